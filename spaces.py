"""Actions, as an environment describes them, and observations, as a rollout stores them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Discrete(NamedTuple):
    """Actions 0 .. n - 1.

    `masked`: the first n entries of an observation say which of them are legal, 1 or 0.
    """

    n: int
    masked: bool = False

    @property
    def num_outputs(self) -> int:
        """How many numbers the actor gives."""
        return self.n


class MultiDiscrete(NamedTuple):
    """Several choices at once, the i-th among 0 .. sizes[i] - 1.

    `masked`: the first len(sizes) * max(sizes) entries of an observation say which options are
    legal, a row of max(sizes) for each choice.
    """

    sizes: tuple[int, ...]
    masked: bool = False

    @property
    def table(self) -> tuple[int, int]:
        """Choices, and options of the choice that has most."""
        return len(self.sizes), max(self.sizes)

    @property
    def num_outputs(self) -> int:
        """How many numbers the actor gives."""
        return int(np.prod(self.table))

    def exists(self) -> np.ndarray:
        """(choices, options) bool, False behind the last option of a choice with fewer."""
        return np.arange(max(self.sizes)) < np.array(self.sizes)[:, None]


class Box(NamedTuple):
    """Real-valued actions of `size` numbers; `low` and `high` are tuples of that length.

    `masked`: the first `size` entries of an observation say which of the numbers are used.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    masked: bool = False

    @property
    def size(self) -> int:
        return len(self.low)

    @property
    def num_outputs(self) -> int:
        """How many numbers the actor gives."""
        return self.size

    def clip(self, action: jax.Array) -> jax.Array:
        """(..., size), within the bounds."""
        return jnp.clip(action, jnp.asarray(self.low), jnp.asarray(self.high))


ActionSpace = Discrete | MultiDiscrete | Box


def mask_size(space: ActionSpace) -> int:
    """How many leading entries of an observation are the mask of the actions."""
    return space.num_outputs if space.masked else 0


def encode_action(space: ActionSpace, action: jax.Array) -> jax.Array:
    """An action (...) as (..., num_outputs) float32: one-hot, or the numbers within the bounds."""
    if isinstance(space, Box):
        return space.clip(action)
    if isinstance(space, Discrete):
        return jax.nn.one_hot(action, space.n)
    choices, options = space.table
    one_hot = jax.nn.one_hot(action, options)
    return one_hot.reshape(*one_hot.shape[:-2], choices * options)


class StoredObs(NamedTuple):
    """Observations (..., obs_size) in the smallest types that hold them exactly."""

    binary: jax.Array  # (..., num_binary) bool, the leading entries, which are 0 or 1
    real: jax.Array  # (..., obs_size - num_binary) float32, the others


def store_obs(obs: jax.Array, num_binary: int) -> StoredObs:
    """(..., obs_size) float32, the first `num_binary` of them 0 or 1, in fewer bytes."""
    return StoredObs(obs[..., :num_binary].astype(bool), obs[..., num_binary:])


def restore_obs(stored: StoredObs) -> jax.Array:
    """Undoes `store_obs`."""
    return jnp.concatenate([stored.binary.astype(jnp.float32), stored.real], axis=-1)
