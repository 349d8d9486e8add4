"""Lock that gives a run's folder one writer at a time."""

import errno
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from trxl.errors import ConfigError
from trxl.runs.processes import print_main

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of file systems, or Pythons, without locks."""


class FolderLock:
    """Lock on a run's folder, held until `release` or the end of the process.

    Args:
      folder: existing folder.

    Raises:
      ConfigError: another process holds the lock, or the folder can't be written.
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
        """Releases the lock, and removes its file."""
        with suppress(OSError):  # on Windows the release removes the file
            self._path.unlink()
        self._lock.release()
