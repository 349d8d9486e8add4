"""What an environment is, and wrappers around a batch of them: returns, agents as rows, inputs.

A `SingleEnvironment`, a suite's adapter or one of your own, does not reset itself. The reset
strategies of resets.py turn it into B environments in which a finished one starts its next episode
in that very step:

    reset(keys) -> (obs, state)
    step(keys, state, action) -> (obs, state, reward, done, info)

with `info["terminated"]`, `info["truncated"]` and, where the environment can truncate,
`info["final_observation"]`: what the step returned before the reset. Keys are (B,), one per
environment, so that an environment's random stream does not depend on which others run beside it.

info may have three more, all (B,) bool, of which the trainer otherwise takes `done`:
`memory_boundary`, where the agent is to forget; `returned_episode`, where there is something in the
`episode_metrics`; and, with several agents, what `AgentRows` says.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from config import ConfigError
from spaces import ActionSpace, Box, Grid, encode_action, mask_size


class SingleEnvironment:
    """One environment, pure functions of JAX, that does not reset itself.

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
    """Names in info whose values at an episode's end are to be averaged over episodes."""
    num_agents: int | None = None
    """With several agents, how many; then see `AgentRows`."""
    episodes_per_trial = 1
    """How many episodes there are between two memory boundaries."""
    previous_action_reward = False
    """What PREV_ACTION_REWARD=None means."""
    default_reset_strategy = "auto"

    def reset(self, key: jax.Array) -> tuple[jax.Array, Any]:
        """A first observation (obs_size,) float32, and the state."""
        raise NotImplementedError

    def step(self, key: jax.Array, state: Any, action: jax.Array):
        """One step.

        Args:
          action: () int for `Discrete` actions, else (choices,) int or (size,) float; numbers of a
            `Box` come within its bounds.

        Returns:
          obs, state, reward (), terminated () bool, truncated () bool, info: a dict, which may have
          `memory_boundary` () bool.
        """
        raise NotImplementedError

    def next_episode(self, key: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """What follows an episode that ended in `state`: by default a reset."""
        del state
        return self.reset(key)

    def out(self, state: Any) -> jax.Array:
        """Of several agents (A,) bool, which have no part in the episode any more."""
        raise NotImplementedError

    def renderer(self) -> Callable[[Any], np.ndarray]:
        """A function from a state to its picture (height, width, 3), uint8.

        Raises:
          ConfigError: there is none for this environment.
        """
        raise ConfigError(f"{type(self).__name__} has no renderer")


class Wrapper:
    """Passes on whatever it does not define itself."""

    def __init__(self, env):
        self._env = env

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # not there yet, as in copy or pickle
            raise AttributeError(name)
        return getattr(self._env, name)


class EpisodeLogState(NamedTuple):
    env_state: Any
    episode_return: jax.Array  # (B,) float32
    episode_length: jax.Array  # (B,) int32


class LogEpisodes(Wrapper):
    """Adds `returned_episode_returns` and `returned_episode_lengths` of the episodes that finished.

    Both are (B,) and mean something where `done`; they stand first among `episode_metrics`, the
    names of everything in info that is to be averaged over finished episodes. The return of several
    agents is the mean of theirs.
    """

    def __init__(self, env):
        super().__init__(env)
        self.episode_metrics = (
            "returned_episode_returns",
            "returned_episode_lengths",
            *env.episode_metrics,
        )

    def reset(self, keys: jax.Array):
        obs, env_state = self._env.reset(keys)
        zeros = jnp.zeros(self.num_envs)
        return obs, EpisodeLogState(env_state, zeros, zeros.astype(jnp.int32))

    def step(self, keys: jax.Array, state: EpisodeLogState, action: jax.Array):
        obs, env_state, reward, done, info = self._env.step(keys, state.env_state, action)
        with jax.named_scope("logging"):
            return self._logged(obs, env_state, reward, done, info, state)

    def _logged(self, obs, env_state, reward, done, info, state: EpisodeLogState):
        episode_return = state.episode_return + reward.reshape(self.num_envs, -1).mean(axis=1)
        episode_length = state.episode_length + 1
        info["returned_episode_returns"] = episode_return
        info["returned_episode_lengths"] = episode_length
        state = EpisodeLogState(
            env_state, jnp.where(done, 0.0, episode_return), jnp.where(done, 0, episode_length)
        )
        return obs, state, reward, done, info

    def single_states(self, state: EpisodeLogState) -> Any:
        """The single environments' own states in `state`, leaves (B, ...)."""
        return self._env.single_states(state.env_state)


class AgentRows(Wrapper):
    """Several agents that share their parameters: N environments of A agents as B = N A rows.

    The environment below it has an axis of the agents behind that of the environments in
    observations, actions and rewards, one end for all of them, and `out(state)` (A,), which agents
    have no part in the episode any more, though it goes on. Here every agent is a row with the
    end, the memory boundary and the key of its environment, and `active` says which rows count. An
    episode is logged once, in the row of the first agent.
    """

    def __init__(self, env):
        super().__init__(env)
        self.num_rows = env.num_envs * env.num_agents

    def reset(self, keys: jax.Array):
        obs, state = self._env.reset(keys[:: self.num_agents])
        return self._rows(obs), state

    def step(self, keys: jax.Array, state: Any, action: jax.Array):
        action = action.reshape(self.num_envs, self.num_agents, *action.shape[1:])
        keys = keys[:: self.num_agents]
        obs, state, reward, done, info = self._env.step(keys, state, action)
        ends = ["terminated", "truncated", *self.episode_metrics]
        ends += ["memory_boundary"] * ("memory_boundary" in info)
        rows = {name: jnp.repeat(info[name], self.num_agents) for name in ends}
        if "final_observation" in info:
            rows["final_observation"] = self._rows(info["final_observation"])
        done = jnp.repeat(done, self.num_agents)
        rows["returned_episode"] = done & (jnp.arange(self.num_rows) % self.num_agents == 0)
        return self._rows(obs), state, self._rows(reward), done, rows

    def active(self, state: Any) -> jax.Array:
        """(B,) bool, which rows have a part in the step that is taken from `state`."""
        return ~self._rows(jax.vmap(self._env.out)(self.single_states(state)))

    def _rows(self, x: jax.Array) -> jax.Array:
        return x.reshape(self.num_rows, *x.shape[2:])


class PreviousActionReward(Wrapper):
    """Adds the step before to the observation: its action, encoded, and its reward.

    Both are 0 at the start and after a memory boundary. The action goes in front, behind the mask
    where there is one, and the reward at the end.
    """

    def __init__(self, env):
        super().__init__(env)
        outputs = env.action_space.num_outputs
        self.obs_size = env.obs_size + outputs + 1
        if isinstance(env.action_space, Box):  # numbers stand before what was binary
            self.num_binary = mask_size(env.action_space)
            self.grid = None
        else:
            self.grid = env.grid and env.grid._replace(start=env.grid.start + outputs)
            self.num_binary = env.num_binary + outputs

    def reset(self, keys: jax.Array):
        obs, state = self._env.reset(keys)
        action = jnp.zeros((len(obs), self.action_space.num_outputs))
        return self._extend(obs, action, jnp.zeros(len(obs))), state

    def step(self, keys: jax.Array, state: Any, action: jax.Array):
        obs, state, reward, done, info = self._env.step(keys, state, action)
        encoded = encode_action(self.action_space, action)
        if self.can_truncate:
            info["final_observation"] = self._extend(info["final_observation"], encoded, reward)
        remembered = ~info.get("memory_boundary", done)
        obs = self._extend(obs, encoded * remembered[:, None], reward * remembered)
        return obs, state, reward, done, info

    def _extend(self, obs: jax.Array, action: jax.Array, reward: jax.Array) -> jax.Array:
        mask, rest = jnp.split(obs, [mask_size(self.action_space)], axis=-1)
        return jnp.concatenate([mask, action, rest, reward[:, None]], axis=-1)
