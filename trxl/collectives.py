"""Means and moments over devices, and conditions over runs that are vmapped."""

from typing import Any

import jax
import jax.numpy as jnp


def mean_over_devices(tree: Any, axis_name: str | None) -> Any:
    """Averages every leaf over the devices of an axis; without an axis returns the tree."""
    return jax.lax.pmean(tree, axis_name) if axis_name else tree


def sum_over_devices(tree: Any, axis_name: str | None) -> Any:
    """Sums every leaf over the devices of an axis; without an axis returns the tree."""
    return jax.lax.psum(tree, axis_name) if axis_name else tree


def where_counted(x: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Sets x to 0 where its weight is 0, since 0 times infinity would be NaN."""
    return x if weight is None else jnp.where(weight > 0, x, 0)


def normalize_weight(weight: jax.Array, axis_name: str | None) -> jax.Array:
    """Scales weights to mean 1 over all devices; leaves weights that are all 0."""
    mean = mean_over_devices(jnp.mean(weight), axis_name)
    return weight / jnp.where(mean == 0, 1, mean)


def weighted_mean(x: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Averages all elements of x on this device; weights have mean 1, None: all 1."""
    return jnp.mean(x if weight is None else weight * where_counted(x, weight))


def moments(
    x: jax.Array, weight: jax.Array | None, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """Returns mean and population variance of all elements of x on all devices, () each."""
    mean = mean_over_devices(weighted_mean(x, weight), axis_name)
    return mean, mean_over_devices(weighted_mean((x - mean) ** 2, weight), axis_name)


def root_mean_square(x: jax.Array, weight: jax.Array | None, axis_name: str | None) -> jax.Array:
    """Returns the root mean square () of x over all devices; weights are 1 or 0."""
    if weight is not None:
        weight = normalize_weight(weight, axis_name)
    return jnp.sqrt(mean_over_devices(weighted_mean(x**2, weight), axis_name))


@jax.custom_batching.custom_vmap
def any_across_vmap(mask: jax.Array) -> jax.Array:
    """Returns whether `mask` is true anywhere, () bool, in any of the vmapped runs.

    Under `jax.vmap` a `lax.cond` with a batched predicate runs both branches, and a
    `lax.while_loop` selects its whole carry. This predicate is not batched: all runs take the
    branch or iteration that any run needs. So the branch must be harmless for the other runs.
    """
    return jnp.any(mask)


@any_across_vmap.def_vmap
def _(axis_size: int, in_batched: list[bool], mask: jax.Array) -> tuple[jax.Array, bool]:
    del axis_size, in_batched  # called only if the mask is batched
    return any_across_vmap(mask), False
