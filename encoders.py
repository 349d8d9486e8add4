"""From an observation to the numbers that the transformer's stream starts from.

What agents of Craftax's sample budgets put there (Moon et al. 2023, arXiv 2307.03486; Dedieu et al.
2025, arXiv 2502.01591): the grid is read with its shape, and what is beside it, an inventory, gets
a layer and a norm of its own, so that both arrive at the same scale.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dense import Dense, NormRelu, matmul
from spaces import Obs, ObsSpace, grid_and_vector, pieces

CELL_WIDTH = 32
"""Numbers for each cell of a grid."""


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
        present = [x.astype(self.dtype) for x in pieces(obs, self.space) if x.shape[-1]]
        ends = np.cumsum([x.shape[-1] for x in present])[:-1]
        products = map(matmul, present, jnp.split(kernel, ends))
        return (sum(products) + bias).astype(jnp.float32)


class FeatureEncoder(nn.Module):
    """The grid through convolutions, all else beside it: obs (..., size) to features (..., F).

    F is `width` for either of them where there is only one; beside a grid, all else has a fourth.
    """

    space: ObsSpace
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, obs: Obs) -> jax.Array:
        grid, vector = grid_and_vector(obs, self.space)
        if grid is None:
            return self._features(vector, self.width, "vector")
        features = self._features(GridEncoder(self.dtype, name="cells")(grid), self.width, "grid")
        if not vector.shape[-1]:
            return features
        beside = self._features(vector, self.width // 4, "vector")
        return jnp.concatenate([features, beside], axis=-1)

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
        convolution = Dense(CELL_WIDTH, dtype=self.dtype, name="convolution")
        cells = cells + convolution(neighbourhoods(nn.relu(cells)))
        return nn.relu(cells).reshape(*batch, -1)


def neighbourhoods(grid: jax.Array) -> jax.Array:
    """The 3 x 3 cells around each, 0 beyond the edge: (N, R, C, F) to (N, R, C, 9 F), row by row.

    A dense layer of it is a convolution. XLA's own takes 60 times as long on CPUs within a scan,
    and is taken apart by vmap over seeds.
    """
    rows, columns = grid.shape[1:3]
    padded = jnp.pad(grid, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1)
