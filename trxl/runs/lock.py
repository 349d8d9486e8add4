"""A run's folder has one writer at a time."""

import fcntl
import io
import os
import socket
from contextlib import suppress
from pathlib import Path

from trxl.errors import ConfigError
from trxl.runs.processes import print_main


class FolderLock:
    """The right to write to a run's folder, until `release` or the end of the process.

    It is a POSIX record lock on the folder's file `lock`: it dies with its process, and holds over
    NFS too. The file says who has it.

    Args:
      folder: that exists.

    Raises:
      ConfigError: another process has it, or the folder can't be written.
    """

    def __init__(self, folder: Path):
        self._path = folder / "lock"
        self._file = self._take()

    def _take(self) -> io.FileIO:
        while True:
            try:
                file = open(self._path, "a+b", buffering=0)  # noqa: SIM115, as long as the run
            except OSError as error:
                raise ConfigError(
                    f"can't write to {self._path.parent}: {error.strerror}"
                ) from error
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                with file:
                    holder = file_text(file) or "a run"
                raise ConfigError(
                    f"{self._path.parent} is being written to by {holder}; wait for its end, or"
                    " stop it first"
                ) from error
            except OSError as error:
                print_main(
                    f"no locks on this file system ({error.strerror}): don't start a run twice"
                )
            if is_same_file(file.fileno(), self._path):
                break
            file.close()  # its last holder removed it meanwhile
        with suppress(OSError):  # of a full disk: then it says nothing of who has it
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        return file

    def release(self) -> None:
        """Gives it back; the file goes."""
        if is_same_file(self._file.fileno(), self._path):
            with suppress(OSError):  # of a folder that may not be changed any more
                self._path.unlink()
        self._file.close()


def file_text(file: io.FileIO) -> str:
    """Returns the text of a short file."""
    return os.pread(file.fileno(), 200, 0).decode(errors="replace")


def is_same_file(descriptor: int, path: Path) -> bool:
    """Returns whether an open file still has this name."""
    try:
        there = os.stat(path)
    except OSError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))
