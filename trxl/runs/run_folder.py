"""Folder of a run: checkpoints and metrics, written while it trains."""

import time
from collections.abc import Iterable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

from trxl.config import num_updates
from trxl.errors import ConfigError, explained
from trxl.rollout import Metrics
from trxl.runs.checkpoints import Checkpoints, kept_of, restored_state
from trxl.runs.compiled import Program
from trxl.runs.divergence import (
    Divergence,
    NotFiniteError,
    read_divergences,
    save_divergences,
    what_is_not_finite,
)
from trxl.runs.lock import FolderLock
from trxl.runs.metrics import CurveFile, whole_updates
from trxl.runs.outputs import discard, fresh_folder, missing_folders, results_root
from trxl.runs.processes import (
    broadcast,
    check_shared,
    is_main,
    largest,
    print_main,
    run_on_all,
    warn_main,
)
from trxl.runs.saved_config import as_saved, save_run_config
from trxl.runs.tracking import NoTracker, make_tracker
from trxl.training import Algorithm, RunnerState

RETRY_SECONDS = 30
"""Seconds after a disk error until writing is retried."""


class RunFolder:
    """Folder of a run, with its checkpoints and metrics.

    Disk errors don't stop a run: they are reported once and writing is retried. `diverged` has the
    diverged seeds.

    Args:
      config: checked; with RESUME the folder is that run's, else a new one.
      algorithm: algorithm that trains.
      seeds: seeds of the run.

    Raises:
      ConfigError: the folder can't be written, another process writes to it, it has nothing to
        resume, or the config can't be saved.
    """

    def __init__(self, config: dict[str, Any], algorithm: Algorithm, seeds: list[int]):
        as_saved(config)
        self.resumed = config["RESUME"] is not None
        self.updates = 0
        self._config = config
        self._algorithm = algorithm
        self._seeds = seeds
        self._trouble = False  # whether the disk failed since the last checkpoint
        self._retry_at: float | None = None  # when to retry a failed checkpoint
        self._lock = None
        self._made = missing_folders(results_root(config))
        self.folder = Path(config["RESUME"] or broadcast(self._make_folder))
        self._checkpoints = Checkpoints(self.folder, config["KEEP_CHECKPOINTS"])
        try:
            check_shared(self.folder)
            self._lock = run_on_all(lambda: FolderLock(self.folder) if is_main() else None)
            if self.resumed:
                self.updates = int(broadcast(lambda: str(self._start())))
            self.diverged = read_divergences(self.folder, self.updates)
            self._tracker, self._curves = run_on_all(self._open_files)
        except Exception:
            self._release()
            raise

    def _make_folder(self) -> str:
        return str(fresh_folder(self._config, self._algorithm.name))

    def _start(self) -> int:
        """Returns the number of updates of the newest checkpoint.

        Raises:
          ConfigError: there is no checkpoint, its metrics are incomplete, or the run is finished.
        """
        start = self.newest_checkpoint()
        if not start:
            raise ConfigError(f"RESUME: {self.folder} has no whole checkpoint to go on from")
        for seed in self._seeds:
            path = self.folder / f"{seed}_metrics.jsonl"
            whole = whole_updates(path, self._config["NUM_STEPS"] * self._config["NUM_ENVS"])
            if whole < start:
                raise ConfigError(
                    f"RESUME: line {whole + 1} of {path} is missing or corrupt; move the"
                    f" checkpoints after update {whole} in {self._checkpoints.root} away to go on"
                    " from the one before"
                )
        total = num_updates(self._config)
        whole_seeds = set(self._seeds) - read_divergences(self.folder, start).keys()
        saved = all((self.folder / f"{seed}_params.npy").exists() for seed in whole_seeds)
        if start > total or (start == total and saved):
            raise ConfigError(
                f"RESUME: {self.folder} has done its {start} updates; set a larger"
                " TOTAL_TIMESTEPS to go on"
            )
        return start

    def _open_files(self) -> tuple[NoTracker, list[CurveFile]]:
        if not is_main():
            return NoTracker(), []
        with ExitStack() as opened:
            curves = [
                opened.enter_context(closing(CurveFile(self.folder, seed, self.updates)))
                for seed in self._seeds
            ]
            # Last, so that no later failure leaves a started tracker.
            tracker = make_tracker(self._config, self.folder, self._seeds)
            opened.pop_all()
        return tracker, curves

    def first_state(self, program: Program) -> RunnerState:
        """Returns the first state of a new or resumed run, and writes the run's config.

        Raises:
          ConfigError: the folder can't be written, or the checkpoint is broken or of another run.
            In the latter case the folder is not changed.
        """
        state = run_on_all(lambda: self._restored(program)) if self.resumed else program.init()
        run_on_all(self._write_beginning)
        return state

    def _restored(self, program: Program) -> RunnerState:
        print_main(f"going on after update {self.updates} of {self.folder}")
        for line in self.divergences(self.diverged):
            print_main(line)
        return restored_state(self._checkpoints, self.updates, program)

    def newest_checkpoint(self) -> int:
        """Returns the number of updates of the newest checkpoint, 0 if there is none."""
        return self._checkpoints.newest()

    def _write_beginning(self) -> None:
        try:
            if is_main():
                for curve in self._curves:
                    curve.cut_off()
                save_run_config(self.folder, {**self._config, "ALGORITHM": self._algorithm.name})
                save_divergences(self.folder, self.diverged)
        except OSError as error:
            raise ConfigError(
                f"can't write to {self.folder}: {error.strerror}; set RESULTS_DIR to a folder with"
                " more space"
            ) from error

    def append(self, metrics: list[Metrics]) -> None:
        """Writes an update's metrics, one dict per seed, and marks seeds that diverged.

        Raises:
          NotFiniteError: all seeds have diverged.
        """
        self.updates += 1
        self._tracker.log(metrics)
        try:
            for curve, one_seed in zip(self._curves, metrics, strict=False):  # only in process 0
                curve.append(one_seed)
        except OSError as error:
            self._tell_trouble(error)
        must_be_finite = self._algorithm.must_be_finite
        broken = {
            seed: Divergence(what, self.updates)
            for seed, one_seed in zip(self._seeds, metrics, strict=True)
            if seed not in self.diverged and (what := what_is_not_finite(one_seed, must_be_finite))
        }
        if broken:
            self._mark_diverged(broken)

    def _mark_diverged(self, broken: dict[int, Divergence]) -> None:
        """Marks seeds as diverged; raises NotFiniteError if all are."""
        self.diverged |= broken
        if len(self.diverged) == len(self._seeds):
            # Not saved, since a resumed run starts before the divergence.
            newest = self.newest_checkpoint()
            kept = f"the checkpoint of update {newest} is kept" if newest else "no checkpoint yet"
            lines = "\n".join(self.divergences(self._seeds))
            raise NotFiniteError(f"{lines}; {kept} in {self.folder}")
        for line in self.divergences(broken):
            warn_main(f"{line}; the other seeds go on")

    def divergences(self, seeds: Iterable[int]) -> list[str]:
        """Returns a line for each of these diverged seeds."""
        several = len(self._seeds) > 1
        return [
            f"{f'seed {seed}: ' if several else ''}{mark.what} after update {mark.update}"
            for seed, mark in ((seed, self.diverged[seed]) for seed in seeds)
        ]

    def save_checkpoint(self, program: Program, state: RunnerState) -> None:
        """Writes a checkpoint of this update, after syncing the metrics up to it."""
        kept = kept_of(state, self._config["CHECKPOINT_KIND"])
        try:
            run_on_all(self._sync, OSError)
            run_on_all(lambda: self._checkpoints.save(self.updates, kept), OSError)
        except OSError as error:
            self._tell_trouble(error)
            self._retry_at = time.monotonic() + RETRY_SECONDS
        else:
            if self._trouble:
                warn_main(f"the checkpoint of update {self.updates} is in {self.folder} now")
            self._trouble, self._retry_at = False, None

    def explain(self, error: Exception) -> str:
        """Explains an error that ended the run, and says how to resume, in one line."""
        newest = self.newest_checkpoint()
        resume = f"RESUME={self.folder} goes on from update {newest}" if newest else ""
        progress = f"after update {self.updates}" if self.updates else ""
        return explained(error, self.folder if self.updates else None, progress, resume)

    def _sync(self) -> None:
        """Syncs the metrics, and the marks of diverged seeds, to the disk."""
        if is_main():
            for curve in self._curves:
                curve.sync()
            save_divergences(self.folder, self.diverged)

    def owes_checkpoint(self) -> bool:
        """Returns whether it is time to retry a failed checkpoint."""
        return self._retry_at is not None and bool(largest(time.monotonic() > self._retry_at))

    def save_last(self, program: Program, state: RunnerState) -> None:
        """Writes a checkpoint of the last update, retrying until the disk has room."""
        self.save_checkpoint(program, state)
        if self._retry_at is not None:
            warn_main(f"the run is done; waiting for room in {self.folder}")
        while self._retry_at is not None:
            time.sleep(RETRY_SECONDS)
            self.save_checkpoint(program, state)

    def _tell_trouble(self, error: OSError) -> None:
        """Reports a disk error, once until the next checkpoint."""
        if not self._trouble:
            warn_main(
                f"can't write to {self.folder}: {reason(error)}; the run goes on in memory and"
                f" tries again every {RETRY_SECONDS} s"
            )
        self._trouble = True

    def close(self) -> None:
        """Closes tracker and files; removes the folder if the run did nothing."""
        self._tracker.close()
        for curve in self._curves:
            curve.close()
        self._release()

    def _release(self) -> None:
        if self._lock:
            self._lock.release()  # first, since Windows can't remove open files
        self.discard_if_empty()

    def curves(self) -> list[dict[str, np.ndarray]]:
        """Returns each seed's metrics of the whole run, {name: (updates,)}."""
        return [curve.read() for curve in self._curves]

    def discard_if_empty(self) -> None:
        """Removes the folder, and parents made for it, if no update was done yet."""
        if is_main() and not self.resumed and not self.updates:
            discard(self.folder, self._made)


def reason(error: Exception) -> str:
    """Returns the reason of an error in a few words."""
    return getattr(error, "strerror", None) or str(error)
