"""What `jax.vmap` over whole runs (seeds, members of a population) would otherwise make slow."""

import jax
import jax.numpy as jnp


@jax.custom_batching.custom_vmap
def anywhere(mask: jax.Array) -> jax.Array:
    """Whether `mask` is true anywhere, () bool: also in any of the runs that are vmapped over.

    `jax.vmap` turns a `lax.cond` whose predicate differs from run to run into both branches and a
    select, and a `lax.while_loop` into one that selects its whole carry. With this predicate all
    runs take the branch, or go round the loop, that any of them needs, so that what none needs is
    skipped. The branch, or the body, must therefore do no harm to a run that doesn't need it.
    """
    return jnp.any(mask)


@anywhere.def_vmap
def _(axis_size: int, in_batched: list[bool], mask: jax.Array) -> tuple[jax.Array, bool]:
    del axis_size, in_batched  # it is called where the mask is batched
    return anywhere(mask), False
