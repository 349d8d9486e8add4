"""Values in a scale that follows the returns, and outputs that stay what they were when it moves.

van Hasselt et al. 2016, "Learning values across many orders of magnitude" (arXiv 1602.07714),
section 2: adaptively rescaling the targets (art), preserving outputs precisely (pop). The critic
predicts (R - mu) / sigma.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from reductions import mean_over_devices, normalise_weight, weighted_mean

LEAST_SIGMA = 1e-3
"""In units of the return: rewards that never come don't blow the values up."""


class ReturnMoments(NamedTuple):
    """Exponential averages of the returns and of their squares, which start at 0."""

    mean: jax.Array  # ()
    square: jax.Array  # ()
    weight: jax.Array  # (), that of everything seen so far: what both are divided by


class Scale(NamedTuple):
    """What the critic's output x stands for: sigma x + mu."""

    mu: jax.Array  # ()
    sigma: jax.Array  # ()

    def raw(self, x: Any) -> Any:
        """A tree of the critic's outputs, in units of the return."""
        return jax.tree.map(lambda y: self.sigma * y + self.mu, x)

    def normalised(self, x: Any) -> Any:
        """Undoes `raw`."""
        return jax.tree.map(lambda y: (y - self.mu) / self.sigma, x)


def no_returns() -> ReturnMoments:
    """Before anything was seen."""
    return ReturnMoments(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))


def scale_of(moments: ReturnMoments) -> Scale:
    """mu and sigma, 0 and 1 before anything was seen."""
    seen = moments.weight > 0
    weight = jnp.where(seen, moments.weight, 1)
    mu = moments.mean / weight
    variance = moments.square / weight - mu**2
    sigma = jnp.sqrt(jnp.maximum(variance, LEAST_SIGMA**2))
    return Scale(mu, jnp.where(seen, sigma, 1.0))


def see_returns(
    moments: ReturnMoments,
    returns: jax.Array,
    weight: jax.Array | None,
    decay: float,
    axis_name: str | None,
) -> ReturnMoments:
    """The averages with the returns (B, T) of one update, of all devices together.

    Args:
      weight: (B, T), 1 where the step counts; None where all do.
      decay: of what was seen before.
    """
    if weight is not None:
        weight = normalise_weight(weight, axis_name)
    now = jnp.stack([weighted_mean(returns, weight), weighted_mean(returns**2, weight)])
    mean, square = mean_over_devices(now, axis_name)

    def average(before: jax.Array, new: jax.Array | float) -> jax.Array:
        return decay * before + (1 - decay) * new

    return ReturnMoments(
        average(moments.mean, mean), average(moments.square, square), average(moments.weight, 1.0)
    )


def preserve_outputs(layer: dict[str, jax.Array], old: Scale, new: Scale) -> dict[str, jax.Array]:
    """The last layer, changed so that what it says in units of the return stays.

    w <- w sigma / sigma', b <- (sigma b + mu - mu') / sigma' (equation 4).

    Args:
      layer: `kernel` (N, 1) and `bias` (1,).
    """
    return {
        "kernel": layer["kernel"] * (old.sigma / new.sigma),
        "bias": new.normalised(old.raw(layer["bias"])),
    }
