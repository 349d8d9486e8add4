"""A recurrent layer in the place of a transformer's, to compare with: it remembers a vector.

It has the interface of `transformerXL.TransformerXLLayer`, with a memory of one slot: the carry
after the step before. Letters as there; M is 1.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from trxl.dense import Dense, matmul


def orthogonal_blocks(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32):
    """(E, n E) of n orthogonal matrices side by side."""
    rows, columns = shape
    keys = jax.random.split(key, columns // rows)
    block = nn.initializers.orthogonal()
    return jnp.concatenate([block(key, (rows, rows), dtype) for key in keys], axis=1)


class GRUCell(nn.Module):
    """A gated recurrent unit (Cho et al. 2014, arXiv 1406.1078).

    r = sigmoid(Wr x + Ur h + br), z = sigmoid(Wz x + Uz h + bz),
    n = tanh(Wn x + bn + r (Un h + cn)), h' = (1 - z) n + z h:
    the reset gate is applied after the product, as in cuDNN's and PyTorch's.
    """

    width: int
    dtype: Any = jnp.float32  # of products; gates and carry stay float32

    def setup(self):
        self.of_input = Dense(3 * self.width, dtype=self.dtype)
        self.carry_kernel = self.param(
            "carry_kernel", orthogonal_blocks, (self.width, 3 * self.width)
        )
        self.carry_bias = self.param("carry_bias", nn.initializers.zeros, (self.width,))

    def project(self, x: jax.Array) -> jax.Array:
        """What `advance` reads of inputs (..., N), for many steps at once."""
        return self.of_input(x)

    def advance(self, carry: jax.Array, projected: jax.Array) -> jax.Array:
        """h (..., width) and a projected input, of shapes that broadcast -> h'."""
        of_carry = matmul(carry.astype(self.dtype), self.carry_kernel.astype(self.dtype))
        input_r, input_z, input_n = jnp.split(projected.astype(jnp.float32), 3, axis=-1)
        carry_r, carry_z, carry_n = jnp.split(of_carry.astype(jnp.float32), 3, axis=-1)
        r, z = nn.sigmoid(input_r + carry_r), nn.sigmoid(input_z + carry_z)
        n = jnp.tanh(input_n + r * (carry_n + self.carry_bias))
        return (1 - z) * n + z * carry


class GRULayer(nn.Module):
    """A `GRUCell` over time, its carry the layer's output.

    A gradient flows through W steps, from a carry of the rollout.
    """

    embed_size: int
    dtype: Any = jnp.float32

    def setup(self):
        self.cell = GRUCell(self.embed_size, self.dtype)

    def start_rollout(self, memory: jax.Array) -> jax.Array:
        """The carry (B, E) of a memory (B, 1, E)."""
        return memory[:, 0]

    def step(self, x: jax.Array, carry: jax.Array, t: jax.Array, reach: jax.Array):
        """x (B, E), reach (B,), 0 where the carry is to be forgotten -> output (B, E), carry."""
        carry = self._advance(carry, self.cell.project(x), reach)
        return carry, carry

    def kept(self, x: jax.Array, carry: jax.Array) -> jax.Array:
        """What the memory keeps of a step, (B, E)."""
        return carry

    def window(self, x: jax.Array, memory: jax.Array, reach: jax.Array, window_grad: int):
        """x (B, T, E), memory (B, 1+T-W, E) of the steps -1 .. T-W-1, reach (B, T) -> (B, T, E)."""
        batch, steps = reach.shape

        def by_step(x: jax.Array) -> jax.Array:
            """(B, T, ...) to (W, B K, ...)."""
            return jnp.moveaxis(x.reshape(-1, window_grad, *x.shape[2:]), 1, 0)

        def advance(carry: jax.Array, now: tuple[jax.Array, jax.Array]):
            carry = self._advance(carry, *now)
            return carry, carry

        # Window k starts from the carry after step k W - 1.
        start = memory[:, ::window_grad].reshape(-1, self.embed_size)
        projected = self.cell.project(x)
        _, outputs = jax.lax.scan(advance, start, (by_step(projected), by_step(reach)))
        return jnp.moveaxis(outputs, 0, 1).reshape(batch, steps, self.embed_size)

    def _advance(self, carry: jax.Array, projected: jax.Array, reach: jax.Array) -> jax.Array:
        return self.cell.advance(jnp.where(reach[:, None] > 0, carry, 0.0), projected)
