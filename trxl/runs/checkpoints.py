"""Checkpoints of a run: written by Orbax, whole or absent whenever the process dies.

A checkpoint holds the `RunnerState`, or with CHECKPOINT_KIND=learner its `TrainState` alone, with
CHECKPOINT_KIND=params that without the optimiser's state.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from trxl.errors import ConfigError, one_line
from trxl.runs.compiled import Program
from trxl.runs.processes import is_main, print_main, run_on_all
from trxl.training import RunnerState

LEAST_ROOM = 500_000
"""Bytes that a checkpoint takes beside the arrays: the names of everything in it."""

LEFTOVERS = ("*.partial", "*.orbax-checkpoint-tmp*")
"""What a kill may leave beside the whole checkpoints, which have a number for a name."""


class Checkpoints:
    """The newest few trees of arrays of a run, in its folder's `checkpoints/<updates done>`.

    Args:
      folder: of the run.
      keep: how many to keep.
    """

    def __init__(self, folder: Path, keep: int):
        self.root = folder.absolute() / "checkpoints"
        self._keep = keep
        self._current: int | None = None  # the one that was last written or read
        self._orbax = ocp.Checkpointer(ocp.StandardCheckpointHandler())

    def all(self) -> list[int]:
        """Returns after how many updates there are checkpoints, in order."""
        names = (path.parent.name for path in self.root.glob("*/_CHECKPOINT_METADATA"))
        return sorted(int(name) for name in names if name.isdigit())

    def newest(self) -> int:
        """Returns after how many updates the newest one was taken, 0 if there is none."""
        return max(self.all(), default=0)

    def save(self, updates: int, tree: Any) -> None:
        """Writes the arrays after so many updates; returns when they are on the disk.

        Raises:
          OSError: they can't be written.
        """
        if updates == self._current:
            return
        with ExitStack() as probes:
            run_on_all(lambda: probes.enter_context(self._room_for(tree)), OSError)
        try:
            self._orbax.save(
                self.root / str(updates),
                args=ocp.args.StandardSave(without_empty(tree)),
                force=True,
            )
            if is_main():
                self._prune()
        except Exception as error:  # a disk's failures have many names
            raise OSError(one_line(error)) from error
        self._current = updates

    def saved_names(self, updates: int) -> Any:
        """Returns the tree that a checkpoint has, with None where nothing was saved.

        Raises:
          ConfigError: it is broken.
        """
        with unreadable_in_one_line(self.root / str(updates)):
            return self._orbax.metadata(self.root / str(updates)).item_metadata.tree

    def restore(self, updates: int, shapes: Any) -> Any:
        """Returns the arrays after so many updates, in a tree of `jax.ShapeDtypeStruct`.

        Raises:
          ConfigError: the checkpoint is broken, or of a run with other shapes.
        """
        saved = shapes_by_name(self.saved_names(updates))
        wanted = shapes_by_name(without_empty(shapes))
        with unreadable_in_one_line(self.root / str(updates)):
            if differing := [x for x in saved | wanted if saved.get(x) != wanted.get(x)]:
                # Orbax would fail in many threads.
                name = differing[0]
                raise ValueError(f"{name}: {saved.get(name)} there, {wanted.get(name)} here")
            tree = self._orbax.restore(
                self.root / str(updates), args=ocp.args.StandardRestore(without_empty(shapes))
            )
        self._current = updates
        return with_empty(tree, shapes)

    @contextmanager
    def _room_for(self, tree: Any) -> Iterator[None]:
        """Reserves the room that this process's part of the arrays needs, where that is possible.

        A disk that fills up while Orbax writes would leave the other processes waiting.

        Raises:
          OSError: there is not enough.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        if is_main():
            self._remove_leftovers()
        size = LEAST_ROOM + sum(x.nbytes for x in jax.tree.leaves(tree)) // jax.process_count()
        probe = self.root / f"room_{jax.process_index()}.partial"
        try:
            with open(probe, "wb") as file:
                if hasattr(os, "posix_fallocate"):  # macOS has none
                    os.posix_fallocate(file.fileno(), 0, size)
            yield
        finally:
            probe.unlink(missing_ok=True)  # process 0 may have removed it as a leftover

    def _prune(self) -> None:
        """Removes all but the newest; one that is cut short has no number for a name any more."""
        for old in self.all()[: -self._keep]:
            partial = self.root / f"{old}.partial"
            os.rename(self.root / str(old), partial)
            shutil.rmtree(partial)

    def _remove_leftovers(self) -> None:
        """Removes what a kill left half-written or half-removed."""
        for leftover in (path for pattern in LEFTOVERS for path in self.root.glob(pattern)):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)


def kept_of(state: RunnerState, kind: str) -> dict[str, Any]:
    """Returns what a checkpoint of this CHECKPOINT_KIND has of a state, or of its shapes."""
    if kind == "full":  # what an algorithm does not use is in no checkpoint
        return {name: part for name, part in state._asdict().items() if part is not None}
    if kind == "learner":
        return {"train_state": state.train_state}
    return {"train_state": state.train_state._replace(opt_state=None)}


def restored_state(checkpoints: Checkpoints, updates: int, program: Program) -> RunnerState:
    """Returns the state after so many updates; with fresh episodes where only the learner was kept.

    Raises:
      ConfigError: the checkpoint is broken or of another run.
    """
    shapes = program.shapes()
    saved = checkpoints.saved_names(updates)
    if len(saved) > 1:
        return RunnerState(**checkpoints.restore(updates, kept_of(shapes, "full")))
    kind = "learner" if saved["train_state"]["opt_state"] is not None else "params"
    train_state = checkpoints.restore(updates, kept_of(shapes, kind))["train_state"]
    state = program.init(stream=updates)
    if kind == "params":
        train_state = train_state._replace(opt_state=state.train_state.opt_state)
    how = "the optimiser starts afresh" if kind == "params" else "the optimiser's state is kept"
    print_main(f"a learner-only checkpoint: every environment starts a fresh episode, {how}")
    return state._replace(train_state=train_state)


def shapes_by_name(tree: Any) -> dict[str, tuple[int, ...]]:
    """Returns {name: shape} of the arrays as Orbax saves them, random keys as numbers."""

    def shape(x: Any) -> tuple[int, ...]:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return (jax.eval_shape(jax.random.key_data, x) if is_key else x).shape

    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="."): shape(x) for k, x in leaves}


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


@contextmanager
def unreadable_in_one_line(path: Path) -> Iterator[None]:
    """Turns whatever reading a checkpoint raises, which may be anything, into a `ConfigError`."""
    try:
        yield
    except Exception as error:
        reason = one_line(error)[:120]
        raise ConfigError(
            f"RESUME: {path} is broken, or of another run, environment or version ({reason}); move"
            " it away to go on from the checkpoint before it"
        ) from error
