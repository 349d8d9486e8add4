"""POPGym: tasks that take a memory, in three difficulties each.

Morad et al. 2023, "POPGym: Benchmarking Partially Observable Reinforcement Learning" (arXiv
2303.01859), written anew for JAX; the tests play each beside the original. The two labyrinths are
left out: they come from a generator that does not vectorise, and the original itself says that
they can be solved without a memory.
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
    """Gymnax's CartPole or Pendulum, of which only some numbers are seen, maybe with noise.

    Args:
      limit: steps until the episode is cut off.
      noise: standard deviation of what is added to the observation, which is then clipped.
    """

    task: str
    bounds: tuple[float, ...]
    """Of the numbers that are seen, up and down."""

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
        """The numbers that the agent sees."""
        raise NotImplementedError

    def first(self, physics: Any) -> list[jax.Array]:
        """Returns the entries of an episode's first observation."""
        return self.see(physics)

    def scaled(self, reward: jax.Array) -> jax.Array:
        """A reward of Gymnax's as POPGym's."""
        raise NotImplementedError

    def _seen(self, key: jax.Array, numbers: list[jax.Array]) -> jax.Array:
        obs = jnp.stack(numbers).astype(jnp.float32).reshape(-1)
        if not self.noise:
            return obs
        bounds = jnp.array(self.bounds)
        noisy = obs + self.noise * jax.random.normal(key, obs.shape)
        return jnp.clip(noisy, -bounds, bounds)


class PositionOnlyCartPole(Swing):
    """CartPole without its velocities."""

    task = "CartPole-v1"
    bounds = (4.8, 0.41887903)
    action_space = Discrete(2)

    def see(self, physics):
        return [physics.x, physics.theta]

    def scaled(self, reward):
        return jnp.float32(1 / self.limit)


class VelocityOnlyCartPole(PositionOnlyCartPole):
    """CartPole without its positions, which, as in the original, are what is seen first."""

    def see(self, physics):
        return [physics.x_dot, physics.theta_dot]

    def first(self, physics):
        return [physics.x, physics.theta]


class PositionOnlyPendulum(Swing):
    """Pendulum without its velocity."""

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
"""By the name of a family its environment, and its arguments in each of LEVELS."""

NAMES = [f"{family}{level}" for family in FAMILIES for level in LEVELS]


def registered() -> list[str]:
    """The names that there are."""
    return NAMES


def make(name: str, env_kwargs: dict[str, Any]) -> SingleEnvironment:
    """A task as POPGym's own baselines see it, see `WithAction`; it takes no ENV_KWARGS.

    Raises:
      ConfigError: there are some.
    """
    check_env_kwargs(name, env_kwargs, [])
    return WithAction(bare(name))


def bare(name: str) -> SingleEnvironment:
    """A task without what its baselines add."""
    (level,) = (level for level in LEVELS if name.endswith(level))
    kind, *arguments = FAMILIES[name.removesuffix(level)]
    return kind(*arguments[LEVELS.index(level)])


def no_action(space: ActionSpace) -> jax.Array:
    """The action 0."""
    match space:
        case Discrete():
            return jnp.int32(0)
        case MultiDiscrete():
            return jnp.zeros(len(space.sizes), jnp.int32)
        case Box():
            return jnp.zeros(space.size)


class WithAction(SingleEnvironment):
    """Puts a flag of an episode's first step and the previous action before the observation.

    The original's baselines add both (its wrappers PreviousAction and Antialias); the action before
    the first is 0.
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
