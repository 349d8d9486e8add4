"""What a run leaves on the disk while it goes: its folder, checkpoints and curves."""

import shutil
import sys
from collections.abc import Iterable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from config import ConfigError, num_updates
from host.checkpoints import (
    CurveFile,
    FullCheckpoints,
    LearnerCheckpoints,
    as_saved,
    save_run_config,
)
from host.divergence import (
    Divergence,
    discard_copies,
    keep_copy,
    read_divergences,
    save_divergences,
)
from host.multihost import check_shared, from_main, in_all, is_main, largest, say
from host.program import Program
from host.results_files import fresh_folder
from host.tracking import NoTracker, make_tracker
from learning import Algorithm, RunnerState, TrainState
from normalization import Moments
from rollout import Metrics


class NotFiniteError(Exception):
    """A loss or a parameter is infinite or not a number; a line for each seed that has it."""


class Record:
    """What a run leaves on the disk while it goes: its folder, checkpoints, and curves.

    `diverged` has the seeds whose agent broke while others' went on.

    Args:
      config: checked; with RESUME the folder is that run's, else a fresh one.
      algorithm: that trains.
      seeds: of the run.

    Raises:
      ConfigError: the folder can't be written, there is nothing to resume in it, or the config
        can't be saved.
    """

    def __init__(self, config: dict[str, Any], algorithm: Algorithm, seeds: list[int]):
        as_saved(config)
        self.resumed = config["RESUME"] is not None
        self.updates = 0
        self._config = config
        self._algorithm = algorithm
        self._seeds = seeds
        self.folder = Path(config["RESUME"] or from_main(lambda: str(fresh_folder(config))))
        try:
            check_shared(self.folder)
            self._full = FullCheckpoints(self.folder, config["KEEP_CHECKPOINTS"])
            self._learner = LearnerCheckpoints(self.folder, config["KEEP_CHECKPOINTS"])
            self.updates = largest(self.newest_checkpoint())
            self._check_updates()
            self.diverged = read_divergences(self.folder, self.updates)
            self._tracker, self._curves = in_all(self._open_files)
        except Exception:
            self.discard_if_empty()
            raise

    def _check_updates(self) -> None:
        if self.resumed and not self.updates:
            raise ConfigError(f"RESUME: {self.folder} has no whole checkpoint to go on from")
        if self.updates >= num_updates(self._config):
            raise ConfigError(
                f"RESUME: {self.folder} has done its {self.updates} updates; set a larger"
                " TOTAL_TIMESTEPS to go on"
            )

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

    def newest_checkpoint(self) -> int:
        """After how many updates the newest checkpoint was taken, 0 if there is none."""
        return max(self._full.newest() or 0, self._learner.newest() or 0)

    def _newest_folder(self) -> Path:
        newest = self.newest_checkpoint()
        kind = self._full if self._full.newest() == newest else self._learner
        return kind.root / str(newest)

    def first_state(self, program: Program) -> RunnerState:
        """The state that the run starts or goes on from; says so.

        Raises:
          ConfigError: the checkpoint is broken or of another run; the folder is left as it was.
        """
        state = in_all(lambda: self._restored(program)) if self.resumed else program.init()
        for curve in self._curves:
            curve.cut_off()
        if is_main():
            save_run_config(self.folder, {**self._config, "ALGORITHM": self._algorithm.name})
            save_divergences(self.folder, self.diverged)
            discard_copies(self.folder, but=self.diverged)
        return state

    def _restored(self, program: Program) -> RunnerState:
        say(f"going on after update {self.updates} of {self.folder}")
        for line in self.divergences(self.diverged):
            say(line)
        if self._full.newest() == self.updates:
            return program.split(self._full.restore(program.joined_shapes()))
        state = program.join(program.init(stream=self.updates))
        kept, opt_state = self._learner.restore(
            learnt(state.train_state), state.train_state.opt_state
        )
        how = "the optimiser's state is kept" if opt_state else "the optimiser starts afresh"
        say(f"a learner-only checkpoint: every environment starts a fresh episode, {how}")
        train_state = state.train_state._replace(
            **kept._asdict(), updates=jnp.full_like(state.train_state.updates, self.updates)
        )
        if opt_state:
            train_state = train_state._replace(opt_state=opt_state)
        return program.split(state._replace(train_state=train_state))

    def append(self, metrics: list[Metrics]) -> None:
        """Notes an update's metrics, one dict per seed, and which seeds it broke.

        Raises:
          NotFiniteError: no seed has a whole agent any more.
        """
        self.updates += 1
        self._tracker.log(metrics)
        for curve, one_seed in zip(self._curves, metrics, strict=False):  # none but in process 0
            curve.append(one_seed)
        must_be_finite = self._algorithm.must_be_finite
        broken = {
            seed: what
            for seed, one_seed in zip(self._seeds, metrics, strict=True)
            if seed not in self.diverged and (what := what_is_not_finite(one_seed, must_be_finite))
        }
        if broken:
            self._mark(broken)

    def _mark(self, broken: dict[int, str]) -> None:
        """Marks seeds as diverged, {seed: what shows it}, and keeps the last checkpoint before."""
        newest = self.newest_checkpoint() or None
        for seed, what in broken.items():
            self.diverged[seed] = Divergence(what, self.updates, newest)
        if len(self.diverged) == len(self._seeds):
            # These marks are not saved, since a resumed run starts before them.
            raise NotFiniteError("\n".join(self.divergences(self._seeds)))
        if newest:
            for seed in broken:
                keep_copy(self._newest_folder(), seed)
        save_divergences(self.folder, self.diverged)
        for line in self.divergences(broken):
            tqdm.write(f"{line}; the other seeds go on", file=sys.stderr)

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
        for curve in self._curves:
            curve.sync()
        kind = self._config["CHECKPOINT_KIND"]
        if kind == "full":
            self._full.save(self.updates, program.join(state))
        elif is_main():
            train_state = program.train_state(state)
            opt_state = train_state.opt_state if kind == "learner" else None
            self._learner.save(self.updates, learnt(train_state), opt_state)

    def close(self) -> None:
        """Ends the live metrics and closes the files; nothing stays of a run that did nothing."""
        self._tracker.close()
        for curve in self._curves:
            curve.close()
        self.discard_if_empty()

    def curves(self) -> list[dict[str, np.ndarray]]:
        """For each seed the metrics of the whole run, {name: (updates,)}."""
        return [curve.read() for curve in self._curves]

    def discard_if_empty(self) -> None:
        """Removes the folder of a run that has not done anything yet."""
        if is_main() and not self.resumed and not self.updates:
            shutil.rmtree(self.folder, ignore_errors=True)


def what_is_not_finite(metrics: Metrics, must_be_finite: Iterable[str]) -> str | None:
    """Which metric shows that the update broke the agent, with its value; None if none does."""
    broken = [name for name in must_be_finite if not np.isfinite(metrics[name])]
    return f"{broken[0]} is {metrics[broken[0]]}" if broken else None


class Learnt(NamedTuple):
    """A `TrainState` without the optimiser's state and the counter."""

    params: Any
    normalizer: dict[str, Moments]
    extra: Any


def learnt(train_state: TrainState) -> Learnt:
    """What every learner-only checkpoint holds of a train state."""
    return Learnt(**{name: getattr(train_state, name) for name in Learnt._fields})


def saved_params(algorithm: Algorithm, train_state: TrainState) -> dict[str, Any]:
    """What `<seed>_params.npy` holds: the parameters that act, and statistics if there are any."""
    params = algorithm.acting_params(train_state)
    if not train_state.normalizer:
        return params
    normalizer = {name: moments._asdict() for name, moments in train_state.normalizer.items()}
    return {**params, "normalizer": normalizer}
