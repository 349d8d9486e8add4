"""XLand-MiniGrid: MiniGrid tasks, and meta-reinforcement-learning on rulesets.

Nikulin et al. 2024, "XLand-MiniGrid" (arXiv 2312.12044).
"""

import bz2
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trxl.environments.adapters import (
    check_env_kwargs,
    each,
    field_names,
    flatten_obs,
    import_suite,
    making,
)
from trxl.environments.base import Mirror, SingleEnvironment
from trxl.environments.custom import find
from trxl.errors import ConfigError, one_line, shortened
from trxl.results import unpickle_arrays
from trxl.spaces import Discrete, Grid

NAMES = [
    *each("XLand-MiniGrid-R1-{0}x{0}", "9 11 13 15 17"),
    *each("XLand-MiniGrid-R2-{0}x{0}", "9 11 13 15 17"),
    *each("XLand-MiniGrid-R4-{0}x{0}", "9 11 13 15 17"),
    *each("XLand-MiniGrid-R6-{0}x{0}", "13 17 19"),
    *each("XLand-MiniGrid-R9-{0}x{0}", "16 19 25"),
    *each("MiniGrid-DoorKey-{0}x{0}", "5 6 8 16"),
    *each("MiniGrid-Empty-{0}x{0}", "5 6 8 16"),
    *each("MiniGrid-EmptyRandom-{0}x{0}", "5 6 8 16"),
    *each("MiniGrid-MemoryS{}", "8 16 32 64 128"),
    *each("MiniGrid-{}", "BlockedUnlockPickUp FourRooms LockedRoom Playground Unlock"),
    "MiniGrid-UnlockPickUp",
]

OF_A_TRIAL: dict[str, Any] = {
    "benchmark": "",
    "episodes_per_trial": 10,
    "held_out": 0.0,
    "split": "train",
    "show_episode": False,
}

SPLITS = ("train", "held_out")


def registered() -> list[str]:
    """Returns the names in the installed XLand-MiniGrid."""
    return list(import_suite("xminigrid").registered_environments())


def make(name: str, env_kwargs: dict[str, Any]) -> SingleEnvironment:
    """Makes a MiniGrid task, or trials of XLand-MiniGrid.

    ENV_KWARGS are `height`, `width`, `view_size` and `max_steps`. Trials also have:

    | name | default | meaning |
    | --- | --- | --- |
    | `benchmark` | | name of a benchmark of xminigrid, or path of a benchmark file |
    | `episodes_per_trial` | 10 | |
    | `show_episode` | False | add the episode's index in the trial to observations, one-hot |
    | `held_out` | 0.0 | share of rulesets held out for evaluation |
    | `split` | "train" | "train" or "held_out" rulesets |

    Raises:
      ConfigError: an argument is invalid.
    """
    return (Trials if name.startswith("XLand-") else Task)(name, env_kwargs)


class Task(SingleEnvironment):
    """MiniGrid task, observed as one-hot tiles and colours in view, and the agent's direction.

    Logs `success`: 1 for an episode that ended with a reward, else 0.
    """

    episode_metrics: tuple[str, ...] = ("success",)
    extra: tuple[str, ...] = ()
    """Names in ENV_KWARGS besides xminigrid's parameters."""

    def __init__(self, name: str, env_kwargs: dict[str, Any]):
        xminigrid = import_suite("xminigrid")
        constants = import_suite("xminigrid.core.constants")
        known = field_names(import_suite("xminigrid.environment").EnvParams)
        check_env_kwargs(name, env_kwargs, [*(k for k in known if k != "render_mode"), *self.extra])
        attempt = making(name, env_kwargs)
        of_params = {key: value for key, value in env_kwargs.items() if key in known}
        self._env, self._params = attempt(lambda: xminigrid.make(name, **of_params))
        self._categories = constants.NUM_TILES, constants.NUM_COLORS
        self.action_space = Discrete(self._env.num_actions(self._params))
        self.obs_size = attempt(lambda: jax.eval_shape(self.reset, jax.random.key(0)))[0].size
        self.num_binary = self.obs_size
        view = self._params.view_size
        self.grid = Grid(0, view, view, tuple((n,) for n in self._categories))
        if view % 2:  # the agent is in the middle of its view
            self.mirrors = (upside_down(self.grid),)

    def reset(self, key: jax.Array):
        timestep = self._env.reset(self._params, key)
        return self._observe(timestep), timestep

    def step(self, key: jax.Array, state: Any, action: jax.Array):
        return self._step(self._params, state, action)

    def renderer(self) -> Callable[[Any], np.ndarray]:
        """Returns xminigrid's own renderer, from a state to (height, width, 3) uint8."""
        return lambda state: np.asarray(self._env.render(self._params, state))

    def _step(self, params: Any, timestep: Any, action: jax.Array):
        timestep = self._env.step(params, timestep, action)
        terminated = timestep.last() & (timestep.discount == 0)
        truncated = timestep.last() & ~terminated
        info = {"success": (timestep.reward > 0).astype(jnp.float32)}
        obs = self._observe(timestep)
        return obs, timestep, timestep.reward, terminated, truncated, info

    def _observe(self, timestep: Any) -> jax.Array:
        tiles, colors = (
            jax.nn.one_hot(timestep.observation[..., layer], categories)
            for layer, categories in enumerate(self._categories)
        )
        return flatten_obs([tiles, colors, jax.nn.one_hot(timestep.state.agent.direction, 4)])


def upside_down(grid: Grid) -> Mirror:
    """Makes the symmetry that flips the rows of the world.

    The agent always looks up in its view, so this flips the view's columns.

    Args:
      grid: the view, at the start of the observation; the direction follows.
    """
    down_to_up = np.array([2, 1, 0, 3])  # of up, right, down and left
    other_turn = np.array([0, 2, 1, 3, 4, 5])  # actions 1 and 2 turn clockwise and back

    def mirror_obs(obs: jax.Array) -> jax.Array:
        view, direction = obs[: grid.size], obs[grid.size :]
        return jnp.concatenate([grid.flatten(jnp.flip(grid.join(view), 1)), direction[down_to_up]])

    return Mirror(mirror_obs, lambda action: jnp.asarray(other_turn)[action])


class Trial(NamedTuple):
    """State of a trial."""

    ruleset: Any
    episode: jax.Array  # () int32, from 0
    timestep: Any


class Trials(Task):
    """Trials for meta-reinforcement-learning: several episodes under one hidden ruleset.

    A trial samples a ruleset (goal, rules, objects) from the benchmark. Its episodes differ in the
    objects' positions. The memory boundary is the trial's end. Observations also have a flag of an
    episode's first step. By default they include the previous action and reward (Duan et al. 2016,
    "RL^2", arXiv 1611.02779).

    Logs `trial_return/episode_<i>`, i from 1: the return of a trial's i-th episode.
    """

    previous_action_reward = True
    extra = tuple(OF_A_TRIAL)

    def __init__(self, name: str, env_kwargs: dict[str, Any]):
        chosen = OF_A_TRIAL | {key: value for key, value in env_kwargs.items() if key in OF_A_TRIAL}
        self.episodes_per_trial = chosen["episodes_per_trial"]
        if type(self.episodes_per_trial) is not int or self.episodes_per_trial < 1:
            raise ConfigError("ENV_KWARGS: episodes_per_trial must be a whole number from 1 on")
        self._shows = bool(chosen["show_episode"])
        rulesets = load_rulesets(name, chosen["benchmark"])
        self._rulesets = split_rulesets(rulesets, chosen["held_out"], chosen["split"])
        super().__init__(name, env_kwargs)
        self.mirrors = ()  # goals and rules name directions
        self.episode_metrics += tuple(map(self._metric, range(self.episodes_per_trial)))

    def reset(self, key: jax.Array):
        ruleset_key, key = jax.random.split(key)
        return self._start(key, self._rulesets.sample_ruleset(ruleset_key), jnp.int32(0))

    def next_episode(self, key: jax.Array, state: Trial):
        """Starts the trial's next episode, or the first of the next trial."""
        ruleset_key, key = jax.random.split(key)
        episode = (state.episode + 1) % self.episodes_per_trial
        fresh = self._rulesets.sample_ruleset(ruleset_key)
        ruleset = jax.tree.map(lambda a, b: jnp.where(episode, a, b), state.ruleset, fresh)
        return self._start(key, ruleset, episode)

    def step(self, key: jax.Array, state: Trial, action: jax.Array):
        params = self._params.replace(ruleset=state.ruleset)
        obs, timestep, reward, terminated, truncated, info = self._step(
            params, state.timestep, action
        )
        obs = self._with_episode(obs, state.episode)
        # Only the last step has a reward, so this is the episode's return.
        for episode in range(self.episodes_per_trial):
            info[self._metric(episode)] = jnp.where(state.episode == episode, reward, jnp.nan)
        last = state.episode == self.episodes_per_trial - 1
        info["memory_boundary"] = (terminated | truncated) & last
        state = state._replace(timestep=timestep)
        return obs, state, reward, terminated, truncated, info

    def renderer(self) -> Callable[[Any], np.ndarray]:
        """Returns the task's renderer, for the current episode."""
        render = super().renderer()
        return lambda trial: render(trial.timestep)

    def _start(self, key: jax.Array, ruleset: Any, episode: jax.Array):
        timestep = self._env.reset(self._params.replace(ruleset=ruleset), key)
        obs = self._with_episode(self._observe(timestep), episode)
        return obs, Trial(ruleset, episode, timestep)

    def _with_episode(self, obs: jax.Array, episode: jax.Array) -> jax.Array:
        shown = [jax.nn.one_hot(episode, self.episodes_per_trial)] if self._shows else []
        return jnp.concatenate([obs, *shown])

    def _observe(self, timestep: Any) -> jax.Array:
        return flatten_obs([super()._observe(timestep), timestep.first()])

    def _metric(self, episode: int) -> str:
        return f"trial_return/episode_{episode + 1}"


def load_rulesets(name: str, benchmark: str) -> Any:
    """Loads xminigrid's `Benchmark` of that name, which xminigrid downloads, or a file.

    Raises:
      ConfigError: the benchmark is unknown, can't be loaded, or the file holds no rulesets.
    """
    benchmarks = import_suite("xminigrid.benchmarks")
    names = benchmarks.registered_benchmarks()
    if benchmark in names:
        return making(name, {"benchmark": benchmark})(lambda: benchmarks.load_benchmark(benchmark))
    path = find(Path(benchmark))
    if path is None:
        raise ConfigError(
            f"{name} needs rulesets: ENV_KWARGS={{'benchmark': ...}} with one of"
            f" {', '.join(names)} or the path of a file; {shortened(benchmark)} is neither"
        )
    try:
        with bz2.open(path) as file:
            content = unpickle_arrays(file)
        arrays = {key: jnp.asarray(content[key]) for key in benchmarks.Benchmark.__annotations__}
    except Exception as error:  # a broken file raises almost anything
        raise ConfigError(f"{benchmark} is not a file of rulesets: {one_line(error)}") from error
    return benchmarks.Benchmark(**arrays)


def split_rulesets(rulesets: Any, held_out: float, split: str) -> Any:
    """Returns the training or the held-out part of a `Benchmark`.

    The split depends only on the number of rulesets and the share. So training and evaluation never
    overlap.

    Raises:
      ConfigError: the share is invalid, or the part is empty.
    """
    share = isinstance(held_out, int | float) and 0 <= held_out < 1
    if not share:
        raise ConfigError(f"ENV_KWARGS: held_out is {shortened(held_out)}, but must be in [0, 1)")
    if split not in SPLITS:
        raise ConfigError(
            f"ENV_KWARGS: split is {shortened(split)}, not one of {', '.join(SPLITS)}"
        )
    number = rulesets.num_rulesets()
    kept = round(number * held_out)
    shuffled = np.random.default_rng(0).permutation(number)  # equal in every process
    chosen = np.sort(shuffled[:kept] if split == "held_out" else shuffled[kept:])
    if not len(chosen):
        raise ConfigError(
            f"ENV_KWARGS: held_out={held_out} of {number} rulesets leaves none to {split}"
        )
    return jax.tree.map(lambda x: x[chosen], rulesets)
