"""Means and moments over devices, and conditions over runs that are vmapped."""

from typing import Any

import jax
import jax.numpy as jnp


def mean_over_devices(tree: Any, axis_name: str | None) -> Any:
    """Returns every leaf's mean over the devices of the axis; the tree itself without an axis."""
    return jax.lax.pmean(tree, axis_name) if axis_name else tree


def sum_over_devices(tree: Any, axis_name: str | None) -> Any:
    """Returns every leaf's sum over the devices of the axis; the tree itself without an axis."""
    return jax.lax.psum(tree, axis_name) if axis_name else tree


def where_counted(x: jax.Array, weight: jax.Array | None) -> jax.Array:
    """x, and 0 where its weight is 0, whatever stands there: 0 times infinity would be NaN."""
    return x if weight is None else jnp.where(weight > 0, x, 0)


def normalize_weight(weight: jax.Array, axis_name: str | None) -> jax.Array:
    """Weights whose mean over all devices is 1, or that are all 0."""
    mean = mean_over_devices(jnp.mean(weight), axis_name)
    return weight / jnp.where(mean == 0, 1, mean)


def weighted_mean(x: jax.Array, weight: jax.Array | None) -> jax.Array:
    """The mean of x over all its elements; weights have mean 1, None stands for all alike."""
    return jnp.mean(x if weight is None else weight * where_counted(x, weight))


def moments(
    x: jax.Array, weight: jax.Array | None, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """Mean and population variance of x over all its elements on all devices."""
    mean = mean_over_devices(weighted_mean(x, weight), axis_name)
    return mean, mean_over_devices(weighted_mean((x - mean) ** 2, weight), axis_name)


def root_mean_square(x: jax.Array, weight: jax.Array | None, axis_name: str | None) -> jax.Array:
    """Returns the root mean square of x over all devices; weights are 1 or 0."""
    if weight is not None:
        weight = normalize_weight(weight, axis_name)
    return jnp.sqrt(mean_over_devices(weighted_mean(x**2, weight), axis_name))


@jax.custom_batching.custom_vmap
def any_across_vmap(mask: jax.Array) -> jax.Array:
    """Returns whether `mask` is true anywhere, () bool: in any of the vmapped runs as well.

    `jax.vmap` turns a `lax.cond` whose predicate differs from run to run into both branches and a
    select, and a `lax.while_loop` into one that selects its whole carry. With this predicate all
    runs take the branch, or go round the loop, that any of them needs, so that what none needs is
    skipped. The branch, or the body, must therefore do no harm to a run that doesn't need it.
    """
    return jnp.any(mask)


@any_across_vmap.def_vmap
def _(axis_size: int, in_batched: list[bool], mask: jax.Array) -> tuple[jax.Array, bool]:
    del axis_size, in_batched  # it is called where the mask is batched
    return any_across_vmap(mask), False
