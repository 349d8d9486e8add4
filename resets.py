"""Reset strategies: from one environment to B of which a finished one starts anew in that step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from batching import anywhere
from spaces import Box
from wrappers import Wrapper


class BatchedReset(Wrapper):
    """What the reset strategies share: stepping B environments and reporting how they ended.

    A step's key is split as Gymnax's and Craftax's own auto-reset do it, into one for the step and
    one for the reset, so that equal keys give equal transitions.
    """

    def __init__(self, env, num_envs: int):
        super().__init__(env)
        self.num_envs = self.num_rows = num_envs

    def reset(self, keys: jax.Array):
        return jax.vmap(self._env.reset)(keys)

    def single_states(self, state: Any) -> Any:
        """The single environments' own states in `state`, leaves (B, ...)."""
        return state

    @jax.named_scope("keys")
    def _split(self, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        pairs = jax.vmap(jax.random.split)(keys)
        return pairs[:, 0], pairs[:, 1]

    def _step_without_reset(self, keys: jax.Array, state: Any, action: jax.Array):
        if isinstance(self.action_space, Box):
            action = self.action_space.clip(action)
        with jax.named_scope("game"):
            obs, state, reward, terminated, truncated, info = jax.vmap(self._env.step)(
                keys, state, action
            )
        reward = reward.astype(jnp.float32)
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
        step_keys, reset_keys = self._split(keys)
        obs, state, reward, done, info = self._step_without_reset(step_keys, state, action)
        with jax.named_scope("resets"):
            fresh = jax.vmap(self._env.next_episode)(reset_keys, state)
            obs, state = _where(done, fresh, (obs, state))
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
        step_keys, reset_keys = self._split(keys)
        obs, state, reward, done, info = self._step_without_reset(step_keys, state, action)
        with jax.named_scope("resets"):
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

    @jax.named_scope("worlds")
    def _refill(self, pool: Pool, needed: jax.Array) -> Pool:
        """Replaces worlds while a whole batch is used, or one is that is needed now.

        Under vmap over seeds what one of them needs replaces the used worlds of all: early, and
        with the worlds that they would get later.
        """

        def due(pool: Pool):
            gathered = jnp.sum(pool.used) >= self._batch
            return anywhere(gathered | (pool.used & needed))

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

    @jax.named_scope("resets")
    def _take(self, done: jax.Array, running: Any, worlds: Any):
        """`running` with the rows that are done replaced, a batch at a time: the rows are large."""

        def copy(carry):
            running, left = carry
            (rows,) = jnp.nonzero(left, size=self._batch, fill_value=self.num_envs)
            running = _write_rows(running, rows, _rows(worlds, rows))
            return running, left.at[rows].set(False, mode="drop")

        return jax.lax.while_loop(lambda carry: anywhere(carry[1]), copy, (running, done))[0]


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
