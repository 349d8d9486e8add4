"""Muesli with a gated Transformer-XL: targets, loss, update, and `make_train`.

Hessel et al. 2021, "Muesli: Combining Improvements in Policy Optimization" (arXiv 2104.06159), with
a Transformer-XL as in AdA (arXiv 2301.07608). Pure functions: no files, no printing.

The trained parameters are theta. Their moving average theta' acts, and gives the prior, values and
action values. Letters as in rollout.py; W = WINDOW_GRAD, K = MODEL_STEPS, N = CMPO_SAMPLES.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trxl import training
from trxl.collectives import normalize_weight, root_mean_square, weighted_mean
from trxl.config import LARGEST_WIDTH, Key, minibatches, network_key, with_shared
from trxl.distributions import Bins
from trxl.muesli import (
    Imagined,
    ModelNetwork,
    PolicyTarget,
    advantage_std,
    clipped_mpo,
    every_action,
    kl_to_target,
    sampled_mpo_weights,
    update_advantage_moments,
)
from trxl.replay import (
    Steps,
    draw_rows,
    needs_old_value,
    retrace,
)
from trxl.rollout import Config, Metrics, Rollout, swap_time_and_batch, window_memory
from trxl.spaces import ActionSpace, Discrete, ObsSpace, StoredObs, encode_action
from trxl.statistics import Moments, init_decaying_moments
from trxl.training import (
    Algorithm,
    TrainState,
    gradient_step,
    learning_rate,
    mean_metrics,
    minibatch_rows,
)

from transformerXL import make_body
from wrappers import make_env

KEYS = with_shared(
    {
        "LR": Key(5e-4, "learning rate of Adam", low=0, traced=True),
        "UPDATE_EPOCHS": Key(1, "passes over a rollout", low=1),
        "NUM_MINIBATCHES": minibatches(32),
        "REPLAY_SHARE": Key(
            0.75,
            "share of replayed rollouts in a minibatch, in [0, 1)",
            low=0,
            high=0.99,
            resumable=False,
        ),
        "REPLAY_ROLLOUTS": Key(
            8, "number of newest rollouts in the replay", low=1, resumable=False
        ),
        "RETRACE_LAMBDA": Key(0.95, "decay of Retrace's traces", low=0, high=1, traced=True),
        "TARGET_EMA_RATE": Key(
            0.1,
            "step of the target parameters towards the trained ones, per gradient step",
            low=0,
            high=1,
            traced=True,
        ),
        "CMPO_CLIP": Key(1.0, "clipping range of the advantages in CMPO", low=0, traced=True),
        "CMPO_SAMPLES": Key(16, "actions sampled from the prior where CMPO is not exact", low=1),
        "EXACT_ACTIONS": Key(
            64, "largest number of `Discrete` actions for which CMPO is exact", low=0
        ),
        "ADVANTAGE_DECAY": Key(
            0.99, "decay of the advantages' variance per gradient step", low=0, high=1
        ),
        "ADVANTAGE_FLOOR": Key(
            0.1,
            "minimum divisor of advantages, as a fraction of the returns' root mean square",
            low=0,
            traced=True,
        ),
        "MODEL_STEPS": Key(5, "steps that the model is unrolled in training", low=1, high=1000),
        "MODEL_SIZE": network_key(64, "width of the model's latents", low=1, high=LARGEST_WIDTH),
        "VALUE_BINS": network_key(101, "bins of values and rewards", low=2, high=LARGEST_WIDTH),
        "VALUE_LIMIT": Key(
            20.0,
            "largest bin, in squashed units; 20 is a return of 422",
            "Network",
            low=1e-3,
            resumable=False,
        ),
        "PG_COEF": Key(1.0, "weight of the policy gradient", low=0, traced=True),
        "CMPO_COEF": Key(1.0, "weight of KL(CMPO || policy)", low=0, traced=True),
        "MODEL_COEF": Key(
            1.0, "weight of KL(CMPO || policy) of the model's policies", low=0, traced=True
        ),
        "REWARD_COEF": Key(1.0, "weight of the rewards' cross-entropy", low=0, traced=True),
        "VF_COEF": Key(0.25, "weight of the values' cross-entropy", low=0, traced=True),
        "ENT_COEF": Key(0.0, "weight of the entropy bonus, per nat", low=0, traced=True),
    }
)
"""Muesli's settings."""


class Batch(NamedTuple):
    """Input of the loss, with a row for each environment."""

    obs: StoredObs  # (B, T, obs_size)
    action: jax.Array  # (B, T), (B, T, choices) or (B, T, action_size)
    log_prob: jax.Array  # (B, T), of the policy that acted
    reward: jax.Array  # (B, T)
    terminated: jax.Array  # (B, T) bool
    truncated: jax.Array  # (B, T) bool
    final_value: jax.Array  # (B, T), valid where truncated
    last_value: jax.Array | None  # (B,)
    has_return: jax.Array  # (B, T) bool, False where a replayed row would need an old value
    reach: jax.Array  # (B, T)
    memory: jax.Array  # (B, M+T-W, L, E), layer inputs of steps -M .. T-W-1
    active: jax.Array | None  # (B, T) bool; None: all active


class Learner(NamedTuple):
    """State of Muesli beside theta."""

    target: Any  # theta'
    advantages: Moments  # variance around 0


class Targets(NamedTuple):
    """Targets of a batch under theta', (B, T) each."""

    value: jax.Array  # v
    returns: jax.Array  # G
    advantage: jax.Array  # (G - v) / standard deviation
    policy: PolicyTarget


def make_train(config: Config, axis_name: str | None = None) -> Callable:
    """Makes a whole training run one function, see `trainer_PPO_trXL.make_train`."""
    return training.make_train(config, MUESLI, axis_name)


def make_network(
    config: dict[str, Any], action_space: ActionSpace, space: ObsSpace
) -> ModelNetwork:
    """Makes the network of a checked config."""
    body, make_head = make_body(config, space)
    return ModelNetwork(
        body,
        action_space,
        make_head,
        config["MODEL_SIZE"],
        Bins(config["VALUE_BINS"], config["VALUE_LIMIT"], squashed=True, sigma=0),
        jnp.dtype(config["COMPUTE_DTYPE"]),
    )


def make_optimizer() -> optax.GradientTransformation:
    """Makes Adam without a learning rate, clipped to +-1, on parameters flattened to one vector."""
    return optax.flatten(optax.chain(optax.scale_by_adam(), optax.clip(1.0)))


def init(config: Config, params: Any) -> TrainState:
    """Makes the train state of fresh parameters; theta' starts as theta."""
    del config
    return training.fresh_train_state(
        params, make_optimizer(), Learner(params, init_decaying_moments())
    )


def update(
    config: Config,
    network: ModelNetwork,
    train_state: TrainState,
    collected: Rollout,
    key: jax.Array,
    axis_name: str | None,
) -> tuple[TrainState, Metrics]:
    """Runs UPDATE_EPOCHS epochs of NUM_MINIBATCHES gradient steps each.

    Each step joins replayed rows to fresh ones, and computes its targets with the current theta'.

    Args:
      collected: leaves (T, B, ...).
      key: differs between devices.

    Returns:
      the train state, and metrics {name: ()}; loss metrics are means over gradient steps.
    """
    batch = make_batch(config, collected)
    replay = collected.replay
    rate = learning_rate(config, train_state.updates)
    optimizer = make_optimizer()
    epochs, minibatches = config["UPDATE_EPOCHS"], config["NUM_MINIBATCHES"]
    rows_key, sample_key = jax.random.split(key)
    rows = minibatch_rows(rows_key, len(batch.reward), epochs, minibatches)
    keys = jax.random.split(sample_key, (epochs, minibatches))

    def minibatch_step(train_state: TrainState, inputs):
        rows, key = inputs
        key, replay_key = jax.random.split(key)
        minibatch = jax.tree.map(lambda x: x[rows], batch)
        if replay is not None:
            replayed = draw_rows(replay, num_replayed(config, len(rows)), replay_key)
            minibatch = jax.tree.map(
                lambda *x: jnp.concatenate(x), minibatch, without_old_values(replayed)
            )
        learner: Learner = train_state.algorithm_state
        targets, advantages = make_targets(config, network, learner, minibatch, key, axis_name)
        train_state, metrics = gradient_step(
            partial(loss, config, network, batch=minibatch, targets=targets, axis_name=axis_name),
            optimizer,
            rate,
            train_state,
            axis_name,
        )
        metrics["advantage_std"] = advantage_std(advantages)
        target = optax.incremental_update(
            train_state.params, learner.target, config["TARGET_EMA_RATE"]
        )
        return train_state._replace(algorithm_state=Learner(target, advantages)), metrics

    def epoch(train_state: TrainState, inputs):
        return jax.lax.scan(minibatch_step, train_state, inputs)

    train_state, metrics = jax.lax.scan(epoch, train_state, (rows, keys))
    return train_state, mean_metrics(metrics, rate, train_state.params)


def make_batch(config: Config, collected: Rollout) -> Batch:
    """Makes a batch, (B, T, ...), of a rollout."""
    trajectory = collected.trajectory
    final_value, last_value = trajectory.final_value, collected.last_value
    active = trajectory.active
    if active is not None:  # agents that have left the episode bootstrap from 0
        final_value = jnp.where(active, final_value, 0)
        assert collected.last_active is not None
        last_value = jnp.where(collected.last_active, last_value, 0)
    names = ("obs", "action", "log_prob", "reward", "terminated", "truncated", "reach")
    return Batch(
        **{name: swap_time_and_batch(getattr(trajectory, name)) for name in names},
        final_value=swap_time_and_batch(final_value),
        last_value=last_value,
        has_return=jnp.ones(trajectory.reward.shape[::-1], bool),
        memory=window_memory(config, collected),
        active=None if active is None else swap_time_and_batch(active),
    )


def without_old_values(batch: Batch) -> Batch:
    """Clears `has_return` where a replayed return would need a value of the time of play."""
    needs = needs_old_value(batch.terminated, batch.truncated, batch.active)
    return batch._replace(has_return=~needs)


def num_replayed(config: Config, fresh: int) -> int:
    """Returns the number of replayed rows that join `fresh` new ones."""
    share = config["REPLAY_SHARE"]
    return round(fresh * share / (1 - share))


def make_targets(
    config: Config,
    network: ModelNetwork,
    learner: Learner,
    batch: Batch,
    key: jax.Array,
    axis_name: str | None,
) -> tuple[Targets, Moments]:
    """Computes a minibatch's targets with theta', and updates the advantages' moments.

    Args:
      key: samples CMPO's actions.

    Returns:
      the targets, and the updated moments.
    """

    def call(method: str, *args: Any) -> Any:
        return network.apply(learner.target, *args, method=method)

    space, gamma = network.action_space, config["GAMMA"]
    latent = call("unroll_windows", batch.obs, batch.memory, batch.reach, config["WINDOW_GRAD"])
    prior = call("policy", latent, batch.obs)
    value = network.bins.mean(call("value", latent))
    exact = tries_all(config, space)
    if exact:
        encoded = every_action(space)
        probs, actions = prior.probs, None
    else:
        actions = prior.sample(seed=key, sample_shape=config["CMPO_SAMPLES"])
        actions = jnp.moveaxis(actions, 0, 2)  # (B, T, N, ...)
        encoded = encode_action(space, actions)
        probs = 1 / config["CMPO_SAMPLES"]
    q = call("action_values", latent, encoded, gamma)  # (B, T, A or N)
    taken = encode_action(space, batch.action)[..., None, :]
    steps = Steps(
        reward=batch.reward,
        terminated=batch.terminated,
        truncated=batch.truncated,
        final_value=batch.final_value,
        prior_value=jnp.sum(probs * q, axis=-1),
        q=call("action_values", latent, taken, gamma)[..., 0],
        trace=jnp.minimum(1, jnp.exp(prior.log_prob(batch.action) - batch.log_prob)),
        last_value=batch.last_value,
        has_return=batch.has_return,
        active=batch.active,
    )
    returns = retrace(steps, gamma, config["RETRACE_LAMBDA"])
    counted = batch.has_return if batch.active is None else batch.has_return & batch.active
    weight = counted.astype(jnp.float32)
    advantages = update_advantage_moments(
        learner.advantages, returns - value, weight, config["ADVANTAGE_DECAY"], axis_name
    )
    floor = config["ADVANTAGE_FLOOR"] * root_mean_square(returns, weight, axis_name)
    deviation = jnp.maximum(advantage_std(advantages), floor)
    advantage = (q - value[..., None]) / deviation
    if exact:
        logits = clipped_mpo(prior.logits, advantage, config["CMPO_CLIP"])
        policy = PolicyTarget(jax.nn.softmax(logits), None, None)
    else:
        weights = sampled_mpo_weights(advantage, config["CMPO_CLIP"])
        policy = PolicyTarget(None, actions, weights)
    gained = jnp.where(batch.has_return, returns - value, 0)
    return Targets(value, returns, gained / deviation, policy), advantages


def tries_all(config: Config, space: ActionSpace) -> bool:
    """Returns whether CMPO is exact, over all actions."""
    return isinstance(space, Discrete) and space.n <= config["EXACT_ACTIONS"]


def loss(
    config: Config,
    network: ModelNetwork,
    params: Any,
    batch: Batch,
    targets: Targets,
    axis_name: str | None,
) -> tuple[jax.Array, Metrics]:
    """Computes policy gradient, CMPO and model losses (equation 10 and section 4.5).

    Returns:
      the weighted sum (), and metrics {name: ()}.
    """

    def call(method: str, *args: Any) -> Any:
        return network.apply(params, *args, method=method)

    weight = None
    if batch.active is not None:
        weight = normalize_weight(batch.active.astype(jnp.float32), axis_name)
    latent = call("unroll_windows", batch.obs, batch.memory, batch.reach, config["WINDOW_GRAD"])
    policy = call("policy", latent, batch.obs)
    log_prob = policy.log_prob(batch.action)
    importance = jnp.minimum(1, jax.lax.stop_gradient(jnp.exp(log_prob - batch.log_prob)))
    gradient_loss = -weighted_mean(importance * targets.advantage * log_prob, weight)
    cmpo_loss = weighted_mean(kl_to_target(targets.policy, policy), weight)

    bins = network.bins
    value_losses = [batch.has_return * bins.cross_entropy(call("value", latent), targets.returns)]
    reward_losses, policy_losses = [], []
    for ahead in look_ahead(batch, targets, config["MODEL_STEPS"]):
        imagined: Imagined = call(
            "imagine", latent, encode_action(network.action_space, ahead.action)
        )
        latent = imagined.latent
        reward_losses.append(ahead.sees_reward * bins.cross_entropy(imagined.reward, ahead.reward))
        value_losses.append(ahead.sees_value * bins.cross_entropy(imagined.value, ahead.value))
        drawn = kl_to_target(ahead.policy, call("policy", latent, ahead.obs))
        policy_losses.append(jnp.where(ahead.sees_policy, drawn, 0.0))
    value_loss, reward_loss, model_loss = (
        weighted_mean(jnp.mean(jnp.stack(losses), axis=0), weight)
        for losses in (value_losses, reward_losses, policy_losses)
    )
    entropy = weighted_mean(policy.entropy().astype(jnp.float32), weight)
    total = (
        config["PG_COEF"] * gradient_loss
        + config["CMPO_COEF"] * cmpo_loss
        + config["MODEL_COEF"] * model_loss
        + config["REWARD_COEF"] * reward_loss
        + config["VF_COEF"] * value_loss
        - config["ENT_COEF"] * entropy
    )
    has_return = batch.has_return if weight is None else batch.has_return * weight
    has_return = normalize_weight(has_return.astype(jnp.float32), axis_name)
    error = weighted_mean((targets.returns - targets.value) ** 2, has_return)
    return total, {
        "total_loss": total,
        "actor_loss": gradient_loss,
        "cmpo_loss": cmpo_loss,
        "model_loss": model_loss,
        "reward_loss": reward_loss,
        "value_loss": value_loss,
        "value_mse": error,
        "entropy": entropy,
        "importance_weight": weighted_mean(importance, weight),
        "value_clip_fraction": weighted_mean(bins.clips(targets.returns), weight),
    }


class Ahead(NamedTuple):
    """Targets of the model's k-th latent after each step, (B, T) each."""

    action: jax.Array  # leads to the latent
    reward: jax.Array
    value: jax.Array
    obs: StoredObs
    policy: PolicyTarget
    sees_reward: jax.Array  # bool, whether the target exists
    sees_value: jax.Array  # bool
    sees_policy: jax.Array  # bool


def look_ahead(batch: Batch, targets: Targets, count: int) -> list[Ahead]:
    """Makes the targets of latents k = 1 .. `count` after each step t.

    Latent k follows the action of step j = t + k - 1. From a termination on, values and later
    rewards are 0 (absorbing), and policies have no target. If step j is truncated or the rollout's
    last, the value target is the bootstrap value, which replayed rows lack. Later latents have no
    target.
    """
    length = batch.reward.shape[1]
    assert batch.last_value is not None
    after = jnp.concatenate([targets.returns[:, 1:], batch.last_value[:, None]], axis=1)
    after = jnp.where(batch.truncated, batch.final_value, after)
    after = jnp.where(batch.terminated, 0.0, after)  # value after each step
    running = jnp.ones(batch.reward.shape, bool)  # no end before step j
    absorbed = jnp.zeros(batch.reward.shape, bool)  # a termination before step j
    result = []
    for k in range(1, count + 1):
        shift = partial(later, steps=k - 1)
        exists = jnp.arange(length) + k - 1 < length
        running &= exists
        now, ahead = jax.tree.map(shift, batch._replace(last_value=None)), partial(later, steps=k)
        terminated, truncated = running & now.terminated, running & now.truncated
        goes_on = running & ~terminated & ~truncated & (jnp.arange(length) + k < length)
        result.append(
            Ahead(
                action=now.action,
                reward=jnp.where(running, now.reward, 0.0),
                value=jnp.where(running, shift(after), 0.0),
                obs=jax.tree.map(ahead, batch.obs),
                policy=jax.tree.map(ahead, targets.policy),
                sees_reward=running | absorbed,
                sees_value=(running & now.has_return) | absorbed,
                sees_policy=goes_on if batch.active is None else goes_on & ahead(batch.active),
            )
        )
        running, absorbed = goes_on, absorbed | terminated
    return result


def later(x: jax.Array, steps: int) -> jax.Array:
    """Shifts (B, T, ...) by `steps`, wrapping at the end; callers mask the wrapped part."""
    return jnp.roll(x, -steps, axis=1)


MUESLI = Algorithm(
    name="Muesli",
    keys=KEYS,
    make_env=make_env,
    make_network=make_network,
    init=init,
    update=update,
    must_be_finite=(
        "total_loss",
        "actor_loss",
        "cmpo_loss",
        "model_loss",
        "reward_loss",
        "value_loss",
        "entropy",
        "grad_norm",
        "param_norm",
    ),
    behaviour_params=lambda train_state: train_state.algorithm_state.target,
    has_replay=lambda config: num_replayed(config, config["NUM_ENVS"]) > 0,
    to_replay=make_batch,
)
