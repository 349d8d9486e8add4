"""The whole network: encoder, transformer, actor and critic, as a config has them.

Letters as in transformerXL.py: B environments, T steps, M = window_mem, W = window_grad, L layers,
E = embed_size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import distrax
import flax.linen as nn
import jax
import jax.numpy as jnp

from config import piece
from encoders import FeatureEncoder, LinearEncoder
from gru import GRULayer
from heads import Head, ResidualHead
from policies import make_policy
from spaces import ActionSpace, Box, Obs, ObsSpace
from transformerXL import TransformerXL, TransformerXLLayer


class ActorCriticTransformer(nn.Module):
    """A policy and a value on top of a `TransformerXL`.

    The policy is the distribution that `policies.make_policy` makes of the actor's outputs; the log
    standard deviation of real-valued actions does not depend on the state.
    """

    transformer: TransformerXL
    action_space: ActionSpace
    make_head: Callable[..., nn.Module]  # of outputs and gain

    def setup(self):
        outputs = self.action_space.num_outputs
        self.actor = self.make_head(outputs=outputs, gain=0.01)
        self.critic = self.make_head(outputs=1, gain=1.0)
        real_valued = isinstance(self.action_space, Box)
        self.log_std = (
            self.param("log_std", nn.initializers.zeros, (outputs,)) if real_valued else None
        )

    def start_rollout(self, memory: jax.Array) -> tuple[Any, ...]:
        """Makes of the memory (B, M, L, E) what `step` needs, say keys and values."""
        return self.transformer.start_rollout(memory)

    def step(self, obs: Obs, caches: tuple[Any, ...], t: jax.Array, reach: jax.Array):
        """One step of a rollout.

        Args:
          obs: (B, obs_size), or as stored.
          caches: from `start_rollout` or from the step before.
          t: (), steps since the rollout's start.
          reach: (B,), how many of the steps before this one it may attend to, 0..M.

        Returns:
          policy over (B,), values (B,), caches, hidden states (B, L, E) for the memory.
        """
        x, caches, hidden = self.transformer.step(obs, caches, t, reach)
        return *self._heads(x, obs), caches, hidden

    def window(self, obs: Obs, memory: jax.Array, reach: jax.Array, window_grad: int):
        """A whole rollout, in windows of W = `window_grad` steps that carry the gradient.

        Args:
          obs: (B, T, obs_size), or as stored.
          memory: (B, M+T-W, L, E), hidden states of the steps -M .. T-W-1, oldest first.
          reach: (B, T).
          window_grad: W, divides T.

        Returns:
          policy over (B, T), values (B, T).
        """
        return self._heads(self.transformer.window(obs, memory, reach, window_grad), obs)

    def _heads(self, x: jax.Array, obs: Obs) -> tuple[distrax.Distribution, jax.Array]:
        policy = make_policy(self.action_space, self.actor(x), obs, self.log_std)
        return policy, jnp.squeeze(self.critic(x), axis=-1)


def make_network(
    config: dict[str, Any],
    action_space: ActionSpace,
    space: ObsSpace,
    layer: type = TransformerXLLayer,
) -> ActorCriticTransformer:
    """The network of a checked config.

    Args:
      layer: of MEMORY=transformer, this one or another class with the same interface.
    """
    body, make_head = make_body(config, space, layer)
    return ActorCriticTransformer(body, action_space, make_head)


def make_body(
    config: dict[str, Any], space: ObsSpace, layer: type = TransformerXLLayer
) -> tuple[TransformerXL, Callable[..., nn.Module]]:
    """What any algorithm's network is made of: the body, and what makes a head."""
    dtype = jnp.dtype(config["COMPUTE_DTYPE"])
    width = config["EMBED_SIZE"]
    make_layer = (
        partial(GRULayer, width, dtype)
        if config["MEMORY"] == "gru"
        else partial(
            layer,
            embed_size=width,
            num_heads=config["num_heads"],
            qkv_features=config["qkv_features"],
            window_mem=config["WINDOW_MEM"],
            gating=config["gating"],
            gating_bias=config["gating_bias"],
            dtype=dtype,
        )
    )
    linear = piece(config, "ENCODER") == "linear"
    make_encoder = (
        partial(LinearEncoder, space, width, dtype)
        if linear
        else partial(FeatureEncoder, space, config["encoder_features"], dtype)
    )
    make_head = (
        partial(Head, activation=config["ACTIVATION"])
        if piece(config, "HEADS") == "mlp"
        else ResidualHead
    )
    body = TransformerXL(
        config["num_layers"],
        width,
        make_encoder,
        make_layer,
        embeds=not linear,
        skip=piece(config, "SKIP"),
        dtype=dtype,
    )
    return body, partial(make_head, width=config["hidden_layers"], dtype=dtype)
