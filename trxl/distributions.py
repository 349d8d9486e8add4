"""Distributions: policies over legal actions, and values and rewards over bins.

A critic that classifies predicts a distribution over bins by a cross-entropy, and its value is the
distribution's mean. Bellemare et al. 2017 (arXiv 1707.06887) learn values so; the two-hot target
and the scale h are those of MuZero (Schrittwieser et al. 2020, arXiv 1911.08265, appendix F), the
Gaussian target is HL-Gauss (Farebrother et al. 2024, arXiv 2403.03950, appendix A).
"""

import math
from typing import NamedTuple

import distrax
import jax
import jax.numpy as jnp

from trxl.spaces import ActionSpace, Box, Discrete, Obs, action_mask

MASKED_LOGIT = -1e9
"""The logit of an action that can't be taken: finite, so that its gradient is 0 and not NaN."""

ENTROPY_FREE = (2 * math.pi * math.e) ** -0.5
"""The deviation of a normal distribution whose entropy is 0."""


def make_policy(
    space: ActionSpace, outputs: jax.Array, obs: Obs, log_std: jax.Array | None = None
) -> distrax.Distribution:
    """The distribution that the actor's outputs (..., num_outputs) stand for.

    `distrax.Categorical` for `Discrete` actions, one for each choice, independent of each other,
    for `MultiDiscrete` ones, and `distrax.MultivariateNormalDiag` for a `Box`. Where the space is
    masked, what the observation rules out has probability 0; numbers of a `Box` that are not used
    get a fixed distribution, which leaves ratios and entropies as they would be without them.

    Args:
      outputs: logits, or means.
      obs: (..., obs_size), or as stored, whose first entries are the mask where the space has one.
      log_std: (num_outputs,), of a `Box`.
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
    """Over actions (...) int32 from logits (..., options)."""
    return distrax.Categorical(logits=logits, dtype=jnp.int32)


def independent_choices(logits: jax.Array) -> distrax.Distribution:
    """Over actions (..., choices) from logits (..., choices, options)."""
    return distrax.Independent(categorical(logits), 1)


def sample_per_row(policy: distrax.Distribution, keys: jax.Array) -> jax.Array:
    """Samples an action for each row of a policy over (B,), from that row's own key in (B,)."""
    if isinstance(policy, distrax.Categorical):
        make, parameters = categorical, [policy.logits]
    elif isinstance(policy, distrax.Independent):
        make, parameters = independent_choices, [policy.distribution.logits]
    else:
        make, parameters = distrax.MultivariateNormalDiag, [policy.loc, policy.scale_diag]
    return jax.vmap(lambda key, *row: make(*row).sample(seed=key))(keys, *parameters)


def sample_uniformly(space: ActionSpace, obs: jax.Array, keys: jax.Array) -> jax.Array:
    """Samples a legal action uniformly for each row of obs (B, obs_size).

    A number of a `Box` without bounds is standard normal.
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
    """h(x) = sgn(x) (sqrt(|x| + 1) - 1) + 0.001 x (Pohlen et al. 2018, arXiv 1805.11593)."""
    return jnp.sign(x) * (jnp.sqrt(jnp.abs(x) + 1) - 1) + EPSILON * x


def unsquash(y: jax.Array) -> jax.Array:
    """The inverse of `squash`."""
    # Of y = s - 1 + e (s^2 - 1) with s = sqrt(|x| + 1), the root, in a form that loses no digits.
    shifted = jnp.abs(y) + 1 + EPSILON
    root = 2 * shifted / (1 + jnp.sqrt(1 + 4 * EPSILON * shifted))
    return jnp.sign(y) * (root**2 - 1)


class Bins(NamedTuple):
    """Bins of a distribution over numbers, evenly spaced from -limit to limit."""

    number: int
    limit: float  # the outermost centres
    squashed: bool  # whether the bins are of h(x), not of x
    sigma: float  # standard deviation of a target, in bin widths; 0: two-hot

    @property
    def centres(self) -> jax.Array:
        """(number,), squashed."""
        return jnp.linspace(-self.limit, self.limit, self.number, dtype=jnp.float32)

    def target(self, x: jax.Array) -> jax.Array:
        """Numbers (...) as probabilities (..., number) around them."""
        position = (self._scaled(x) + self.limit) / (2 * self.limit) * (self.number - 1)
        position = jnp.clip(position, 0, self.number - 1)
        return self._gaussian(position) if self.sigma else self._two_hot(position)

    def clips(self, x: jax.Array) -> jax.Array:
        """Returns (...) bool, which numbers (...) are beyond the outermost bins."""
        return jnp.abs(self._scaled(x)) > self.limit

    def mean(self, logits: jax.Array) -> jax.Array:
        """The number (...) that a distribution's logits (..., number) stand for."""
        mean = jnp.sum(jax.nn.softmax(logits) * self.centres, axis=-1)
        return unsquash(mean) if self.squashed else mean

    def cross_entropy(self, logits: jax.Array, x: jax.Array) -> jax.Array:
        """(...) of predicted logits (..., number) against numbers (...)."""
        return -jnp.sum(self.target(x) * jax.nn.log_softmax(logits), axis=-1)

    def _scaled(self, x: jax.Array) -> jax.Array:
        return squash(x) if self.squashed else x

    def _two_hot(self, position: jax.Array) -> jax.Array:
        """Probabilities of the two bins beside a position in 0..number-1, which is their mean."""
        distance = jnp.abs(position[..., None] - jnp.arange(self.number, dtype=jnp.int32))
        return jnp.maximum(1 - distance, 0)

    def _gaussian(self, position: jax.Array) -> jax.Array:
        """Probabilities that a Gaussian around a position, truncated to all bins, gives each.

        p_i = (F(i + 1/2) - F(i - 1/2)) / (F(number - 1/2) - F(-1/2)), F its distribution function.
        """
        edges = jnp.arange(self.number + 1, dtype=jnp.float32) - 0.5
        below = jax.scipy.special.erf((edges - position[..., None]) / (2**0.5 * self.sigma))
        return (below[..., 1:] - below[..., :-1]) / (below[..., -1:] - below[..., :1])
