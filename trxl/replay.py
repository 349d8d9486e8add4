"""Replay of the newest rollouts, and Retrace's returns of rows that an older policy played.

Arrays of a batch are (B, T, ...). R = slots of the replay, other letters as in rollout.py.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Replay(NamedTuple):
    """Ring of R slots for each environment."""

    rollouts: Any  # leaves (B, R, ...)
    number: jax.Array  # (B,) int32, number of rollouts added so far, equal for all


def empty_replay(fresh: Any, slots: int) -> Replay:
    """Makes an empty replay for rollouts like `fresh`, leaves (B, ...)."""
    rollouts = jax.tree.map(lambda x: jnp.zeros((x.shape[0], slots, *x.shape[1:]), x.dtype), fresh)
    return Replay(rollouts, jnp.zeros(jax.tree.leaves(fresh)[0].shape[0], jnp.int32))


def add_rollout(replay: Replay, fresh: Any) -> Replay:
    """Adds a rollout, leaves (B, ...), in place of the oldest."""
    slot = replay.number[0] % num_slots(replay)
    rollouts = jax.tree.map(lambda ring, x: ring.at[:, slot].set(x), replay.rollouts, fresh)
    return Replay(rollouts, replay.number + 1)


def draw_rows(replay: Replay, count: int, key: jax.Array) -> Any:
    """Samples rows (count, ...) uniformly from all environments and filled slots."""
    row_key, slot_key = jax.random.split(key)
    filled = jnp.minimum(replay.number[0], num_slots(replay))
    rows = jax.random.randint(row_key, (count,), 0, len(replay.number), jnp.int32)
    slots = jax.random.randint(slot_key, (count,), 0, filled, jnp.int32)
    return jax.tree.map(lambda x: x[rows, slots], replay.rollouts)


def num_slots(replay: Replay) -> int:
    """Returns R."""
    return jax.tree.leaves(replay.rollouts)[0].shape[1]


class Steps(NamedTuple):
    """Inputs of Retrace for T steps, (B, T) each; `last_value` (B,)."""

    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    final_value: jax.Array  # of the final observation, valid where truncated
    prior_value: jax.Array  # v = sum_a prior(a|s) q(s, a)
    q: jax.Array  # of the action taken
    trace: jax.Array  # c = min(1, prior / behaviour)
    last_value: jax.Array | None  # of the observation after the last step
    has_return: jax.Array  # bool, whether the step has a return
    active: jax.Array | None  # bool, whether the agent takes part in the step; None: all


def retrace(steps: Steps, gamma: float, decay: float) -> jax.Array:
    """Computes Retrace's returns G (B, T) (Munos et al. 2016, arXiv 1606.02647, equation 4).

    G_t = r_t + gamma (1 - terminated_t) [v_{t+1} + decay c_{t+1} (G_{t+1} - q_{t+1})].

    Exceptions:

    - At a truncation the bracket is the final value, after the last step `last_value`.
    - If the agent is inactive at t + 1, the bracket is G_{t+1}, the team's return.
    - Without `has_return`, G_t is v_t.
    """

    def step(bracket: jax.Array, now: Steps):
        later = jnp.where(now.truncated, now.final_value, bracket)
        returns = now.reward + gamma * (1 - now.terminated) * later
        correction = jnp.where(now.has_return, returns - now.q, 0)
        returns = jnp.where(now.has_return, returns, now.prior_value)
        bracket = now.prior_value + decay * now.trace * correction
        if now.active is not None:
            bracket = jnp.where(now.active, bracket, returns)
        return bracket, returns

    by_step = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), steps._replace(last_value=None))
    last: Any = steps.last_value
    _, returns = jax.lax.scan(step, last, by_step, reverse=True)
    return jnp.moveaxis(returns, 0, 1)


def needs_old_value(
    terminated: jax.Array, truncated: jax.Array, active: jax.Array | None
) -> jax.Array:
    """Returns (B, T) bool, at which steps the return needs the value of an unstored observation.

    A replayed rollout has current values only, and the observations after its last and its
    truncated steps are not stored. So these steps have no return. Agents that have left the episode
    bootstrap from 0.
    """
    last = jnp.arange(terminated.shape[1]) == terminated.shape[1] - 1
    needs = truncated | (last & ~terminated)
    return needs if active is None else needs & active
