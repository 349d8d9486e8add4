"""The textbook formulation of the agent: the baseline, and an oracle for the fast one.

The same parameters and the same function as transformerXL.py's layer, written as in the papers: in
a rollout the hidden memory is rolled at every step, and normed and projected to keys and values
again, all M + 1 positions of it; in the loss every window has its M + W hidden states gathered and
projected by itself. Nothing is cached, folded or fused beyond what XLA does.

Letters as in transformerXL.py.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from trxl.layers import LAYER_NORM_EPSILON

from trainer_PPO_trXL import PPO
from transformerXL import (
    Gate,
    TransformerXLLayer,
    make_network,
    relative_shift,
    sinusoid,
)


class NaiveLayer(TransformerXLLayer):
    """Layer with `TransformerXLLayer`'s parameters, written as in the papers."""

    def setup(self):
        dense = partial(nn.Dense, dtype=self.dtype)
        heads = (self.num_heads, self.qkv_features // self.num_heads)
        self.attention_norm = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON)
        self.query = dense(self.qkv_features)
        self.key_value = dense(2 * self.qkv_features)
        self.position = dense(self.qkv_features, use_bias=False)
        self.content_bias = self.param("content_bias", nn.initializers.zeros, heads)
        self.position_bias = self.param("position_bias", nn.initializers.zeros, heads)
        self.attention_out = dense(self.embed_size)
        self.mlp_norm = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON)
        self.mlp_in = dense(self.embed_size)
        self.mlp_out = dense(self.embed_size)
        if self.gating:
            self.attention_gate = Gate(self.gating_bias, self.dtype)
            self.mlp_gate = Gate(self.gating_bias, self.dtype)

    def init_cache(self, memory: jax.Array) -> jax.Array:
        """Returns memory (B, M, E), oldest first, unchanged."""
        return memory

    def step(self, x: jax.Array, memory: jax.Array, t: jax.Array, reach: jax.Array):
        """Maps x (B, E), memory (B, M, E), reach (B,) to output (B, E) and the rolled memory."""
        tokens = jnp.concatenate([memory, x[:, None]], axis=1)
        output = self._layer(tokens, reach[:, None])
        return output[:, 0], tokens[:, 1:]

    def unroll_windows(self, x: jax.Array, memory: jax.Array, reach: jax.Array, window_grad: int):
        """Maps x (B, T, E), memory (B, M+T-W, E), reach (B, T) to output (B, T, E)."""
        outputs = []
        for start in range(0, x.shape[1], window_grad):
            now = slice(start, start + window_grad)
            past = memory[:, start : start + self.window_mem]
            tokens = jnp.concatenate([past, x[:, now]], axis=1)
            outputs.append(self._layer(tokens, reach[:, now]))
        return jnp.concatenate(outputs, axis=1)

    def _layer(self, tokens: jax.Array, reach: jax.Array) -> jax.Array:
        """Maps tokens (B, M+W, E), reach (B, W) of the last W of them to their output (B, W, E)."""
        window = reach.shape[1]
        n = self.attention_norm(tokens)
        query = self._split_heads(self.query(n[:, -window:]))  # (B, W, H, D)
        keys, values = map(self._split_heads, jnp.split(self.key_value(n), 2, axis=-1))
        distances = jnp.arange(self.window_mem, -1, -1)
        positions = self._split_heads(self.position(sinusoid(distances, self.embed_size)))
        by_distance = jnp.einsum("bihd,rhd->bhir", query + self.position_bias, positions)
        content = jnp.einsum("bihd,bjhd->bhij", query + self.content_bias, keys)
        scale = (self.qkv_features // self.num_heads) ** -0.5
        logits = (content + relative_shift(by_distance)) * scale

        # Query i's own step is key M + i.
        ages = self.window_mem + jnp.arange(window)[:, None] - jnp.arange(tokens.shape[1])
        visible = (ages >= 0) & (ages <= reach[..., None])  # (B, W, M+W)
        weights = jax.nn.softmax(jnp.where(visible[:, None], logits, -jnp.inf))
        attended = jnp.einsum("bhij,bjhd->bihd", weights, values)
        a = self.attention_out(attended.reshape(*attended.shape[:2], self.qkv_features))

        x = tokens[:, -window:]
        y = self.attention_gate(x, nn.relu(a)) if self.gating else x + a
        f = self.mlp_out(nn.gelu(self.mlp_in(self.mlp_norm(y))))
        return self.mlp_gate(y, nn.relu(f)) if self.gating else y + f


make_naive_network = partial(make_network, layer=NaiveLayer)
"""Network of naive layers, with the same parameters as `make_network`'s."""

NAIVE_PPO = PPO._replace(make_network=make_naive_network)
