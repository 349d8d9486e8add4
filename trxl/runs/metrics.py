"""Metrics of a running run on the disk, a line per update."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from trxl.errors import ConfigError


class CurveFile:
    """File of a seed's metrics, `<seed>_metrics.jsonl`, with a line per update.

    Lines that can't be written, such as on a full disk, are buffered.

    Args:
      folder: the run's folder.
      seed: the seed.
      updates: number of existing lines to continue from.

    Raises:
      ConfigError: there are fewer lines, or the file can't be read.
    """

    def __init__(self, folder: Path, seed: int, updates: int):
        self._path = folder / f"{seed}_metrics.jsonl"
        self._waiting = b""
        try:
            self._file = open_unbuffered(self._path, new=not updates)
            lines = self._file.readall().splitlines(keepends=True)[:updates]
        except OSError as error:  # a process may open some hundreds of files
            cure = "; lower NUM_SEEDS" if error.errno == errno.EMFILE else ""
            raise ConfigError(f"{self._path}: {error.strerror}{cure}") from error
        if len(lines) < updates:
            raise ConfigError(f"{self._path} has {len(lines)} lines, not one for each update")
        self._length = sum(map(len, lines))

    def cut_off(self) -> None:
        """Removes the lines after the first `updates`."""
        self._file.truncate(self._length)
        self._file.seek(self._length)

    def append(self, metrics: dict[str, Any]) -> None:
        """Adds an update's metrics, {name: number}.

        Raises:
          OSError: the line can't be written; it is buffered.
        """
        # JSON is lossless here: float32 is exact as double, and its decimals read back exactly.
        line = json.dumps({name: np.asarray(v).item() for name, v in metrics.items()})
        self._waiting += f"{line}\n".encode()
        self._write()

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def sync(self) -> None:
        """Writes buffered lines, and syncs the file to the disk.

        Raises:
          OSError: writing fails.
        """
        self._write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _content(self) -> bytes:
        self._file.seek(0)
        return self._file.readall() + self._waiting  # the position is at the end again

    def read(self) -> dict[str, np.ndarray]:
        """Reads all metrics, {name: (updates,)}, as integers or float32.

        Metrics missing in an update, as after a resume by another version, are NaN.
        """
        rows = [json.loads(line) for line in self._content().splitlines()]
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}
        return {
            name: column.astype(np.float32) if column.dtype == np.float64 else column
            for name, column in columns.items()
        }


def open_unbuffered(path: Path, new: bool = False) -> Any:
    """Opens a file for reading and writing; truncates it if new."""
    return open(path, "w+b" if new else "r+b", buffering=0)


def whole_updates(path: Path, steps_per_update: int) -> int:
    """Returns the number of complete updates, in order, in a file of metrics; 0 without a file."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError:
        return 0
    for updates, line in enumerate(lines):
        if not is_metrics(line, (updates + 1) * steps_per_update):
            return updates
    return len(lines)


def is_metrics(line: bytes, env_steps: int) -> bool:
    """Returns whether a line holds the metrics of the update that ended after `env_steps`."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # truncated by a kill, or not UTF-8
        return False
    return line.endswith(b"\n") and isinstance(row, dict) and row.get("env_steps") == env_steps
