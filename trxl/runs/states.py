"""The states of a run on the disk: checkpoints of either kind as one."""

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from trxl.runs.checkpoints import FullCheckpoints, LearnerCheckpoints, set_aside
from trxl.runs.multihost import is_main, say
from trxl.runs.program import Program
from trxl.learning import RunnerState, TrainState
from trxl.normalization import Moments


class States:
    """The checkpoints of a run, full ones and learner-only ones beside each other.

    Args:
      folder: of the run.
      keep: how many of the newest of a kind to keep.

    Raises:
      ConfigError: what is there can't be read.
    """

    def __init__(self, folder: Path, keep: int):
        self._full = FullCheckpoints(folder, keep)
        self._learner = LearnerCheckpoints(folder, keep)

    def all(self) -> list[int]:
        """After how many updates there are checkpoints, in that order."""
        return sorted({*self._full.all(), *self._learner.all()})

    def newest(self) -> int:
        """After how many updates the newest one was taken, 0 if there is none."""
        return max(self.all(), default=0)

    def newest_folder(self) -> Path:
        """Where it is."""
        newest = self.newest()
        kind = self._full if self._full.newest() == newest else self._learner
        return kind.root / str(newest)

    def has_place(self) -> bool:
        """Whether there is a folder for full checkpoints, which somebody may have removed."""
        return self._full.root.exists()

    def make_place(self) -> None:
        """Makes that folder.

        Raises:
          OSError: it can't be made.
        """
        self._full.root.mkdir(parents=True, exist_ok=True)

    def reload(self) -> None:
        """Looks anew at what is there, after somebody or an error changed it."""
        self._full.reload()

    def set_aside_after(self, updates: int) -> None:
        """Moves those of later updates to where they are not found as checkpoints.

        Raises:
          OSError: the folder can't be written.
        """
        for kind in (self._full, self._learner):
            for later in kind.all():
                if later > updates:
                    set_aside(kind.root / str(later))

    def save(self, updates: int, kind: str, program: Program, state: RunnerState) -> None:
        """Writes the state after so many updates.

        Args:
          kind: the value of CHECKPOINT_KIND.

        Raises:
          OSError: it can't be written.
        """
        if kind == "full":
            self._full.save(updates, filled_fields(program.join(state)))
        elif is_main():
            with_optimizer = kind == "learner"
            save_learner(self._learner, updates, program, state, with_optimizer)

    def restore(self, updates: int, program: Program) -> RunnerState:
        """The state after so many updates; with fresh episodes from a learner-only checkpoint.

        Raises:
          ConfigError: the checkpoint is broken or of another run.
        """
        if updates in self._full.all():
            fields = self._full.restore(updates, filled_fields(program.joined_shapes()))
            return program.split(RunnerState(**fields))
        state = program.join(program.init(stream=updates))
        kept, opt_state = self._learner.restore(
            updates, learnt(state.train_state), state.train_state.opt_state
        )
        how = "the optimiser's state is kept" if opt_state else "the optimiser starts afresh"
        say(f"a learner-only checkpoint: every environment starts a fresh episode, {how}")
        train_state = state.train_state._replace(
            **kept._asdict(), updates=jnp.full_like(state.train_state.updates, updates)
        )
        if opt_state:
            train_state = train_state._replace(opt_state=opt_state)
        return program.split(state._replace(train_state=train_state))


def filled_fields(state: RunnerState) -> dict[str, Any]:
    """The fields that are not None: what an algorithm does not use is in no checkpoint."""
    return {name: part for name, part in state._asdict().items() if part is not None}


class Learnt(NamedTuple):
    """A `TrainState` without the optimiser's state and the counter."""

    params: Any
    normalizer: dict[str, Moments]
    extra: Any


def save_learner(
    checkpoints: LearnerCheckpoints,
    updates: int,
    program: Program,
    state: RunnerState,
    with_optimizer: bool = True,
) -> None:
    """Writes what was learnt after so many updates, from one process.

    Raises:
      OSError: it can't be written.
    """
    train_state = program.train_state(state)
    opt_state = train_state.opt_state if with_optimizer else None
    checkpoints.save(updates, learnt(train_state), opt_state)


def learnt(train_state: TrainState) -> Learnt:
    """What every learner-only checkpoint holds of a train state."""
    return Learnt(**{name: getattr(train_state, name) for name in Learnt._fields})
