"""Distributions: policies over legal actions, and values and rewards over bins.

A critic that classifies predicts a distribution over bins (Bellemare et al. 2017, arXiv
1707.06887), and its value is the mean. The two-hot target and the scale h are MuZero's
(Schrittwieser et al. 2020, arXiv 1911.08265, appendix F). The Gaussian target is HL-Gauss
(Farebrother et al. 2024, arXiv 2403.03950, appendix A).
"""

import math
from typing import Any, NamedTuple

import distrax
import jax
import jax.numpy as jnp

from trxl.spaces import ActionSpace, Box, Discrete, Obs, action_mask

MASKED_LOGIT = -1e9
"""Logit of an illegal action: finite, so that gradients are 0 and not NaN."""

ENTROPY_FREE = (2 * math.pi * math.e) ** -0.5
"""Standard deviation of a normal distribution with entropy 0."""


def make_policy(
    space: ActionSpace, outputs: jax.Array, obs: Obs, log_std: jax.Array | None = None
) -> distrax.Distribution:
    """Makes the policy of the actor's outputs.

    | action space | distribution |
    | --- | --- |
    | `Discrete` | `distrax.Categorical` |
    | `MultiDiscrete` | `distrax.Independent`: a categorical for each choice |
    | `Box` | `distrax.MultivariateNormalDiag` |

    Masked actions have probability 0. Masked entries of a `Box` get a fixed distribution, which
    changes neither probability ratios nor entropies.

    Args:
      outputs: (..., num_outputs) float32, logits or means.
      obs: (..., obs_size), or as stored; begins with the mask if the space is masked.
      log_std: (num_outputs,) float32, for a `Box`.
    """
    legal = action_mask(obs, space)
    if isinstance(space, Box):
        assert log_std is not None
        scale = jnp.broadcast_to(jnp.exp(log_std), outputs.shape)
        if legal is not None:
            outputs, scale = jnp.where(legal, outputs, 0), jnp.where(legal, scale, ENTROPY_FREE)
        return distrax.MultivariateNormalDiag(outputs, scale)
    logits = outputs if legal is None else jnp.where(legal, outputs, MASKED_LOGIT)
    if isinstance(space, Discrete):
        return categorical(logits)
    logits = logits.reshape(*logits.shape[:-1], *space.table)
    logits = jnp.where(space.exists(), logits, MASKED_LOGIT)
    return independent_choices(logits)


def categorical(logits: jax.Array) -> distrax.Distribution:
    """Makes a distribution over actions (...) int32 from logits (..., options)."""
    return distrax.Categorical(logits=logits, dtype=jnp.int32)


def independent_choices(logits: jax.Array) -> distrax.Distribution:
    """Makes a distribution over actions (..., choices) from logits (..., choices, options)."""
    return distrax.Independent(categorical(logits), 1)


def sample_per_row(policy: distrax.Distribution, keys: jax.Array) -> jax.Array:
    """Samples an action for each row of a policy over (B,), with one key of `keys` (B,) per row."""
    make, *parameters = take_apart(policy)
    return jax.vmap(lambda key, *row: make(*row).sample(seed=key))(keys, *parameters)


def take_apart(policy: distrax.Distribution) -> tuple[Any, ...]:
    """Returns the function that makes a policy, and its arguments, which are arrays."""
    if isinstance(policy, distrax.Categorical):
        return categorical, policy.logits
    if isinstance(policy, distrax.Independent):
        return independent_choices, policy.distribution.logits
    return distrax.MultivariateNormalDiag, policy.loc, policy.scale_diag


def sample_uniformly(space: ActionSpace, obs: jax.Array, keys: jax.Array) -> jax.Array:
    """Samples a legal action uniformly for each row of obs (B, obs_size), with keys (B,).

    Unbounded entries of a `Box` are standard normal.
    """
    if not isinstance(space, Box):
        outputs = jnp.zeros((len(obs), space.num_outputs), jnp.float32)
        return sample_per_row(make_policy(space, outputs, obs), keys)
    low, high = space.bounds()
    bounded = jnp.isfinite(low) & jnp.isfinite(high)

    def sample(key: jax.Array) -> jax.Array:
        within, without = jax.random.split(key)
        uniform = jax.random.uniform(within, low.shape, jnp.float32)
        normal = jax.random.normal(without, low.shape, jnp.float32)
        return jnp.where(bounded, jnp.where(bounded, low, 0) + uniform * (high - low), normal)

    return jax.vmap(sample)(keys)


EPSILON = 1e-3


def squash(x: jax.Array) -> jax.Array:
    """Returns h(x) = sgn(x) (sqrt(|x| + 1) - 1) + 0.001 x.

    Pohlen et al. 2018 (arXiv 1805.11593).
    """
    return jnp.sign(x) * (jnp.sqrt(jnp.abs(x) + 1) - 1) + EPSILON * x


def unsquash(y: jax.Array) -> jax.Array:
    """Inverts `squash`."""
    # Solves y = s - 1 + e (s^2 - 1) for s = sqrt(|x| + 1), in a form without cancellation.
    shifted = jnp.abs(y) + 1 + EPSILON
    root = 2 * shifted / (1 + jnp.sqrt(1 + 4 * EPSILON * shifted))
    return jnp.sign(y) * (root**2 - 1)


class Bins(NamedTuple):
    """Bins of a distribution over numbers, evenly spaced from -limit to limit."""

    number: int
    limit: float  # centres of the outermost bins
    squashed: bool  # whether the bins are of h(x) instead of x
    sigma: float  # standard deviation of a Gaussian target, in bin widths; 0: two-hot targets

    @property
    def centres(self) -> jax.Array:
        """Centres of the bins, (number,) float32, squashed if `squashed`."""
        return jnp.linspace(-self.limit, self.limit, self.number, dtype=jnp.float32)

    def target(self, x: jax.Array) -> jax.Array:
        """Returns the target probabilities (..., number) of x (...), clipped to the bins."""
        position = (self._scaled(x) + self.limit) / (2 * self.limit) * (self.number - 1)
        position = jnp.clip(position, 0, self.number - 1)
        return self._gaussian(position) if self.sigma else self._two_hot(position)

    def clips(self, x: jax.Array) -> jax.Array:
        """Returns (...) bool, which x are beyond the outermost bins."""
        return jnp.abs(self._scaled(x)) > self.limit

    def mean(self, logits: jax.Array) -> jax.Array:
        """Returns the mean (...) of logits (..., number), taken back by h^-1 if `squashed`."""
        mean = jnp.sum(jax.nn.softmax(logits) * self.centres, axis=-1)
        return unsquash(mean) if self.squashed else mean

    def cross_entropy(self, logits: jax.Array, x: jax.Array) -> jax.Array:
        """Computes the cross-entropy (...) of logits (..., number) with the target of x."""
        return -jnp.sum(self.target(x) * jax.nn.log_softmax(logits), axis=-1)

    def _scaled(self, x: jax.Array) -> jax.Array:
        return squash(x) if self.squashed else x

    def _two_hot(self, position: jax.Array) -> jax.Array:
        """Returns probabilities of the two bins nearest to a position in 0..number-1."""
        distance = jnp.abs(position[..., None] - jnp.arange(self.number, dtype=jnp.int32))
        return jnp.maximum(1 - distance, 0)

    def _gaussian(self, position: jax.Array) -> jax.Array:
        """Returns each bin's share of a Gaussian around a position, truncated to all bins.

        p_i = (F(i + 1/2) - F(i - 1/2)) / (F(number - 1/2) - F(-1/2)), with its cumulative
        distribution function F.
        """
        edges = jnp.arange(self.number + 1, dtype=jnp.float32) - 0.5
        below = jax.scipy.special.erf((edges - position[..., None]) / (2**0.5 * self.sigma))
        return (below[..., 1:] - below[..., :-1]) / (below[..., -1:] - below[..., :1])
