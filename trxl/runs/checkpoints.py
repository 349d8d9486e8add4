"""Checkpoints of a run, written atomically by Orbax.

| CHECKPOINT_KIND | content |
| --- | --- |
| full | `RunnerState` |
| learner | `TrainState` |
| params | `TrainState` without the optimiser's state |
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
"""Bytes of a checkpoint's metadata."""

LEFTOVERS = ("*.partial", "*.orbax-checkpoint-tmp*")
"""Incomplete checkpoints of a killed process. Complete ones have a number for a name."""


class Checkpoints:
    """Newest checkpoints of a run, in its folder's `checkpoints/<updates done>`.

    Args:
      folder: the run's folder.
      keep: number of checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int):
        self.root = folder.absolute() / "checkpoints"
        self._keep = keep
        self._current: int | None = None  # updates of the last one written or read
        self._orbax = ocp.Checkpointer(ocp.StandardCheckpointHandler())

    def all(self) -> list[int]:
        """Returns the numbers of updates of all checkpoints, ascending."""
        names = (path.parent.name for path in self.root.glob("*/_CHECKPOINT_METADATA"))
        return sorted(int(name) for name in names if name.isdigit())

    def newest(self) -> int:
        """Returns the number of updates of the newest checkpoint, 0 if there is none."""
        return max(self.all(), default=0)

    def save(self, updates: int, tree: Any) -> None:
        """Writes the arrays after `updates` updates; returns when they are on the disk.

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
        except Exception as error:  # Orbax raises many types for disk errors
            raise OSError(one_line(error)) from error
        self._current = updates

    def saved_names(self, updates: int) -> Any:
        """Returns the tree of a checkpoint's metadata, with None for what was not saved.

        Raises:
          ConfigError: the checkpoint is broken.
        """
        with unreadable_in_one_line(self.root / str(updates)):
            return self._orbax.metadata(self.root / str(updates)).item_metadata.tree

    def restore(self, updates: int, shapes: Any) -> Any:
        """Restores the arrays after `updates` updates, into a tree of `jax.ShapeDtypeStruct`.

        Raises:
          ConfigError: the checkpoint is broken, or has other shapes.
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
        """Reserves disk space for this process's part of the arrays, if the system can.

        If the disk filled up while Orbax writes, the other processes would wait forever.

        Raises:
          OSError: there is not enough space.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        if is_main():
            self._remove_leftovers()
        size = LEAST_ROOM + sum(x.nbytes for x in jax.tree.leaves(tree)) // jax.process_count()
        probe = self.root / f"room_{jax.process_index()}.partial"
        try:
            with open(probe, "wb") as file:
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    os.posix_fallocate(file.fileno(), 0, size)
            yield
        finally:
            probe.unlink(missing_ok=True)  # process 0 may have removed it as a leftover

    def _prune(self) -> None:
        """Removes old checkpoints, renamed first so that an interruption leaves no number."""
        for old in self.all()[: -self._keep]:
            partial = self.root / f"{old}.partial"
            os.rename(self.root / str(old), partial)
            shutil.rmtree(partial)

    def _remove_leftovers(self) -> None:
        """Removes the incomplete checkpoints of a killed process."""
        for leftover in (path for pattern in LEFTOVERS for path in self.root.glob(pattern)):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)


def kept_of(state: RunnerState, kind: str) -> dict[str, Any]:
    """Returns the parts of a state, or of its shapes, that a CHECKPOINT_KIND saves."""
    if kind == "full":  # without fields that the algorithm does not use
        return {name: part for name, part in state._asdict().items() if part is not None}
    if kind == "learner":
        return {"train_state": state.train_state}
    return {"train_state": state.train_state._replace(opt_state=None)}


def restored_state(checkpoints: Checkpoints, updates: int, program: Program) -> RunnerState:
    """Restores the state after `updates` updates; learner-only checkpoints start fresh episodes.

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
    """Returns {name: shape} of the arrays that Orbax saves, with random keys as integers."""

    def shape(x: Any) -> tuple[int, ...]:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return (jax.eval_shape(jax.random.key_data, x) if is_key else x).shape

    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="."): shape(x) for k, x in leaves}


def without_empty(tree: Any) -> Any:
    """Replaces empty arrays, such as a memory of 0 steps, by None, since Orbax refuses them."""
    return jax.tree.map(lambda x: x if x.size else None, tree)


def with_empty(tree: Any, shapes: Any) -> Any:
    """Inverts `without_empty`."""

    def fill(shape: jax.ShapeDtypeStruct | None, x: Any) -> Any:
        if x is not None or shape is None:
            return x
        make = partial(jnp.zeros, shape.shape, shape.dtype)
        return jax.jit(make, out_shardings=shape.sharding)()

    return jax.tree.map(fill, shapes, tree, is_leaf=lambda x: x is None)


@contextmanager
def unreadable_in_one_line(path: Path) -> Iterator[None]:
    """Turns any error of reading a checkpoint into a `ConfigError`."""
    try:
        yield
    except Exception as error:
        reason = one_line(error)[:120]
        raise ConfigError(
            f"RESUME: {path} is broken, or of another run, environment or version ({reason}); move"
            " it away to go on from the checkpoint before it"
        ) from error
