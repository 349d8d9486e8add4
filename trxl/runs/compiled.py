"""Jitted functions of a run: one seed, several seeds under vmap, or several devices."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from trxl.runs.parameters import check_fit, read_start
from trxl.training import Algorithm, RunnerState, Start, make_init_and_update

AXIS = "devices"
EVERYWHERE, BY_ROW = PartitionSpec(), PartitionSpec(AXIS)

SPECS = RunnerState(EVERYWHERE, BY_ROW, EVERYWHERE, BY_ROW)  # type: ignore[arg-type]
"""Sharding of a state over devices: parameters are replicated, environments sharded by row."""


class Program:
    """Jitted `init` and `update` of a run.

    On one or several devices a state differs only in its sharding. With NUM_SEEDS above 1, leaves
    begin with an axis of seeds.

    Args:
      config: checked.
      algorithm: algorithm that trains.
      num_devices: devices of all processes; None for one device.

    Raises:
      ConfigError: the config can't be run, or PARAMS does not fit.
    """

    def __init__(self, config: dict[str, Any], algorithm: Algorithm, num_devices: int | None):
        self.algorithm, self.num_devices = algorithm.name, num_devices or 1
        self.seeds = [config["seed"] + i for i in range(config["NUM_SEEDS"])]
        self._several = len(self.seeds) > 1
        self._mesh = Mesh(np.array(jax.devices()), (AXIS,)) if num_devices else None
        axis_name = AXIS if num_devices else None
        init, update = make_init_and_update(config, algorithm, axis_name, num_devices or 1)

        def init_seed(seed: jax.Array, stream: jax.Array, start: Start | None) -> RunnerState:
            key = jax.random.key(seed)
            return init(jnp.where(stream > 0, jax.random.fold_in(key, stream), key), start)

        if self._mesh:
            shard = partial(jax.shard_map, mesh=self._mesh, check_vma=False)
            init_seed = shard(init_seed, in_specs=EVERYWHERE, out_specs=SPECS)
            update = shard(update, in_specs=(SPECS,), out_specs=(SPECS, EVERYWHERE))
        elif self._several:
            init_seed, update = jax.vmap(init_seed, (0, None, 0)), jax.vmap(update)
        self._init = jax.jit(init_seed)
        self._update = jax.jit(update, donate_argnums=0)
        begins = config["PARAMS"] and not config["RESUME"]  # RESUME has its own parameters
        self._start = self._read_start(config["PARAMS"]) if begins else None

    def _read_start(self, path: str) -> Start:
        starts = read_start(Path(path), self.seeds)
        start = jax.tree.map(lambda *x: np.stack(x), *starts) if self._several else starts[0]
        fresh = self.shapes().train_state
        check_fit(start, Start(fresh.params, fresh.normalizer))
        return start

    def _arguments(self, stream: int, start: Start | None) -> tuple[Any, ...]:
        seeds = np.array(self.seeds, np.uint32)
        return seeds if self._several else seeds[0], np.uint32(stream), start

    def init(self, stream: int = 0) -> RunnerState:
        """Returns a first state, with random streams that depend on `stream`."""
        return jax.block_until_ready(self._init(*self._arguments(stream, self._start)))

    def shapes(self) -> RunnerState:
        """Returns a state as a tree of `jax.ShapeDtypeStruct` with the sharding of each leaf."""
        shapes = jax.eval_shape(self._init, *self._arguments(0, None))
        if not self._mesh:
            return with_sharding(shapes, SingleDeviceSharding(jax.devices()[0]))
        placed = [
            with_sharding(field, NamedSharding(self._mesh, spec))
            for field, spec in zip(shapes, SPECS, strict=True)
        ]
        return RunnerState(*placed)

    def num_parameters(self) -> int:
        """Returns the number of parameters per seed."""
        params = self.shapes().train_state.params
        return sum(x.size for x in jax.tree.leaves(params)) // len(self.seeds)

    def trace_update(self) -> Any:
        """Traces the update; JAX caches the trace for `compile`."""
        return self._update.trace(self.shapes())

    def compile(self, state: RunnerState) -> Callable:
        """Compiles the update for such a state.

        With JAX_DEBUG_NANS returns the jitted update, since only then JAX names the operation.
        """
        if jax.config.jax_debug_nans:  # type: ignore[attr-defined]
            return self._update
        return self._update.lower(state).compile()

    def per_seed(self, tree: Any) -> list[Any]:
        """Copies the train state or metrics to the host, as one tree of NumPy arrays per seed."""
        tree = jax.device_get(tree)
        if not self._several:
            return [tree]
        return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(len(self.seeds))]


def with_sharding(shapes: Any, sharding: Sharding) -> Any:
    """Adds a sharding to a tree of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
