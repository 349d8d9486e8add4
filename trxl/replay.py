"""The newest rollouts, kept on the device to be learnt from again.

Pure functions of JAX. Letters as in rollout.py; R = the slots of the ring.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Replay(NamedTuple):
    """A ring of R slots for each environment."""

    rollouts: Any  # leaves (B, R, ...)
    number: jax.Array  # (B,) int32, how many there were so far, the same for all


def empty(fresh: Any, slots: int) -> Replay:
    """Nothing yet; `fresh` is a rollout, leaves (B, ...)."""
    rollouts = jax.tree.map(lambda x: jnp.zeros((len(x), slots, *x.shape[1:]), x.dtype), fresh)
    return Replay(rollouts, jnp.zeros(len(jax.tree.leaves(fresh)[0]), jnp.int32))


def put(replay: Replay, fresh: Any) -> Replay:
    """With one more rollout, in place of the oldest."""
    slot = replay.number[0] % num_slots(replay)
    rollouts = jax.tree.map(lambda ring, x: ring.at[:, slot].set(x), replay.rollouts, fresh)
    return Replay(rollouts, replay.number + 1)


def draw(replay: Replay, count: int, key: jax.Array) -> Any:
    """Rows of any environment and any slot that is filled, all with the same probability.

    Returns:
      as a rollout, leaves (count, ...).
    """
    row_key, slot_key = jax.random.split(key)
    filled = jnp.minimum(replay.number[0], num_slots(replay))
    rows = jax.random.randint(row_key, (count,), 0, len(replay.number))
    slots = jax.random.randint(slot_key, (count,), 0, filled)
    return jax.tree.map(lambda x: x[rows, slots], replay.rollouts)


def num_slots(replay: Replay) -> int:
    """R."""
    return jax.tree.leaves(replay.rollouts)[0].shape[1]
