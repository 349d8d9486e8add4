"""Trials of several episodes: what the agent sees of the end of one, and what it keeps of it.

An environment that resets itself shows the next episode's first observation in the step in which
one ends; where the agent was when the reward came it has to infer. `EPISODE_END` says what else it
sees, and without `TRIAL_MEMORY` it starts every episode with nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spaces import mask_size
from wrappers import SingleEnvironment, Wrapper


class ForgottenEpisodes(Wrapper):
    """Trials in which every episode's end empties the memory, as if it were the trial's."""

    def step(self, keys: jax.Array, state: Any, action: jax.Array):
        obs, state, reward, done, info = self._env.step(keys, state, action)
        return obs, state, reward, done, {k: v for k, v in info.items() if k != "memory_boundary"}


class EndBeside(Wrapper):
    """The last observation of an episode beside the first of the next one of the same trial.

    Below every other observation there are zeros. A mask of actions is not repeated.
    """

    def __init__(self, env):
        super().__init__(env)
        self._mask = mask_size(env.action_space)
        self.obs_size = 2 * env.obs_size - self._mask
        binary = env.num_binary == env.obs_size
        self.num_binary = self.obs_size if binary else env.num_binary

    def reset(self, keys: jax.Array):
        obs, state = self._env.reset(keys)
        return self._extend(obs, jnp.zeros_like(obs)), state

    def step(self, keys: jax.Array, state: Any, action: jax.Array):
        obs, state, reward, done, info = self._env.step(keys, state, action)
        last = info["final_observation"]
        shown = done & ~info.get("memory_boundary", done)
        info["final_observation"] = self._extend(last, jnp.zeros_like(last))
        return self._extend(obs, last * shown[:, None]), state, reward, done, info

    def _extend(self, obs: jax.Array, last: jax.Array) -> jax.Array:
        return jnp.concatenate([obs, last[:, self._mask :]], axis=-1)


class ShownEndState(NamedTuple):
    """Where an environment stands, and whether it shows an end."""

    env_state: Any
    obs: jax.Array  # (obs_size,), the newest
    boundary: jax.Array  # () bool, whether a trial ended with it
    waiting: jax.Array  # () bool, whether the next step begins an episode


class ShownEnd(SingleEnvironment):
    """A step between two episodes of a trial, from the last observation to the next first one.

    Its action changes nothing and its reward is 0; it counts as the first of the next episode.
    Between two trials there is none.
    """

    SAME = (
        *("action_space", "obs_size", "num_binary", "grid", "can_truncate", "episode_metrics"),
        *("episodes_per_trial", "previous_action_reward", "num_agents"),
    )

    def __init__(self, env: SingleEnvironment):
        self._env = env
        for name in self.SAME:
            setattr(self, name, getattr(env, name))

    def reset(self, key: jax.Array):
        return self._at(*self._env.reset(key))

    def step(self, key: jax.Array, state: ShownEndState, action: jax.Array):
        step_key, next_key = jax.random.split(key)
        obs, env_state, *ends, info = self._env.step(step_key, state.env_state, action)
        begun = self._at(*self._env.next_episode(next_key, state.env_state))
        ended = ends[1] | ends[2]
        boundary = info.get("memory_boundary", ended)
        went_on = obs, ShownEndState(env_state, obs, boundary, jnp.bool_(False))
        obs, after = choose(state.waiting, begun, went_on)
        reward, terminated, truncated = (choose(state.waiting, jnp.zeros_like(x), x) for x in ends)
        info["memory_boundary"] = boundary & ~state.waiting
        return obs, after, reward, terminated, truncated, info

    def next_episode(self, key: jax.Array, state: ShownEndState):
        fresh = self._at(*self._env.next_episode(key, state.env_state))
        return choose(state.boundary, fresh, (state.obs, state._replace(waiting=jnp.bool_(True))))

    def out(self, state: ShownEndState) -> jax.Array:
        return self._env.out(state.env_state)

    def renderer(self) -> Callable[[Any], np.ndarray]:
        render = self._env.renderer()
        return lambda state: render(state.env_state)

    def _at(self, obs: jax.Array, env_state: Any) -> tuple[jax.Array, ShownEndState]:
        no = jnp.bool_(False)
        return obs, ShownEndState(env_state, obs, no, no)


def choose(condition: jax.Array, if_true: Any, if_false: Any) -> Any:
    """One of two trees."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), if_true, if_false)
