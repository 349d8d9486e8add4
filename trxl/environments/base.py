"""Interface of a single environment: adapters of suites, and environments of your own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from trxl.errors import ConfigError
from trxl.spaces import ActionSpace, Grid


class Mirror(NamedTuple):
    """Symmetry of an environment.

    The mirrored action in the mirrored state must give the mirrored next state, the same reward and
    the same end.
    """

    obs: Callable[[jax.Array], jax.Array]
    """Mirrors an observation (obs_size,)."""
    action: Callable[[jax.Array], jax.Array]
    """Mirrors an action, shaped as in `SingleEnvironment.step`."""


ATTRIBUTES = (
    "action_space",
    "obs_size",
    "num_binary",
    "grid",
    "can_truncate",
    "episode_metrics",
    "num_agents",
    "episodes_per_trial",
    "previous_action_reward",
    "default_reset_strategy",
    "float64",
    "mirrors",
)
"""Attributes of a `SingleEnvironment`, which wrappers copy."""


class SingleEnvironment:
    """Environment of pure functions, without auto-reset.

    A subclass sets `action_space` and `obs_size`, and other attributes if they differ.
    """

    action_space: ActionSpace
    obs_size: int
    num_binary = 0
    """Number of leading entries of an observation that are always 0 or 1."""
    grid: Grid | None = None
    """Grid of cells within the binary entries of an observation."""
    can_truncate = True
    """Bootstrapping of truncated episodes. If False, truncation counts as termination."""
    episode_metrics: tuple[str, ...] = ()
    """Names in info whose values at an episode's end are averaged over episodes.

    In an environment of your own, () means every number in info.
    """
    num_agents: int | None = None
    """Number of agents, A; None for one agent without an axis, see `FlattenAgents`."""
    episodes_per_trial = 1
    """Number of episodes between two memory boundaries."""
    previous_action_reward = False
    """Value of PREV_ACTION_REWARD=None."""
    default_reset_strategy = "auto"
    float64 = True
    """Support of JAX_ENABLE_X64. False for suites, which always compute in float32."""

    mirrors: tuple[Mirror, ...] = ()
    """Symmetries that MIRRORS learns from."""

    @property
    def continues(self) -> bool:
        """Returns whether an episode continues the previous one."""
        return type(self).next_episode is not SingleEnvironment.next_episode

    def reset(self, key: jax.Array) -> tuple[jax.Array, Any]:
        """Returns a first observation (obs_size,) float32, and the state."""
        raise NotImplementedError

    def step(
        self, key: jax.Array, state: Any, action: jax.Array
    ) -> tuple[jax.Array, Any, jax.Array, jax.Array, jax.Array, dict[str, Any]]:
        """Takes a step.

        Args:
          action: () int for `Discrete`, (choices,) int for `MultiDiscrete`, (size,) float within
            its bounds for `Box`.

        Returns:
          obs (obs_size,), state, reward (), terminated () bool, truncated () bool, and info, a dict
          with an optional `memory_boundary` () bool.
        """
        raise NotImplementedError

    def next_episode(self, key: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Starts the episode after the one that ended in `state`; by default resets."""
        del state
        return self.reset(key)

    def agents_done(self, state: Any) -> jax.Array:
        """Returns (A,) bool, which agents have left the episode."""
        raise NotImplementedError

    def renderer(self) -> Callable[[Any], np.ndarray]:
        """Returns a function from a state to a picture (height, width, 3) uint8.

        Raises:
          ConfigError: the environment has no renderer.
        """
        raise ConfigError(f"{type(self).__name__} has no renderer")
