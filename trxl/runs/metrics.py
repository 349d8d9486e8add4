"""A run's metrics on the disk while it goes, a line per update."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from trxl.errors import ConfigError


class CurveFile:
    """A seed's metrics on the disk, `<seed>_metrics.jsonl`: a line per update, as the run goes.

    Lines that can't be written, on a full disk say, wait in memory until they can.

    Args:
      folder: of the run.
      seed: whose metrics.
      updates: how many of the lines that are there to go on from.

    Raises:
      ConfigError: there are fewer, or they can't be read.
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
        """Removes the lines behind those to go on from."""
        self._file.truncate(self._length)
        self._file.seek(self._length)

    def append(self, metrics: dict[str, Any]) -> None:
        """Adds an update's metrics, {name: number}.

        Raises:
          OSError: the line can't be written yet; it waits.
        """
        # float32 has an exact double, and JSON's decimals read back as the same double.
        line = json.dumps({name: np.asarray(v).item() for name, v in metrics.items()})
        self._waiting += f"{line}\n".encode()
        self._write()

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def sync(self) -> None:
        """Waits until all lines are on the disk.

        Raises:
          OSError: they can't be.
        """
        self._write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _content(self) -> bytes:
        self._file.seek(0)
        return self._file.readall() + self._waiting  # and is at the end again

    def read(self) -> dict[str, np.ndarray]:
        """The whole curve, {name: (updates,)}; whole numbers as integers, others as float32.

        A run that is resumed by another version may get other metrics: NaN stands where an update
        had none of a name.
        """
        rows = [json.loads(line) for line in self._content().splitlines()]
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}
        return {
            name: column.astype(np.float32) if column.dtype == np.float64 else column
            for name, column in columns.items()
        }


def open_unbuffered(path: Path, new: bool = False) -> Any:
    """The file for reading and writing, emptied where it is to be new."""
    return open(path, "w+b" if new else "r+b", buffering=0)


def whole_updates(path: Path, steps_per_update: int) -> int:
    """Returns how many updates a run's curve has, complete and in order; 0 without a file."""
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
    except (ValueError, RecursionError):  # cut off by a kill, say, or not UTF-8
        return False
    return line.endswith(b"\n") and isinstance(row, dict) and row.get("env_steps") == env_steps
