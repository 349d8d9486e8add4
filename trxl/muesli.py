"""Parts of Muesli: targets, and the network with its model.

Hessel et al. 2021, "Muesli" (arXiv 2104.06159). Arrays of a batch are (B, T, ...). S = MODEL_SIZE,
A = actor outputs, other letters as in rollout.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import distrax
import flax.linen as nn
import jax
import jax.numpy as jnp

from trxl.collectives import mean_over_devices, normalize_weight, weighted_mean
from trxl.distributions import Bins, make_policy
from trxl.layers import Dense, GRUCell, NormRelu
from trxl.spaces import ActionSpace, Box, Obs, encode_action
from trxl.statistics import Moments, update_decaying_moments

LEAST_VARIANCE = 1e-12


def update_advantage_moments(
    moments: Moments,
    advantage: jax.Array,
    weight: jax.Array | None,
    decay: float,
    axis_name: str | None,
) -> Moments:
    """Updates the variance around 0 of the advantages of all devices (section 4.3).

    Args:
      advantage: G - v, (B, T).
      weight: (B, T), 1 or 0; None: all 1.
      decay: share of the earlier advantages.
    """
    if weight is not None:
        weight = normalize_weight(weight, axis_name)
    square = mean_over_devices(weighted_mean(advantage**2, weight), axis_name)
    return update_decaying_moments(moments, jnp.float32(0), square, decay)


def advantage_std(moments: Moments) -> jax.Array:
    """Returns the divisor of advantages, sqrt(variance + 1e-12), ()."""
    return jnp.sqrt(moments.variance + LEAST_VARIANCE)


def clipped_mpo(prior_logits: jax.Array, advantage: jax.Array, limit: float) -> jax.Array:
    """Returns logits (..., A) of pi_CMPO, proportional to prior exp(clip(adv, -limit, limit)).

    Equation 9, over all actions.
    """
    return prior_logits + jnp.clip(advantage, -limit, limit)


def sampled_mpo_weights(advantage: jax.Array, limit: float) -> jax.Array:
    """Returns weights (..., N) of the log-probabilities of N actions sampled from the prior.

    exp(clip adv_i) / z_i, z_i = (1 + sum_{k != i} exp(clip adv_k)) / N (equations 11 and 12). The
    normaliser z_i replaces action i's term by 1, so that it does not depend on action i.
    """
    ratio = jnp.exp(jnp.clip(advantage, -limit, limit))
    others = jnp.sum(ratio, axis=-1, keepdims=True) - ratio
    return ratio * advantage.shape[-1] / (1 + others)


class PolicyTarget(NamedTuple):
    """Target of the policy: probabilities of all actions, or weights of sampled ones."""

    probs: jax.Array | None  # (B, T, A)
    actions: jax.Array | None  # (B, T, N, ...)
    weights: jax.Array | None  # (B, T, N)


def kl_to_target(target: PolicyTarget, policy: distrax.Distribution) -> jax.Array:
    """Computes KL(target || policy) (B, T); for samples the cross-entropy, its policy term."""
    if target.probs is not None:
        probs, log_probs = target.probs, jax.nn.log_softmax(policy.logits)
        log_target = jnp.log(jnp.where(probs > 0, probs, 1))
        return jnp.sum(jnp.where(probs > 0, probs * (log_target - log_probs), 0), axis=-1)
    log_probs = jax.vmap(policy.log_prob, in_axes=2, out_axes=2)(target.actions)
    return -jnp.mean(target.weights * log_probs, axis=-1)


class Imagined(NamedTuple):
    """Predictions of the model after an action."""

    latent: jax.Array  # (..., S)
    reward: jax.Array  # (..., bins), logits, of the action
    value: jax.Array  # (..., bins), logits, of the new latent


class ModelNetwork(nn.Module):
    """Policy, value and model on a `TransformerXL`."""

    transformer: nn.Module  # a `TransformerXL`
    action_space: ActionSpace
    make_head: Callable[..., nn.Module]  # takes outputs and gain
    size: int
    bins: Bins
    dtype: Any = jnp.float32

    def setup(self):
        outputs = self.action_space.num_outputs
        self.to_latent = Dense(self.size, dtype=self.dtype)
        self.norm = NormRelu()
        self.cell = GRUCell(self.size, self.dtype)
        self.actor = self.make_head(outputs=outputs, gain=0.01)
        self.critic = self.make_head(outputs=self.bins.number, gain=0.01)
        self.reward = self.make_head(outputs=self.bins.number, gain=0.01)
        real_valued = isinstance(self.action_space, Box)
        self.log_std = (
            self.param("log_std", nn.initializers.zeros, (outputs,), jnp.float32)
            if real_valued
            else None
        )

    def init_cache(self, memory: jax.Array) -> tuple[Any, ...]:
        """Makes the caches of `step` from the memory (B, M, L, E)."""
        return self.transformer.init_cache(memory)

    def step(self, obs: Obs, caches: tuple[Any, ...], t: jax.Array, reach: jax.Array):
        """Runs a step: policy over (B,), values (B,), caches, memory entries (B, L, E)."""
        x, caches, layer_inputs = self.transformer.step(obs, caches, t, reach)
        latent = self._latent(x)
        return self.policy(latent, obs), self.bins.mean(self.critic(latent)), caches, layer_inputs

    def unroll_windows(self, obs: Obs, memory: jax.Array, reach: jax.Array, window_grad: int):
        """Runs a whole rollout: latents s_0 (B, T, S)."""
        latent = self._latent(self.transformer.unroll_windows(obs, memory, reach, window_grad))
        if self.is_initializing():
            self.policy(latent, obs)
            shape = (*latent.shape[:-1], self.action_space.num_outputs)
            self.imagine(latent, jnp.zeros(shape, jnp.float32))
        return latent

    def policy(self, latent: jax.Array, obs: Obs) -> distrax.Distribution:
        """Returns the policy in latents (..., S); `obs` (..., obs_size) holds the action mask."""
        return make_policy(self.action_space, self.actor(latent), obs, self.log_std)

    def value(self, latent: jax.Array) -> jax.Array:
        """Returns logits (..., bins) of the values of latents (..., S)."""
        return self.critic(latent)

    def imagine(self, latent: jax.Array, action: jax.Array) -> Imagined:
        """Applies the model to latents (..., S) and encoded actions (..., A), which broadcast."""
        latent = self.cell.advance(latent, self.cell.project(action))
        return Imagined(latent, self.reward(latent), self.critic(latent))

    def action_values(self, latent: jax.Array, action: jax.Array, gamma: float) -> jax.Array:
        """Computes q(s, a) = r_1(s, a) + gamma v_1(s, a), one step of the model.

        Args:
          latent: (..., S).
          action: (..., N, A), N encoded actions per latent.

        Returns:
          (..., N) float32, in units of the return.
        """
        imagined = self.imagine(latent[..., None, :], action)
        return self.bins.mean(imagined.reward) + gamma * self.bins.mean(imagined.value)

    def _latent(self, x: jax.Array) -> jax.Array:
        return self.norm(self.to_latent(x).astype(jnp.float32))


def every_action(space: ActionSpace) -> jax.Array:
    """Returns all encoded actions of a `Discrete` space, (A, A) float32."""
    return encode_action(space, jnp.arange(space.num_outputs, dtype=jnp.int32))
