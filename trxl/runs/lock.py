"""A run's folder has one writer at a time."""

import errno
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from trxl.errors import ConfigError
from trxl.runs.processes import print_main

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of a file system, or of a Python, that has no locks."""


class FolderLock:
    """The right to write to a run's folder, until `release` or the end of the process.

    Args:
      folder: that exists.

    Raises:
      ConfigError: another process has it, or the folder can't be written.
    """

    def __init__(self, folder: Path):
        self._path = folder / "lock"
        # A soft lock would outlive a killed process.
        self._lock = FileLock(self._path, timeout=0, fallback_to_soft=False)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ConfigError(
                f"another process writes to {folder}; wait for its end, or stop it first"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise ConfigError(f"can't write to {folder}: {error.strerror}") from error
            print_main(f"no locks here ({error.strerror}): don't start a run twice")

    def release(self) -> None:
        """Gives it back; the file goes."""
        with suppress(OSError):  # Windows removes it later, with the release
            self._path.unlink()
        self._lock.release()
