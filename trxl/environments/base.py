"""Interface of a single environment, which every suite's adapter and one of your own has."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from trxl.errors import ConfigError
from trxl.spaces import ActionSpace, Grid

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
)
"""Attributes of a `SingleEnvironment`, which one around another passes on."""


class SingleEnvironment:
    """An environment, pure functions of JAX, that does not reset itself.

    Every adapter is one, and so is an environment of your own; it sets `action_space` and
    `obs_size`, and others of these attributes where they are different.
    """

    action_space: ActionSpace
    obs_size: int
    num_binary = 0
    """So many leading entries of an observation are always 0 or 1."""
    grid: Grid | None = None
    """The grid of cells that an observation holds, among its binary entries."""
    can_truncate = True
    """Whether truncation is told from termination; if not, it counts as one."""
    episode_metrics: tuple[str, ...] = ()
    """Names in info whose values at an episode's end are averaged over episodes.

    In an environment of your own, () means every number in info.
    """
    num_agents: int | None = None
    """With several agents, how many; then see `FlattenAgents`."""
    episodes_per_trial = 1
    """How many episodes there are between two memory boundaries."""
    previous_action_reward = False
    """What PREV_ACTION_REWARD=None means."""
    default_reset_strategy = "auto"
    float64 = True
    """Whether JAX_ENABLE_X64 is for it too; a suite's computes in float32 in any case."""

    @property
    def continues(self) -> bool:
        """Tells whether an episode builds on the one before it."""
        return type(self).next_episode is not SingleEnvironment.next_episode

    def reset(self, key: jax.Array) -> tuple[jax.Array, Any]:
        """A first observation (obs_size,) float32, and the state."""
        raise NotImplementedError

    def step(
        self, key: jax.Array, state: Any, action: jax.Array
    ) -> tuple[jax.Array, Any, jax.Array, jax.Array, jax.Array, dict[str, Any]]:
        """Takes a step.

        Args:
          action: () int for `Discrete` actions, else (choices,) int or (size,) float; numbers of a
            `Box` come within its bounds.

        Returns:
          obs, state, reward (), terminated () bool, truncated () bool, and the dict info, which may
          have `memory_boundary` () bool.
        """
        raise NotImplementedError

    def next_episode(self, key: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Starts the episode after one that ended in `state`: by default a reset."""
        del state
        return self.reset(key)

    def agents_done(self, state: Any) -> jax.Array:
        """Returns (A,) bool, which of several agents have left the episode."""
        raise NotImplementedError

    def renderer(self) -> Callable[[Any], np.ndarray]:
        """A function from a state to its picture (height, width, 3), uint8.

        Raises:
          ConfigError: there is none for this environment.
        """
        raise ConfigError(f"{type(self).__name__} has no renderer")
