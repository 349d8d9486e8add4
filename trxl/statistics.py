"""Running statistics of observations, rewards, returns (PopArt) and advantages.

Observations and rewards are normalised as in PureJaxRL's script for continuous control (Lu et al.
2022) and Gym's NormalizeObservation and NormalizeReward. An episode's last reward is treated
differently, see `rollout.update_reward_statistics`. Means and variances are merged as in Chan et
al. 1979.

PopArt: van Hasselt et al. 2016, "Learning values across many orders of magnitude" (arXiv
1602.07714), section 2: adaptively rescaling the targets (art), preserving outputs precisely (pop).
The critic predicts (R - mu) / sigma.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trxl.collectives import moments as batch_moments
from trxl.collectives import normalize_weight, sum_over_devices, where_counted

EPSILON = 1e-8

LARGEST_OBS = 10.0
"""Clipping range in standard deviations. An entry that was always 0 would explode otherwise."""

PRIOR_COUNT = 1e-4
"""Weight of the initial mean 0 and variance 1, in rows."""


class Moments(NamedTuple):
    """Mean and variance of all data so far, or decaying ones."""

    mean: jax.Array
    variance: jax.Array
    # All data: number of rows as high 2^32 + low, (2,) uint32, which never rounds.
    # Decaying: number of batches, () int32.
    count: jax.Array  # type: ignore[assignment]  # hides tuple's method


def mix(moments: Moments, mean: jax.Array, variance: jax.Array, share: jax.Array) -> Moments:
    """Merges moments with those of a new batch of weight a = `share` (Chan et al. 1979).

    m' = m + a (m_b - m), v' = (1 - a) v + a v_b + a (1 - a) (m_b - m)^2. All squares are of centred
    values, which keeps a small variance beside a large mean exact.
    """
    delta = mean - moments.mean
    variance = (1 - share) * moments.variance + share * variance + share * (1 - share) * delta**2
    return moments._replace(mean=moments.mean + share * delta, variance=variance)


def init_decaying_moments() -> Moments:
    """Returns decaying moments before the first batch, () each."""
    return Moments(jnp.float32(0), jnp.float32(1), jnp.int32(0))


def update_decaying_moments(
    moments: Moments, mean: jax.Array, variance: jax.Array, decay: float
) -> Moments:
    """Updates decaying moments with the mean and variance of a batch.

    The n-th batch has the share (1 - decay) / (1 - decay^n), the bias correction of Adam: 1 for the
    first, and 1 / n if decay is 1.
    """
    number = moments.count + 1.0
    share = 1 / number if decay == 1 else (1 - decay) / (1 - decay**number)
    share = jnp.where(moments.count == 0, 1.0, share)  # exactly 1, to discard the initial variance
    return mix(moments, mean, variance, share)._replace(count=moments.count + 1)


Normalizer = dict[str, Moments]
"""Statistics of a run: "obs" with NORMALIZE_OBS, "reward" with NORMALIZE_REWARD."""


def first_moments(shape: tuple[int, ...]) -> Moments:
    """Returns moments without data: mean 0 and variance 1, with weight `PRIOR_COUNT`."""
    zeros = jnp.zeros(shape, jnp.float32)
    return Moments(zeros, jnp.ones_like(zeros), jnp.zeros(2, jnp.uint32))


def init_normalizer(config: dict[str, Any], env: Any) -> Normalizer:
    """Makes the statistics of a config; binary entries of observations have none."""
    normalizer = {}
    if config["NORMALIZE_OBS"]:
        normalizer["obs"] = first_moments((env.obs_size - env.num_binary,))
    if config["NORMALIZE_REWARD"]:
        normalizer["reward"] = first_moments(())
    return normalizer


def update_normalizer(
    normalizer: Normalizer,
    name: str,
    batch: jax.Array,
    active: jax.Array | None,
    axis_name: str | None,
) -> Normalizer:
    """Updates the statistics `name`, if they exist, with a batch (B, ...)."""
    if name not in normalizer:
        return normalizer
    return normalizer | {name: update_moments(normalizer[name], batch, active, axis_name)}


def update_moments(
    moments: Moments, batch: jax.Array, active: jax.Array | None, axis_name: str | None
) -> Moments:
    """Updates moments of all data with the rows of a batch (B, ...) of every device.

    Args:
      active: (B,) bool, which rows count; None: all.
      axis_name: axis of devices.
    """
    counted = jnp.ones(len(batch), bool) if active is None else active
    mask = counted.reshape(-1, *(1,) * (batch.ndim - 1))

    def total(x: jax.Array) -> jax.Array:
        return sum_over_devices(jnp.sum(x, axis=0, dtype=x.dtype), axis_name)

    rows = total(counted.astype(jnp.uint32))
    count = rows.astype(jnp.float32)
    divisor = jnp.maximum(count, 1)
    mean = total(where_counted(batch, mask)) / divisor
    variance = total(where_counted((batch - mean) ** 2, mask)) / divisor
    share = count / (as_float(moments.count) + count)
    return mix(moments, mean, variance, share)._replace(count=add_rows(moments.count, rows))


def as_float(count: jax.Array) -> jax.Array:
    """Returns an exact count (2,) plus `PRIOR_COUNT` as float32."""
    high, low = count.astype(jnp.float32)
    return high * 2.0**32 + low + PRIOR_COUNT


def add_rows(count: jax.Array, rows: jax.Array) -> jax.Array:
    """Adds () uint32 to an exact count (2,)."""
    high, low = count[0], count[1] + rows
    return jnp.stack([high + (low < rows), low])


def exact_count(count: Any) -> np.ndarray:
    """Returns a saved count as (..., 2) uint32; earlier versions saved it as float32 (...)."""
    count = np.asarray(count)
    if count.dtype == np.uint32:
        return count
    whole = np.rint(count.astype(np.float64)).astype(np.uint64)
    return np.stack([whole >> 32, whole & 0xFFFFFFFF], axis=-1).astype(np.uint32)


def restored_normalizer(saved: dict[str, dict[str, Any]]) -> Normalizer:
    """Restores the statistics of a `<seed>_params.npy`."""
    return {name: Moments(**{**x, "count": exact_count(x["count"])}) for name, x in saved.items()}


def network_input(normalizer: Normalizer, obs: jax.Array) -> jax.Array:
    """Normalises observations (..., obs_size) with NORMALIZE_OBS."""
    return normalize_obs(normalizer["obs"], obs) if "obs" in normalizer else obs


def normalize_obs(moments: Moments, obs: jax.Array) -> jax.Array:
    """Normalises observations (..., obs_size), except for leading entries without moments."""
    binary, real = jnp.split(obs, [obs.shape[-1] - moments.mean.size], axis=-1)
    real = (real - moments.mean) / jnp.sqrt(moments.variance + EPSILON)
    real = jnp.clip(real, -LARGEST_OBS, LARGEST_OBS)
    return jnp.concatenate([binary, real], axis=-1)


def scale_reward(moments: Moments, reward: jax.Array) -> jax.Array:
    """Divides rewards by the standard deviation of the discounted returns in `moments`."""
    return reward / jnp.sqrt(moments.variance + EPSILON)


LEAST_SIGMA = 1e-3
"""Minimum sigma, in units of the return. Without it, values explode while all returns are equal."""


class Scale(NamedTuple):
    """Scale of the critic's output x: sigma x + mu is the return."""

    mu: jax.Array  # ()
    sigma: jax.Array  # ()

    def denormalize(self, x: Any) -> Any:
        """Converts a tree of the critic's outputs to units of the return."""
        return jax.tree.map(lambda y: self.sigma * y + self.mu, x)

    def normalize(self, x: Any) -> Any:
        """Inverts `denormalize`."""
        return jax.tree.map(lambda y: (y - self.mu) / self.sigma, x)


def value_scale(moments: Moments) -> Scale:
    """Returns mu and sigma, sigma at least `LEAST_SIGMA`."""
    return Scale(moments.mean, jnp.sqrt(jnp.maximum(moments.variance, LEAST_SIGMA**2)))


def update_return_moments(
    moments: Moments,
    returns: jax.Array,
    weight: jax.Array | None,
    decay: float,
    axis_name: str | None,
) -> Moments:
    """Updates decaying moments with the returns of one update, over all devices.

    Args:
      returns: (B, T).
      weight: (B, T), 1 or 0; None: all 1.
      decay: share of the earlier moments.
    """
    if weight is not None:
        weight = normalize_weight(weight, axis_name)
    mean, variance = batch_moments(returns, weight, axis_name)
    return update_decaying_moments(moments, mean, variance, decay)


def absorb_scale(layer: dict[str, jax.Array], scale: Scale) -> dict[str, jax.Array]:
    """Folds the scale into the last layer, whose outputs are then in units of the return."""
    return preserve_outputs(layer, scale, Scale(jnp.float32(0), jnp.float32(1)))


def preserve_outputs(layer: dict[str, jax.Array], old: Scale, new: Scale) -> dict[str, jax.Array]:
    """Changes the last layer for a new scale, preserving its outputs in units of the return.

    w <- w sigma / sigma', b <- (sigma b + mu - mu') / sigma' (equation 4).

    Args:
      layer: `kernel` (N, 1) and `bias` (1,).
    """
    return {
        "kernel": layer["kernel"] * (old.sigma / new.sigma),
        "bias": new.normalize(old.denormalize(layer["bias"])),
    }
