"""A network with a model of what comes next: Muesli's.

Hessel et al. 2021, "Muesli" (arXiv 2104.06159), section 4.5, on the transformer: from its output a
latent s_0, from s_k and an action s_{k+1}, and from every latent a policy, a value, and the reward
of the step that led there. Letters as in network.py, S = MODEL_SIZE, A the actor's outputs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import distrax
import flax.linen as nn
import jax
import jax.numpy as jnp

from trxl.categorical import Bins
from trxl.dense import Dense, NormRelu
from trxl.gru import GRUCell
from trxl.policies import make_policy
from trxl.spaces import ActionSpace, Box, Obs, encode_action


class Imagined(NamedTuple):
    """What is predicted after one more action."""

    latent: jax.Array  # (..., S)
    reward: jax.Array  # (..., bins), logits, of the step that led here
    value: jax.Array  # (..., bins), logits


class ModelNetwork(nn.Module):
    """Policy, value and model on top of a `TransformerXL`."""

    transformer: nn.Module  # a `TransformerXL`
    action_space: ActionSpace
    make_head: Callable[..., nn.Module]  # of outputs and gain
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
            self.param("log_std", nn.initializers.zeros, (outputs,)) if real_valued else None
        )

    def start_rollout(self, memory: jax.Array) -> tuple[Any, ...]:
        """Makes of the memory (B, M, L, E) what `step` needs."""
        return self.transformer.start_rollout(memory)

    def step(self, obs: Obs, caches: tuple[Any, ...], t: jax.Array, reach: jax.Array):
        """One step of a rollout: policy over (B,), values (B,), caches, hidden (B, L, E)."""
        x, caches, hidden = self.transformer.step(obs, caches, t, reach)
        latent = self._latent(x)
        return self.policy(latent, obs), self.bins.mean(self.critic(latent)), caches, hidden

    def window(self, obs: Obs, memory: jax.Array, reach: jax.Array, window_grad: int):
        """A whole rollout: latents s_0, (B, T, S)."""
        latent = self._latent(self.transformer.window(obs, memory, reach, window_grad))
        if self.is_initializing():
            self.policy(latent, obs)
            self.imagine(latent, jnp.zeros((*latent.shape[:-1], self.action_space.num_outputs)))
        return latent

    def policy(self, latent: jax.Array, obs: Obs) -> distrax.Distribution:
        """The policy in latents (..., S); of `obs` (..., obs_size) the mask of actions is read."""
        return make_policy(self.action_space, self.actor(latent), obs, self.log_std)

    def value(self, latent: jax.Array) -> jax.Array:
        """Logits (..., bins) of the value of latents (..., S)."""
        return self.critic(latent)

    def imagine(self, latent: jax.Array, action: jax.Array) -> Imagined:
        """What comes of encoded actions (..., A) in latents (..., S), of shapes that broadcast."""
        latent = self.cell.advance(latent, self.cell.project(action))
        return Imagined(latent, self.reward(latent), self.critic(latent))

    def action_values(self, latent: jax.Array, action: jax.Array, gamma: float) -> jax.Array:
        """q(s, a) = r_1(s, a) + gamma v_1(s, a), one step of the model.

        Args:
          latent: (..., S).
          action: (..., N, A), N encoded actions in each.

        Returns:
          (..., N).
        """
        imagined = self.imagine(latent[..., None, :], action)
        return self.bins.mean(imagined.reward) + gamma * self.bins.mean(imagined.value)

    def _latent(self, x: jax.Array) -> jax.Array:
        return self.norm(self.to_latent(x).astype(jnp.float32))


def every_action(space: ActionSpace) -> jax.Array:
    """(A, A), all actions of a `Discrete` space, encoded."""
    return encode_action(space, jnp.arange(space.num_outputs))
