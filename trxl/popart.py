"""Values in a scale that follows the returns, and outputs that stay what they were when it moves.

van Hasselt et al. 2016, "Learning values across many orders of magnitude" (arXiv 1602.07714),
section 2: adaptively rescaling the targets (art), preserving outputs precisely (pop). The critic
predicts (R - mu) / sigma.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trxl.reductions import moments as batch_moments
from trxl.reductions import normalise_weight

LEAST_SIGMA = 1e-3
"""In units of the return: rewards that never come don't blow the values up."""


class ReturnMoments(NamedTuple):
    """Moving mean and variance of the returns; 0 and 1 before the first update."""

    mean: jax.Array  # ()
    variance: jax.Array  # ()


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
    """Returns the moments before the first update."""
    return ReturnMoments(jnp.zeros(()), jnp.ones(()))


def scale_of(moments: ReturnMoments) -> Scale:
    """Returns mu and sigma, sigma at least `LEAST_SIGMA`."""
    return Scale(moments.mean, jnp.sqrt(jnp.maximum(moments.variance, LEAST_SIGMA**2)))


def see_returns(
    before: ReturnMoments,
    returns: jax.Array,
    weight: jax.Array | None,
    decay: float,
    updates: jax.Array,
    axis_name: str | None,
) -> ReturnMoments:
    """Updates the moments with the returns of one update, of all devices together.

    m' = m + a (m_b - m), v' = (1 - a) v + a v_b + a (1 - a) (m_b - m)^2 with the batch's mean m_b
    and variance v_b. The step a = (1 - decay) / (1 - decay^(updates + 1)) removes the bias of the
    start, as in Adam: it is 1 at the first update, and 1 / (updates + 1) where decay is 1. All
    squares are of centred values, so that a small variance beside a large mean stays exact.

    Args:
      returns: (B, T).
      weight: (B, T), 1 where the step counts; None where all do.
      decay: share of the earlier moments that is kept.
      updates: (), updates before this one.
    """
    if weight is not None:
        weight = normalise_weight(weight, axis_name)
    mean, variance = batch_moments(returns, weight, axis_name)
    number = updates + 1.0
    step = 1 / number if decay == 1 else (1 - decay) / (1 - decay**number)
    step = jnp.where(updates == 0, 1.0, step)  # exactly, or 0 counts as a return that was seen
    delta = mean - before.mean
    return ReturnMoments(
        before.mean + step * delta,
        (1 - step) * before.variance + step * variance + step * (1 - step) * delta**2,
    )


def absorb_scale(layer: dict[str, jax.Array], scale: Scale) -> dict[str, jax.Array]:
    """Returns the last layer with the scale folded in: it predicts in units of the return."""
    return preserve_outputs(layer, scale, Scale(jnp.zeros(()), jnp.ones(())))


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
