"""The jitted functions of a run, for one seed, for several under vmap, or for several devices."""

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
"""How the fields of a state lie on several devices: parameters everywhere, environments by row."""


class Program:
    """`init` and `update`, jitted.

    A state is the same whether one device has it or several, but for the sharding of its arrays;
    with NUM_SEEDS above 1 its leaves have an axis of the seeds in front.

    Args:
      config: checked.
      algorithm: that trains.
      num_devices: of all processes together; None for one device.

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
        begins = config["PARAMS"] and not config["RESUME"]  # a resumed run has begun
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
        """Returns a first state; another `stream` has other environments and actions."""
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
        """Returns the number of one seed's parameters."""
        params = self.shapes().train_state.params
        return sum(x.size for x in jax.tree.leaves(params)) // len(self.seeds)

    def trace_update(self) -> Any:
        """Returns the traced update, which `compile` then need not trace again."""
        return self._update.trace(self.shapes())

    def compile(self, state: RunnerState) -> Callable:
        """Returns the update, compiled for such a state.

        With JAX_DEBUG_NANS it is compiled when first called: only then does JAX name the operation.
        """
        if jax.config.jax_debug_nans:  # type: ignore[attr-defined]
            return self._update
        return self._update.lower(state).compile()

    def per_seed(self, tree: Any) -> list[Any]:
        """Returns the train state or the metrics as one tree of NumPy arrays for each seed."""
        tree = jax.device_get(tree)
        if not self._several:
            return [tree]
        return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(len(self.seeds))]


def with_sharding(shapes: Any, sharding: Sharding) -> Any:
    """Returns a tree of `jax.ShapeDtypeStruct`, placed."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
