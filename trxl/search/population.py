"""Members of a population as rows of one vmapped program, on one device or all of them.

A row is one seed of one member. Rows are trained in chunks of one fixed size, so that fewer of them
compile nothing new; a chunk that is not full trains its last row several times.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trxl.config import num_updates
from trxl.rollout import Metrics
from trxl.runs.memory_check import device_memory, least_needs
from trxl.search.trials import Running
from trxl.training import INPUTS, Algorithm, RunnerState, TrainState, make_init_and_update

ROWS = ("rows",)
BY_ROW = PartitionSpec(ROWS)

OF_A_CPU = 4
"""Members in a chunk there: more are hardly faster, and a chunk that is not full costs as much."""


class Row(NamedTuple):
    """One seed of one member."""

    traced: dict[str, float]  # the values in which members of a program differ
    seed: int


class Seen(NamedTuple):
    """What an update of a chunk shows, (rows,) each."""

    returns: np.ndarray  # mean return of the episodes that ended; NaN: none did
    episodes: np.ndarray
    whole: np.ndarray  # bool, whether all is finite that must be
    running: list[Running]  # episodes that have run through the whole update


RUNNING = ("running_episodes", "running_episode_returns")
"""Metrics of a population's update beside a run's."""


def running_episodes(state: RunnerState, num_steps: int) -> Metrics:
    """Returns how many episodes have run for `num_steps` and go on, and their mean return so far.

    Without them, an agent whose episodes are longer than the updates that are compared would have
    no score, or that of its shortest ones.
    """
    log = state.rollout_state.env_state
    long = log.episode_length >= num_steps
    number = jnp.sum(long)
    total = jnp.sum(jnp.where(long, log.episode_return, 0))
    return dict(zip(RUNNING, (number, total / jnp.maximum(number, 1)), strict=True))


class Programs:
    """The `init` and `update` of a chunk of rows, jitted once for what shapes them.

    Args:
      config: checked, with one value for every key; rows have their own of the traced ones.
      algorithm: that trains.
      rows: of a chunk, a multiple of the number of devices.
      devices: that it is spread over.
    """

    def __init__(self, config: dict[str, Any], algorithm: Algorithm, rows: int, devices: int):
        self.num_updates = num_updates(config)
        self.steps_per_update = config["NUM_ENVS"] * config["NUM_STEPS"]
        self._rows = rows
        self._mesh = Mesh(np.array(jax.local_devices()[:devices]), ROWS)
        self._must_be_finite = (*INPUTS, *algorithm.must_be_finite)

        def init(traced: dict[str, jax.Array], key: jax.Array) -> RunnerState:
            return make_init_and_update({**config, **traced}, algorithm)[0](key)

        def update(traced: dict[str, jax.Array], state: RunnerState):
            state, metrics = make_init_and_update({**config, **traced}, algorithm)[1](state)
            return state, metrics | running_episodes(state, config["NUM_STEPS"])

        self._init = self._mapped(init)
        self._update = self._mapped(update, donate_argnums=1)
        self._shapes = partial(jax.eval_shape, jax.vmap(init))

    def _mapped(self, function: Callable, **options: Any) -> Callable:
        rows = jax.vmap(function)
        if self._mesh.size > 1:
            rows = jax.shard_map(
                rows, mesh=self._mesh, in_specs=BY_ROW, out_specs=BY_ROW, check_vma=False
            )
        return jax.jit(rows, **options)

    def init(self, rows: list[Row]) -> RunnerState:
        """Fresh agents, leaves (len(rows), ...) in the host's memory."""
        seeds = jnp.array([row.seed for row in self._full(rows)], jnp.uint32)
        keys = self._place(jax.vmap(jax.random.key)(seeds))
        return self.to_host(self._init(self._traced(rows), keys), len(rows))

    def shapes(self, rows: list[Row]) -> RunnerState:
        """`init`'s result in shapes, leaves (len(rows), ...)."""
        keys = jax.vmap(jax.random.key)(jnp.zeros(len(rows), jnp.uint32))
        return self._shapes(stacked([row.traced for row in rows]), keys)

    def load(self, rows: list[Row], state: RunnerState) -> "Chunk":
        """Agents on the devices, ready to train."""
        padded = jax.tree.map(self._pad, state)
        return Chunk(self, len(rows), self._traced(rows), self._place(padded))

    def step(self, traced: Any, state: RunnerState) -> tuple[RunnerState, Metrics]:
        """An update of a whole chunk; metrics {name: (rows,)}, on the devices."""
        return self._update(traced, state)

    def seen(self, metrics: Metrics, number: int) -> Seen:
        """Of the first `number` rows; no other metrics leave the devices."""
        names = {*self._must_be_finite, *RUNNING, "returned_episode_returns", "num_episodes"}
        here: dict[str, np.ndarray] = jax.device_get({name: metrics[name] for name in names})
        whole = np.all([np.isfinite(here[name]) for name in self._must_be_finite], axis=0)
        returns, episodes = here["returned_episode_returns"], here["num_episodes"]
        running = [
            Running(int(n), float(mean))
            for n, mean in zip(*(here[x] for x in RUNNING), strict=True)
        ]
        return Seen(returns[:number], episodes[:number], whole[:number], running[:number])

    def _traced(self, rows: list[Row]) -> dict[str, jax.Array]:
        return self._place(stacked([row.traced for row in self._full(rows)]))

    def _full(self, rows: list[Row]) -> list[Row]:
        return rows + rows[-1:] * (self._rows - len(rows))

    def _pad(self, x: jax.Array) -> jax.Array:
        missing = self._rows - len(x)
        return jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]) if missing else x

    def _place(self, tree: Any) -> Any:
        """Copies whole chunks to the devices, rows over all of them."""
        sharding = NamedSharding(self._mesh, BY_ROW)
        return jax.tree.map(lambda x: jax.device_put(x, sharding, may_alias=False), tree)

    def to_host(self, state: RunnerState, number: int) -> RunnerState:
        """The first rows of a chunk's state, in the host's memory."""
        host = host_device()
        with jax.default_device(host):
            # Copied, since the next update takes the arrays for its own.
            state = jax.device_put(state, host, may_alias=False)
            return jax.tree.map(lambda x: x[:number], state)


class Chunk:
    """Rows that train together."""

    def __init__(self, programs: Programs, number: int, traced: Any, state: RunnerState):
        self._programs = programs
        self._number = number
        self._traced = traced
        self._state = state
        self._metrics: Metrics = {}

    def update(self) -> Seen:
        """An update of every row."""
        self._state, self._metrics = self._programs.step(self._traced, self._state)
        return self._programs.seen(self._metrics, self._number)

    def metrics(self) -> dict[str, np.ndarray]:
        """Returns a run's metrics of the last update, {name: (rows,)}."""
        here = jax.device_get({k: x for k, x in self._metrics.items() if k not in RUNNING})
        return {name: x[: self._number] for name, x in here.items()}

    def train_state(self, row: int) -> TrainState:
        """Of one row."""
        return jax.tree.map(lambda x: x[row], self._state.train_state)

    def state(self) -> RunnerState:
        """Of the rows, in the host's memory."""
        return self._programs.to_host(self._state, self._number)


def stacked(trees: list[dict[str, float]]) -> dict[str, jax.Array]:
    """Numbers of many rows as arrays (rows,) float32."""
    return {name: jnp.array([tree[name] for tree in trees], jnp.float32) for name in trees[0]}


def host_device() -> jax.Device:
    """Where agents wait that don't train."""
    return jax.local_devices(backend="cpu")[0]


def fork_random_streams(state: RunnerState, number: int) -> RunnerState:
    """A copy of a state whose random streams part from the original's."""

    def part(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return jnp.vectorize(jax.random.fold_in)(x, jnp.uint32(number))

    return jax.tree.map(part, state)


def chunk_members(config: dict[str, Any], seeds: int, population: int) -> int:
    """How many members of `seeds` rows each are in a chunk, where nobody says."""
    if jax.devices()[0].platform == "cpu":
        return min(OF_A_CPU, population)
    of_one = sum(need.size for need in least_needs({**config, "NUM_SEEDS": seeds}, 1))
    fitting = device_memory() * jax.local_device_count() // (FOR_ALL_ELSE * max(of_one, 1))
    return max(1, min(population, fitting))


FOR_ALL_ELSE = 4
"""How many times what a run holds at least it may take: environments, and what XLA adds."""
