"""Moving statistics of observations, rewards, returns (PopArt) and advantages.

Observations and rewards as PureJaxRL keeps them (Lu et al. 2022, its script for continuous
control), the same as Gym's NormalizeObservation and NormalizeReward but for the last reward of an
episode (`rollout.update_reward_statistics`). Chan et al. 1979 give the way to join two means and
variances.

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
"""In deviations: an entry that was always 0 so far would blow up when it first is not."""

PRIOR_COUNT = 1e-4
"""What the first mean 0 and variance 1 count: almost nothing."""


class Moments(NamedTuple):
    """A mean and a variance of everything seen so far, or of the recent past."""

    mean: jax.Array
    variance: jax.Array
    # Of everything, the number of rows as high 2^32 + low, (2,) uint32, so that no sum is ever
    # rounded; of the recent past, the number of batches, () int32.
    count: jax.Array  # type: ignore[assignment]  # hides tuple's method


def mix(moments: Moments, mean: jax.Array, variance: jax.Array, share: jax.Array) -> Moments:
    """Returns the moments of a mixture, its `share` from a new batch (Chan et al. 1979).

    m' = m + a (m_b - m), v' = (1 - a) v + a v_b + a (1 - a) (m_b - m)^2. All squares are of centred
    values, so that a small variance beside a large mean stays exact.
    """
    delta = mean - moments.mean
    variance = (1 - share) * moments.variance + share * variance + share * (1 - share) * delta**2
    return moments._replace(mean=moments.mean + share * delta, variance=variance)


def init_decaying_moments() -> Moments:
    """Returns moments of the recent past before the first batch, () each."""
    return Moments(jnp.float32(0), jnp.float32(1), jnp.int32(0))


def update_decaying_moments(
    moments: Moments, mean: jax.Array, variance: jax.Array, decay: float
) -> Moments:
    """Returns the moments after one more batch; `decay` is the share of the earlier ones.

    The new batch has the share (1 - decay) / (1 - decay^n) as the n-th, which removes the bias of
    the start, as in Adam: it is 1 for the first, and 1 / n where decay is 1.
    """
    number = moments.count + 1.0
    share = 1 / number if decay == 1 else (1 - decay) / (1 - decay**number)
    share = jnp.where(moments.count == 0, 1.0, share)  # exactly, or the first variance counts
    return mix(moments, mean, variance, share)._replace(count=moments.count + 1)


Normalizer = dict[str, Moments]
"""The statistics of a run by name: "obs" with NORMALIZE_OBS, "reward" with NORMALIZE_REWARD."""


def first_moments(shape: tuple[int, ...]) -> Moments:
    """Returns the moments before any data: mean 0 and variance 1, which count almost nothing."""
    zeros = jnp.zeros(shape, jnp.float32)
    return Moments(zeros, jnp.ones_like(zeros), jnp.zeros(2, jnp.uint32))


def init_normalizer(config: dict[str, Any], env: Any) -> Normalizer:
    """The statistics that the config asks for; entries that are always 0 or 1 have none."""
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
    """Takes a batch (B, ...) into the statistics of that name, where there are any."""
    if name not in normalizer:
        return normalizer
    return normalizer | {name: update_moments(normalizer[name], batch, active, axis_name)}


def update_moments(
    moments: Moments, batch: jax.Array, active: jax.Array | None, axis_name: str | None
) -> Moments:
    """Takes the rows of a batch (B, ...) of every device into account.

    Args:
      active: (B,) bool, which rows count; None for all.
      axis_name: of the devices.
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
    """An exact count and the prior's as float32."""
    high, low = count.astype(jnp.float32)
    return high * 2.0**32 + low + PRIOR_COUNT


def add_rows(count: jax.Array, rows: jax.Array) -> jax.Array:
    """An exact count (2,) and () uint32 more."""
    high, low = count[0], count[1] + rows
    return jnp.stack([high + (low < rows), low])


def exact_count(count: Any) -> np.ndarray:
    """A saved count (..., 2); earlier versions saved it as one float32 (...)."""
    count = np.asarray(count)
    if count.dtype == np.uint32:
        return count
    whole = np.rint(count.astype(np.float64)).astype(np.uint64)
    return np.stack([whole >> 32, whole & 0xFFFFFFFF], axis=-1).astype(np.uint32)


def restored_normalizer(saved: dict[str, dict[str, Any]]) -> Normalizer:
    """The statistics of a `<seed>_params.npy`."""
    return {name: Moments(**{**x, "count": exact_count(x["count"])}) for name, x in saved.items()}


def network_input(normalizer: Normalizer, obs: jax.Array) -> jax.Array:
    """Observations (..., obs_size) as the network gets them: normalised, where asked."""
    return normalize_obs(normalizer["obs"], obs) if "obs" in normalizer else obs


def normalize_obs(moments: Moments, obs: jax.Array) -> jax.Array:
    """obs (..., obs_size); its leading entries that `moments` does not have are left alone."""
    binary, real = jnp.split(obs, [obs.shape[-1] - moments.mean.size], axis=-1)
    real = (real - moments.mean) / jnp.sqrt(moments.variance + EPSILON)
    real = jnp.clip(real, -LARGEST_OBS, LARGEST_OBS)
    return jnp.concatenate([binary, real], axis=-1)


def scale_reward(moments: Moments, reward: jax.Array) -> jax.Array:
    """Divides rewards by the standard deviation of the discounted returns in `moments`."""
    return reward / jnp.sqrt(moments.variance + EPSILON)


LEAST_SIGMA = 1e-3
"""In units of the return: rewards that never come don't blow the values up."""


class Scale(NamedTuple):
    """The unit of the critic's output x, which stands for sigma x + mu."""

    mu: jax.Array  # ()
    sigma: jax.Array  # ()

    def denormalize(self, x: Any) -> Any:
        """A tree of the critic's outputs, in units of the return."""
        return jax.tree.map(lambda y: self.sigma * y + self.mu, x)

    def normalize(self, x: Any) -> Any:
        """Undoes `denormalize`."""
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
    """Updates the moments with the returns of one update, of all devices together.

    Args:
      returns: (B, T).
      weight: (B, T), 1 where the step counts; None where all do.
      decay: share of the earlier moments.
    """
    if weight is not None:
        weight = normalize_weight(weight, axis_name)
    mean, variance = batch_moments(returns, weight, axis_name)
    return update_decaying_moments(moments, mean, variance, decay)


def absorb_scale(layer: dict[str, jax.Array], scale: Scale) -> dict[str, jax.Array]:
    """Returns the last layer with the scale folded in: it predicts in units of the return."""
    return preserve_outputs(layer, scale, Scale(jnp.float32(0), jnp.float32(1)))


def preserve_outputs(layer: dict[str, jax.Array], old: Scale, new: Scale) -> dict[str, jax.Array]:
    """The last layer, changed so that what it says in units of the return stays.

    w <- w sigma / sigma', b <- (sigma b + mu - mu') / sigma' (equation 4).

    Args:
      layer: `kernel` (N, 1) and `bias` (1,).
    """
    return {
        "kernel": layer["kernel"] * (old.sigma / new.sigma),
        "bias": new.normalize(old.denormalize(layer["bias"])),
    }
