"""Batched environments: `make_env`, reset strategies, logging, and what the agent observes.

A `SingleEnvironment`, a suite's adapter or one of your own, does not reset itself. The reset
strategies turn it into B environments in which a finished one starts its next episode in that very
step:

    reset(keys) -> (obs, state)
    step(keys, state, action) -> (obs, state, reward, done, info)

with `info["terminated"]`, `info["truncated"]` and `info["final_observation"]`, the step's
observation before the reset. Keys are (B,), one per
environment, so that an environment's random stream does not depend on which others run beside it.

Optional entries of info, (B,) bool, `done` where they are missing: `memory_boundary`, where the
agent's memory is reset, and `returned_episode`, where `episode_metrics` have values. With several
agents, `agents_active(state)` says which rows count (`FlattenAgents`).
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


class LogWrapper(Wrapper):
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
        """The single environments' own states in `state`, leaves (B, ...)."""
        return self._env.single_states(state.env_state)


class FlattenAgents(Wrapper):
    """Makes each of several agents a row: N environments of A agents are B = N A rows.

    The environment below it has an axis of the agents behind that of the environments in
    observations, actions and rewards, one end for all of them, and `agents_done(state)` (A,), which
    agents have left the episode, though it goes on. Every row repeats the ends of its environment,
    which uses the key of its first row. `agents_active` says which rows have a part in a step. An
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
        rows["final_observation"] = self._rows(info["final_observation"])
        done = jnp.repeat(done, self.num_agents)
        rows["returned_episode"] = done & (jnp.arange(self.num_rows) % self.num_agents == 0)
        return self._rows(obs), state, self._rows(reward), done, rows

    def agents_active(self, state: Any) -> jax.Array:
        """Returns (B,) bool, which rows have a part in the step from `state`."""
        return ~self._rows(jax.vmap(self._env.agents_done)(self.single_states(state)))

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
    """Hides the boundaries of trials: each episode's end empties the memory and ends the credit."""

    def step(self, keys: jax.Array, state: Any, action: jax.Array):
        obs, state, reward, done, info = self._env.step(keys, state, action)
        info.pop("memory_boundary", None)
        return obs, state, reward, done, info


class AppendLastObservation(Wrapper):
    """The last observation of an episode beside the first of the next one of the same trial.

    Beside every other observation there are zeros, with TRIAL_MEMORY=False beside all. A mask of
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
    """The state of a `TerminalStep`."""

    env_state: Any
    obs: jax.Array  # (obs_size,), the newest
    boundary: jax.Array  # () bool, whether a trial ended with `obs`
    waiting: jax.Array  # () bool, whether the next step begins an episode


class TerminalStep(SingleEnvironment):
    """A step between two episodes of a trial, from the last observation to the next first one.

    Its action changes nothing and its reward is 0; it counts as the first of the next episode.
    Between two trials there is none. Since an episode builds on the one before, RESET_STRATEGY is
    auto, the default of a `SingleEnvironment`.
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
    """Base of the reset strategies: steps B environments and reports how they ended.

    A step's key is split as Gymnax's and Craftax's own auto-reset do it, into one for the step and
    one for the reset, so that equal keys give equal transitions.
    """

    def __init__(self, env, num_envs: int):
        super().__init__(env)
        self.num_envs = self.num_rows = num_envs

    def reset(self, keys: jax.Array):
        return self._start(self._env.reset, keys)

    def single_states(self, state: Any) -> Any:
        """The single environments' own states in `state`, leaves (B, ...)."""
        return state

    def renderer(self) -> Callable[[Any], np.ndarray]:
        """A function from a single environment's state to its picture (height, width, 3), uint8."""
        with self._precision():
            render = self._env.renderer()

        def render_state(state: Any) -> np.ndarray:
            with self._precision():
                return render(state)

        return render_state

    def _precision(self) -> AbstractContextManager:
        """Turns JAX_ENABLE_X64 off for a suite's environment: Craftax, for one, fails with it."""
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

    What Gymnax and Craftax do by themselves. Right where a reset costs no more than a step.
    """

    def step(self, keys: jax.Array, state: Any, action: jax.Array):
        step_keys, reset_keys = split_keys(keys, 2)
        obs, state, reward, done, info = self._step_without_reset(step_keys, state, action)
        with jax.named_scope("resets"):
            fresh = self._start(self._env.next_episode, reset_keys, state)
            obs, state = select(done, fresh, (obs, state))
        return obs, state, reward, done, info


class OptimisticReset(BatchedReset):
    """B / ratio resets per step, shared by the environments that finish in it.

    The strategy of Craftax Baselines (Matthews et al. 2024). The i-th environment to finish in a
    step takes world i mod (B / ratio): while there are as many worlds as finishing environments no
    two get the same one, beyond that they share them.

    Args:
      ratio: divides num_envs.
    """

    def __init__(self, env, num_envs: int, ratio: int):
        super().__init__(env, num_envs)
        self._num_worlds = num_envs // ratio

    def step(self, keys: jax.Array, state: Any, action: jax.Array):
        step_keys, reset_keys = split_keys(keys, 2)
        obs, state, reward, done, info = self._step_without_reset(step_keys, state, action)
        with jax.named_scope("resets"):
            worlds = self.reset(reset_keys[: self._num_worlds])
            taken = (jnp.cumsum(done) - 1) % self._num_worlds
            obs, state = select(done, read_rows(worlds, taken), (obs, state))
        return obs, state, reward, done, info


class Pool(NamedTuple):
    """A world for each environment, in which its next episode starts."""

    worlds: Any  # (B, ...) (obs, state)
    used: jax.Array  # (B,) bool, the world was taken and is not replaced yet
    keys: jax.Array  # (B,)
    episode: jax.Array  # (B,) int32, the number of the episode that the world is for


class PoolState(NamedTuple):
    running: Any  # (B, ...) state
    pool: Pool


class ResetPool(BatchedReset):
    """A pool with the next world of every environment, refilled in batches.

    World generation in Craftax costs about 20 times a step. Here a world is generated once per
    episode, from a key that depends on its environment's reset key and the episode's number alone:
    no world is ever played twice, and which one comes next depends neither on the environments
    beside it nor on the batch size.

    Used worlds are replaced when `batch` of them have gathered, in one vectorised call. An
    environment that finishes again before that has no fresh world in the pool: then the pool
    generates a batch at once, and so on until all who finish in this step have theirs. Running dry
    costs time, never a repeated world.

    Args:
      batch: worlds generated per call, at most num_envs.
    """

    def __init__(self, env, num_envs: int, batch: int):
        super().__init__(env, num_envs)
        self._batch = batch

    def reset(self, keys: jax.Array):
        first_keys, world_keys = split_keys(keys, 2)
        episode = jnp.ones(self.num_envs, jnp.int32)
        # All in one call: world generation takes long to compile.
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
        """Replaces worlds while a whole batch is used, or one is that is needed now.

        Under vmap over seeds what one of them needs replaces the used worlds of all: early, and
        with the worlds that they would get later.
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
        """`running` with the rows that are done replaced, a batch at a time: the rows are large."""

        def copy(carry):
            running, left = carry
            (rows,) = jnp.nonzero(left, size=self._batch, fill_value=self.num_envs)
            running = write_rows(running, rows, read_rows(worlds, rows))
            return running, left.at[rows].set(False, mode="drop")

        return jax.lax.while_loop(lambda carry: any_across_vmap(carry[1]), copy, (running, done))[0]


def select(mask: jax.Array, if_true: Any, if_false: Any) -> Any:
    """Selects between two trees with leaves (..., *), `mask` being (...)."""

    def where(a, b):
        return jnp.where(mask.reshape(*mask.shape, *(1,) * (b.ndim - mask.ndim)), a, b)

    return jax.tree.map(where, if_true, if_false)


def read_rows(tree: Any, rows: jax.Array) -> Any:
    """Reads the rows; one past the end reads the last."""
    return jax.tree.map(lambda x: x.at[rows].get(mode="clip"), tree)


def write_rows(tree: Any, rows: jax.Array, values: Any) -> Any:
    """Writes `values` at `rows`; rows past the end are dropped."""
    return jax.tree.map(lambda x, v: x.at[rows].set(v, mode="drop"), tree, values)


def make_env(config: dict[str, Any], num_envs: int) -> Wrapper:
    """Makes the batched environment of a checked config.

    Args:
      config: of it `ENV_NAME`, `ENV_KWARGS`, `BOOTSTRAP_TRUNCATED`, `EPISODE_END`,
        `TRIAL_MEMORY`, `PREV_ACTION_REWARD`, `RESET_STRATEGY` and `RESET_RATIO` are used.
      num_envs: how many environments run here: NUM_ENVS, or one device's share.

    Returns:
      An environment as the head of wrappers.py describes it, with the attributes of a
      `SingleEnvironment` and `num_rows`, B: `num_envs` times the number of agents.

    Raises:
      ConfigError: an unknown environment, one that can't be made or has actions of no supported
        kind, an unknown name in ENV_KWARGS.
    """
    make = making(config["ENV_NAME"], config["ENV_KWARGS"])
    # A suite is imported where it is first used; its constants must not be of a trace then.
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
    if env.num_agents is not None:
        env = FlattenAgents(env)
    if of_trials and config["EPISODE_END"] == "append":
        env = AppendLastObservation(env)
    previous = config["PREV_ACTION_REWARD"]
    if env.previous_action_reward if previous is None else previous:
        env = PreviousActionReward(env)
    return env


def with_resets(single: SingleEnvironment, config: dict[str, Any], num_envs: int) -> BatchedReset:
    """The environment in a batch that resets itself by the config's strategy.

    Raises:
      ConfigError: the strategy is not for this environment, or not for so many.
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
