"""What a search leaves on the disk while it goes, so that it can go on after a kill."""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from trxl.environments import resolve_name
from trxl.errors import ConfigError, shortened
from trxl.runs.checkpoints import FullCheckpoints
from trxl.runs.compiled import with_sharding
from trxl.runs.lock import FolderLock
from trxl.runs.metrics import CurveFile
from trxl.runs.outputs import fresh_folder, write_whole
from trxl.runs.processes import warn_main
from trxl.runs.run_folder import RETRY_SECONDS, reason
from trxl.runs.saved_config import as_saved
from trxl.search.population import host_device
from trxl.search.strategies import Scores
from trxl.search.trials import Trial, from_line, plain, save_trials
from trxl.training import RunnerState

SAVE_SECONDS = 60
"""How long a search trains at least between two checkpoints."""


class SearchFolder:
    """A search's folder: `search.json`, what was asked for, and its numbered checkpoints.

    A disk that fails is told of once, and outlived. `number` is the newest checkpoint's.

    Args:
      folder: that exists.
      asked: what was asked for, see `search_trXL.py`.
      resumed: whether a search goes on here.

    Raises:
      ConfigError: another process writes there, or it can't be written or read.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any], resumed: bool):
        self.folder = folder
        self.number = 0
        self._resumed = resumed
        self._saved_at = time.monotonic()
        self._trouble = ""
        self._lock = FolderLock(folder)
        try:
            self._checkpoints = FullCheckpoints(folder, keep=2)
            if not resumed:
                text = json.dumps(as_saved(dict(asked)), indent=1)
                write_whole(folder / "search.json", lambda file: file.write(text.encode()))
            self._open()
        except OSError as error:
            self._lock.release()
            raise ConfigError(f"can't write to {folder}: {error.strerror}") from error
        except ConfigError:
            self._lock.release()
            raise

    def _open(self) -> None:
        """What else there is, and the `number` to go on from."""

    def is_time(self) -> bool:
        """Whether the last checkpoint was long enough ago."""
        pause = RETRY_SECONDS if self._trouble else SAVE_SECONDS
        return time.monotonic() - self._saved_at > pause

    @contextmanager
    def _tolerate_disk_errors(self) -> Iterator[None]:
        self._saved_at = time.monotonic()
        try:
            yield
        except OSError as error:
            if not self._trouble:
                warn_main(
                    f"can't write to {self.folder}: {reason(error)}; the search goes on in memory"
                    f" and tries again every {RETRY_SECONDS} s"
                )
            self._trouble = reason(error)
        else:
            self._trouble = ""

    def close(self) -> None:
        """Gives the folder back; nothing stays of a search that did nothing."""
        self.discard_if_empty()
        self._lock.release()

    def discard_if_empty(self) -> None:
        """Removes the folder of a search that has no checkpoint yet."""
        if not self._resumed and not self.number:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # another's folder may be in it
                self.folder.parent.rmdir()


class SearchRecord(SearchFolder):
    """The folder of a search of hyperparameters, with `trials.jsonl`.

    A checkpoint is the agents of all members that may go on; `notes/<number>.json` has all that was
    noted up to it: scores of finished rounds, and the trials.
    """

    def _open(self) -> None:
        self.trials: dict[int, Trial] = {}
        self.history: list[Scores] = []
        self._groups: list[list[int]] = []
        self._notes = self.folder / "notes"
        self._notes.mkdir(exist_ok=True)
        noted = [n for n in self._checkpoints.all() if (self._notes / f"{n}.json").exists()]
        self.number = max(noted, default=0)
        if self.number:
            self._read_notes(self._notes / f"{self.number}.json")

    def _read_notes(self, path: Path) -> None:
        try:
            notes = json.loads(path.read_text())
            trials = [from_line(json.dumps(row)) for row in notes["trials"]]
            self.history = [
                {int(trial): -float("inf") if x is None else x for trial, x in scores.items()}
                for scores in notes["history"]
            ]
            self._groups = notes["groups"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"RESUME: {path} is broken: {error}") from error
        self.trials = {trial.trial: trial for trial in trials}

    def groups(self) -> list[list[int]]:
        """Which trials' agents the newest checkpoint has, those of one program together."""
        return self._groups

    def restore(self, groups: Mapping[tuple, Any]) -> dict[int, RunnerState]:
        """The agents of the newest checkpoint by their trial.

        Args:
          groups: {the trials of a group: its `Programs`, and the rows}.

        Raises:
          ConfigError: it is broken.
        """
        shapes = {
            str(i): on_host(programs.shapes(rows))
            for i, (programs, rows) in enumerate(groups.values())
        }
        states = self._checkpoints.restore(self.number, shapes)
        found: dict[int, RunnerState] = {}
        for i, trials in enumerate(groups):
            lengths = [len(self.trials[trial].seeds) for trial in trials]
            found |= cut(states[str(i)], lengths, list(trials))
        return found

    def save(self, states: Mapping[int, RunnerState], groups: list[list[int]]) -> None:
        """Writes a checkpoint, and the trials.

        Args:
          groups: the trials of which there are states, those of one program together.
        """
        number = self.number + 1
        notes = {
            "history": [{t: plain(x) for t, x in scores.items()} for scores in self.history],
            "trials": [json.loads(trial.as_line()) for trial in self.trials.values()],
            "groups": groups,
        }
        with self._tolerate_disk_errors():
            text = json.dumps(notes).encode()
            write_whole(self._notes / f"{number}.json", lambda file: file.write(text))
            tree = {str(i): joined([states[t] for t in one]) for i, one in enumerate(groups)}
            self._checkpoints.save(number, tree)
            save_trials(self.folder / "trials.jsonl", self.trials.values())
            for old in self._notes.glob("*.json"):
                if int(old.stem) not in (number, self.number):
                    old.unlink()
            self.number = number


class EvolutionRecord(SearchFolder):
    """The folder of an evolution: a checkpoint's number is how many generations there were.

    `<seed>_metrics.jsonl` has a line for each.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any], resumed: bool, seed: int):
        self._seed = seed
        super().__init__(folder, asked, resumed)

    def _open(self) -> None:
        self.number = self._checkpoints.newest()
        self.generations = self.number
        self._curve = CurveFile(self.folder, self._seed, self.number)
        self._curve.cut_off()

    def restore(self, first: Any) -> Any:
        """What the newest checkpoint has; `first` if there is none.

        Raises:
          ConfigError: it is broken.
        """
        if not self.number:
            return first
        shapes = on_host(jax.eval_shape(lambda: first))
        state = jax.device_get(self._checkpoints.restore(self.number, shapes))
        return jax.tree.map(jnp.asarray, state)  # on no device in particular

    def note(self, metrics: dict[str, Any]) -> None:
        """Notes a generation's metrics."""
        self.generations += 1
        with suppress(OSError):  # the line waits for the next
            self._curve.append(metrics)

    def save(self, state: Any) -> None:
        """Writes a checkpoint, and makes sure of the curve before."""
        with self._tolerate_disk_errors():
            self._curve.sync()
            self._checkpoints.save(self.generations, state)
            self.number = self.generations

    def curve(self) -> dict[str, Any]:
        """The metrics of all generations, {name: (generations,)}."""
        return self._curve.read()

    def close(self) -> None:
        """Closes the curve, and gives the folder back."""
        self._curve.close()
        super().close()


def fresh_search_folder(config: dict[str, Any]) -> Path:
    """Makes a search's folder, beside those of runs.

    Raises:
      ConfigError: it can't be made.
    """
    suite, _ = resolve_name(config["ENV_NAME"])
    return fresh_folder({**config, "RESULTS_DIR": config["RESULTS_DIR"] or f"runs/search_{suite}"})


def read_asked(folder: Path) -> dict[str, Any]:
    """What a search was asked for.

    Raises:
      ConfigError: there is none in the folder.
    """
    path = folder / "search.json"
    try:
        asked = json.loads(path.read_text())
    except OSError as error:
        where = " ".join(str(folder)[:200].split("\n"))
        raise ConfigError(f"RESUME: no search in {where}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"RESUME: {path} is broken: {error}") from error
    if not isinstance(asked, dict):
        raise ConfigError(f"RESUME: {path} is broken: it holds {shortened(asked)}")
    return asked


def on_host(shapes: Any) -> Any:
    """A tree of `jax.ShapeDtypeStruct`, placed where agents wait that don't train."""
    return with_sharding(shapes, SingleDeviceSharding(host_device()))


def joined(states: list[RunnerState]) -> RunnerState:
    """Rows of many members behind each other."""
    with jax.default_device(host_device()):
        return jax.tree.map(lambda *x: jnp.concatenate(x), *states)


def cut(state: RunnerState, lengths: list[int], trials: list[int]) -> dict[int, RunnerState]:
    """Undoes `joined`."""
    found: dict[int, RunnerState] = {}
    start = 0
    with jax.default_device(host_device()):
        for trial, length in zip(trials, lengths, strict=True):
            rows = slice(start, start + length)
            found[trial] = jax.tree.map(lambda x, rows=rows: x[rows], state)
            start += length
    return found
