"""Targets of regularised policy optimisation with a model: Retrace, clipped MPO, advantage scale.

Hessel et al. 2021, "Muesli" (arXiv 2104.06159). Arrays are (B, T, ...), a row per environment.
"""

from typing import Any, NamedTuple

import distrax
import jax
import jax.numpy as jnp

from trxl.reductions import mean_over_devices, normalise_weight, weighted_mean

LEAST_VARIANCE = 1e-12


class Steps(NamedTuple):
    """What Retrace reads of T steps, (B, T) each; `last_value` (B,)."""

    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    final_value: jax.Array  # of the final observation where an episode was truncated
    prior_value: jax.Array  # sum_a prior(a|s) q(s, a)
    q: jax.Array  # of the action that was taken
    trace: jax.Array  # c = min(1, prior / behaviour)
    last_value: jax.Array | None  # of the observation after the last step
    has_return: jax.Array  # bool, whether the step has a return of its own
    active: jax.Array | None  # bool, whether the agent had a part in the step; None: always


def retrace(steps: Steps, gamma: float, decay: float) -> jax.Array:
    """Off-policy returns G (B, T) (Munos et al. 2016, arXiv 1606.02647, equation 4).

    G_t = r_t + gamma (1 - terminated_t) [v_{t+1} + decay c_{t+1} (G_{t+1} - q_{t+1})], with the
    value of the final observation in place of the bracket where an episode was truncated, and that
    of the last observation behind the last step. While an agent is out, its team's rewards count as
    they come: the bracket is then the return itself. A step that has no return of its own gives its
    value v_t, from which the steps before it bootstrap.
    """

    def step(bracket: jax.Array, now: Steps):
        later = jnp.where(now.truncated, now.final_value, bracket)
        returns = now.reward + gamma * (1 - now.terminated) * later
        correction = jnp.where(now.has_return, returns - now.q, 0)
        returns = jnp.where(now.has_return, returns, now.prior_value)
        bracket = now.prior_value + decay * now.trace * correction
        if now.active is not None:
            bracket = jnp.where(now.active, bracket, returns)
        return bracket, returns

    by_step = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), steps._replace(last_value=None))
    last: Any = steps.last_value
    _, returns = jax.lax.scan(step, last, by_step, reverse=True)
    return jnp.moveaxis(returns, 0, 1)


class Variance(NamedTuple):
    """An exponential average of squared advantages, which starts at 0."""

    square: jax.Array  # ()
    weight: jax.Array  # (), that of everything seen so far

    def deviation(self) -> jax.Array:
        """What advantages are divided by: sqrt(var + 1e-12), without the bias of the start."""
        return jnp.sqrt(self.square / jnp.maximum(self.weight, 1e-8) + LEAST_VARIANCE)


def no_variance() -> Variance:
    """Before the first advantage."""
    return Variance(jnp.zeros(()), jnp.zeros(()))


def see_advantages(
    variance: Variance,
    advantage: jax.Array,
    weight: jax.Array | None,
    decay: float,
    axis_name: str | None,
) -> Variance:
    """The average with G - v (B, T) of all devices (section 4.3); weights as they are, 1 or 0."""
    if weight is not None:
        weight = normalise_weight(weight, axis_name)
    square = mean_over_devices(weighted_mean(advantage**2, weight), axis_name)
    return Variance(
        decay * variance.square + (1 - decay) * square, decay * variance.weight + 1 - decay
    )


def clipped_mpo(prior_logits: jax.Array, advantage: jax.Array, limit: float) -> jax.Array:
    """Logits (..., A) of pi_CMPO, proportional to prior exp(clip(advantage, -limit, limit)).

    Equation 9, over all actions.
    """
    return prior_logits + jnp.clip(advantage, -limit, limit)


def sampled_mpo_weights(advantage: jax.Array, limit: float) -> jax.Array:
    """What the log-probabilities of N actions from the prior weigh, (..., N).

    exp(clip adv_i) / z_i with z_i = (1 + sum_{k != i} exp(clip adv_k)) / N (equations 11 and 12): a
    normaliser that has its own action replaced by 1, so that it depends on it no longer.
    """
    ratio = jnp.exp(jnp.clip(advantage, -limit, limit))
    others = jnp.sum(ratio, axis=-1, keepdims=True) - ratio
    return ratio * advantage.shape[-1] / (1 + others)


class PolicyTarget(NamedTuple):
    """What a policy is drawn to: probabilities of all actions, or weights of some."""

    probs: jax.Array | None  # (B, T, A)
    actions: jax.Array | None  # (B, T, N, ...)
    weights: jax.Array | None  # (B, T, N)


def divergence(target: PolicyTarget, policy: distrax.Distribution) -> jax.Array:
    """KL(target || policy) (B, T); of samples what depends on the policy, their cross-entropy."""
    if target.probs is not None:
        probs, log_probs = target.probs, jax.nn.log_softmax(policy.logits)
        log_target = jnp.log(jnp.where(probs > 0, probs, 1))
        return jnp.sum(jnp.where(probs > 0, probs * (log_target - log_probs), 0), axis=-1)
    log_probs = jax.vmap(policy.log_prob, in_axes=2, out_axes=2)(target.actions)
    return -jnp.mean(target.weights * log_probs, axis=-1)
