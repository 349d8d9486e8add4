"""Dense layers, norms, heads of actor and critic, and a GRU.

`matmul` is x @ w, `layer_norm` is LayerNorm without scale and bias. Both define their gradients in
the form that XLA's CPU back end runs fastest, at no cost on other devices.

`GRULayer` has the interface of a `TransformerXLLayer` and a memory of one slot, the previous carry.
Letters as in transformerXL.py, with M = 1.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

LAYER_NORM_EPSILON = 1e-6


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiplies x (..., N) by w (N, K), with a gradient of w that is fast on CPUs.

    With JAX's own rule XLA transpose-copies the output gradient. This one copies x, which is
    narrower and shared by several products.
    """
    return x @ w


def _matmul_forward(x: jax.Array, w: jax.Array):
    return x @ w, (x, w)


def _matmul_backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array):
    x, w = residuals
    rows, gradient_rows = (a.reshape(-1, a.shape[-1]) for a in (x, gradient))
    gradient_of_x = (gradient_rows @ w.T).reshape(x.shape)
    return gradient_of_x, jax.lax.dot_general(rows, gradient_rows, (((0,), (0,)), ((), ())))


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def layer_norm(x: jax.Array) -> jax.Array:
    """Normalises the last axis: LayerNorm (Ba et al. 2016, arXiv 1607.06450) without parameters."""
    return _layer_norm_forward(x)[0]


def _layer_norm_forward(x: jax.Array):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
    return centred * inverse, (centred * inverse, inverse)


def _layer_norm_backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array):
    n, inverse = residuals
    mean = jnp.mean(gradient, axis=-1, keepdims=True)
    along_n = jnp.mean(gradient * n, axis=-1, keepdims=True)
    return (inverse * (gradient - mean - n * along_n),)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNormParams(nn.Module):
    """Scale and bias of a LayerNorm, (width,) each, for the `Dense` after it."""

    width: int

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        scale = self.param("scale", nn.initializers.ones, (self.width,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32)
        return scale, bias


class NormRelu(nn.Module):
    """LayerNorm and ReLU of x (..., N)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale, bias = LayerNormParams(x.shape[-1], name="Norm_0")()
        return nn.relu(scale * layer_norm(x) + bias)


class Dense(nn.Module):
    """Dense layer x W + b, optionally with the scale and shift of a preceding `norm`.

    The norm is folded into the matrix: (scale * x + shift) W + b = x (scale * W) + (shift W + b).
    This saves two passes over x, and a product in the gradient if x is constant, as memory is.
    """

    features: int
    use_bias: bool = True
    kernel_init: Callable = nn.initializers.lecun_normal()
    dtype: Any = jnp.float32  # of the product and the output; parameters are float32

    @nn.compact
    def __call__(self, x: jax.Array, norm: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = jnp.zeros((), jnp.float32)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        if norm is not None:
            scale, shift = norm
            kernel, bias = scale[:, None] * kernel, shift @ kernel + bias
        return matmul(x.astype(self.dtype), kernel.astype(self.dtype)) + bias.astype(self.dtype)


OUTPUT_LAYER = {"mlp": "Dense_2", "residual": "output"}
"""Parameter name of a head's last layer, by the value of HEADS."""

ACTIVATIONS = {"relu": nn.relu, "tanh": nn.tanh}


def orthogonal(gain: float) -> Callable:
    """Returns Flax's orthogonal initialiser, run one matrix at a time under vmap.

    On CPUs jaxlib 0.10.2 can hang in a batched QR decomposition within a training run vmapped over
    seeds. jaxlib 0.11.2 does not.
    """

    def initialise(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32):
        one = partial(nn.initializers.orthogonal(gain), shape=shape, dtype=dtype)
        return jax.custom_batching.sequential_vmap(one)(key)

    return initialise


class MLPHead(nn.Module):
    """MLP with two hidden layers, x (..., N) to (..., outputs).

    Orthogonal initialisation: gain sqrt 2 in the hidden layers, `gain` in the last.
    """

    width: int
    outputs: int
    gain: float
    activation: str
    dtype: Any = jnp.float32  # of the hidden layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = Dense(self.width, kernel_init=orthogonal(2**0.5), dtype=self.dtype)(x)
            x = ACTIVATIONS[self.activation](x)
        return Dense(self.outputs, kernel_init=orthogonal(self.gain))(x)


class ResidualHead(nn.Module):
    """Norm, dense layer, residual layer, norm, output: x (..., N) to (..., outputs).

    Orthogonal initialisation: gain sqrt 2, 0.1 in the residual layer, `gain` in the last.
    """

    width: int
    outputs: int
    gain: float
    dtype: Any = jnp.float32  # of the hidden layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = LayerNormParams(x.shape[-1], name="Norm_0")()
        h = Dense(self.width, kernel_init=orthogonal(2**0.5), dtype=self.dtype)(layer_norm(x), norm)
        h = h.astype(jnp.float32)
        residual = Dense(self.width, kernel_init=orthogonal(0.1), dtype=self.dtype)
        h = h + residual(NormRelu()(h)).astype(jnp.float32)
        return Dense(self.outputs, kernel_init=orthogonal(self.gain), name="output")(NormRelu()(h))


def orthogonal_blocks(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32):
    """Initialises (E, n E) as n orthogonal matrices side by side."""
    rows, columns = shape
    keys = jax.random.split(key, columns // rows)
    block = nn.initializers.orthogonal()
    return jnp.concatenate([block(key, (rows, rows), dtype) for key in keys], axis=1)


class GRUCell(nn.Module):
    """Gated recurrent unit (Cho et al. 2014, arXiv 1406.1078).

    ```
    r = sigmoid(Wr x + Ur h + br)
    z = sigmoid(Wz x + Uz h + bz)
    n = tanh(Wn x + bn + r (Un h + cn))
    h' = (1 - z) n + z h
    ```

    The reset gate is applied after the product, as in cuDNN and PyTorch.
    """

    width: int
    dtype: Any = jnp.float32  # of matrix products; gates and carry stay float32

    def setup(self):
        self.of_input = Dense(3 * self.width, dtype=self.dtype)
        shape = (self.width, 3 * self.width)
        self.carry_kernel = self.param("carry_kernel", orthogonal_blocks, shape, jnp.float32)
        self.carry_bias = self.param(
            "carry_bias", nn.initializers.zeros, (self.width,), jnp.float32
        )

    def project(self, x: jax.Array) -> jax.Array:
        """Projects inputs (..., N) of any number of steps for `advance`."""
        return self.of_input(x)

    def advance(self, carry: jax.Array, projected: jax.Array) -> jax.Array:
        """Returns h' of h (..., width) and projected inputs (..., 3 width), which broadcast."""
        of_carry = matmul(carry.astype(self.dtype), self.carry_kernel.astype(self.dtype))
        input_r, input_z, input_n = jnp.split(projected.astype(jnp.float32), 3, axis=-1)
        carry_r, carry_z, carry_n = jnp.split(of_carry.astype(jnp.float32), 3, axis=-1)
        r, z = nn.sigmoid(input_r + carry_r), nn.sigmoid(input_z + carry_z)
        n = jnp.tanh(input_n + r * (carry_n + self.carry_bias))
        return (1 - z) * n + z * carry


class GRULayer(nn.Module):
    """`GRUCell` over time; the carry is the output.

    The gradient flows through W steps, from a carry that the rollout stored.
    """

    embed_size: int
    dtype: Any = jnp.float32

    def setup(self):
        self.cell = GRUCell(self.embed_size, self.dtype)

    def init_cache(self, memory: jax.Array) -> jax.Array:
        """Returns the carry (B, E) in a memory (B, 1, E)."""
        return memory[:, 0]

    def step(self, x: jax.Array, carry: jax.Array, t: jax.Array, reach: jax.Array):
        """Runs a step: x (B, E), reach (B,), 0 to reset the carry -> output (B, E), carry."""
        carry = self._advance(carry, self.cell.project(x), reach)
        return carry, carry

    def memory_entry(self, x: jax.Array, carry: jax.Array) -> jax.Array:
        """Returns the memory entry (B, E) of a step, its carry."""
        return carry

    def unroll_windows(self, x: jax.Array, memory: jax.Array, reach: jax.Array, window_grad: int):
        """Runs T steps: x (B, T, E), reach (B, T) -> (B, T, E).

        `memory` is (B, 1+T-W, E), the carries after steps -1 .. T-W-1.
        """
        batch, steps = reach.shape

        def by_step(x: jax.Array) -> jax.Array:
            """Transposes (B, T, ...) to (W, B K, ...)."""
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
