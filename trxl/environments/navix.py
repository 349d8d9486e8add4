"""Navix: MiniGrid in JAX."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from trxl.environments.adapters import (
    check_env_kwargs,
    choose,
    each,
    field_names,
    flatten_obs,
    import_suite,
    making,
    read_action_space,
)
from trxl.environments.base import SingleEnvironment

NAMES = [
    *each("Navix-Empty-{}-v0", "5x5 6x6 8x8 16x16"),
    *each("Navix-Empty-Random-{}-v0", "5x5 6x6 8x8 16x16"),
    *each("Navix-DoorKey-{}-v0", "5x5 6x6 8x8 16x16"),
    *each("Navix-DoorKey-Random-{}-v0", "5x5 6x6 8x8 16x16"),
    *each("Navix-KeyCorridor{}-v0", "S3R1 S3R2 S3R3 S4R3 S5R3 S6R3"),
    *each("Navix-LavaGap{}-v0", "S5 S6 S7"),
    *each("Navix-SimpleCrossing{}-v0", "S9N1 S9N2 S9N3 S11N5"),
    *each("Navix-Dynamic-Obstacles-{}-v0", "5x5 6x6 8x8 16x16 5x5-Random 6x6-Random"),
    *each("Navix-GoToDoor-{}-v0", "5x5 6x6 8x8"),
    *("Navix-FourRooms-v0", "Navix-DistShift1-v0", "Navix-DistShift2-v0"),
]


def registered() -> list[str]:
    """Returns the names in the installed Navix."""
    return list(import_suite("navix").registry())


def make(name: str, env_kwargs: dict[str, Any]) -> SingleEnvironment:
    """Makes an environment of Navix."""
    return NavixAdapter(name, env_kwargs)


class NavixAdapter(SingleEnvironment):
    """Environment of Navix, without auto-reset.

    ENV_KWARGS: `max_steps` and other fields of Navix's `Environment`. Functions such as
    `observation_fn` are given by name ("symbolic_first_person").
    """

    def __init__(self, name: str, env_kwargs: dict[str, Any]):
        navix = import_suite("navix")
        modules = {
            "observation_fn": navix.observations,
            "reward_fn": navix.rewards,
            "termination_fn": navix.terminations,
        }
        check_env_kwargs(name, env_kwargs, field_names(navix.environments.Environment))
        env_kwargs = {
            key: choose(key, value, vars(modules[key])) if key in modules else value
            for key, value in env_kwargs.items()
        }
        attempt = making(name, env_kwargs)
        self._env = attempt(lambda: navix.make(name, **env_kwargs))
        self.action_space = read_action_space(name, self._env.action_space)
        self.obs_size = attempt(lambda: jax.eval_shape(self.reset, jax.random.key(0)))[0].size
        self._draw = jax.jit(navix.observations.rgb)

    def reset(self, key: jax.Array):
        timestep = self._env.reset(key)
        return flatten_obs([timestep.observation]), timestep

    def step(self, key: jax.Array, state: Any, action: jax.Array):
        # `step` would reset after a last timestep.
        timestep = self._env._step(state, action)
        ends = timestep.is_termination(), timestep.is_truncation()
        return flatten_obs([timestep.observation]), timestep, timestep.reward, *ends, {}

    def renderer(self) -> Callable[[Any], np.ndarray]:
        """Returns Navix's own renderer, from a state to (height, width, 3) uint8."""
        return lambda timestep: np.asarray(self._draw(timestep.state))
