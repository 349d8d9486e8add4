"""Batched environments: `make_env`, reset strategies, logging, and wrappers of observations.

A reset strategy turns a `SingleEnvironment`, which does not reset itself, into B environments. They
start the next episode in the step that ends one:

    reset(keys) -> (obs, state)
    step(keys, state, action) -> (obs, state, reward, done, info)

Keys are (B,), one per environment, so that random streams do not depend on B. Entries of info:

| entry | content |
| --- | --- |
| `terminated`, `truncated` | (B,) bool |
| `final_observation` | (B, obs_size) float32, the observation before the reset |
| `memory_boundary` | (B,) bool, whether the agent's memory is reset; optional, default `done` |
| `returned_episode` | (B,) bool, whether `episode_metrics` are valid; optional, default `done` |

With several agents, `agents_active(state)` tells which rows count (`FlattenAgents`).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trxl.collectives import any_across_vmap
from trxl.environments import make_single_env
from trxl.environments.adapters import making
from trxl.environments.base import ATTRIBUTES, SingleEnvironment
from trxl.errors import ConfigError
from trxl.rollout import split_keys
from trxl.spaces import Box, encode_action, mask_size


class Wrapper:
    """Wrapper that forwards missing attributes to the wrapped environment."""

    def __init__(self, env):
        self._env = env

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # before __init__, in copy and pickle
            raise AttributeError(name)
        return getattr(self._env, name)


class EpisodeLogState(NamedTuple):
    env_state: Any
    episode_return: jax.Array  # (num_envs,) float32
    episode_length: jax.Array  # (num_envs,) int32


class LogWrapper(Wrapper):
    """Adds `returned_episode_returns` and `returned_episode_lengths` to info.

    Both are (num_envs,) and valid where `done`. They come first in `episode_metrics`, the names of
    the entries of info that are averaged over finished episodes. With several agents, the return is
    their mean.
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
        zeros = jnp.zeros(self.num_envs, jnp.float32)
        return obs, EpisodeLogState(env_state, zeros, zeros.astype(jnp.int32))

    def step(self, keys: jax.Array, state: EpisodeLogState, action: jax.Array):
        obs, env_state, reward, done, info = self._env.step(keys, state.env_state, action)
        with jax.named_scope("logging"):
            episode_return = state.episode_return + reward.reshape(self.num_envs, -1).mean(axis=1)
            episode_length = state.episode_length + 1
            info["returned_episode_returns"] = episode_return
            info["returned_episode_lengths"] = episode_length
            state = EpisodeLogState(
                env_state, jnp.where(done, 0.0, episode_return), jnp.where(done, 0, episode_length)
            )
        return obs, state, reward, done, info

    def single_states(self, state: EpisodeLogState) -> Any:
        """Returns the states of the single environments, leaves (num_envs, ...)."""
        return self._env.single_states(state.env_state)


class FlattenAgents(Wrapper):
    """Flattens N environments of A agents to B = N A rows.

    The wrapped environment has observations, actions and rewards (N, A, ...), one `done` per
    environment, and `agents_done(state)` (A,) bool: agents that have left the episode. Each row
    repeats `done` of its environment, which uses the key of its first row. Episodes are logged in
    the row of the first agent alone.
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
        rows["final_observation"] = self._rows(info["final_observation"])
        done = jnp.repeat(done, self.num_agents)
        rows["returned_episode"] = done & (jnp.arange(self.num_rows) % self.num_agents == 0)
        return self._rows(obs), state, self._rows(reward), done, rows

    def agents_active(self, state: Any) -> jax.Array:
        """Returns (B,) bool, which rows take part in the step from `state`."""
        return ~self._rows(jax.vmap(self._env.agents_done)(self.single_states(state)))

    def _rows(self, x: jax.Array) -> jax.Array:
        return x.reshape(self.num_rows, *x.shape[2:])


class MirroredRows(Wrapper):
    """Adds a row for each symmetry of each environment, which sees it mirrored and never plays.

    N environments with S `mirrors` have B = N (1 + S) rows. The first row of an environment plays.
    The others take its action mirrored, and each has a memory of its own, so the policy learns that
    mirrored states are alike (van der Pol et al. 2020, arXiv 2006.16908). An environment uses the
    key of its first row, in which its episodes are logged.
    """

    def __init__(self, env):
        super().__init__(env)
        self._copies = 1 + len(env.mirrors)
        self.num_rows = env.num_envs * self._copies

    def reset(self, keys: jax.Array):
        obs, state = self._env.reset(keys[:: self._copies])
        return self._all_obs(obs), state

    def step(self, keys: jax.Array, state: Any, action: jax.Array):
        played = slice(None, None, self._copies)
        obs, state, reward, done, info = self._env.step(keys[played], state, action[played])
        final_observation = self._all_obs(info.pop("final_observation"))
        reward, done, info = jax.tree.map(self._repeated, (reward, done, info))
        info["final_observation"] = final_observation
        info["returned_episode"] = done & (jnp.arange(self.num_rows) % self._copies == 0)
        return self._all_obs(obs), state, reward, done, info

    def as_played(self, action: jax.Array, log_prob: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gives mirrored rows the mirrored action of the row that plays, and its log-probability.

        An action's own probability in a mirrored row is not the one that it was drawn with.

        Args:
          action: (B, ...), of every row.
          log_prob: (B,).
        """
        action, log_prob = action[:: self._copies], log_prob[:: self._copies]
        mirrored = [jax.vmap(mirror.action)(action) for mirror in self.mirrors]
        return interleaved(action, *mirrored), self._repeated(log_prob)

    def _all_obs(self, obs: jax.Array) -> jax.Array:
        """Returns the observations (B, obs_size) of all rows, given (N, obs_size)."""
        return interleaved(obs, *(jax.vmap(mirror.obs)(obs) for mirror in self.mirrors))

    def _repeated(self, x: jax.Array) -> jax.Array:
        return jnp.repeat(x, self._copies, axis=0)


def interleaved(*arrays: jax.Array) -> jax.Array:
    """Interleaves n arrays (N, ...) to one (n N, ...)."""
    return jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])


class PreviousActionReward(Wrapper):
    """Adds the previous action, encoded, and the previous reward to the observation.

    Both are 0 at the start and after a memory boundary. The action comes first, after the mask if
    there is one. The reward comes last.
    """

    def __init__(self, env):
        super().__init__(env)
        outputs = env.action_space.num_outputs
        self.obs_size = env.obs_size + outputs + 1
        if isinstance(env.action_space, Box):  # its numbers come before the binary entries
            self.num_binary = mask_size(env.action_space)
            self.grid = None
        else:
            self.grid = env.grid and env.grid._replace(start=env.grid.start + outputs)
            self.num_binary = env.num_binary + outputs

    def reset(self, keys: jax.Array):
        obs, state = self._env.reset(keys)
        action = jnp.zeros((len(obs), self.action_space.num_outputs), jnp.float32)
        return self._extend(obs, action, jnp.zeros(len(obs), jnp.float32)), state

    def step(self, keys: jax.Array, state: Any, action: jax.Array):
        obs, state, reward, done, info = self._env.step(keys, state, action)
        encoded = encode_action(self.action_space, action)
        info["final_observation"] = self._extend(info["final_observation"], encoded, reward)
        remembered = ~info.get("memory_boundary", done)
        obs = self._extend(obs, encoded * remembered[:, None], reward * remembered)
        return obs, state, reward, done, info

    def _extend(self, obs: jax.Array, action: jax.Array, reward: jax.Array) -> jax.Array:
        mask, rest = jnp.split(obs, [mask_size(self.action_space)], axis=-1)
        return jnp.concatenate([mask, action, rest, reward[:, None]], axis=-1)


class ResetMemoryEachEpisode(Wrapper):
    """Hides trial boundaries, so that each episode's end resets the memory and ends the credit."""

    def step(self, keys: jax.Array, state: Any, action: jax.Array):
        obs, state, reward, done, info = self._env.step(keys, state, action)
        info.pop("memory_boundary", None)
        return obs, state, reward, done, info


class AppendLastObservation(Wrapper):
    """Appends an episode's last observation to the first one of the next episode in the trial.

    To every other observation, with TRIAL_MEMORY=False to all, zeros are appended. A mask of
    actions is not repeated.
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


class TerminalStepState(NamedTuple):
    """State of a `TerminalStep`."""

    env_state: Any
    obs: jax.Array  # (obs_size,), the newest
    boundary: jax.Array  # () bool, whether a trial ended with `obs`
    waiting: jax.Array  # () bool, whether the next step begins an episode


class TerminalStep(SingleEnvironment):
    """Extra step between two episodes of a trial, in which the agent observes the last observation.

    Its action has no effect and its reward is 0. It counts as the first step of the next episode.
    Since each episode continues the previous one, RESET_STRATEGY must be auto.
    """

    def __init__(self, env: SingleEnvironment):
        self._env = env
        for name in ATTRIBUTES:
            setattr(self, name, getattr(env, name))
        self.default_reset_strategy = "auto"

    def reset(self, key: jax.Array):
        return self._at(*self._env.reset(key))

    def step(self, key: jax.Array, state: TerminalStepState, action: jax.Array):
        step_key, next_key = jax.random.split(key)
        obs, env_state, reward, terminated, truncated, info = self._env.step(
            step_key, state.env_state, action
        )
        boundary = info.get("memory_boundary", terminated | truncated)
        stepped = obs, TerminalStepState(env_state, obs, boundary, jnp.bool_(False))
        begun = self._at(*self._env.next_episode(next_key, state.env_state))
        obs, after = select(state.waiting, begun, stepped)
        reward = jnp.where(state.waiting, 0, reward)
        terminated, truncated = terminated & ~state.waiting, truncated & ~state.waiting
        info["memory_boundary"] = boundary & ~state.waiting
        return obs, after, reward, terminated, truncated, info

    def next_episode(self, key: jax.Array, state: TerminalStepState):
        fresh = self._at(*self._env.next_episode(key, state.env_state))
        return select(state.boundary, fresh, (state.obs, state._replace(waiting=jnp.bool_(True))))

    def agents_done(self, state: TerminalStepState) -> jax.Array:
        return self._env.agents_done(state.env_state)

    def renderer(self) -> Callable[[Any], np.ndarray]:
        render = self._env.renderer()
        return lambda state: render(state.env_state)

    def _at(self, obs: jax.Array, env_state: Any) -> tuple[jax.Array, TerminalStepState]:
        no = jnp.bool_(False)
        return obs, TerminalStepState(env_state, obs, no, no)


class BatchedReset(Wrapper):
    """Base of the reset strategies: steps B environments without resetting them.

    Subclasses split keys into step and reset keys like the auto-reset of Gymnax and Craftax. So
    equal keys lead to equal transitions.
    """

    def __init__(self, env, num_envs: int):
        super().__init__(env)
        self.num_envs = self.num_rows = num_envs

    def reset(self, keys: jax.Array):
        return self._start(self._env.reset, keys)

    def single_states(self, state: Any) -> Any:
        """Returns the states of the single environments, leaves (B, ...)."""
        return state

    def renderer(self) -> Callable[[Any], np.ndarray]:
        """Returns a function from a single environment's state to (height, width, 3) uint8."""
        with self._precision():
            render = self._env.renderer()

        def render_state(state: Any) -> np.ndarray:
            with self._precision():
                return render(state)

        return render_state

    def _precision(self) -> AbstractContextManager:
        """Turns JAX_ENABLE_X64 off for suites that fail with it, such as Craftax."""
        return nullcontext() if self._env.float64 else jax.enable_x64(False)

    def _start(self, start: Callable, *arguments: jax.Array):
        """Starts an episode in every environment."""
        with self._precision():
            obs, state = jax.vmap(start)(*arguments)
        return obs.astype(jnp.float32), state

    def _step_without_reset(self, keys: jax.Array, state: Any, action: jax.Array):
        if isinstance(self.action_space, Box):
            action = self.action_space.clip(action)
        with jax.named_scope("game"), self._precision():
            obs, state, reward, terminated, truncated, info = jax.vmap(self._env.step)(
                keys, state, action
            )
        obs, reward = obs.astype(jnp.float32), reward.astype(jnp.float32)
        terminated, truncated = terminated.astype(bool), truncated.astype(bool)
        if not self._env.can_truncate:
            terminated, truncated = terminated | truncated, jnp.zeros_like(truncated)
        info = {**info, "terminated": terminated, "truncated": truncated}
        info["final_observation"] = obs
        return obs, state, reward, terminated | truncated, info


class AutoReset(BatchedReset):
    """A reset per environment per step, used where the environment finished.

    Gymnax and Craftax do the same. Use it if a reset costs no more than a step.
    """

    def step(self, keys: jax.Array, state: Any, action: jax.Array):
        step_keys, reset_keys = split_keys(keys, 2)
        obs, state, reward, done, info = self._step_without_reset(step_keys, state, action)
        with jax.named_scope("resets"):
            fresh = self._start(self._env.next_episode, reset_keys, state)
            obs, state = select(done, fresh, (obs, state))
        return obs, state, reward, done, info


class OptimisticReset(BatchedReset):
    """B / ratio resets per step, shared by the environments that finish in the step.

    The strategy of Craftax Baselines (Matthews et al. 2024). The i-th environment to finish takes
    level i mod (B / ratio). So environments share levels only if more than B / ratio finish.

    Args:
      ratio: divides num_envs.
    """

    def __init__(self, env, num_envs: int, ratio: int):
        super().__init__(env, num_envs)
        self._num_levels = num_envs // ratio

    def step(self, keys: jax.Array, state: Any, action: jax.Array):
        step_keys, reset_keys = split_keys(keys, 2)
        obs, state, reward, done, info = self._step_without_reset(step_keys, state, action)
        with jax.named_scope("resets"):
            levels = self.reset(reset_keys[: self._num_levels])
            taken = (jnp.cumsum(done) - 1) % self._num_levels
            obs, state = select(done, read_rows(levels, taken), (obs, state))
        return obs, state, reward, done, info


class Pool(NamedTuple):
    """Levels of the next episode of each environment."""

    worlds: Any  # (B, ...) (obs, state)
    used: jax.Array  # (B,) bool, whether the level was used and not yet replaced
    keys: jax.Array  # (B,)
    episode: jax.Array  # (B,) int32, number of the episode that the level is for


class PoolState(NamedTuple):
    running: Any  # (B, ...) state
    pool: Pool


class ResetPool(BatchedReset):
    """Pool with the next level of every environment, refilled in batches.

    Generating a level of Craftax takes as long as about 20 steps. The pool generates one level per
    episode, from the environment's reset key and the episode's number. So no level is played
    twice, and levels depend neither on other environments nor on the batch size.

    Used levels are replaced in one vectorised call, once `batch` of them have gathered. If an
    environment finishes before that and finds its level used, the pool is refilled immediately.

    Args:
      batch: levels generated per call, at most num_envs.
    """

    def __init__(self, env, num_envs: int, batch: int):
        super().__init__(env, num_envs)
        self._batch = batch

    def reset(self, keys: jax.Array):
        first_keys, world_keys = split_keys(keys, 2)
        episode = jnp.ones(self.num_envs, jnp.int32)
        # One call, since level generation is slow to compile.
        all_keys = jnp.concatenate([first_keys, self._episode_keys(world_keys, episode)])
        generated = self._start(self._env.reset, all_keys)
        obs, running = jax.tree.map(lambda x: x[: self.num_envs], generated)
        worlds = jax.tree.map(lambda x: x[self.num_envs :], generated)
        used = jnp.zeros(self.num_envs, bool)
        return obs, PoolState(running, Pool(worlds, used, world_keys, episode))

    def step(self, keys: jax.Array, state: PoolState, action: jax.Array):
        step_keys, _ = split_keys(keys, 2)
        obs, running, reward, done, info = self._step_without_reset(
            step_keys, state.running, action
        )
        pool = self._refill(state.pool, done)
        obs, running = self._take(done, (obs, running), pool.worlds)
        pool = pool._replace(used=pool.used | done)
        return obs, PoolState(running, pool), reward, done, info

    def single_states(self, state: PoolState) -> Any:
        return state.running

    def _episode_keys(self, world_keys: jax.Array, episode: jax.Array) -> jax.Array:
        return jax.vmap(jax.random.fold_in)(world_keys, episode)

    @jax.named_scope("worlds")
    def _refill(self, pool: Pool, needed: jax.Array) -> Pool:
        """Replaces used levels while they fill a batch, or while one of them is needed now.

        Under vmap over seeds, a refill for one seed refills all of them. The others then receive
        the same levels earlier.
        """

        def due(pool: Pool):
            gathered = jnp.sum(pool.used) >= self._batch
            return any_across_vmap(gathered | (pool.used & needed))

        def replace(pool: Pool):
            urgency = jnp.where(pool.used, jnp.where(needed, 0, 1), 2)
            rows = jnp.argsort(urgency)[: self._batch]
            rows = jnp.where(pool.used[rows], rows, self.num_envs)  # past the end: dropped
            episode = pool.episode.at[rows].add(1, mode="drop")
            keys = self._episode_keys(read_rows(pool.keys, rows), read_rows(episode, rows))
            worlds = self._start(self._env.reset, keys)
            return pool._replace(
                worlds=write_rows(pool.worlds, rows, worlds),
                used=pool.used.at[rows].set(False, mode="drop"),
                episode=episode,
            )

        return jax.lax.while_loop(due, replace, pool)

    @jax.named_scope("resets")
    def _take(self, done: jax.Array, running: Any, worlds: Any):
        """Replaces the rows of `running` that are done, a batch at a time, since rows are large."""

        def copy(carry):
            running, left = carry
            (rows,) = jnp.nonzero(left, size=self._batch, fill_value=self.num_envs)
            running = write_rows(running, rows, read_rows(worlds, rows))
            return running, left.at[rows].set(False, mode="drop")

        return jax.lax.while_loop(lambda carry: any_across_vmap(carry[1]), copy, (running, done))[0]


def select(mask: jax.Array, if_true: Any, if_false: Any) -> Any:
    """Selects between two trees with leaves (..., *) by `mask` (...)."""

    def where(a, b):
        return jnp.where(mask.reshape(*mask.shape, *(1,) * (b.ndim - mask.ndim)), a, b)

    return jax.tree.map(where, if_true, if_false)


def read_rows(tree: Any, rows: jax.Array) -> Any:
    """Reads rows; indices past the end read the last row."""
    return jax.tree.map(lambda x: x.at[rows].get(mode="clip"), tree)


def write_rows(tree: Any, rows: jax.Array, values: Any) -> Any:
    """Writes `values` at `rows`; indices past the end are dropped."""
    return jax.tree.map(lambda x, v: x.at[rows].set(v, mode="drop"), tree, values)


def make_env(config: dict[str, Any], num_envs: int) -> Wrapper:
    """Makes the batched environment of a checked config.

    Args:
      config: uses `ENV_NAME`, `ENV_KWARGS`, `BOOTSTRAP_TRUNCATED`, `EPISODE_END`, `TRIAL_MEMORY`,
        `MIRRORS`, `PREV_ACTION_REWARD`, `RESET_STRATEGY` and `RESET_RATIO`.
      num_envs: NUM_ENVS, or one device's share.

    Returns:
      An environment as in this module's docstring, with the attributes of a `SingleEnvironment`
      and `num_rows`: B, `num_envs` times the number of agents, or of rows per environment with
      MIRRORS.

    Raises:
      ConfigError: the environment is unknown or can't be made, its actions are of no supported
        kind, or ENV_KWARGS has an unknown name.
    """
    make = making(config["ENV_NAME"], config["ENV_KWARGS"])
    # The first use imports the suite, possibly within a trace; its constants must be concrete.
    with jax.ensure_compile_time_eval():
        return make(lambda: _make_env(config, num_envs))


def _make_env(config: dict[str, Any], num_envs: int) -> Wrapper:
    single = make_single_env(config["ENV_NAME"], config["ENV_KWARGS"])
    if config["BOOTSTRAP_TRUNCATED"] is not None:
        single.can_truncate = config["BOOTSTRAP_TRUNCATED"]
    of_trials = single.episodes_per_trial > 1
    if of_trials and config["EPISODE_END"] == "step" and config["TRIAL_MEMORY"]:
        single = TerminalStep(single)
    env: Wrapper = LogWrapper(with_resets(single, config, num_envs))
    if of_trials and not config["TRIAL_MEMORY"]:
        env = ResetMemoryEachEpisode(env)
    if config["MIRRORS"]:
        if not env.mirrors or env.num_agents is not None:
            raise ConfigError(
                "MIRRORS=True needs an environment of one agent that names its `mirrors`; leave it"
                f" out for {config['ENV_NAME']}"
            )
        env = MirroredRows(env)
    if env.num_agents is not None:
        env = FlattenAgents(env)
    if of_trials and config["EPISODE_END"] == "append":
        env = AppendLastObservation(env)
    previous = config["PREV_ACTION_REWARD"]
    if env.previous_action_reward if previous is None else previous:
        env = PreviousActionReward(env)
    return env


def with_resets(single: SingleEnvironment, config: dict[str, Any], num_envs: int) -> BatchedReset:
    """Batches an environment with the config's reset strategy.

    Raises:
      ConfigError: the strategy does not suit the environment or the number of environments.
    """
    strategy = config["RESET_STRATEGY"] or single.default_reset_strategy
    ratio = config["RESET_RATIO"]
    if strategy == "auto":
        return AutoReset(single, num_envs)
    if single.continues:
        raise ConfigError(
            f"{config['ENV_NAME']} has episodes that build on the one before, which takes"
            f" RESET_STRATEGY=auto, not {strategy}"
        )
    if strategy == "pool":
        return ResetPool(single, num_envs, max(1, num_envs // ratio))
    if num_envs % ratio:
        raise ConfigError(
            "RESET_RATIO must divide the number of environments with RESET_STRATEGY=optimistic:"
            f" {ratio} does not divide {num_envs}"
        )
    return OptimisticReset(single, num_envs, ratio)
