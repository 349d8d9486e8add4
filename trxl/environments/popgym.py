"""POPGym: tasks that need memory, in three difficulties each.

A JAX implementation of Morad et al. 2023, "POPGym: Benchmarking Partially Observable Reinforcement
Learning" (arXiv 2303.01859). Tests compare each task with the original. The two labyrinths are left
out: their generator does not vectorise, and the original documents that they need no memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trxl.environments import popgym_boards as boards
from trxl.environments import popgym_cards as cards
from trxl.environments.adapters import check_env_kwargs, import_suite
from trxl.environments.base import SingleEnvironment
from trxl.spaces import ActionSpace, Box, Discrete, MultiDiscrete, encode_action

LEVELS = ("Easy", "Medium", "Hard")


class Swing(SingleEnvironment):
    """Gymnax's CartPole or Pendulum, partially observed, with optional noise.

    Args:
      limit: steps until truncation.
      noise: standard deviation of noise on the observation, which is then clipped to `bounds`.
    """

    task: str
    bounds: tuple[float, ...]
    """Largest absolute values of an observation's entries."""

    def __init__(self, limit: int, noise: float = 0.0):
        self._env, self._params = import_suite("gymnax").make(self.task)
        self.limit, self.noise = limit, noise
        self.obs_size = len(self.bounds)

    def reset(self, key: jax.Array):
        key, noise_key = jax.random.split(key)
        _, physics = self._env.reset_env(key, self._params)
        state = {"physics": physics, "steps": jnp.int32(0)}
        return self._seen(noise_key, self.first(physics)), state

    def step(self, key: jax.Array, state: Any, action: jax.Array):
        key, noise_key = jax.random.split(key)
        _, physics, reward, failed, _ = self._env.step_env(
            key, state["physics"], action, self._params
        )
        state = {"physics": physics, "steps": state["steps"] + 1}
        obs = self._seen(noise_key, self.see(physics))
        truncated = state["steps"] >= self.limit
        return obs, state, self.scaled(reward), failed, truncated, {}

    def see(self, physics: Any) -> list[jax.Array]:
        """Returns the entries of an observation."""
        raise NotImplementedError

    def first(self, physics: Any) -> list[jax.Array]:
        """Returns the entries of an episode's first observation."""
        return self.see(physics)

    def scaled(self, reward: jax.Array) -> jax.Array:
        """Converts a reward of Gymnax to POPGym's scale."""
        raise NotImplementedError

    def _seen(self, key: jax.Array, numbers: list[jax.Array]) -> jax.Array:
        obs = jnp.stack(numbers).astype(jnp.float32).reshape(-1)
        if not self.noise:
            return obs
        bounds = jnp.array(self.bounds)
        noisy = obs + self.noise * jax.random.normal(key, obs.shape)
        return jnp.clip(noisy, -bounds, bounds)


class PositionOnlyCartPole(Swing):
    """CartPole without velocities."""

    task = "CartPole-v1"
    bounds = (4.8, 0.41887903)
    action_space = Discrete(2)

    def see(self, physics):
        return [physics.x, physics.theta]

    def scaled(self, reward):
        return jnp.float32(1 / self.limit)


class VelocityOnlyCartPole(PositionOnlyCartPole):
    """CartPole without positions, except, as in the original, in the first observation."""

    def see(self, physics):
        return [physics.x_dot, physics.theta_dot]

    def first(self, physics):
        return [physics.x, physics.theta]


class PositionOnlyPendulum(Swing):
    """Pendulum without velocity."""

    task = "Pendulum-v1"
    bounds = (1.0, 1.0)
    action_space = Box((-2.0,), (2.0,))

    def see(self, physics):
        return [jnp.cos(physics.theta), jnp.sin(physics.theta)]

    def scaled(self, reward):
        half = 16.2736044 / 2
        return (reward + half) / half / self.limit


FAMILIES: dict[str, tuple[Callable[..., SingleEnvironment], tuple, tuple, tuple]] = {
    "Autoencode": (cards.Autoencode, (1,), (2,), (3,)),
    "Battleship": (boards.Battleship, (8,), (10,), (12,)),
    "Concentration": (cards.Concentration, (1, "colors"), (2, "colors"), (1, "ranks")),
    "CountRecall": (cards.CountRecall, (1, "colors"), (2, "suits"), (4, "ranks")),
    "HigherLower": (cards.HigherLower, (1,), (2,), (3,)),
    "MineSweeper": (boards.MineSweeper, (4, 2), (6, 6), (8, 10)),
    "MultiarmedBandit": (boards.MultiarmedBandit, (10, 200), (20, 400), (30, 600)),
    "NoisyPositionOnlyCartPole": (PositionOnlyCartPole, (200, 0.1), (200, 0.2), (200, 0.3)),
    "NoisyPositionOnlyPendulum": (PositionOnlyPendulum, (200, 0.1), (200, 0.2), (200, 0.3)),
    "PositionOnlyCartPole": (PositionOnlyCartPole, (200,), (400,), (600,)),
    "PositionOnlyPendulum": (PositionOnlyPendulum, (200,), (150,), (100,)),
    "RepeatFirst": (cards.RepeatFirst, (1,), (8,), (16,)),
    "RepeatPrevious": (cards.RepeatPrevious, (1, 4), (2, 32), (3, 64)),
    "VelocityOnlyCartPole": (VelocityOnlyCartPole, (200,), (400,), (600,)),
}
"""Environment of each family, and its arguments for each of LEVELS."""

NAMES = [f"{family}{level}" for family in FAMILIES for level in LEVELS]


def registered() -> list[str]:
    """Returns all names."""
    return NAMES


def make(name: str, env_kwargs: dict[str, Any]) -> SingleEnvironment:
    """Makes a task with the observations of POPGym's own baselines, see `WithAction`.

    Raises:
      ConfigError: `env_kwargs` is not empty.
    """
    check_env_kwargs(name, env_kwargs, [])
    return WithAction(bare(name))


def bare(name: str) -> SingleEnvironment:
    """Makes a task without `WithAction`."""
    (level,) = (level for level in LEVELS if name.endswith(level))
    kind, *arguments = FAMILIES[name.removesuffix(level)]
    return kind(*arguments[LEVELS.index(level)])


def no_action(space: ActionSpace) -> jax.Array:
    """Returns action 0."""
    match space:
        case Discrete():
            return jnp.int32(0)
        case MultiDiscrete():
            return jnp.zeros(len(space.sizes), jnp.int32)
        case Box():
            return jnp.zeros(space.size)


class WithAction(SingleEnvironment):
    """Prepends a flag of an episode's first step, and the previous action, to observations.

    These are the wrappers Antialias and PreviousAction of the original's baselines. In the first
    step the previous action is 0.
    """

    def __init__(self, env: SingleEnvironment):
        self._env = env
        self.action_space = env.action_space
        self.obs_size = 1 + env.action_space.num_outputs + env.obs_size
        real = isinstance(env.action_space, Box)
        self.num_binary = 1 if real else 1 + env.action_space.num_outputs + env.num_binary

    def reset(self, key: jax.Array):
        obs, state = self._env.reset(key)
        return self._extend(obs, True, no_action(self.action_space)), state

    def step(self, key: jax.Array, state: Any, action: jax.Array):
        obs, *rest = self._env.step(key, state, action)
        return self._extend(obs, False, action), *rest

    def _extend(self, obs: jax.Array, first: bool, action: jax.Array) -> jax.Array:
        encoded = encode_action(self.action_space, action)
        return jnp.concatenate([jnp.float32([first]), encoded, obs])
