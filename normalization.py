"""Running means and variances of observations and of returns, as PureJaxRL keeps them.

Lu et al. 2022, PureJaxRL's continuous-control script; the same as Gym's NormalizeObservation and
NormalizeReward. Chan et al. 1979 give the way to join two means and variances.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

EPSILON = 1e-8


class Moments(NamedTuple):
    """Of everything seen so far."""

    mean: jax.Array
    variance: jax.Array
    count: jax.Array  # () float32


def first_moments(shape: tuple[int, ...]) -> Moments:
    """Before anything was seen: mean 0 and variance 1, which count almost nothing."""
    return Moments(jnp.zeros(shape), jnp.ones(shape), jnp.float32(1e-4))


def update_moments(
    moments: Moments, batch: jax.Array, active: jax.Array | None, axis_name: str | None
) -> Moments:
    """Takes the rows of a batch (B, ...) of every device into account.

    Args:
      active: (B,) bool, which rows count; None for all.
      axis_name: of the devices.
    """
    weight = jnp.ones(len(batch)) if active is None else active.astype(jnp.float32)
    weight = weight.reshape(-1, *(1,) * (batch.ndim - 1))

    def total(x: jax.Array) -> jax.Array:
        x = jnp.sum(x, axis=0)
        return jax.lax.psum(x, axis_name) if axis_name else x

    count = total(weight).reshape(())
    divisor = jnp.maximum(count, 1)
    mean = total(weight * batch) / divisor
    variance = total(weight * (batch - mean) ** 2) / divisor
    joint = moments.count + count
    delta = mean - moments.mean
    squares = (
        moments.variance * moments.count
        + variance * count
        + delta**2 * moments.count * count / joint
    )
    return Moments(moments.mean + delta * count / joint, squares / joint, joint)


def normalise_obs(moments: Moments, obs: jax.Array) -> jax.Array:
    """obs (..., obs_size); its leading entries that `moments` does not have are left alone."""
    binary, real = jnp.split(obs, [obs.shape[-1] - moments.mean.size], axis=-1)
    real = (real - moments.mean) / jnp.sqrt(moments.variance + EPSILON)
    return jnp.concatenate([binary, real], axis=-1)


def scale_reward(moments: Moments, reward: jax.Array) -> jax.Array:
    """By the deviation of the discounted returns that `moments` has seen."""
    return reward / jnp.sqrt(moments.variance + EPSILON)
