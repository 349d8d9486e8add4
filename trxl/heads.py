"""From the transformer's output to the actor's and the critic's numbers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from trxl.dense import Dense, Norm, NormRelu, standardise

LAST_LAYER = {"mlp": "Dense_2", "residual": "output"}
"""The name of a head's last layer among its parameters, by the value of HEADS."""

ACTIVATIONS = {"relu": nn.relu, "tanh": nn.tanh}


def orthogonal(gain: float) -> Callable:
    """Flax's orthogonal initialiser, one matrix at a time under vmap.

    jaxlib 0.10.2's CPU runtime can wait for ever for a batched QR decomposition in a program as
    large as a whole training run vmapped over seeds (seen on 2 cores; 0.11.2 does not).
    """

    def initialise(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32):
        one = partial(nn.initializers.orthogonal(gain), shape=shape, dtype=dtype)
        return jax.custom_batching.sequential_vmap(one)(key)

    return initialise


class Head(nn.Module):
    """An MLP of two hidden layers, initialised orthogonally: gain sqrt 2, `gain` at the end."""

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
    """Norm, dense, a residual layer whose weights start small, norm, output.

    x (..., N) to (..., outputs). As wide as one likes: what a rarely seen input needs is not shared
    with everything else.
    """

    width: int
    outputs: int
    gain: float
    dtype: Any = jnp.float32  # of the hidden layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = Norm(x.shape[-1])()
        h = Dense(self.width, kernel_init=orthogonal(2**0.5), dtype=self.dtype)(
            standardise(x), norm
        )
        h = h.astype(jnp.float32)
        residual = Dense(self.width, kernel_init=orthogonal(0.1), dtype=self.dtype)
        h = h + residual(NormRelu()(h)).astype(jnp.float32)
        return Dense(self.outputs, kernel_init=orthogonal(self.gain), name="output")(NormRelu()(h))
