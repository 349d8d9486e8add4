"""Policies: distributions over legal actions."""

import math

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
    if isinstance(policy, distrax.Categorical):
        make, parameters = categorical, [policy.logits]
    elif isinstance(policy, distrax.Independent):
        make, parameters = independent_choices, [policy.distribution.logits]
    else:
        make, parameters = distrax.MultivariateNormalDiag, [policy.loc, policy.scale_diag]
    return jax.vmap(lambda key, *row: make(*row).sample(seed=key))(keys, *parameters)


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
