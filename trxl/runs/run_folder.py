"""What a run leaves on the disk while it goes: its folder, checkpoints and curves."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trxl.config import num_updates
from trxl.errors import ConfigError, first_line
from trxl.rollout import Metrics
from trxl.runs.checkpoints import LearnerCheckpoints, States, save_learner
from trxl.runs.compiled import Program
from trxl.runs.divergence import (
    Divergence,
    discard_copies,
    keep_copy,
    read_divergences,
    save_divergences,
)
from trxl.runs.lock import FolderLock
from trxl.runs.metrics import CurveFile, whole_updates
from trxl.runs.outputs import fresh_folder, results_root
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
from trxl.training import INPUTS, Algorithm, RunnerState

RETRY_SECONDS = 30
"""How long a run waits after a disk failed until it tries again."""


class NotFiniteError(Exception):
    """A loss or a parameter is infinite or not a number; a line for each seed that has it."""


class Record:
    """What a run leaves on the disk while it goes: its folder, checkpoints, and curves.

    `diverged` has the seeds whose agent broke while others' went on. A run outlives its disk: what
    can't be written is told once, and written as soon as there is a place for it. Of several
    processes all write a checkpoint or none.

    Args:
      config: checked; with RESUME the folder is that run's, else a fresh one.
      algorithm: that trains.
      seeds: of the run.

    Raises:
      ConfigError: the folder can't be written, another process writes to it, there is nothing to
        resume in it, or the config can't be saved.
    """

    def __init__(self, config: dict[str, Any], algorithm: Algorithm, seeds: list[int]):
        as_saved(config)
        self.resumed = config["RESUME"] is not None
        self.updates = 0
        self._config = config
        self._algorithm = algorithm
        self._seeds = seeds
        self._trouble = ""  # what keeps this process from the disk
        self._owed = False  # whether a checkpoint could not be written, in all processes alike
        self._retry_at = 0.0
        self._lock = None
        root = results_root(config)
        self._made = [path for path in (root, *root.parents) if not os.path.exists(path)]
        self.folder = Path(config["RESUME"] or broadcast(lambda: str(fresh_folder(config))))
        try:
            check_shared(self.folder)
            self._lock = run_on_all(lambda: FolderLock(self.folder) if is_main() else None)
            self._states = States(self.folder, config["KEEP_CHECKPOINTS"])
            if self.resumed:
                self.updates = int(broadcast(lambda: str(self._start())))
            self.diverged = read_divergences(self.folder, self.updates)
            self._tracker, self._curves = run_on_all(self._open_files)
        except Exception:
            self._release()
            raise

    def _start(self) -> int:
        """After how many updates the newest checkpoint was taken whose curve is whole.

        Raises:
          ConfigError: there is none, or nothing left to do.
        """
        newest = self._states.newest()
        if not newest:
            raise ConfigError(f"RESUME: {self.folder} has no whole checkpoint to go on from")
        steps = self._config["NUM_STEPS"] * self._config["NUM_ENVS"]
        curves = [self.folder / f"{seed}_metrics.jsonl" for seed in self._seeds]
        whole = {path: whole_updates(path, steps) for path in curves}
        shortest = min(whole, key=lambda path: whole[path])
        start = max((n for n in self._states.all() if n <= whole[shortest]), default=0)
        if start < newest:
            broken = f"line {whole[shortest] + 1} of {shortest} is missing or corrupt"
            if not start:
                raise ConfigError(f"RESUME: {broken}, and no checkpoint is from before it")
            print_main(
                f"{broken}: checkpoints after update {start} are moved to {self.folder / 'aside'}"
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
            # Last: nothing that fails after it leaves it started.
            tracker = make_tracker(self._config, self.folder, self._seeds)
            opened.pop_all()
        return tracker, curves

    def first_state(self, program: Program) -> RunnerState:
        """The state that the run starts or goes on from; says so.

        Raises:
          ConfigError: the checkpoint is broken or of another run, and the folder is left as it was;
            or the folder can't be written.
        """
        state = run_on_all(lambda: self._restored(program)) if self.resumed else program.init()
        run_on_all(self._write_beginning)
        if self.resumed:
            self._states.reload()
        return state

    def _restored(self, program: Program) -> RunnerState:
        print_main(f"going on after update {self.updates} of {self.folder}")
        for line in self.divergences(self.diverged):
            print_main(line)
        return self._states.restore(self.updates, program)

    def newest_checkpoint(self) -> int:
        """After how many updates the newest checkpoint was taken, 0 if there is none."""
        return self._states.newest()

    def _write_beginning(self) -> None:
        try:
            if is_main():
                for curve in self._curves:
                    curve.cut_off()
                self._states.set_aside_after(self.updates)
                self._describe(self.folder)
                discard_copies(self.folder, but=self.diverged)
        except OSError as error:
            raise ConfigError(
                f"can't write to {self.folder}: {error.strerror}; set RESULTS_DIR to a folder with"
                " more space"
            ) from error

    def _describe(self, folder: Path) -> None:
        """Writes what a run is, beside its states."""
        save_run_config(folder, {**self._config, "ALGORITHM": self._algorithm.name})
        save_divergences(folder, self.diverged)

    def append(self, metrics: list[Metrics]) -> None:
        """Notes an update's metrics, one dict per seed, and which seeds it broke.

        Raises:
          NotFiniteError: no seed has a whole agent any more.
        """
        self.updates += 1
        self._tracker.log(metrics)
        with self._tolerate_disk_errors():
            for curve, one_seed in zip(self._curves, metrics, strict=False):  # in process 0 alone
                curve.append(one_seed)
        must_be_finite = self._algorithm.must_be_finite
        broken = {
            seed: what
            for seed, one_seed in zip(self._seeds, metrics, strict=True)
            if seed not in self.diverged and (what := what_is_not_finite(one_seed, must_be_finite))
        }
        if broken:
            self._mark_diverged(broken)

    def _mark_diverged(self, broken: dict[int, str]) -> None:
        """Marks seeds as diverged, {seed: what shows it}, and keeps the last checkpoint before."""
        newest = self._states.newest() or None
        for seed, what in broken.items():
            self.diverged[seed] = Divergence(what, self.updates, newest)
        if len(self.diverged) == len(self._seeds):
            # These marks are not saved, since a resumed run starts before them.
            raise NotFiniteError("\n".join(self.divergences(self._seeds)))
        with self._tolerate_disk_errors():
            if newest:
                for seed in broken:
                    keep_copy(self._states.newest_folder(), seed)
            save_divergences(self.folder, self.diverged)
        for line in self.divergences(broken):
            warn_main(f"{line}; the other seeds go on")

    def divergences(self, seeds: Iterable[int]) -> list[str]:
        """A line for each of these seeds, which diverged."""
        lines = []
        for seed in seeds:
            mark, copy = self.diverged[seed], self.folder / f"diverged_{seed}"
            kept = "no checkpoint yet in"
            if mark.checkpoint:
                kept = f"the checkpoint of update {mark.checkpoint} is kept in"
            which = f"seed {seed}: " if len(self._seeds) > 1 else ""
            where = copy if copy.exists() else self.folder
            lines.append(f"{which}{mark.what} after update {mark.update}; {kept} {where}")
        return lines

    def save_checkpoint(self, program: Program, state: RunnerState) -> None:
        """Writes the state of this update, and makes sure of the curve up to it before."""
        self._owed = True
        with self._tolerate_disk_errors():
            run_on_all(self._prepare_folder, OSError)
            if largest(bool(self._trouble) or not self._states.has_place()):
                self._states.reload()
            run_on_all(lambda: self._save_state(self._states, program, state), OSError)
            if self._trouble:
                warn_main(f"the checkpoint of update {self.updates} is in {self.folder} now")
            self._owed, self._trouble = False, ""

    def _prepare_folder(self) -> None:
        """Makes what is missing of the folder, and brings the curves up to date."""
        if not is_main():
            return
        if not (self.folder / "run.json").exists():  # somebody removed it
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._lock:
                self._lock.renew()
            self._describe(self.folder)
        self._states.make_place()
        for curve in self._curves:
            curve.sync()

    def owes_checkpoint(self) -> bool:
        """Whether one could not be written, and it is time to try again."""
        return self._owed and bool(largest(time.monotonic() > self._retry_at))

    def save_last(self, program: Program, state: RunnerState) -> None:
        """Writes the last state, in a temporary folder where the run's own can't have it.

        `folder` is that one then. Where none has room this waits until one has. The temporary
        folder of several processes is process 0's alone, so it has a learner-only checkpoint.
        """
        self.save_checkpoint(program, state)
        while self._owed:
            try:
                run_on_all(lambda: self._save_elsewhere(program, state), OSError)
            except OSError as error:
                warn_main(
                    f"nor in {tempfile.gettempdir()}: {reason(error)}; waiting for room in either"
                )
                time.sleep(RETRY_SECONDS)
                self.save_checkpoint(program, state)
            else:
                warn_main(f"the run is saved in {self.folder} instead")
                self._owed, self._trouble = False, ""

    def _save_elsewhere(self, program: Program, state: RunnerState) -> None:
        """Writes the run to a temporary folder, which is its `folder` from then on.

        Raises:
          OSError: there is no room either.
        """
        if not is_main():
            return
        elsewhere = Path(tempfile.mkdtemp(prefix=f"{self.folder.name}_"))
        try:
            self._describe(elsewhere)
            for seed, curve in zip(self._seeds, self._curves, strict=True):
                curve.copy_to(elsewhere / f"{seed}_metrics.jsonl")
            if jax.process_count() == 1:
                self._save_state(States(elsewhere, 1), program, state)
            else:
                save_learner(LearnerCheckpoints(elsewhere, 1), self.updates, program, state)
        except Exception as error:  # of the file system, whatever it is called
            shutil.rmtree(elsewhere, ignore_errors=True)
            raise OSError(reason(error)) from error
        self.folder = elsewhere

    def _save_state(self, states: States, program: Program, state: RunnerState) -> None:
        states.save(self.updates, self._config["CHECKPOINT_KIND"], program, state)

    @contextmanager
    def _tolerate_disk_errors(self) -> Iterator[None]:
        """Tells once of what fails there, and notes when to try again."""
        try:
            yield
        except (ConfigError, OSError) as error:
            if not self._trouble:
                warn_main(
                    f"can't write to {self.folder}: {reason(error)}; the run goes on in memory and"
                    f" tries again every {RETRY_SECONDS} s"
                )
            self._trouble = reason(error)
            self._retry_at = time.monotonic() + RETRY_SECONDS

    def close(self) -> None:
        """Ends the live metrics and closes the files; nothing stays of a run that did nothing."""
        self._tracker.close()
        for curve in self._curves:
            curve.close()
        self._release()

    def _release(self) -> None:
        self.discard_if_empty()
        if self._lock:
            self._lock.release()

    def curves(self) -> list[dict[str, np.ndarray]]:
        """For each seed the metrics of the whole run, {name: (updates,)}."""
        return [curve.read() for curve in self._curves]

    def discard_if_empty(self) -> None:
        """Removes the folder of a run that has not done anything yet, with what it was made in."""
        if is_main() and not self.resumed and not self.updates:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # another run's folder may be in one
                for folder in self._made:
                    folder.rmdir()


def what_is_not_finite(metrics: Metrics, must_be_finite: Iterable[str]) -> str | None:
    """Which metric shows that the update broke the agent, with its value; None if none does."""
    for name in (*INPUTS, *must_be_finite):
        if not np.isfinite(metrics[name]):
            return f"{INPUTS.get(name, name)} is {metrics[name]}"
    return None


def reason(error: Exception) -> str:
    """What went wrong, in a few words."""
    return first_line(str(getattr(error, "strerror", None) or error))
