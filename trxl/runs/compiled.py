"""The jitted functions of a run, and its state with and without the axis of the devices."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import (
    global_array_to_host_local_array,
    host_local_array_to_global_array,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from trxl.runs.parameters import check_fit, read_start
from trxl.training import ALIKE, Algorithm, RunnerState, Start, TrainState, make_init_and_update

BY_DEVICE = PartitionSpec("devices")


class Program:
    """`init` and `update`, jitted for one seed, for several under vmap, or for devices under pmap.

    Args:
      config: checked.
      algorithm: that trains.
      num_devices: of all processes together, for pmap; None for one device without it.

    Raises:
      ConfigError: the config can't be run, or PARAMS has not what it takes.

    Under pmap a state has the devices of this process as its first axis. Joined, it has none: what
    all devices have alike is there once, rows of environments stand in their global order, and each
    array is one array for all processes.
    """

    def __init__(self, config: dict[str, Any], algorithm: Algorithm, num_devices: int | None):
        self.seeds = [config["seed"] + i for i in range(config["NUM_SEEDS"])]
        keys = jax.vmap(jax.random.key)(jnp.array(self.seeds, jnp.uint32))
        axis_name = "devices" if num_devices else None
        init, update = make_init_and_update(config, algorithm, axis_name, num_devices)
        if num_devices:
            self._keys = jnp.repeat(keys, jax.local_device_count())
            self._init = jax.pmap(init, axis_name, in_axes=(0, None))
            self._update = jax.pmap(update, axis_name, donate_argnums=0)
        elif len(self.seeds) > 1:
            self._keys = keys
            self._init = jax.jit(jax.vmap(init))
            self._update = jax.jit(jax.vmap(update), donate_argnums=0)
        else:
            self._keys = keys[0]
            self._init = jax.jit(init)
            self._update = jax.jit(update, donate_argnums=0)
        self._num_devices = num_devices
        begins = config["PARAMS"] and not config["RESUME"]  # what goes on has begun
        self._start = self._read_start(config["PARAMS"]) if begins else None

    def _read_start(self, folder: str) -> Start:
        """What PARAMS says to start from, as `init` takes it."""
        starts = read_start(Path(folder), self.seeds)
        several = len(starts) > 1
        start = jax.tree.map(lambda *x: jnp.stack(x), *starts) if several else starts[0]
        fresh = jax.eval_shape(self._init, self._keys, None).train_state
        if self._num_devices:
            fresh = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), fresh)
        check_fit(start, Start(fresh.params, fresh.normalizer))
        return start

    def init(self, stream: int = 0) -> RunnerState:
        """A first state; another `stream` has other environments and actions."""
        keys = self._keys
        if stream:
            keys = jnp.vectorize(jax.random.fold_in)(keys, stream)
        return jax.block_until_ready(self._init(keys, self._start))

    def num_parameters(self) -> int:
        """Of one seed's network."""
        params = self.joined_shapes().train_state.params
        return sum(x.size for x in jax.tree.leaves(params)) // len(self.seeds)

    def row_bytes(self) -> tuple[int, int]:
        """What the environments' states take on one device, and what is kept of rollouts."""
        state = jax.eval_shape(self._init, self._keys, self._start)
        running = state.rollout_state
        devices = jax.local_device_count() if self._num_devices else 1

        def size(tree: Any) -> int:
            return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) // devices

        return size((running.env_state, running.obs)), size(state.replay)

    def compile(self, state: RunnerState) -> Callable:
        """The update, compiled for such a state."""
        compiled = self._update.lower(state).compile()
        # What pmap compiles for several processes takes their joint arrays; called by its name, it
        # finds the same program and takes this process's share.
        return self._update if jax.process_count() > 1 else compiled

    def join(self, state: RunnerState) -> RunnerState:
        """The state without the axis of the devices, the same however many they are."""
        if not self._num_devices:
            return state
        by_device = host_local_array_to_global_array(state, self._mesh(), BY_DEVICE)
        out_shardings: Any = RunnerState(**self._shardings())
        return jax.jit(join_devices, out_shardings=out_shardings)(by_device)

    def split(self, joined: RunnerState) -> RunnerState:
        """Undoes `join`, for the devices of this program."""
        if not self._num_devices:
            return joined
        sharding = NamedSharding(self._mesh(), BY_DEVICE)
        split = jax.jit(partial(split_devices, self._num_devices), out_shardings=sharding)
        return global_array_to_host_local_array(split(joined), self._mesh(), BY_DEVICE)

    def joined_shapes(self) -> RunnerState:
        """A joined state as a tree of `jax.ShapeDtypeStruct`, which say where each leaf goes."""
        shapes = jax.eval_shape(self._init, self._keys, None)
        if not self._num_devices:
            return with_sharding(shapes, SingleDeviceSharding(jax.devices()[0]))
        shapes = jax.tree.map(self._of_all_processes, shapes)
        joined = jax.eval_shape(join_devices, shapes)
        shardings = self._shardings()
        return RunnerState(
            **{name: with_sharding(getattr(joined, name), shardings[name]) for name in shardings}
        )

    def train_state(self, state: RunnerState) -> TrainState:
        """The train state as it stands in a joined state, as NumPy arrays."""
        return self._to_host(state.train_state)

    def per_seed(self, tree: Any) -> list[Any]:
        """The train state or the metrics as one tree of NumPy arrays for each seed."""
        tree = self._to_host(tree)
        if len(self.seeds) == 1:
            return [tree]
        return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(len(self.seeds))]

    def _to_host(self, tree: Any) -> Any:
        """What all devices have alike, as NumPy arrays without their axis: one device's is read."""
        if not self._num_devices:
            return jax.device_get(tree)
        of_one = jax.device_get(jax.tree.map(lambda x: x.addressable_data(0), tree))
        return jax.tree.map(lambda x: x[0], of_one)

    def _of_all_processes(self, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self._num_devices, *x.shape[1:]), x.dtype)

    def _mesh(self) -> Mesh:
        return Mesh(np.array(jax.devices()), ("devices",))

    def _shardings(self) -> dict[str, Any]:
        """Where each field of a joined state is: everywhere, or by rows over the devices."""
        everywhere = NamedSharding(self._mesh(), PartitionSpec())
        rows = NamedSharding(self._mesh(), BY_DEVICE)
        return {name: everywhere if name in ALIKE else rows for name in RunnerState._fields}


def join_devices(state: RunnerState) -> RunnerState:
    """(devices, B, ...) to (devices * B, ...), and what all devices have alike once."""

    def join(name: str, part: Any) -> Any:
        if name in ALIKE:
            return jax.tree.map(lambda x: x[0], part)
        return jax.tree.map(lambda x: jax.lax.collapse(x, 0, 2), part)

    return RunnerState(**{name: join(name, part) for name, part in state._asdict().items()})


def split_devices(num_devices: int, joined: RunnerState) -> RunnerState:
    """Undoes `join_devices`."""

    def repeat(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (num_devices, *x.shape))

    def cut(x: jax.Array) -> jax.Array:
        return jnp.stack(jnp.split(x, num_devices))

    return RunnerState(
        **{
            name: jax.tree.map(repeat if name in ALIKE else cut, part)
            for name, part in joined._asdict().items()
        }
    )


def with_sharding(shapes: Any, sharding: Sharding) -> Any:
    """A tree of `jax.ShapeDtypeStruct`, placed."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
