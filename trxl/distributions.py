"""Policies: distributions over legal actions, from the actor's outputs."""

import math

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
