"""From an observation to the numbers that the transformer's stream starts from.

What agents of Craftax's sample budgets put there (Moon et al. 2023, arXiv 2307.03486; Dedieu et al.
2025, arXiv 2502.01591): the grid is read with its shape, and what is beside it, an inventory, gets
a layer and a norm of its own, so that both arrive at the same scale.
"""

from functools import reduce
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from trxl.cells import cells_product
from trxl.dense import Dense, NormRelu, matmul
from trxl.spaces import Obs, ObsSpace, StoredObs, grid_and_vector, pieces

CELL_WIDTH = 32
"""Numbers for each cell of a grid."""

LARGE_GRID = 4096
"""So many entries are too many to multiply them all."""


class LinearEncoder(nn.Module):
    """x0 = Dense_E(obs), the published network's: its features are the stream.

    As a sum over the pieces that an observation is stored in, which need not be joined for it.
    """

    space: ObsSpace
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, obs: Obs) -> jax.Array:
        shape = (self.space.size, self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.width,)).astype(self.dtype)
        return (self._product(obs, kernel) + bias).astype(jnp.float32)

    def _product(self, obs: Obs, kernel: jax.Array) -> jax.Array:
        """obs (..., size) times kernel (size, E)."""
        grid = self.space.grid
        if isinstance(obs, StoredObs) and grid is not None and grid.size >= LARGE_GRID:
            assert obs.cells is not None
            before, of_grid, behind = jnp.split(kernel, [grid.start, grid.start + grid.size])
            _, vector = grid_and_vector(obs, self.space)
            beside = matmul(vector.astype(self.dtype), jnp.concatenate([before, behind]))
            cells = obs.cells.reshape(-1, *obs.cells.shape[-3:])
            return beside + cells_product(cells, of_grid, grid).reshape(beside.shape)
        present = [x.astype(self.dtype) for x in pieces(obs, self.space) if x.shape[-1]]
        ends = np.cumsum([x.shape[-1] for x in present])[:-1]
        products = map(matmul, present, jnp.split(kernel, ends))
        return reduce(jnp.add, products)


class FeatureEncoder(nn.Module):
    """The grid through convolutions, all else beside it: obs (..., size) to features (..., F).

    F is `width` for the grid and a fourth of that for all else; either may be missing.
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
    """A dense layer for each cell and a residual 3 x 3 convolution.

    (..., rows, columns, channels) to (..., rows * columns * CELL_WIDTH). Of one-hot channels the
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
    """3 x 3 cells to one, 0 beyond the edge: (N, rows, columns, F) to the same.

    The rows of the kernel, (9 F, F), are the neighbours row by row, as in a dense layer of all
    nine. XLA's own convolution takes 60 times as long on CPUs within a scan, and is taken apart by
    vmap over seeds; all nine neighbours side by side take 1.3 to 1.7 times as long. So three are,
    those of a row, and their products for the three rows are summed where they belong.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, grid: jax.Array) -> jax.Array:
        *_, rows, columns, width = grid.shape
        shape = (9 * width, width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (width,)).astype(self.dtype)
        padded = jnp.pad(grid.astype(self.dtype), ((0, 0), (0, 0), (1, 1), (0, 0)))
        beside = jnp.concatenate([padded[:, :, j : j + columns] for j in range(3)], axis=-1)
        by_row = kernel.reshape(3, 3 * width, width).swapaxes(0, 1).reshape(3 * width, 3 * width)
        products = jnp.pad(matmul(beside, by_row), ((0, 0), (1, 1), (0, 0), (0, 0)))
        of_row = jnp.split(products, 3, axis=-1)
        return sum(x[:, i : i + rows] for i, x in enumerate(of_row)) + bias
