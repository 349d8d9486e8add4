"""Members of a population as rows of one vmapped program, on one or all devices.

A row is one seed of one member. Batches have a fixed size, so that a program compiles once.
Smaller batches are padded with copies of the last row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trxl.config import num_updates
from trxl.rollout import Metrics
from trxl.runs.compiled import Program
from trxl.runs.memory_check import device_memory, least_bytes
from trxl.training import (
    INPUTS,
    Algorithm,
    RunnerState,
    TrainState,
    make_init_and_update,
    with_nan,
)

Array = np.ndarray | jax.Array

ROWS = ("rows",)
BY_ROW = PartitionSpec(ROWS)

MEMBERS_ON_A_CPU = 4
"""Members per batch on a CPU. More are hardly faster, and padding costs as much as members."""


class Row(NamedTuple):
    """Seed of a member."""

    traced: dict[str, float]  # values of traced keys
    seed: int


class UpdateResult(NamedTuple):
    """Results of an update of a batch, (rows,) each.

    Running episodes are those as long as the update or longer. Without them, an agent with long
    episodes would have no score, or only that of its shortest episodes.
    """

    returns: Array  # mean return of the episodes that ended; NaN: none
    episodes: Array  # number of episodes that ended
    running: Array  # number of running episodes
    running_returns: Array  # mean return so far of running episodes
    finite: Array  # bool, whether all metrics of `must_be_finite` are finite


class Programs:
    """Jitted `init` and `update` of a batch of rows.

    Args:
      config: checked; rows override its traced keys.
      algorithm: algorithm that trains.
      rows: batch size, a multiple of the number of devices.
      devices: number of devices.
    """

    def __init__(self, config: dict[str, Any], algorithm: Algorithm, rows: int, devices: int):
        self.num_updates = num_updates(config)
        self.steps_per_update = config["NUM_ENVS"] * config["NUM_STEPS"]
        self._rows = rows
        mesh = Mesh(np.array(jax.local_devices()[:devices]), ROWS)
        self._sharding = NamedSharding(mesh, BY_ROW)
        must_be_finite = (*INPUTS, *algorithm.must_be_finite)

        def init(traced: dict[str, jax.Array], seed: jax.Array) -> RunnerState:
            return make_init_and_update({**config, **traced}, algorithm)[0](jax.random.key(seed))

        def update(traced: dict[str, jax.Array], state: RunnerState):
            state, metrics = make_init_and_update({**config, **traced}, algorithm)[1](state)
            log = state.rollout_state.env_state
            long = log.episode_length >= config["NUM_STEPS"]
            running = jnp.sum(long, dtype=jnp.int32)
            so_far = jnp.sum(jnp.where(long, log.episode_return, 0))
            result = UpdateResult(
                metrics["returned_episode_returns"],
                metrics["num_episodes"],
                running,
                so_far / jnp.maximum(running, 1),
                jnp.all(jnp.isfinite(jnp.stack([metrics[name] for name in must_be_finite]))),
            )
            return state, metrics, result

        def mapped(function: Callable, **options: Any) -> Callable:
            over_rows = jax.vmap(function)
            if devices > 1:
                over_rows = jax.shard_map(
                    over_rows, mesh=mesh, in_specs=BY_ROW, out_specs=BY_ROW, check_vma=False
                )
            return jax.jit(over_rows, **options)

        self._init = mapped(init)
        self._abstract_init = jax.vmap(init)
        self.update = mapped(update, donate_argnums=1)

    def init(self, rows: list[Row]) -> RunnerState:
        """Returns fresh states, leaves (len(rows), ...) in host memory."""
        return self.to_host(self._init(*self._place(inputs(rows))), len(rows))

    def shapes(self, rows: list[Row]) -> RunnerState:
        """Returns the shapes of `init`'s result."""
        return jax.eval_shape(self._abstract_init, *inputs(rows))

    def load(self, rows: list[Row], state: RunnerState) -> "MemberBatch":
        """Copies states to the devices, for training."""
        traced, _ = inputs(rows)
        return MemberBatch(self, len(rows), self._place(traced), self._place(state))

    def _place(self, tree: Any) -> Any:
        """Copies rows to the devices, padded to a full batch."""

        def place(x: Any) -> jax.Array:
            x = x[np.minimum(np.arange(self._rows), len(x) - 1)]
            return jax.device_put(x, self._sharding, may_alias=False)

        return jax.tree.map(place, tree)

    def to_host(self, state: RunnerState, number: int) -> RunnerState:
        """Copies a batch's first rows to host memory, since the next update donates them."""
        state = jax.device_put(state, host_device(), may_alias=False)
        return jax.tree.map(lambda x: x[:number], state)


class MemberBatch:
    """Batch of rows on the devices."""

    def __init__(self, programs: Programs, number: int, traced: Any, state: RunnerState):
        self._programs = programs
        self._number = number
        self._traced = traced
        self._state = state
        self._metrics: Metrics = {}

    def update(self) -> UpdateResult:
        """Updates every row."""
        self._state, self._metrics, result = self._programs.update(self._traced, self._state)
        return UpdateResult(*(x[: self._number] for x in with_nan(jax.device_get(result))))

    def metrics(self) -> dict[str, np.ndarray]:
        """Returns a run's metrics of the last update, {name: (rows,)}."""
        metrics = with_nan(jax.device_get(self._metrics))
        return {name: x[: self._number] for name, x in metrics.items()}

    def train_state(self, row: int) -> TrainState:
        """Returns the train state of one row."""
        return jax.tree.map(lambda x: x[row], self._state.train_state)

    def state(self) -> RunnerState:
        """Returns the rows' states in host memory."""
        return self._programs.to_host(self._state, self._number)


def inputs(rows: list[Row]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns the traced values of rows, {name: (rows,)}, and their seeds (rows,)."""
    values = {name: [row.traced[name] for row in rows] for name in rows[0].traced}
    traced = {name: np.array(x, np.float32) for name, x in values.items()}
    return traced, np.array([row.seed for row in rows], np.uint32)


def host_device() -> jax.Device:
    """Returns the device that holds states between batches."""
    return jax.local_devices(backend="cpu")[0]


def fork_random_streams(state: RunnerState, number: int) -> RunnerState:
    """Returns a copy of a state with its own random streams."""

    def fork(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return jnp.vectorize(jax.random.fold_in)(x, jnp.uint32(number))

    return jax.tree.map(fork, state)


def members_at_a_time(
    config: dict[str, Any], algorithm: Algorithm, seeds: int, population: int
) -> int:
    """Returns the default number of members, of `seeds` rows each, in a batch."""
    if jax.devices()[0].platform == "cpu":
        return min(MEMBERS_ON_A_CPU, population)
    of_one = sum(least_bytes(Program({**config, "NUM_SEEDS": seeds}, algorithm, None)).values())
    fitting = device_memory() * jax.local_device_count() // (FOR_ALL_ELSE * of_one)
    return max(1, min(population, fitting))


FOR_ALL_ELSE = 4
"""Ratio of a run's memory to `least_bytes`, with XLA's temporary buffers."""
