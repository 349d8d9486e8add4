"""Checkpoints of a run, and what a resumed run may change.

A full checkpoint is the whole `RunnerState`: parameters, optimiser, environment states, memory,
random keys, counters. A learner-only one is its `TrainState`, with or without the optimiser's part,
in files small enough to be carried anywhere. The metrics so far stand beside either, see
`CurveFile`. A checkpoint is either whole or absent, whenever the process dies.
"""

import gc
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from config import ConfigError
from environments import named_by_user
from host.multihost import is_main
from learning import Algorithm
from normalization import exact_count

PART_BYTES = 15_000_000

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
        self._manager = ocp.CheckpointManager(
            self.root.resolve(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                todelete_subdir="removed",
            ),
        )

    def save(self, updates: int, state: Any) -> None:
        """Writes the state after so many updates; returns when it is on the disk."""
        if updates == self.newest():
            return
        if is_main():
            remove_leftovers(self.root)
        self._manager.save(updates, args=ocp.args.StandardSave(without_empty(state)), force=True)
        # The next update takes the state's buffers for its own.
        self._manager.wait_until_finished()
        if is_main():
            remove_leftovers(self.root)

    def newest(self) -> int | None:
        """After how many updates the newest whole checkpoint was taken, None if there is none."""
        return self._manager.latest_step()

    def restore(self, shapes: Any) -> Any:
        """The newest state, as the tree of `jax.ShapeDtypeStruct` that it is.

        Raises:
          ConfigError: the checkpoint is broken, or of a run with other shapes.
        """
        newest = self.newest()
        try:
            with without_unraisable_errors():
                state = self._manager.restore(
                    newest, args=ocp.args.StandardRestore(without_empty(shapes))
                )
            return with_empty(state, shapes)
        except Exception as error:  # a broken folder raises almost anything
            raise unreadable(self.root / str(newest), error) from error


@contextmanager
def without_unraisable_errors() -> Iterator[None]:
    """Says nothing of the reads that fail in Orbax's threads when one does, of each a traceback."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        gc.collect()  # what failed is told of when it is collected
        sys.unraisablehook = hook


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
        for old in self._all()[: -self._keep]:
            remove_whole(self.root / str(old))

    def newest(self) -> int | None:
        """After how many updates the newest one was taken, None if there is none."""
        return max(self._all(), default=None)

    def restore(self, params: Any, opt_state: Any) -> tuple[Any, Any]:
        """The newest one in the trees of `params` and `opt_state`.

        Returns:
          params, and opt_state or None where it was not saved.

        Raises:
          ConfigError: the checkpoint is broken, or of a run with other shapes.
        """
        folder = self.root / str(self.newest())
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

    def _all(self) -> list[int]:
        return sorted(int(path.name) for path in self.root.glob("*") if path.name.isdigit())


def remove_whole(folder: Path) -> None:
    """Removes a folder that, if this is cut short, does not stay half-empty under its name."""
    partial = folder.with_name(f"{folder.name}.partial")
    os.rename(folder, partial)
    shutil.rmtree(partial)


def remove_leftovers(root: Path) -> None:
    """Removes what a kill left half-written or half-removed among a run's checkpoints."""
    for pattern in LEFTOVERS:
        for leftover in root.glob(pattern):
            shutil.rmtree(leftover)


def as_saved_today(x: np.ndarray, like: Any) -> np.ndarray:
    """A leaf of a checkpoint, the statistics' count in the form that `like` has."""
    is_count = getattr(like, "dtype", None) == np.uint32 and np.shape(like) == (*x.shape, 2)
    return exact_count(x) if is_count else x


def unreadable(path: Path, error: Exception) -> ConfigError:
    """What to say of a checkpoint that can't be restored."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0][:120] if lines else type(error).__name__
    return ConfigError(
        f"RESUME: {path} is broken or of another run ({reason}); move it away to go on from the"
        " checkpoint before it"
    )


class CurveFile:
    """A seed's metrics on the disk, `<seed>_metrics.jsonl`: a line per update, as the run goes.

    Args:
      folder: of the run.
      seed: whose metrics.
      updates: how many of the lines that are there to go on from.

    Raises:
      ConfigError: there are fewer, or they can't be read.
    """

    def __init__(self, folder: Path, seed: int, updates: int):
        path = folder / f"{seed}_metrics.jsonl"
        try:
            self._file = open(path, "r+" if updates else "a+")  # noqa: SIM115, as long as the run
            for _ in range(updates):
                json.loads(self._file.readline())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path} has fewer lines than the checkpoint has updates") from error
        self._length = self._file.tell()

    def cut_off(self) -> None:
        """Removes the lines behind those to go on from."""
        self._file.truncate(self._length)
        self._file.seek(self._length)

    def append(self, metrics: dict[str, Any]) -> None:
        """Adds an update's metrics, {name: number}."""
        # float32 has an exact double, and JSON's decimals read back as the same double.
        self._file.write(json.dumps({name: np.asarray(v).item() for name, v in metrics.items()}))
        self._file.write("\n")
        self._file.flush()

    def sync(self) -> None:
        """Waits until all lines are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def read(self) -> dict[str, np.ndarray]:
        """The whole curve, {name: (updates,)}; whole numbers as integers, others as float32.

        A run that is resumed by another version may get other metrics: NaN stands where an update
        had none of a name.
        """
        self._file.seek(0)
        rows = [json.loads(line) for line in self._file]
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}
        return {
            name: column.astype(np.float32) if column.dtype == np.float64 else column
            for name, column in columns.items()
        }


def save_run_config(folder: Path, config: dict[str, Any]) -> None:
    """Writes the config that `resumed_config` reads."""
    partial = folder / "run.json.partial"
    partial.write_text(json.dumps(as_saved({**config, "RESUME": None}), indent=1))
    os.replace(partial, folder / "run.json")


def as_saved(value: Any) -> Any:
    """What is left of a config or a value of it in JSON: tuples are lists, NumPy's arrays too.

    Raises:
      ConfigError: JSON has nothing like it.
    """

    def plain(x: Any) -> Any:
        if hasattr(x, "tolist"):  # an array or a scalar of NumPy's or JAX's
            return x.tolist()
        raise ConfigError(f"{x!r} can't be saved with the run; use numbers, texts, lists and dicts")

    return json.loads(json.dumps(value, default=plain))


def resumed_config(folder: Path, overrides: dict[str, Any], algorithm: Algorithm) -> dict[str, Any]:
    """The config of the run in `folder`, with the overrides of the command line.

    Raises:
      ConfigError: there is no run, or one of another algorithm, or an override that would change
        the meaning of its state, or its environment is a file that the overrides don't name.
    """
    try:
        saved = json.loads((folder / "run.json").read_text())
    except OSError as error:
        raise ConfigError(f"RESUME: no run in {folder}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"RESUME: {folder / 'run.json'} is broken: {error}") from error
    trained_by = saved.pop("ALGORITHM", "PPO")
    if trained_by != algorithm.name:
        raise ConfigError(
            f"RESUME: {folder} was trained by {trained_by}, and this script trains {algorithm.name}"
        )
    saved = algorithm.check(saved)
    asked = algorithm.check({**saved, **overrides})
    given = asked["ENV_NAME"] if "ENV_NAME" in overrides else None
    try:
        saved["ENV_NAME"] = named_by_user(saved["ENV_NAME"], given, "ENV_NAME={}")
    except ConfigError as error:
        raise ConfigError(f"RESUME: {error}") from error
    changed = [
        name
        for name, key in algorithm.keys.items()
        if not key.resumable and as_saved(asked[name]) != saved[name]
    ]
    if changed:
        was = ", ".join(f"{key} = {saved[key]!r}" for key in changed)
        raise ConfigError(f"RESUME: {', '.join(changed)} can't change; the run has {was}")
    return asked
