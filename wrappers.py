"""Wrappers that make a single environment a batched one that resets itself and logs its returns.

A single environment, made by an adapter in environments.py, does not reset itself:

    reset(key) -> (obs, state)
    step(key, state, action) -> (obs, state, reward, terminated, truncated, info)

The reset strategies below turn it into B environments in which a finished one starts its next
episode in that very step:

    reset(keys) -> (obs, state)
    step(keys, state, action) -> (obs, state, reward, done, info)

with `info["terminated"]`, `info["truncated"]` and, where the environment can truncate,
`info["final_observation"]`: what the step returned before the reset. Keys are (B,), one per
environment, so that an environment's random stream does not depend on which others run beside it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Wrapper:
    """Passes on whatever it does not define itself."""

    def __init__(self, env):
        self._env = env

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # not there yet, as in copy or pickle
            raise AttributeError(name)
        return getattr(self._env, name)


class BatchedReset(Wrapper):
    """What the reset strategies share: stepping B environments and reporting how they ended.

    A step's key is split as Gymnax's and Craftax's own auto-reset do it, into one for the step and
    one for the reset, so that equal keys give equal transitions.
    """

    def __init__(self, env, num_envs: int):
        super().__init__(env)
        self.num_envs = num_envs

    def single_states(self, state: Any) -> Any:
        """The single environments' own states in `state`, leaves (B, ...)."""
        return state

    def _split(self, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        pairs = jax.vmap(jax.random.split)(keys)
        return pairs[:, 0], pairs[:, 1]

    def _step_without_reset(self, keys: jax.Array, state: Any, action: jax.Array):
        obs, state, reward, terminated, truncated, info = jax.vmap(self._env.step)(
            keys, state, action
        )
        reward = reward.astype(jnp.float32)
        info = {**info, "terminated": terminated, "truncated": truncated}
        if self._env.can_truncate:
            info["final_observation"] = obs
        return obs, state, reward, terminated | truncated, info


class AutoReset(BatchedReset):
    """A reset per environment per step, used where the environment finished.

    What Gymnax and Craftax do by themselves. Right where a reset costs no more than a step.
    """

    def reset(self, keys: jax.Array):
        return jax.vmap(self._env.reset)(keys)

    def step(self, keys: jax.Array, state: Any, action: jax.Array):
        step_keys, reset_keys = self._split(keys)
        obs, state, reward, done, info = self._step_without_reset(step_keys, state, action)
        obs, state = _where(done, self.reset(reset_keys), (obs, state))
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

    def reset(self, keys: jax.Array):
        return jax.vmap(self._env.reset)(keys)

    def step(self, keys: jax.Array, state: Any, action: jax.Array):
        step_keys, reset_keys = self._split(keys)
        obs, state, reward, done, info = self._step_without_reset(step_keys, state, action)
        worlds = self.reset(reset_keys[: self._num_worlds])
        taken = (jnp.cumsum(done) - 1) % self._num_worlds
        obs, state = _where(done, _rows(worlds, taken), (obs, state))
        return obs, state, reward, done, info


class Pool(NamedTuple):
    """For each environment the world that its next episode starts in."""

    worlds: Any  # (B, ...) (obs, state)
    used: jax.Array  # (B,) bool, the world was taken and is not replaced yet
    keys: jax.Array  # (B,)
    episode: jax.Array  # (B,) int32, the number of the episode that the world is for


class PoolState(NamedTuple):
    running: Any  # (B, ...) state
    pool: Pool


class WorldPool(BatchedReset):
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
        first_keys, world_keys = self._split(keys)
        episode = jnp.ones(self.num_envs, jnp.int32)
        # All in one call: world generation takes long to compile.
        all_keys = jnp.concatenate([first_keys, self._episode_keys(world_keys, episode)])
        generated = jax.vmap(self._env.reset)(all_keys)
        obs, running = jax.tree.map(lambda x: x[: self.num_envs], generated)
        worlds = jax.tree.map(lambda x: x[self.num_envs :], generated)
        used = jnp.zeros(self.num_envs, bool)
        return obs, PoolState(running, Pool(worlds, used, world_keys, episode))

    def step(self, keys: jax.Array, state: PoolState, action: jax.Array):
        step_keys, _ = self._split(keys)
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

    def _refill(self, pool: Pool, needed: jax.Array) -> Pool:
        """Replaces worlds while a whole batch is used, or one is that is needed now."""

        def due(pool: Pool):
            return (jnp.sum(pool.used) >= self._batch) | jnp.any(pool.used & needed)

        def replace(pool: Pool):
            urgency = jnp.where(pool.used, jnp.where(needed, 0, 1), 2)
            rows = jnp.argsort(urgency)[: self._batch]
            rows = jnp.where(pool.used[rows], rows, self.num_envs)  # past the end: dropped
            episode = pool.episode.at[rows].add(1, mode="drop")
            keys = self._episode_keys(_rows(pool.keys, rows), _rows(episode, rows))
            worlds = jax.vmap(self._env.reset)(keys)
            return pool._replace(
                worlds=_write_rows(pool.worlds, rows, worlds),
                used=pool.used.at[rows].set(False, mode="drop"),
                episode=episode,
            )

        return jax.lax.while_loop(due, replace, pool)

    def _take(self, done: jax.Array, running: Any, worlds: Any):
        """`running` with the rows that are done replaced, a batch at a time: the rows are large."""

        def copy(carry):
            running, left = carry
            (rows,) = jnp.nonzero(left, size=self._batch, fill_value=self.num_envs)
            running = _write_rows(running, rows, _rows(worlds, rows))
            return running, left.at[rows].set(False, mode="drop")

        return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), copy, (running, done))[0]


class EpisodeLogState(NamedTuple):
    env_state: Any
    episode_return: jax.Array  # (B,) float32
    episode_length: jax.Array  # (B,) int32


class LogEpisodes(Wrapper):
    """Adds `returned_episode_returns` and `returned_episode_lengths` of the episodes that finished.

    Both are (B,) and mean something where `done`; they stand first among `episode_metrics`, the
    names of everything in info that is to be averaged over finished episodes.
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
        episode_return = state.episode_return + reward
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


def _where(mask: jax.Array, if_true: Any, if_false: Any) -> Any:
    """Row by row: leaves (B, ...) of one tree where `mask` (B,), of the other elsewhere."""

    def select(a, b):
        return jnp.where(mask.reshape(-1, *(1,) * (b.ndim - 1)), a, b)

    return jax.tree.map(select, if_true, if_false)


def _rows(tree: Any, rows: jax.Array) -> Any:
    """Reads the rows; one past the end reads the last."""
    return jax.tree.map(lambda x: x.at[rows].get(mode="clip"), tree)


def _write_rows(tree: Any, rows: jax.Array, values: Any) -> Any:
    """Writes `values` at `rows`; rows past the end are dropped."""
    return jax.tree.map(lambda x, v: x.at[rows].set(v, mode="drop"), tree, values)
