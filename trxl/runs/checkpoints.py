"""Checkpoints of a run.

A full checkpoint is the whole `RunnerState`: parameters, optimiser, environment states, memory,
random keys, counters. A learner-only one is its `TrainState`, with or without the optimiser's part,
in files small enough to be carried anywhere. A checkpoint is either whole or absent, whenever the
process dies.
"""

import gc
import io
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from trxl.errors import ConfigError, first_line
from trxl.runs.compiled import Program
from trxl.runs.processes import is_main, print_main, run_on_all
from trxl.statistics import Moments, exact_count
from trxl.training import RunnerState, TrainState

PART_BYTES = 15_000_000

LEAST_ROOM = 500_000
"""Bytes that a full checkpoint takes beside the state's: the names of everything in it."""

LEFTOVERS = ("*.partial", "removed", "*.orbax-checkpoint-tmp*")
"""What a kill may leave beside the whole checkpoints, which have a number for a name."""


class FullCheckpoints:
    """The newest few states of a run, in its folder's `checkpoints/<updates done>`, with Orbax.

    Args:
      folder: of the run.
      keep: how many to keep.
    """

    def __init__(self, folder: Path, keep: int):
        self.root = folder / "checkpoints"
        self._keep = keep
        self.reload()

    def reload(self) -> None:
        """Looks anew at what is there, after somebody or an error changed it.

        Raises:
          ConfigError: it can't be read.
        """
        if is_main():
            remove_leftovers(self.root)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(self._keep),
            todelete_subdir="removed",
        )
        try:
            self._manager = ocp.CheckpointManager(self.root.resolve(), options=options)
        except Exception as error:  # a broken file among them raises almost anything
            raise unreadable(self.root, error) from error

    def save(self, updates: int, state: Any) -> None:
        """Writes the state after so many updates; returns when it is on the disk.

        Raises:
          OSError: it can't be.
        """
        if updates == self.newest():
            return
        if is_main():
            remove_leftovers(self.root)
        with ExitStack() as probes:
            run_on_all(lambda: probes.enter_context(room_for(self.root, state)), OSError)
        try:
            with one_error_only():
                args = ocp.args.StandardSave(without_empty(state))
                self._manager.save(updates, args=args, force=True)
                # The next update takes the state's buffers for its own.
                self._manager.wait_until_finished()
        except Exception as error:  # a disk's failures have many names
            raise OSError(first_line(str(error))) from error
        finally:
            if is_main():
                remove_leftovers(self.root)

    def all(self) -> list[int]:
        """After how many updates whole checkpoints were taken, in that order."""
        return sorted(self._manager.all_steps())

    def newest(self) -> int:
        """After how many updates the newest one was taken, 0 if there is none."""
        return max(self.all(), default=0)

    def restore(self, updates: int, shapes: Any) -> Any:
        """The state after so many updates, as the tree of `jax.ShapeDtypeStruct` that it is.

        Raises:
          ConfigError: the checkpoint is broken, or of a run with other shapes.
        """
        try:
            with one_error_only():
                state = self._manager.restore(
                    updates, args=ocp.args.StandardRestore(without_empty(shapes))
                )
            return with_empty(state, shapes)
        except Exception as error:  # a broken folder raises almost anything
            raise unreadable(self.root / str(updates), error) from error


@contextmanager
def one_error_only() -> Iterator[None]:
    """Says nothing of what else fails in Orbax's threads when one thing does.

    Each is a traceback there.
    """
    quiet = [logging.getLogger(name) for name in ("absl", "asyncio")]
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    disabled = [logger.disabled for logger in quiet]
    for logger in quiet:
        logger.disabled = True
    try:
        yield
    except Exception:
        gc.collect()  # what failed is told of when it is collected,
        disabled[quiet.index(logging.getLogger("asyncio"))] = True  # or as the process ends
        hook = partial(without_closed_loops, hook)  # some threads still run for a while
        raise
    finally:
        sys.unraisablehook = hook
        for logger, before in zip(quiet, disabled, strict=True):
            logger.disabled = before


def without_closed_loops(hook: Callable[[Any], None], unraisable: Any) -> None:
    """A hook that leaves out what threads say whose event loop was closed by another's failure."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        hook(unraisable)


@contextmanager
def room_for(root: Path, state: Any) -> Iterator[None]:
    """Takes as much room as this process's part of a state needs, and gives it back at the end.

    Orbax fails with much ado, and of several processes the others would wait for the one.

    Raises:
      OSError: there is not so much.
    """
    size = LEAST_ROOM + sum(x.nbytes for x in jax.tree.leaves(state)) // jax.process_count()
    root.mkdir(parents=True, exist_ok=True)
    probe = root / f"room_{jax.process_index()}.partial"
    with open(probe, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            yield
        finally:
            probe.unlink(missing_ok=True)  # process 0 may have removed it as a leftover


def without_empty(tree: Any) -> Any:
    """The tree with None for arrays without entries, which Orbax refuses: a memory of 0 steps."""
    return jax.tree.map(lambda x: x if x.size else None, tree)


def with_empty(tree: Any, shapes: Any) -> Any:
    """Undoes `without_empty`."""

    def fill(shape: jax.ShapeDtypeStruct | None, x: Any) -> Any:
        if x is not None or shape is None:
            return x
        make = partial(jnp.zeros, shape.shape, shape.dtype)
        return jax.jit(make, out_shardings=shape.sharding)()

    return jax.tree.map(fill, shapes, tree, is_leaf=lambda x: x is None)


class LearnerCheckpoints:
    """The newest few train states of a run, in its folder's `learner/<updates done>/`.

    One is an `.npz` archive of the parameters and, where asked, the optimiser's state, cut into
    files `part_000`, `part_001` ... of at most 15 MB.

    Args:
      folder: of the run.
      keep: how many to keep.
    """

    def __init__(self, folder: Path, keep: int):
        self.root = folder / "learner"
        self._keep = keep

    def save(self, updates: int, params: Any, opt_state: Any = None) -> None:
        """Writes NumPy trees; `opt_state` may be None."""
        target = self.root / str(updates)
        if target.exists():
            return
        leaves = jax.tree.leaves({"opt_state": opt_state, "params": params})
        archive = io.BytesIO()
        np.savez(archive, *leaves)
        data = archive.getbuffer()
        remove_leftovers(self.root)
        partial = self.root / f"{updates}.partial"
        partial.mkdir(parents=True)
        for index, start in enumerate(range(0, len(data), PART_BYTES)):
            with open(partial / f"part_{index:03}", "wb") as file:
                file.write(data[start : start + PART_BYTES])
                os.fsync(file.fileno())
        os.rename(partial, target)
        for old in self.all()[: -self._keep]:
            remove_whole(self.root / str(old))

    def all(self) -> list[int]:
        """After how many updates whole checkpoints were taken, in that order."""
        return numbered(self.root)

    def newest(self) -> int:
        """After how many updates the newest one was taken, 0 if there is none."""
        return max(self.all(), default=0)

    def restore(self, updates: int, params: Any, opt_state: Any) -> tuple[Any, Any]:
        """The one after so many updates, in the trees of `params` and `opt_state`.

        Returns:
          params, and opt_state or None where it was not saved.

        Raises:
          ConfigError: the checkpoint is broken, or of a run with other shapes.
        """
        folder = self.root / str(updates)
        parts = sorted(folder.glob("part_*"))
        try:
            archive = np.load(io.BytesIO(b"".join(part.read_bytes() for part in parts)))
            leaves = [archive[f"arr_{i}"] for i in range(len(archive.files))]
        except Exception as error:  # a broken archive raises almost anything
            raise unreadable(folder, error) from error
        tree = {"opt_state": opt_state, "params": params}
        if len(leaves) == len(jax.tree.leaves(params)):
            tree["opt_state"] = None
        wanted, structure = jax.tree.flatten(tree)
        if len(leaves) == len(wanted):
            leaves = list(map(as_saved_today, leaves, wanted))
        if [np.shape(x) for x in leaves] != [np.shape(x) for x in wanted]:
            raise unreadable(folder, ValueError("the arrays have other shapes than the network's"))
        tree = jax.tree.unflatten(structure, leaves)
        return tree["params"], tree["opt_state"]


def numbered(root: Path) -> list[int]:
    """The whole checkpoints among a run's, in their order; an empty folder is none."""
    folders = (path for path in root.glob("*") if path.name.isdigit())
    return sorted(int(path.name) for path in folders if path.is_dir() and any(path.iterdir()))


def set_aside(checkpoint: Path) -> None:
    """Moves a checkpoint where it is not found as one, `<folder of the run>/aside/<kind>/`."""
    root = checkpoint.parent
    aside = root.parent / "aside" / root.name / checkpoint.name
    if aside.exists():
        shutil.rmtree(aside)
    aside.parent.mkdir(parents=True, exist_ok=True)
    os.rename(checkpoint, aside)


def remove_whole(folder: Path) -> None:
    """Removes a folder that, if this is cut short, does not stay half-empty under its name."""
    partial = folder.with_name(f"{folder.name}.partial")
    os.rename(folder, partial)
    shutil.rmtree(partial)


def remove_leftovers(root: Path) -> None:
    """Removes what a kill left half-written, half-removed or empty among a run's checkpoints."""
    for pattern in LEFTOVERS:
        for leftover in root.glob(pattern):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)
    for folder in root.glob("*"):
        if folder.name.isdigit() and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def as_saved_today(x: np.ndarray, like: Any) -> np.ndarray:
    """A leaf of a checkpoint, the statistics' count in the form that `like` has."""
    is_count = getattr(like, "dtype", None) == np.uint32 and np.shape(like) == (*x.shape, 2)
    return exact_count(x) if is_count else x


def unreadable(path: Path, error: Exception) -> ConfigError:
    """What to say of a checkpoint that can't be restored."""
    reason = first_line(str(error) or type(error).__name__)[:120]
    return ConfigError(
        f"RESUME: {path} is broken, of another run or of earlier code ({reason}); move it away to"
        " go on from the checkpoint before it"
    )


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
            self._full.save(updates, filled_fields(state))
        elif is_main():
            with_optimizer = kind == "learner"
            save_learner(self._learner, updates, program, state, with_optimizer)

    def restore(self, updates: int, program: Program) -> RunnerState:
        """The state after so many updates; with fresh episodes from a learner-only checkpoint.

        Raises:
          ConfigError: the checkpoint is broken or of another run.
        """
        if updates in self._full.all():
            fields = self._full.restore(updates, filled_fields(program.shapes()))
            return RunnerState(**fields)
        state = program.init(stream=updates)
        kept, opt_state = self._learner.restore(
            updates, learnt(state.train_state), state.train_state.opt_state
        )
        how = "the optimiser's state is kept" if opt_state else "the optimiser starts afresh"
        print_main(f"a learner-only checkpoint: every environment starts a fresh episode, {how}")
        train_state = state.train_state._replace(
            **kept._asdict(), updates=jnp.full_like(state.train_state.updates, updates)
        )
        if opt_state:
            train_state = train_state._replace(opt_state=opt_state)
        return state._replace(train_state=train_state)


def filled_fields(state: RunnerState) -> dict[str, Any]:
    """The fields that are not None: what an algorithm does not use is in no checkpoint."""
    return {name: part for name, part in state._asdict().items() if part is not None}


class Learnt(NamedTuple):
    """A `TrainState` without the optimiser's state and the counter."""

    params: Any
    normalizer: dict[str, Moments]
    algorithm_state: Any


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
    train_state = jax.device_get(state.train_state)
    opt_state = train_state.opt_state if with_optimizer else None
    checkpoints.save(updates, learnt(train_state), opt_state)


def learnt(train_state: TrainState) -> Learnt:
    """What every learner-only checkpoint holds of a train state."""
    return Learnt(**{name: getattr(train_state, name) for name in Learnt._fields})
