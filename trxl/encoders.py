"""Encoders: from an observation to the features that the transformer reads.

`LinearEncoder` is the published network's. About 1,500 of the 8,217 entries of Craftax's map are
ever 1 in a rollout, so it multiplies only these.

`FeatureEncoder` follows agents for Craftax's sample budgets (Moon et al. 2023, arXiv 2307.03486;
Dedieu et al. 2025, arXiv 2502.01591). Convolutions read the grid. The inventory has a dense layer
and a norm of its own, so that both have the same scale.
"""

from functools import cache, partial, reduce
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from trxl.collectives import any_across_vmap
from trxl.layers import Dense, NormRelu, matmul
from trxl.spaces import (
    Grid,
    Obs,
    ObsSpace,
    StoredObs,
    cell_words,
    grid_and_vector,
    obs_parts,
    unpack_cells,
)

FEW = 4
"""Inverse of the largest share of entries for which the sparse product is used."""


class Entries(NamedTuple):
    """Storage of a grid's entries, in the order of an observation."""

    word: np.ndarray  # (size,) int32, index into the words of all cells
    mask: np.ndarray  # (size,) uint16, bits of the entry's group
    value: np.ndarray  # (size,) uint16, the bits if the entry is 1


@cache
def entries(grid: Grid) -> Entries:
    """Returns the storage of all entries of the grid."""
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
    """Multiplies the grid's entries, in the order of an observation, by a matrix.

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
    """Entries that are 1 anywhere in a batch."""

    entries: jax.Array  # (grid.size / FEW,) int32, sorted, padded with grid.size
    many: jax.Array  # () bool, whether more entries appear, in any of the vmapped runs


def find_entries(cells: jax.Array, grid: Grid) -> Appearing:
    """Finds the entries that are 1 in cells (N, rows, columns, words)."""
    appears = jnp.any(all_entries(cells, grid, jnp.bool_), axis=0)
    few = grid.size // FEW
    (index,) = jnp.nonzero(appears, size=few, fill_value=grid.size)
    return Appearing(index.astype(jnp.int32), any_across_vmap(jnp.sum(appears) > few))


def all_entries(cells: jax.Array, grid: Grid, dtype) -> jax.Array:
    """Unpacks stored cells (N, rows, columns, words) to (N, grid.size)."""
    return grid.flatten(unpack_cells(cells, grid.groups)).astype(dtype)


def some_entries(cells: jax.Array, index: jax.Array, grid: Grid, dtype) -> jax.Array:
    """Unpacks the entries of an index (K,): (N, K), 0 where the index is grid.size."""
    where = entries(grid)
    # Padding: no bits of the first word, compared with 1, so always 0.
    word, mask, value = (
        jnp.asarray(np.append(x, x.dtype.type(end)))
        for x, end in zip(where, (0, 0, 1), strict=True)
    )
    words = jnp.take(cells.reshape(len(cells), -1), word[index], axis=-1)
    return ((words & mask[index]) == value[index]).astype(dtype)


CELL_WIDTH = 32
"""Features per cell of a grid."""

LARGE_GRID = 4096
"""Number of entries from which the sparse product is used."""


class LinearEncoder(nn.Module):
    """Encoder of the published network, x0 = Dense_E(obs).

    The product is summed over the parts of a stored observation, without concatenating them.
    """

    space: ObsSpace
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, obs: Obs) -> jax.Array:
        shape = (self.space.size, self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32)
        kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
        return (self._product(obs, kernel) + bias).astype(jnp.float32)

    def _product(self, obs: Obs, kernel: jax.Array) -> jax.Array:
        """Multiplies obs (..., size) by kernel (size, E)."""
        grid = self.space.grid
        if isinstance(obs, StoredObs) and grid is not None and grid.size >= LARGE_GRID:
            assert obs.cells is not None
            before, of_grid, behind = jnp.split(kernel, [grid.start, grid.start + grid.size])
            _, vector = grid_and_vector(obs, self.space)
            beside = matmul(vector.astype(self.dtype), jnp.concatenate([before, behind]))
            cells = obs.cells.reshape(-1, *obs.cells.shape[-3:])
            return beside + cells_product(cells, of_grid, grid).reshape(beside.shape)
        present = [x.astype(self.dtype) for x in obs_parts(obs, self.space) if x.shape[-1]]
        ends = np.cumsum([x.shape[-1] for x in present])[:-1]
        products = map(matmul, present, jnp.split(kernel, ends))
        return reduce(jnp.add, products)


class FeatureEncoder(nn.Module):
    """Encoder with convolutions for the grid: obs (..., size) to features (..., F).

    The grid has `width` features, the rest a fourth as many. Either may be missing.
    """

    space: ObsSpace
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, obs: Obs) -> jax.Array:
        grid, vector = grid_and_vector(obs, self.space)
        features = []
        if grid is not None:
            cells = GridEncoder(self.dtype, name="cells")(grid)
            features.append(self._features(cells, self.width, "grid"))
        if vector.shape[-1]:
            features.append(self._features(vector, self.width // 4, "vector"))
        return jnp.concatenate(features, axis=-1)

    def _features(self, x: jax.Array, width: int, name: str) -> jax.Array:
        x = Dense(width, dtype=self.dtype, name=name)(x).astype(jnp.float32)
        return NormRelu(name=f"{name}_norm")(x)


class GridEncoder(nn.Module):
    """Dense layer per cell and a residual 3 x 3 convolution.

    (..., rows, columns, channels) to (..., rows * columns * CELL_WIDTH). For one-hot channels the
    dense layer is a sum of embeddings.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, grid: jax.Array) -> jax.Array:
        *batch, rows, columns, channels = grid.shape
        cells = Dense(CELL_WIDTH, dtype=self.dtype)(grid.reshape(-1, rows, columns, channels))
        cells = cells + Convolution(self.dtype, name="convolution")(nn.relu(cells))
        return nn.relu(cells).reshape(*batch, -1)


class Convolution(nn.Module):
    """3 x 3 convolution with zero padding: (N, rows, columns, F) to the same shape.

    The kernel (9 F, F) has the neighbours row by row. The product is of the three neighbours in a
    row, summed over three rows. Within a scan on CPUs the alternatives are slower:

    | alternative | time |
    | --- | --- |
    | XLA's convolution, which vmap over seeds also splits | 60 times |
    | one product of all nine neighbours | 1.3 to 1.7 times |
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, grid: jax.Array) -> jax.Array:
        *_, rows, columns, width = grid.shape
        shape = (9 * width, width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
        kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
        padded = jnp.pad(grid.astype(self.dtype), ((0, 0), (0, 0), (1, 1), (0, 0)))
        beside = jnp.concatenate([padded[:, :, j : j + columns] for j in range(3)], axis=-1)
        by_row = kernel.reshape(3, 3 * width, width).swapaxes(0, 1).reshape(3 * width, 3 * width)
        products = jnp.pad(matmul(beside, by_row), ((0, 0), (1, 1), (0, 0), (0, 0)))
        of_row = jnp.split(products, 3, axis=-1)
        return sum(x[:, i : i + rows] for i, x in enumerate(of_row)) + bias
