"""Real numbers as distributions over bins, evenly spaced in a squashed scale.

Bellemare et al. 2017 (arXiv 1707.06887) learn values so; the two-hot target and the scale h are
those of MuZero (Schrittwieser et al. 2020, arXiv 1911.08265, appendix F) and Muesli (Hessel et al.
2021, arXiv 2104.06159).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

EPSILON = 1e-3


def squash(x: jax.Array) -> jax.Array:
    """h(x) = sgn(x) (sqrt(|x| + 1) - 1) + 0.001 x (Pohlen et al. 2018, arXiv 1805.11593)."""
    return jnp.sign(x) * (jnp.sqrt(jnp.abs(x) + 1) - 1) + EPSILON * x


def unsquash(y: jax.Array) -> jax.Array:
    """The inverse of `squash`."""
    # Of y = s - 1 + e (s^2 - 1) with s = sqrt(|x| + 1), the root, in a form that loses no digits.
    shifted = jnp.abs(y) + 1 + EPSILON
    root = 2 * shifted / (1 + jnp.sqrt(1 + 4 * EPSILON * shifted))
    return jnp.sign(y) * (root**2 - 1)


class Bins(NamedTuple):
    """So many numbers, evenly spaced from -limit to limit where they are squashed."""

    number: int
    limit: float

    @property
    def centres(self) -> jax.Array:
        """(number,), squashed."""
        return jnp.linspace(-self.limit, self.limit, self.number)

    def two_hot(self, x: jax.Array) -> jax.Array:
        """Numbers (...) as probabilities (..., number) of the two bins beside each, mean h(x)."""
        position = (squash(x) + self.limit) / (2 * self.limit) * (self.number - 1)
        position = jnp.clip(position, 0, self.number - 1)
        distance = jnp.abs(position[..., None] - jnp.arange(self.number))
        return jnp.maximum(1 - distance, 0)

    def clips(self, x: jax.Array) -> jax.Array:
        """Returns (...) bool, which numbers (...) are beyond the outermost bins."""
        return jnp.abs(squash(x)) > self.limit

    def mean(self, logits: jax.Array) -> jax.Array:
        """The number (...) that a distribution's logits (..., number) stand for."""
        return unsquash(jnp.sum(jax.nn.softmax(logits) * self.centres, axis=-1))

    def cross_entropy(self, logits: jax.Array, x: jax.Array) -> jax.Array:
        """(...) of predicted logits (..., number) against numbers (...)."""
        return -jnp.sum(self.two_hot(x) * jax.nn.log_softmax(logits), axis=-1)
