"""Files of a running search: its trials, and checkpoints to resume from."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from trxl.environments import resolve_name
from trxl.errors import ConfigError, RunError, explained
from trxl.runs.checkpoints import Checkpoints
from trxl.runs.interruption import StopOnSignal
from trxl.runs.lock import FolderLock
from trxl.runs.outputs import discard, fresh_folder, missing_folders, results_root, write_whole
from trxl.runs.processes import print_main, warn_main
from trxl.runs.run_folder import RETRY_SECONDS, reason
from trxl.runs.saved_config import as_saved, how_to_go_on, read_json
from trxl.search.population import UpdateResult, host_device

COUNTED = 0.2
"""Share of an agent's updates, the last ones, that its score counts."""


@dataclass
class Trial:
    """Config in training, with one or several seeds, from a fresh agent or a copy."""

    trial: int
    values: dict[str, Any]  # of the searched keys
    seeds: list[int]
    role: str = "search"  # or a candidate of the report
    parent: int | None = None
    first_update: int = 0  # updates of the copied agent
    since: int = 0  # update from which all members of the round trained themselves
    updates: int = 0  # of the agent, including the parent's
    steps_per_update: int = 0
    seconds: float = 0.0  # share of its programs' time
    status: str = "running"  # or stopped, finished, diverged
    returns: list[list[float | None]] = field(default_factory=list)  # (updates, seeds)
    episodes: list[list[int]] = field(default_factory=list)  # (updates, seeds)
    # (2, seeds): number and mean return of running episodes after the last update
    running: list[list[float]] = field(default_factory=list)

    def log_update(self, result: UpdateResult) -> None:
        """Records an update of each seed, fields (seeds,)."""
        self.updates += 1
        self.returns.append([as_json(x) for x in result.returns])
        self.episodes.append(result.episodes.tolist())
        self.running = [result.running.tolist(), result.running_returns.tolist()]
        if not result.finite.all():
            self.status = "diverged"

    @property
    def env_steps(self) -> int:
        """Environment steps of all seeds."""
        return len(self.returns) * self.steps_per_update * len(self.seeds)

    def seed_scores(self) -> list[float]:
        """Returns each seed's mean return over the episodes of the last updates.

        The last `COUNTED` of the agent's updates count, but none before `since`. So a copy and its
        parent are scored over the same updates. Running episodes count with their return so far.
        Without episodes, and after divergence, the score is -inf.
        """
        if self.status == "diverged" or not self.returns:
            return [-math.inf] * len(self.seeds)
        counted = min(round(COUNTED * self.updates), self.updates - self.since)
        last = -max(1, min(counted, len(self.returns)))
        weights = np.array([*self.episodes[last:], self.running[0]], float)
        returns = np.nan_to_num(np.array([*self.returns[last:], self.running[1]], float))
        sums, numbers = (returns * weights).sum(axis=0), weights.sum(axis=0)
        return [float(s / n) if n else -math.inf for s, n in zip(sums, numbers, strict=True)]

    def score(self) -> float:
        """Returns the mean score of the seeds."""
        return float(np.mean(self.seed_scores()))

    def row(self) -> dict[str, Any]:
        """Returns the trial's line in trials.jsonl."""
        return vars(self) | {"score": as_json(self.score()), "env_steps": self.env_steps}


def read_trial(row: Mapping[str, Any]) -> Trial:
    """Inverts `Trial.row`."""
    return Trial(**{one.name: row[one.name] for one in fields(Trial)})


def as_json(x: Any) -> float | None:
    """Returns a number for JSON, None if not finite."""
    return float(x) if math.isfinite(x) else None


SAVE_SECONDS = 60
"""Minimum seconds between two checkpoints."""


class SearchFolder:
    """Folder of a search: settings in `search.json`, numbered checkpoints, and their notes.

    Disk errors don't stop a search: they are reported once and writing is retried.

    Args:
      folder: existing folder.
      asked: settings and searched keys, see `search_trXL.py`.
      resumed: whether the folder's search is resumed.
      made: parents made for this folder, removed with it if the search does nothing.

    Raises:
      ConfigError: another process writes to the folder, or it can't be written or read.
    """

    def __init__(
        self, folder: Path, asked: Mapping[str, Any], resumed: bool, made: Sequence[Path] = ()
    ):
        self.folder = folder
        self.notes: dict[str, Any] = {}  # of the newest checkpoint
        self._number = 0  # of the newest checkpoint
        self._resumed = resumed
        self._made = made
        self._saved_at = time.monotonic()
        self._trouble = ""
        self._lock = FolderLock(folder)
        try:
            self._checkpoints = Checkpoints(folder, keep=2)
            if resumed:
                noted = [n for n in self._checkpoints.all() if self._path(n).exists()]
                self._number = max(noted, default=0)
            else:
                (folder / "notes").mkdir()
                write_json(folder / "search.json", as_saved(dict(asked)), indent=1)
            if self._number:
                self.notes = read_json(self._path(self._number), "search")
        except OSError as error:
            self._lock.release()
            raise ConfigError(f"can't write to {folder}: {error.strerror}") from error
        except ConfigError:
            self._lock.release()
            raise

    def _path(self, number: int) -> Path:
        return self.folder / "notes" / f"{number}.json"

    def is_time(self) -> bool:
        """Returns whether a checkpoint is due."""
        pause = RETRY_SECONDS if self._trouble else SAVE_SECONDS
        return time.monotonic() - self._saved_at > pause

    def save(self, notes: dict[str, Any], state: Any) -> None:
        """Writes a checkpoint with its notes, and `trials.jsonl` if there are any."""
        self._saved_at = time.monotonic()
        number = self._checkpoints.newest() + 1
        lines = "".join(f"{json.dumps(row)}\n" for row in notes.get("trials", [])).encode()
        try:
            if lines:
                write_whole(self.folder / "trials.jsonl", lambda file: file.write(lines))
            write_json(self._path(number), notes)
            self._checkpoints.save(number, state)
            self._number, self._trouble = number, ""
            for old in self._path(0).parent.glob("*.json"):
                if int(old.stem) not in self._checkpoints.all():
                    old.unlink()
        except OSError as error:
            if not self._trouble:
                warn_main(
                    f"can't write to {self.folder}: {reason(error)}; the search goes on in memory"
                    f" and tries again every {RETRY_SECONDS} s"
                )
            self._trouble = reason(error)

    def restore(self, shapes: Any) -> Any:
        """Restores the newest checkpoint's state to host memory.

        Raises:
          ConfigError: the checkpoint is broken.
        """
        host = SingleDeviceSharding(host_device())
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host), shapes
        )
        return self._checkpoints.restore(self._number, placed)

    def explain(self, error: Exception) -> str:
        """Explains an error that ended the search, and says how to resume, in one line."""
        if not self._number:  # `close` removes the folder
            return explained(error)
        return explained(error, self.folder, resume=f"RESUME={self.folder} goes on")

    def close(self) -> None:
        """Releases the folder; removes it if the search did nothing."""
        self._lock.release()  # first, since Windows can't remove open files
        self.discard_if_empty()

    def discard_if_empty(self) -> None:
        """Removes the folder if it has no checkpoint yet."""
        if not self._resumed and not self._number:
            discard(self.folder, self._made)


@contextmanager
def open_folder(
    asked: Mapping[str, Any], config: dict[str, Any], resumed: Path | None, what: str
) -> Iterator[tuple[SearchFolder, StopOnSignal]]:
    """Opens a search's folder until its end or a signal, and prints a summary.

    Args:
      asked: settings and searched keys.
      config: the default config.
      resumed: folder of a search to resume; None for a new one.
      what: summary of the search, one line.

    Raises:
      ConfigError: the folder can't be made, written or read.
      RunError: any other error; the newest checkpoint is kept.
    """
    suite, _ = resolve_name(config["ENV_NAME"])
    in_root = {**config, "RESULTS_DIR": config["RESULTS_DIR"] or f"runs/search_{suite}"}
    made = missing_folders(results_root(in_root))
    path = resumed or fresh_folder(in_root)
    asked = {**asked, "ENV_NAME": config["ENV_NAME"]}
    with StopOnSignal() as stop:
        folder = SearchFolder(path, asked, resumed is not None, made)
        stop.watch(folder)
        print_main(f"{config['ENV_NAME']}: {what}, to {path}")
        stop.training = True
        try:
            yield folder, stop
        except ConfigError:
            raise
        except Exception as error:
            raise RunError(folder.explain(error)) from error
        finally:
            folder.close()
    if stop.signal:
        print_main(how_to_go_on(path, config["ENV_NAME"]))


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Writes a JSON file atomically."""
    text = json.dumps(content, indent=indent).encode()
    write_whole(path, lambda file: file.write(text))
