"""Gated Transformer-XL (GTrXL) in Flax Linen.

Relative attention over a memory: Dai et al. 2019, "Transformer-XL" (arXiv 1901.02860). Pre-norm
order and gates: Parisotto et al. 2019, "Stabilizing Transformers for Reinforcement Learning"
(arXiv 1910.06764).

Two forms compute the same function of the same parameters:

- `step`, in the rollout: one token per environment against cached keys and values.
- `unroll_windows`, in the loss: all windows at once, each of W tokens with gradient after M stored
  layer inputs.

They agree on the parameters of the rollout. Later gradient steps still read the memory that the
rollout stored.

Letters: B environments, T rollout steps, W = window_grad, M = window_mem, K = T / W windows,
L layers, E = embed_size, H heads, D = qkv_features / H.

A step attends to itself and to the `reach` steps before it. `reach` is the number of steps since
the last memory boundary, at most M. This integer is the whole attention mask.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import distrax
import flax.linen as nn
import jax
import jax.numpy as jnp

from trxl.distributions import Bins, make_policy
from trxl.encoders import FeatureEncoder, LinearEncoder
from trxl.layers import Dense, GRULayer, LayerNormParams, MLPHead, ResidualHead, layer_norm
from trxl.spaces import ActionSpace, Box, Obs, ObsSpace
from trxl.statistics import Moments, init_decaying_moments, value_scale


class LayerCache(NamedTuple):
    """Keys and values of one layer's last M + 1 steps, as a ring.

    Rollout step t is written to slot t mod (M + 1). The memory entry d = 1 .. M steps before the
    rollout starts in slot -d mod (M + 1).
    """

    keys: jax.Array  # (B, H, M+1, D)
    values: jax.Array  # (B, H, M+1, D)
    # (H, 2(M+1), D): entry i is p_d, d = -i mod (M+1). Stored twice, so any rotation is a slice.
    positions: jax.Array


def sinusoid(distances: jax.Array, embed_size: int) -> jax.Array:
    """Embeds distances (N,) as R_d = [sin(d f), cos(d f)], f_i = 10000^(-2i/E): (N, E).

    Vaswani et al. 2017 (arXiv 1706.03762), section 3.5, in the order of Transformer-XL's code.
    """
    frequencies = 10000.0 ** (-jnp.arange(0, embed_size, 2, jnp.int32) / embed_size)  # (E/2,)
    angles = distances[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def slot_of_age(t: jax.Array, slots: int) -> jax.Array:
    """Returns the ring slots (M+1,) of the steps of age 0 .. M, at step t.

    (t - i) mod (M+1) is its own inverse, so these are also the ages of slots 0 .. M.
    """
    return (t - jnp.arange(slots, dtype=jnp.int32)) % slots


def relative_shift(by_distance: jax.Array) -> jax.Array:
    """Moves terms from the axis of distances to the axis of keys (Transformer-XL, appendix B).

    Args:
      by_distance: (..., W, M+1); entry [i, r] belongs to query i and distance M - r.

    Returns:
      (..., W, M+W); entry [i, j] belongs to query i and key j; key M + i is the query's own step.
      Entries at distances outside 0..M are -inf, which makes the attention causal.
    """
    *batch, window, num_distances = by_distance.shape
    width = num_distances + window - 1  # M+W
    pad = [(0, 0)] * (by_distance.ndim - 1) + [(0, window)]
    padded = jnp.pad(by_distance, pad, constant_values=-jnp.inf)  # (..., W, M+W+1)
    # In the flat array row i starts at i (M+W+1). Cut into rows of M+W, it moves i places right.
    flat = padded.reshape(*batch, window * (width + 1))[..., : window * width]
    return flat.reshape(*batch, window, width)


def sliding_windows(sequence: jax.Array, count: int, stride: int, length: int) -> jax.Array:
    """Cuts (H, B, S, D) into (H, B, count, length, D); window k starts at step k * stride."""

    def cut(start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(sequence, start, length, axis=2)

    return jax.vmap(cut, out_axes=2)(jnp.arange(count, dtype=jnp.int32) * stride)


class Gate(nn.Module):
    """GTrXL's gate, a GRU cell that combines a stream x with a sublayer's output y.

    ```
    r = sigmoid(Wr y + Ur x)
    z = sigmoid(Wz y + Uz x - b)
    h = tanh(Wg y + Ug (r * x))
    result = (1 - z) * x + z * h
    ```

    Source: Parisotto et al. 2019, section 3.2, "Gated-Recurrent-Unit-type gating". Matrices applied
    to the same input are fused into one.
    """

    bias: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        width = x.shape[-1]
        dense = partial(Dense, use_bias=False, dtype=self.dtype)
        bias = self.param("bias", nn.initializers.constant(self.bias), (width,), jnp.float32)
        y_r, y_z, y_g = jnp.split(dense(3 * width, name="w")(y), 3, axis=-1)
        x_r, x_z = jnp.split(dense(2 * width, name="u")(x), 2, axis=-1)
        r = nn.sigmoid(y_r + x_r)
        z = nn.sigmoid(y_z + x_z - bias)
        h = jnp.tanh(y_g + dense(width, name="u_g")(r * x))
        return (1 - z) * x + z * h


class TransformerXLLayer(nn.Module):
    """Relative attention over [memory; x] and an MLP, each followed by a gate."""

    embed_size: int
    num_heads: int
    qkv_features: int
    window_mem: int
    gating: bool
    gating_bias: float
    dtype: Any = jnp.float32  # of matrix products; norms, softmax and the stream stay float32

    def setup(self):
        dense = partial(Dense, dtype=self.dtype)
        heads = (self.num_heads, self.qkv_features // self.num_heads)
        self.attention_norm = LayerNormParams(self.embed_size)
        self.query = dense(self.qkv_features)
        self.key_value = dense(2 * self.qkv_features)
        self.position = dense(self.qkv_features, use_bias=False)
        zeros = nn.initializers.zeros
        self.content_bias = self.param("content_bias", zeros, heads, jnp.float32)  # u
        self.position_bias = self.param("position_bias", zeros, heads, jnp.float32)  # w
        self.attention_out = dense(self.embed_size)
        self.mlp_norm = LayerNormParams(self.embed_size)
        self.mlp_in = dense(self.embed_size)
        self.mlp_out = dense(self.embed_size)
        if self.gating:
            self.attention_gate = Gate(self.gating_bias, self.dtype)
            self.mlp_gate = Gate(self.gating_bias, self.dtype)

    def init_cache(self, memory: jax.Array) -> LayerCache:
        """Projects the memory (B, M, E), oldest first, to the cache of a rollout."""
        keys, values = self._keys_and_values(layer_norm(memory))  # (B, M, H, D)
        # Ages M .. 1 go to slots 1 .. M. The first step writes slot 0.
        empty_first_slot = ((0, 0), (1, 0), (0, 0), (0, 0))
        keys, values = (jnp.swapaxes(jnp.pad(x, empty_first_slot), 1, 2) for x in (keys, values))
        slots = self.window_mem + 1
        ages = -jnp.arange(2 * slots, dtype=jnp.int32) % slots
        return LayerCache(keys, values, jnp.swapaxes(self._position_terms(ages), 0, 1))

    def step(self, x: jax.Array, cache: LayerCache, t: jax.Array, reach: jax.Array):
        """Runs a step of a rollout: x (B, E) at step t (), reach (B,) -> (output (B, E), cache)."""
        slots = self.window_mem + 1
        slot = t % slots
        n = layer_norm(x)
        content_query, position_query = self._queries(n)  # (B, H, D)
        key, value = self._keys_and_values(n)
        write = jax.lax.dynamic_update_index_in_dim
        keys = write(cache.keys, key, slot, axis=2)
        values = write(cache.values, value, slot, axis=2)
        # Slot s has age (t - s) mod (M+1), a rotation of p.
        positions = jax.lax.dynamic_slice_in_dim(cache.positions, slots - slot, slots, axis=1)
        logits = einsum32("bhd,bhsd->bhs", content_query, keys)
        # For an output (B, H, M+1), einsum puts the slots first and transposes.
        logits += jnp.swapaxes(einsum32("bhd,hsd->hbs", position_query, positions), 0, 1)
        ages = slot_of_age(t, slots)  # of all slots; as indices, the slots by age
        visible = ages <= reach[:, None]  # (B, M+1)
        logits = jnp.where(visible[:, None], logits, -jnp.inf)
        # By age, (B, H, M+1). Recorded only if "intermediates" is mutable.
        self.sow("intermediates", "attention", jax.nn.softmax(logits)[..., ages])
        attended = attend("bhs,bhsd->bhd", logits, values)
        return self._join(x, attended), cache._replace(keys=keys, values=values)

    def memory_entry(self, x: jax.Array, cache: LayerCache) -> jax.Array:
        """Returns the memory entry (B, E) of a step, its input x."""
        return x

    def unroll_windows(self, x: jax.Array, memory: jax.Array, reach: jax.Array, window_grad: int):
        """Runs T steps in windows of W: x (B, T, E), reach (B, T) -> output (B, T, E).

        `memory` is (B, M+T-W, E), this layer's cached inputs at steps -M .. T-W-1. Window k attends
        to the M entries before step k W.
        """
        batch, steps = reach.shape
        count = steps // window_grad
        by_window = (batch, count, window_grad)

        def cut(x: jax.Array) -> jax.Array:
            """Cuts (B, T, H, D) into (H, B, K, W, D)."""
            return heads_first(x).reshape(self.num_heads, *by_window, -1)

        n = layer_norm(x)
        content_query, position_query = map(cut, self._queries(n))

        # Windows share memory entries, so the memory is projected before it is cut.
        past = (
            sliding_windows(heads_first(part), count, window_grad, self.window_mem)
            for part in self._keys_and_values(layer_norm(memory))
        )
        now = map(cut, self._keys_and_values(n))
        keys, values = (
            jnp.concatenate(parts, axis=3) for parts in zip(past, now, strict=True)
        )  # (H, B, K, M+W, D)

        distances = jnp.arange(self.window_mem, -1, -1, jnp.int32)  # (M+1,)
        positions = self._position_terms(distances)
        position_logits = einsum32("hbkid,rhd->hbkir", position_query, positions)
        visible = distances <= reach.reshape(*by_window, 1)  # (B, K, W, M+1)
        position_logits = jnp.where(visible, position_logits, -jnp.inf)
        logits = einsum32("hbkid,hbkjd->hbkij", content_query, keys)
        logits += relative_shift(position_logits)
        attended = attend("hbkij,hbkjd->hbkid", logits, values)
        attended = jnp.moveaxis(attended, 0, 3)  # (B, K, W, H, D)
        return self._join(x, attended.reshape(batch, steps, *attended.shape[3:]))

    def _queries(self, n: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (q + u) / sqrt(D) and (q + w) / sqrt(D), (..., H, D), of normed n (..., E)."""
        query = self._split_heads(self.query(n, self.attention_norm()))
        scale = query.shape[-1] ** -0.5
        biases = self.content_bias, self.position_bias
        return tuple(((query + bias) * scale).astype(self.dtype) for bias in biases)

    def _split_heads(self, features: jax.Array) -> jax.Array:
        size = self.qkv_features // self.num_heads
        return features.reshape(*features.shape[:-1], self.num_heads, size)

    def _keys_and_values(self, n: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values, (..., H, D) each, of normed n (..., E)."""
        keys, values = jnp.split(self.key_value(n, self.attention_norm()), 2, axis=-1)
        return self._split_heads(keys), self._split_heads(values)

    def _position_terms(self, distances: jax.Array) -> jax.Array:
        """Returns p_d = Wp R_d (N, H, D) of distances (N,)."""
        return self._split_heads(self.position(sinusoid(distances, self.embed_size)))

    def _join(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Completes the layer after attention: x (..., E), heads (..., H, D) -> (..., E)."""
        a = self.attention_out(attended.reshape(*attended.shape[:-2], self.qkv_features))
        y = self.attention_gate(x, nn.relu(a)) if self.gating else x + a
        f = self.mlp_out(nn.gelu(self.mlp_in(layer_norm(y), self.mlp_norm())))
        return self.mlp_gate(y, nn.relu(f)) if self.gating else y + f


def einsum32(subscripts: str, *operands: jax.Array) -> jax.Array:
    """Computes an einsum in the operands' dtype, and casts it to float32."""
    return jnp.einsum(subscripts, *operands).astype(jnp.float32)


def attend(subscripts: str, logits: jax.Array, values: jax.Array) -> jax.Array:
    """Computes softmax(logits) times values as an einsum.

    The division follows the product, where it is over D columns in place of all keys.
    """
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    attended = einsum32(subscripts, weights.astype(values.dtype), values)
    return attended / jnp.sum(weights, axis=-1, keepdims=True)


def heads_first(x: jax.Array) -> jax.Array:
    """Transposes (B, N, H, D) to (H, B, N, D)."""
    return jnp.moveaxis(x, 2, 0)


class TransformerXL(nn.Module):
    """Encoder and L layers, without an activation or a norm after either.

    With `embeds` a dense layer projects the encoder's F features to E; otherwise F = E. With `skip`
    the output is the features beside the last layer's output, (..., F+E).
    """

    num_layers: int
    embed_size: int
    make_encoder: Callable[[], Any]
    make_layer: Callable[[], Any]
    embeds: bool = False
    skip: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        self.encoder = self.make_encoder()
        if self.embeds:
            self.embedding = Dense(self.embed_size, dtype=self.dtype)
        self.layers = [self.make_layer() for _ in range(self.num_layers)]

    def init_cache(self, memory: jax.Array) -> tuple[Any, ...]:
        """Makes one cache per layer from layer inputs (B, M, L, E), oldest first."""
        return tuple(
            layer.init_cache(memory[:, :, index]) for index, layer in enumerate(self.layers)
        )

    def step(
        self, obs: Obs, caches: tuple[Any, ...], t: jax.Array, reach: jax.Array
    ) -> tuple[jax.Array, tuple[Any, ...], jax.Array]:
        """Runs one step: obs (B, obs_size), t (), reach (B,).

        Returns:
          output (B, E or F+E), caches, and the memory entry (B, L, E) of this step.
        """
        features, x = self._encode(obs)
        # An empty start, so that a network without layers can concatenate.
        layer_inputs = [jnp.zeros((len(x), 0, self.embed_size), jnp.float32)]
        new_caches = []
        for layer, cache in zip(self.layers, caches, strict=True):
            output, cache = layer.step(x, cache, t, reach)
            layer_inputs.append(layer.memory_entry(x, cache)[:, None])
            new_caches.append(cache)
            x = output
        return self._output(features, x), tuple(new_caches), jnp.concatenate(layer_inputs, axis=1)

    def unroll_windows(
        self, obs: Obs, memory: jax.Array, reach: jax.Array, window_grad: int
    ) -> jax.Array:
        """Runs T steps: obs (B, T, obs_size), reach (B, T) -> (B, T, E or F+E).

        `memory` is (B, M+T-W, L, E), layer inputs of steps -M .. T-W-1.
        """
        features, x = self._encode(obs)
        for index, layer in enumerate(self.layers):
            x = layer.unroll_windows(x, memory[:, :, index], reach, window_grad)
        return self._output(features, x)

    def _encode(self, obs: Obs) -> tuple[jax.Array, jax.Array]:
        """Returns the features (..., F) and the first layer's input (..., E)."""
        features = self.encoder(obs)
        return features, self.embedding(features).astype(jnp.float32) if self.embeds else features

    def _output(self, features: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.concatenate([features, x], axis=-1) if self.skip else x


class ActorCriticTransformer(nn.Module):
    """Policy and value heads on a `TransformerXL`.

    `distributions.make_policy` makes the policy from the actor's outputs. The log standard
    deviation of real-valued actions does not depend on the state.

    With `bins` the critic's outputs are logits of (R - mu) / sigma, R the return. Mu and sigma come
    from the collection `return_moments`, so values are in units of the return.
    """

    transformer: TransformerXL
    action_space: ActionSpace
    make_head: Callable[..., nn.Module]  # takes outputs and gain
    bins: Bins | None = None  # of a critic that classifies; None: it predicts a number

    def setup(self):
        outputs = self.action_space.num_outputs
        self.actor = self.make_head(outputs=outputs, gain=0.01)
        if self.bins is None:
            self.critic = self.make_head(outputs=1, gain=1.0)
        else:
            self.critic = self.make_head(outputs=self.bins.number, gain=0.01)
            # Beside the parameters, so that it is saved with them; no gradient reaches it.
            moments = {
                name: self.variable("return_moments", name, jnp.float32, start).value
                for name, start in init_decaying_moments()._asdict().items()
            }
            self.return_moments = Moments(**moments)
        real_valued = isinstance(self.action_space, Box)
        self.log_std = (
            self.param("log_std", nn.initializers.zeros, (outputs,), jnp.float32)
            if real_valued
            else None
        )

    def init_cache(self, memory: jax.Array) -> tuple[Any, ...]:
        """Makes the caches of `step` from the memory (B, M, L, E)."""
        return self.transformer.init_cache(memory)

    def step(
        self, obs: Obs, caches: tuple[Any, ...], t: jax.Array, reach: jax.Array
    ) -> tuple[distrax.Distribution, jax.Array, tuple[Any, ...], jax.Array]:
        """Runs a step of a rollout.

        Args:
          obs: (B, obs_size), or as stored.
          caches: from `init_cache` or the previous step.
          t: () int32, steps since the rollout's start.
          reach: (B,) int32, number of previous steps to attend to, 0..M.

        Returns:
          policy over (B,), values (B,) float32, caches, memory entries (B, L, E) float32.
        """
        x, caches, layer_inputs = self.transformer.step(obs, caches, t, reach)
        policy, outputs = self._heads(x, obs)
        return policy, self._value(outputs), caches, layer_inputs

    def unroll_windows(
        self, obs: Obs, memory: jax.Array, reach: jax.Array, window_grad: int
    ) -> tuple[distrax.Distribution, jax.Array]:
        """Runs a whole rollout in windows of W = `window_grad` steps that carry the gradient.

        Args:
          obs: (B, T, obs_size), or as stored.
          memory: (B, M+T-W, L, E), layer inputs of steps -M .. T-W-1, oldest first.
          reach: (B, T) int32.
          window_grad: W, divides T.

        Returns:
          policy over (B, T), values (B, T) float32.
        """
        policy, outputs = self.unroll_heads(obs, memory, reach, window_grad)
        return policy, self._value(outputs)

    def unroll_heads(self, obs: Obs, memory: jax.Array, reach: jax.Array, window_grad: int):
        """Runs as `unroll_windows`, and returns the critic's outputs (B, T, 1 or bins)."""
        return self._heads(self.transformer.unroll_windows(obs, memory, reach, window_grad), obs)

    def _heads(self, x: jax.Array, obs: Obs) -> tuple[distrax.Distribution, jax.Array]:
        return make_policy(self.action_space, self.actor(x), obs, self.log_std), self.critic(x)

    def _value(self, outputs: jax.Array) -> jax.Array:
        """Values (...) of the critic's outputs (..., 1 or bins)."""
        if self.bins is None:
            return jnp.squeeze(outputs, axis=-1)
        return value_scale(self.return_moments).denormalize(self.bins.mean(outputs))


VALUE_LIMIT = 10.0
"""The outermost bins of a critic that classifies, in standard deviations of the returns."""

TARGET_SIGMA = 0.75
"""Standard deviation of its targets in bin widths, as Farebrother et al. 2024 recommend."""


def make_network(
    config: dict[str, Any],
    action_space: ActionSpace,
    space: ObsSpace,
    layer: type = TransformerXLLayer,
) -> ActorCriticTransformer:
    """Makes the network of a checked config.

    Args:
      layer: class of the layers with MEMORY=transformer.
    """
    body, make_head = make_body(config, space, layer)
    number = config.get("VALUE_BINS")  # PPO's
    bins = number and Bins(number, VALUE_LIMIT, squashed=False, sigma=TARGET_SIGMA)
    return ActorCriticTransformer(body, action_space, make_head, bins)


def make_body(
    config: dict[str, Any], space: ObsSpace, layer: type = TransformerXLLayer
) -> tuple[TransformerXL, Callable[..., nn.Module]]:
    """Returns the body of any algorithm's network, and a function that makes its heads."""
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
    linear = config["ENCODER"] == "linear"
    make_encoder = (
        partial(LinearEncoder, space, width, dtype)
        if linear
        else partial(FeatureEncoder, space, config["encoder_features"], dtype)
    )
    make_head = (
        partial(MLPHead, activation=config["ACTIVATION"])
        if config["HEADS"] == "mlp"
        else ResidualHead
    )
    body = TransformerXL(
        config["num_layers"],
        width,
        make_encoder,
        make_layer,
        embeds=not linear,
        skip=config["SKIP"],
        dtype=dtype,
    )
    return body, partial(make_head, width=config["hidden_layers"], dtype=dtype)
