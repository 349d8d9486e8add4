"""Dense layers whose input may be a LayerNorm's, and the two gradients that they are written for.

`matmul` and `standardise` are x @ w and LayerNorm without scale and bias; their gradients are given
by hand, in the form that XLA's CPU back end runs best. On other devices they cost nothing.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

LAYER_NORM_EPSILON = 1e-6


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x (..., N) times w (N, K), with the gradient of w in the form that XLA's CPU products like.

    As JAX writes it, XLA first copies the gradient of the result, transposed, to memory; as it
    stands here, x. A result is wider than x, so that is less, and several products share it.
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
def standardise(x: jax.Array) -> jax.Array:
    """LayerNorm (Ba et al. 2016, arXiv 1607.06450) over the last axis, without scale and bias."""
    return _standardise_forward(x)[0]


def _standardise_forward(x: jax.Array):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
    return centred * inverse, (centred * inverse, inverse)


def _standardise_backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array):
    n, inverse = residuals
    mean = jnp.mean(gradient, axis=-1, keepdims=True)
    along_n = jnp.mean(gradient * n, axis=-1, keepdims=True)
    return (inverse * (gradient - mean - n * along_n),)


standardise.defvjp(_standardise_forward, _standardise_backward)


class Norm(nn.Module):
    """LayerNorm's scale and bias, (width,) each, for the `Dense` that reads what is normed."""

    width: int

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        scale = self.param("scale", nn.initializers.ones, (self.width,))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        return scale, bias


class NormRelu(nn.Module):
    """relu(LayerNorm(x)), x (..., N)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale, bias = Norm(x.shape[-1])()
        return nn.relu(scale * standardise(x) + bias)


class Dense(nn.Module):
    """x W + b; with a `norm`, of the standardised x after that norm's scale and bias.

    They are folded into the matrix: (scale * x + shift) W + b = x (scale * W) + (shift W + b). That
    saves two passes over x, and where x is a constant, as a memory is, a product in the gradient.
    """

    features: int
    use_bias: bool = True
    kernel_init: Callable = nn.initializers.lecun_normal()
    dtype: Any = jnp.float32  # of the product and its result; parameters are float32

    @nn.compact
    def __call__(self, x: jax.Array, norm: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = jnp.zeros(())
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if norm is not None:
            scale, shift = norm
            kernel, bias = scale[:, None] * kernel, shift @ kernel + bias
        return matmul(x.astype(self.dtype), kernel.astype(self.dtype)) + bias.astype(self.dtype)
