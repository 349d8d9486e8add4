"""Brax: continuous control."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from trxl.environments.adapters import (
    argument_names,
    check_env_kwargs,
    flatten_obs,
    import_suite,
    make_box,
    making,
)
from trxl.environments.base import SingleEnvironment

NAMES = [
    *("ant", "fast", "halfcheetah", "hopper", "humanoid", "humanoidstandup", "pusher"),
    *("inverted_double_pendulum", "inverted_pendulum", "reacher", "swimmer", "walker2d"),
]


def registered() -> list[str]:
    """Returns the names in the installed Brax."""
    return list(import_suite("brax.envs")._envs)


def make(name: str, env_kwargs: dict[str, Any]) -> SingleEnvironment:
    """Makes an environment of Brax."""
    return BraxAdapter(name, env_kwargs)


class BraxAdapter(SingleEnvironment):
    """Environment of Brax under its `EpisodeWrapper`, whose time limit truncates.

    ENV_KWARGS: `episode_length` (1000), `action_repeat` (1), and arguments of the environment's
    constructor such as `backend`.
    """

    def __init__(self, name: str, env_kwargs: dict[str, Any]):
        envs = import_suite("brax.envs")
        wrapper = import_suite("brax.envs.wrappers.training").EpisodeWrapper
        limits = {"episode_length": 1000, "action_repeat": 1}
        known = [*limits, *argument_names(envs._envs[name]), "n_frames"]
        check_env_kwargs(name, env_kwargs, known)
        limits |= {key: env_kwargs[key] for key in limits if key in env_kwargs}
        of_constructor = {key: value for key, value in env_kwargs.items() if key not in limits}
        attempt = making(name, env_kwargs)
        mend_fluid()
        self._env = wrapper(attempt(lambda: envs.get_environment(name, **of_constructor)), **limits)
        self.action_space = make_box(-1, 1, (self._env.action_size,))
        self.obs_size = attempt(lambda: jax.eval_shape(self.reset, jax.random.key(0)))[0].size

    def reset(self, key: jax.Array):
        state = self._env.reset(key)
        return flatten_obs(jax.tree.leaves(state.obs)), state

    def step(self, key: jax.Array, state: Any, action: jax.Array):
        state = self._env.step(state, action)
        truncated = state.info["truncation"].astype(bool)
        terminated = state.done.astype(bool) & ~truncated
        obs = flatten_obs(jax.tree.leaves(state.obs))
        return obs, state, state.reward, terminated, truncated, {}


def mend_fluid() -> None:
    """Fixes `swimmer`: Brax 0.14.2 passes `clip` an argument name that JAX has removed."""

    def clip(x: jax.Array, a_min: Any = None, a_max: Any = None) -> jax.Array:
        return jnp.clip(x, a_min, a_max)

    mended = SimpleNamespace(**{**vars(jnp), "clip": clip})
    vars(import_suite("brax.fluid"))["jp"] = mended
