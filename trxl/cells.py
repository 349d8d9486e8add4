"""The product of a stored grid with a matrix that has a row for each of its zeros and ones.

Of the 8,217 entries of Craftax's map some 1,500 are ever 1 in a rollout, since most kinds of blocks
and creatures live elsewhere. The product over those alone is the same sum.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trxl.batching import anywhere
from trxl.dense import matmul
from trxl.spaces import Grid, cell_words, unpack_cells

FEW = 4
"""The entries that appear count as few where they are at most one of so many."""


class Entries(NamedTuple):
    """Where each entry of a grid is stored, in the order of an observation."""

    word: np.ndarray  # (size,) int32, among the words of all cells
    mask: np.ndarray  # (size,) uint16, its bits there
    value: np.ndarray  # (size,) uint16, what they are where the entry is 1


@cache
def entries(grid: Grid) -> Entries:
    """Of all entries of the grid."""
    words = cell_words(grid.groups)
    channels = sum(grid.groups)
    indices = np.arange(grid.size).reshape(grid.rows, grid.columns, channels)
    ends = np.cumsum([sum(groups) for groups in grid.parts])[:-1]
    order = np.concatenate([part.ravel() for part in np.split(indices, ends, axis=-1)])
    cell, channel = np.divmod(order, channels)
    word = np.repeat(np.arange(len(words)), [len(word.values) for word in words])
    values, masks = (np.concatenate(x) for x in zip(*words, strict=True))
    return Entries(
        (cell * len(words) + word[channel]).astype(np.int32), masks[channel], values[channel]
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def cells_product(cells: jax.Array, kernel: jax.Array, grid: Grid) -> jax.Array:
    """The grid's entries, in the order of an observation, times a matrix.

    Args:
      cells: (N, rows, columns, words) uint16, as stored.
      kernel: (grid.size, K).

    Returns:
      (N, K) of the kernel's dtype.
    """
    return _forward(cells, kernel, grid)[0]


def _forward(cells: jax.Array, kernel: jax.Array, grid: Grid):
    appear = find_entries(cells, grid)

    def over_all() -> jax.Array:
        return matmul(all_entries(cells, grid, kernel.dtype), kernel)

    def over_few() -> jax.Array:
        rows = jnp.take(kernel, appear.entries, axis=0, mode="fill", fill_value=0)
        return matmul(some_entries(cells, appear.entries, grid, kernel.dtype), rows)

    return jax.lax.cond(appear.many, over_all, over_few), (cells, kernel, appear)


def _backward(grid: Grid, residuals, gradient: jax.Array):
    cells, kernel, appear = residuals

    def product(x: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, gradient, (((0,), (0,)), ((), ())))

    def over_all() -> jax.Array:
        return product(all_entries(cells, grid, kernel.dtype))

    def over_few() -> jax.Array:
        rows = product(some_entries(cells, appear.entries, grid, kernel.dtype))
        return jnp.zeros_like(kernel).at[appear.entries].set(rows, mode="drop", unique_indices=True)

    no_gradient = np.zeros(cells.shape, jax.dtypes.float0)
    return no_gradient, jax.lax.cond(appear.many, over_all, over_few)


cells_product.defvjp(_forward, _backward)


class Appearing(NamedTuple):
    """The entries that are 1 anywhere in a batch."""

    entries: jax.Array  # (grid.size / FEW,) int32, in order; grid.size behind the last of them
    many: jax.Array  # () bool, whether there are more than that, here or in a run beside


def find_entries(cells: jax.Array, grid: Grid) -> Appearing:
    """In cells (N, rows, columns, words)."""
    appears = jnp.any(all_entries(cells, grid, jnp.bool_), axis=0)
    few = grid.size // FEW
    (index,) = jnp.nonzero(appears, size=few, fill_value=grid.size)
    return Appearing(index.astype(jnp.int32), anywhere(jnp.sum(appears) > few))


def all_entries(cells: jax.Array, grid: Grid, dtype) -> jax.Array:
    """(N, rows, columns, words) as stored to (N, grid.size)."""
    return grid.part(unpack_cells(cells, grid.groups)).astype(dtype)


def some_entries(cells: jax.Array, index: jax.Array, grid: Grid, dtype) -> jax.Array:
    """Those of an index (K,) alone: (N, K), 0 where the index is grid.size."""
    where = entries(grid)
    # Behind the last entry: no bits of the first word, compared with 1.
    word, mask, value = (
        jnp.asarray(np.append(x, x.dtype.type(end)))
        for x, end in zip(where, (0, 0, 1), strict=True)
    )
    words = jnp.take(cells.reshape(len(cells), -1), word[index], axis=-1)
    return ((words & mask[index]) == value[index]).astype(dtype)
