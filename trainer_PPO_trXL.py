"""PPO with a gated Transformer-XL: advantages, loss, update, and `make_train`.

Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (arXiv 1707.06347) and 2016, "High-
Dimensional Continuous Control Using Generalized Advantage Estimation" (arXiv 1506.02438). Pure
functions: no files, no printing. Letters as in rollout.py, and W = WINDOW_GRAD.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trxl import training
from trxl.collectives import (
    any_across_vmap,
    moments,
    normalize_weight,
    weighted_mean,
    where_counted,
)
from trxl.config import LARGEST_WIDTH, Key, network_key, with_shared
from trxl.distributions import take_apart
from trxl.layers import OUTPUT_LAYER
from trxl.replay import (
    Replay,
    Steps,
    needs_old_value,
    num_slots,
    retrace,
)
from trxl.rollout import Config, Metrics, Rollout, swap_time_and_batch, window_memory
from trxl.spaces import StoredObs
from trxl.statistics import (
    Moments,
    Scale,
    absorb_scale,
    init_decaying_moments,
    preserve_outputs,
    update_return_moments,
    value_scale,
)
from trxl.training import (
    Algorithm,
    TrainState,
    gradient_step,
    learning_rate,
    mean_metrics,
    minibatch_rows,
    no_value,
)

from transformerXL import ActorCriticTransformer, make_network
from wrappers import make_env

KEYS = with_shared(
    {
        "UPDATE_EPOCHS": Key(4, "passes over a rollout", low=1),
        "GAE_LAMBDA": Key(
            0.8, "decay of the advantage estimate per step", low=0, high=1, traced=True
        ),
        "CLIP_EPS": Key(
            0.2, "clipping range of the probability ratio and of the value", low=0, traced=True
        ),
        "CLIP_VALUE": Key(
            None,
            "whether values are clipped to CLIP_EPS around the rollout's in the value loss; None:"
            " only without NORMALIZE_VALUE",
            type=bool,
            derive=lambda config, _: not config["NORMALIZE_VALUE"],
        ),
        "NORMALIZE_VALUE": Key(
            True,
            "whether the critic predicts returns normalised by running moments (PopArt)",
            resumable=False,
        ),
        "VALUE_BINS": network_key(
            None,
            "bins of a critic that classifies (HL-Gauss), say 51, up to 10 standard deviations from"
            " the mean return; None: the critic predicts a number",
            type=int,
            low=2,
            high=LARGEST_WIDTH,
            needs=(("NORMALIZE_VALUE", True), ("CLIP_VALUE", False)),
        ),
        "POPART_DECAY": Key(0.95, "decay of PopArt's moments per update", low=0, high=1),
        "ADVANTAGE_FLOOR": Key(
            0.5,
            "fraction of the largest standard deviation of advantages so far, which decays by 2 %"
            " per update; below it the policy's loss shrinks with the deviation",
            low=0,
            traced=True,
        ),
        "ENT_COEF": Key(0.01, "weight of the entropy bonus, per nat", low=0, traced=True),
        "VF_COEF": Key(0.5, "weight of the value loss", low=0, traced=True),
        "MAX_GRAD_NORM": Key(1.0, "global norm that gradients are clipped to", low=0, traced=True),
        "ADAM_EPSILON": Key(1e-5, "epsilon of Adam", low=0, traced=True),
        "EMA_RATE": Key(
            1.0,
            "step per update of the agent's parameters, an average, towards the trained ones; 1: no"
            " average",
            low=0,
            high=1,
            resumable=False,
        ),
        "AUX_EPOCHS": Key(
            0,
            "passes over the replay in PPG's auxiliary phase, which trains the values and keeps the"
            " policy; 0: no phases",
            low=0,
            resumable=False,
        ),
        "REPLAY_ROLLOUTS": Key(
            8,
            "rollouts in the replay; a phase follows every so many updates",
            low=1,
            resumable=False,
        ),
    }
)
"""PPO's settings."""


class Batch(NamedTuple):
    """Input of the loss, with a row for each environment."""

    obs: StoredObs  # (B, T, obs_size)
    action: jax.Array  # (B, T), (B, T, choices) or (B, T, action_size)
    log_prob: jax.Array  # (B, T), of the rollout's policy
    value: jax.Array  # (B, T), in the critic's units, as `returns`
    advantage: jax.Array  # (B, T), in units of the return, or standardised
    returns: jax.Array  # (B, T)
    reach: jax.Array  # (B, T)
    memory: jax.Array  # (B, M+T-W, L, E), layer inputs of steps -M .. T-W-1
    # (B, T) float32: 0 for agents that have left the episode, else 1. None: all 1. In minibatches
    # divided by the mean.
    weight: jax.Array | None


class Played(NamedTuple):
    """Rollout in the replay, with a row for each environment."""

    obs: StoredObs  # (B, T, obs_size)
    action: jax.Array  # (B, T), (B, T, choices) or (B, T, action_size)
    log_prob: jax.Array  # (B, T), of the rollout's policy
    reward: jax.Array  # (B, T)
    terminated: jax.Array  # (B, T) bool
    truncated: jax.Array  # (B, T) bool
    reach: jax.Array  # (B, T)
    active: jax.Array | None  # (B, T) bool; None: all active
    memory: jax.Array  # (B, M+T-W, L, E), layer inputs of steps -M .. T-W-1


class AuxiliaryTargets(NamedTuple):
    """Targets of the auxiliary phase."""

    policy: list[jax.Array]  # (B, T, ...) each, logits or means and deviations before the phase
    value: jax.Array  # (B, T), in the critic's units


AUXILIARY_METRICS = ("aux_kl", "aux_value_loss")


class PPOState(NamedTuple):
    """PPO's own part of the train state."""

    # PopArt's; None without NORMALIZE_VALUE, and with VALUE_BINS, where they are in the parameters
    return_moments: Moments | None
    largest_deviation: jax.Array  # (), of the advantages of an update so far, decaying
    average: Any  # of the parameters after each update; None with EMA_RATE=1


def make_train(config: Config, axis_name: str | None = None) -> Callable:
    """Makes a whole training run one function, as in PureJaxRL.

    Args:
      config: as in the entry scripts; missing keys take their defaults. Not modified. Keys with
        `Key.traced` may be traced values.
      axis_name: of the `jax.pmap` over all devices around `train`.

    Returns:
      `train(rng)`, for `jax.jit`, for `jax.vmap` over seeds, and for `jax.pmap` with the same rng
      on every device. It returns a dict with `runner_state`, a `RunnerState`, and `metrics`, a dict
      of arrays (NUM_UPDATES,).

    Raises:
      ConfigError: a key or value is invalid, or the environment can't be made.
    """
    return training.make_train(config, PPO, axis_name)


def init(config: Config, params: Any) -> TrainState:
    """Makes the train state of fresh parameters."""
    moments = init_decaying_moments() if predicts_normalized(config) else None
    average = params if config["EMA_RATE"] < 1 else None
    state = PPOState(moments, jnp.float32(0), average)
    return training.fresh_train_state(params, make_optimizer(config), state)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Makes Adam without a learning rate, on clipped gradients.

    Parameters are flattened to one vector, so that a GPU launches few kernels.
    """
    clip = optax.clip_by_global_norm(config["MAX_GRAD_NORM"])
    return optax.flatten(optax.chain(clip, optax.scale_by_adam(eps=config["ADAM_EPSILON"])))


def update(
    config: Config,
    network: ActorCriticTransformer,
    train_state: TrainState,
    collected: Rollout,
    key: jax.Array,
    axis_name: str | None,
) -> tuple[TrainState, Metrics]:
    """Runs the gradient steps on one rollout.

    Args:
      collected: leaves (T, B, ...), values as the critic predicts them.
      key: differs between devices.

    Returns:
      the train state, and metrics {name: ()}; loss metrics are means over gradient steps.
    """
    # CALCULATE ADVANTAGES
    if predicts_normalized(config):
        scale = value_scale(train_state.algorithm_state.return_moments)
        collected = denormalize_values(collected, scale)
    advantage = generalized_advantages(collected, config["GAMMA"], config["GAE_LAMBDA"])
    batch = make_batch(config, collected, advantage)
    train_state, policy_scale = scale_policy_loss(config, train_state, batch, axis_name)

    # RESCALE THE CRITIC
    if config["NORMALIZE_VALUE"]:
        train_state, batch = rescale(config, train_state, batch, axis_name)

    # UPDATE NETWORK
    train_state, metrics = update_network(
        config, network, train_state, batch, policy_scale, key, axis_name
    )
    metrics["explained_variance"] = explained_variance(batch, axis_name)

    # LEARN FROM EARLIER ROLLOUTS
    if collected.replay is not None:
        # Keys 0 to UPDATE_EPOCHS - 1 shuffled the passes over this rollout.
        key = jax.random.fold_in(key, config["UPDATE_EPOCHS"])
        train_state, auxiliary_metrics = auxiliary_phase(
            config, network, train_state, collected.replay, key, axis_name
        )
        metrics |= auxiliary_metrics | {"param_norm": optax.tree.norm(train_state.params["params"])}

    # AVERAGE THE PARAMETERS
    if config["EMA_RATE"] < 1:
        train_state = update_average(config, train_state)
    return train_state, metrics


def update_average(config: Config, train_state: TrainState) -> TrainState:
    """Moves the average towards the parameters by EMA_RATE.

    In the manner of Izmailov et al. 2018 (arXiv 1803.05407), who average the last part of a
    training with a constant learning rate. Over the first 1 / EMA_RATE updates it is the mean.
    """
    state: PPOState = train_state.algorithm_state
    share = 1 / (train_state.updates + 1).astype(jnp.float32)
    rate = jnp.maximum(jnp.float32(config["EMA_RATE"]), share)
    average = optax.incremental_update(train_state.params, state.average, rate)
    return train_state._replace(algorithm_state=state._replace(average=average))


def update_network(
    config: Config,
    network: ActorCriticTransformer,
    train_state: TrainState,
    batch: Batch,
    policy_scale: jax.Array,
    key: jax.Array,
    axis_name: str | None,
) -> tuple[TrainState, Metrics]:
    """Runs UPDATE_EPOCHS epochs over the environments in NUM_MINIBATCHES minibatches each.

    Args:
      policy_scale: (), see `scale_policy_loss`.
      key: shuffles the environments.

    Returns:
      the train state, and metrics {name: ()}.
    """
    rate = learning_rate(config, train_state.updates)
    optimizer = make_optimizer(config)
    all_rows = minibatch_rows(
        key, len(batch.value), config["UPDATE_EPOCHS"], config["NUM_MINIBATCHES"]
    )
    # Normalised before the loop, in which devices then exchange gradients alone.
    normalize = jax.vmap(jax.vmap(partial(normalize_advantages, axis_name=axis_name)))
    weight = None if batch.weight is None else batch.weight[all_rows]
    normalized = normalize(batch.advantage[all_rows], weight)

    def minibatch_step(train_state: TrainState, inputs):
        rows, (advantage, weight) = inputs
        # Rows are read per minibatch, so that no epoch copies the whole batch.
        minibatch: Batch = jax.tree.map(lambda x: x[rows], batch)
        minibatch = minibatch._replace(advantage=advantage, weight=weight)
        loss = partial(ppo_loss, config, network, batch=minibatch, policy_scale=policy_scale)
        return gradient_step(loss, optimizer, rate, train_state, axis_name)

    def epoch(train_state: TrainState, inputs):
        return jax.lax.scan(minibatch_step, train_state, inputs)

    train_state, metrics = jax.lax.scan(epoch, train_state, (all_rows, normalized))
    return train_state, mean_metrics(metrics, rate, train_state.params["params"])


def predicts_normalized(config: Config) -> bool:
    """Returns whether the network's values are normalised; one with bins denormalises its own."""
    return config["NORMALIZE_VALUE"] and config["VALUE_BINS"] is None


def denormalize_values(collected: Rollout, scale: Scale) -> Rollout:
    """Converts the values of a rollout to units of the return."""
    trajectory = collected.trajectory
    value, final_value = scale.denormalize((trajectory.value, trajectory.final_value))
    trajectory = trajectory._replace(value=value, final_value=final_value)
    return collected._replace(
        trajectory=trajectory, last_value=scale.denormalize(collected.last_value)
    )


def rescale(
    config: Config, train_state: TrainState, batch: Batch, axis_name: str | None
) -> tuple[TrainState, Batch]:
    """Updates the moments of the returns (PopArt), and converts critic, values and returns to them.

    A critic that predicts a number keeps its predictions in units of the return. A critic that
    classifies needs no correction. Its bins move with the moments, and the gradient
    steps fit it to returns in the new scale, whose distribution over the bins is nearly the same.

    Returns:
      the train state, and the batch with values and returns normalised by the new moments.
    """
    params, moments = train_state.params, return_moments(config, train_state)
    old = value_scale(moments)
    moments = update_return_moments(
        moments, batch.returns, batch.weight, config["POPART_DECAY"], axis_name
    )
    new = value_scale(moments)
    if config["VALUE_BINS"] is not None:
        train_state = train_state._replace(params={**params, "return_moments": moments._asdict()})
    else:
        state = train_state.algorithm_state

        def preserve(params: Any) -> Any:
            return with_last_layer(config, params, lambda layer: preserve_outputs(layer, old, new))

        average = None if state.average is None else preserve(state.average)
        state = state._replace(return_moments=moments, average=average)
        train_state = train_state._replace(params=preserve(params), algorithm_state=state)
    value, returns = new.normalize((batch.value, batch.returns))
    return train_state, batch._replace(value=value, returns=returns)


def return_moments(config: Config, train_state: TrainState) -> Moments:
    """Returns PopArt's moments; a critic with bins has them among its parameters."""
    if config["VALUE_BINS"] is not None:
        return Moments(**train_state.params["return_moments"])
    return train_state.algorithm_state.return_moments


def with_last_layer(config: Config, params: Any, change: Callable) -> Any:
    """Returns the parameters with `change` applied to the critic's last layer."""
    of_network, name = dict(params["params"]), OUTPUT_LAYER[config["HEADS"]]
    critic = of_network["critic"]
    of_network["critic"] = critic | {name: change(critic[name])}
    return params | {"params": of_network}


def saved_params(config: Config, train_state: TrainState) -> Any:
    """Returns the agent's parameters with a critic that predicts unnormalised returns."""
    params = agent_params(train_state)
    if not predicts_normalized(config):
        return params
    scale = value_scale(train_state.algorithm_state.return_moments)
    return with_last_layer(config, params, lambda layer: absorb_scale(layer, scale))


def agent_params(train_state: TrainState) -> Any:
    """Returns the average of the parameters, if there is one, else the parameters."""
    average = train_state.algorithm_state.average
    return train_state.params if average is None else average


@jax.named_scope("advantages")
def generalized_advantages(collected: Rollout, gamma: float, gae_lambda: float) -> jax.Array:
    """Computes GAE(lambda), bootstrapping truncated episodes from their final observations.

    delta_t = r_t + gamma (1 - terminated_t) V'_t - V_t, where V'_t is the value of the observation
    after step t (Pardo et al. 2018, arXiv 1712.00378, "partial-episode bootstrapping"), and
    A_t = delta_t + gamma lambda (1 - done_t) A_{t+1} (Schulman et al. 2016, equation 16).

    For an agent that has left its team's episode A_t is 0 and V_t is r_t + gamma V_{t+1}. At
    truncations and at the rollout's end such an agent bootstraps from 0.

    Args:
      collected: leaves (T, B, ...), values in units of the return.

    Returns:
      A (T, B) float32, in units of the return.
    """
    trajectory = collected.trajectory
    last_value = collected.last_value
    if trajectory.active is not None:
        assert collected.last_active is not None
        last_value = jnp.where(collected.last_active, last_value, 0)
        final_value = jnp.where(trajectory.active, trajectory.final_value, 0)
        trajectory = trajectory._replace(final_value=final_value)
    trace_decay = gamma * gae_lambda * (1 - trajectory.done)
    discount = gamma * (1 - trajectory.terminated)

    def step(later, inputs):
        next_value, next_advantage = later
        transition, discount, trace_decay = inputs
        next_value = jnp.where(transition.truncated, transition.final_value, next_value)
        value = transition.value
        delta = transition.reward + discount * next_value - value
        advantage = delta + trace_decay * next_advantage
        if transition.active is not None:
            value = jnp.where(transition.active, value, value + advantage)
            advantage = jnp.where(transition.active, advantage, 0)
        return (value, advantage), advantage

    _, advantages = jax.lax.scan(
        step,
        (last_value, jnp.zeros_like(last_value)),
        (trajectory, discount, trace_decay),
        reverse=True,
    )
    return advantages


@jax.named_scope("advantages")
def make_batch(config: Config, collected: Rollout, advantage: jax.Array) -> Batch:
    """Makes a batch, (B, T, ...), of a rollout and its advantages (T, B)."""
    trajectory = collected.trajectory
    value, active = trajectory.value, trajectory.active
    return Batch(
        obs=swap_time_and_batch(trajectory.obs),
        action=swap_time_and_batch(trajectory.action),
        log_prob=swap_time_and_batch(trajectory.log_prob),
        value=swap_time_and_batch(value),
        advantage=swap_time_and_batch(advantage),
        returns=swap_time_and_batch(advantage + value),
        reach=swap_time_and_batch(trajectory.reach),
        memory=window_memory(config, collected),
        weight=None if active is None else swap_time_and_batch(active).astype(jnp.float32),
    )


LARGEST_DECAY = 0.98
"""Decay per update of the largest deviation of advantages. Half of it is left after 34 updates."""


@jax.named_scope("advantages")
def scale_policy_loss(
    config: Config, train_state: TrainState, batch: Batch, axis_name: str | None
) -> tuple[TrainState, jax.Array]:
    """Computes the weight of the policy's loss, s = min(1, d / (ADVANTAGE_FLOOR D)).

    d is the standard deviation of an update's advantages over all devices, and D <- max(0.98 D, d).
    Once all episodes are perfect, only the noise of the values is left in the advantages. Without s
    it would move the policy as much as anything did before.

    Returns:
      the train state with the new D, and s ().
    """
    weight = None if batch.weight is None else normalize_weight(batch.weight, axis_name)
    _, variance = moments(batch.advantage, weight, axis_name)
    deviation = jnp.sqrt(variance)
    state: PPOState = train_state.algorithm_state
    largest = jnp.maximum(LARGEST_DECAY * state.largest_deviation, deviation)
    floor = config["ADVANTAGE_FLOOR"] * largest
    scale = jnp.minimum(1.0, (deviation + 1e-8) / (floor + 1e-8))
    return train_state._replace(algorithm_state=state._replace(largest_deviation=largest)), scale


@jax.named_scope("advantages")
def normalize_advantages(
    advantage: jax.Array, weight: jax.Array | None, axis_name: str | None
) -> tuple[jax.Array, jax.Array | None]:
    """Standardises a minibatch's advantages over all devices, and scales its weights to mean 1.

    Args:
      advantage: (rows, T) float32.
      weight: (rows, T), 1 or 0; None: all 1.
    """
    if weight is not None:
        weight = normalize_weight(weight, axis_name)
    mean, variance = moments(advantage, weight, axis_name)
    return (advantage - mean) / (jnp.sqrt(variance) + 1e-8), weight


def ppo_loss(
    config: Config,
    network: ActorCriticTransformer,
    params: Any,
    batch: Batch,
    policy_scale: jax.Array | float = 1.0,
) -> tuple[jax.Array, Metrics]:
    """Computes L = s (L_clip - ENT_COEF H) + VF_COEF L_value.

    With s = 1 it is equation 9 of Schulman et al. 2017.

    Args:
      batch: with normalised advantages and weights.
      policy_scale: (), s.

    Returns:
      L (), and metrics {name: ()}.
    """
    inputs = batch.obs, batch.memory, batch.reach, config["WINDOW_GRAD"]
    outputs: Any = network.apply(params, *inputs, method="unroll_heads")
    policy, prediction = outputs
    clip_eps, weight = config["CLIP_EPS"], batch.weight
    log_ratio = where_counted(policy.log_prob(batch.action) - batch.log_prob, weight)
    ratio = jnp.exp(log_ratio)
    actor_loss = clipped_surrogate(ratio, batch.advantage, clip_eps, weight)
    old_value = batch.value if config["CLIP_VALUE"] else None
    critic_loss = value_loss(config, network, prediction, batch.returns, old_value, weight)
    entropy = weighted_mean(policy.entropy().astype(jnp.float32), weight)
    policy_loss = actor_loss - config["ENT_COEF"] * entropy
    loss = policy_scale * policy_loss + config["VF_COEF"] * critic_loss
    return loss, {
        "total_loss": loss,
        "actor_loss": actor_loss,
        "value_loss": critic_loss,
        "entropy": entropy,
        "approx_kl": weighted_mean(ratio - 1 - log_ratio, weight),
        "clip_fraction": weighted_mean(jnp.abs(ratio - 1) > clip_eps, weight),
    }


def clipped_surrogate(
    ratio: jax.Array, advantage: jax.Array, clip_eps: float, weight: jax.Array | None
) -> jax.Array:
    """Computes -mean(min(r A, clip(r, 1 - eps, 1 + eps) A)) (Schulman et al. 2017, equation 7)."""
    clipped_ratio = jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps)
    return -weighted_mean(jnp.minimum(ratio * advantage, clipped_ratio * advantage), weight)


def value_loss(
    config: Config,
    network: ActorCriticTransformer,
    prediction: jax.Array,
    returns: jax.Array,
    old_value: jax.Array | None,
    weight: jax.Array | None,
) -> jax.Array:
    """Computes the loss () of the critic's outputs (B, T, 1 or bins) on returns (B, T)."""
    if network.bins is not None:
        cross_entropy = network.bins.cross_entropy(prediction, where_counted(returns, weight))
        return weighted_mean(cross_entropy, weight)
    value = jnp.squeeze(prediction, axis=-1)
    return squared_value_loss(value, old_value, returns, config["CLIP_EPS"], weight)


def squared_value_loss(
    value: jax.Array,
    old_value: jax.Array | None,
    returns: jax.Array,
    clip_eps: float,
    weight: jax.Array | None,
) -> jax.Array:
    """Computes mean(max((v - R)^2, (v_clip - R)^2)) / 2 (Engstrom et al. 2020, section 2).

    v_clip is v clipped to clip_eps around `old_value` (arXiv 2005.12729). Without an `old_value`
    the loss is mean((v - R)^2) / 2.
    """
    squares = where_counted(value - returns, weight) ** 2
    if old_value is not None:
        clipped = old_value + jnp.clip(value - old_value, -clip_eps, clip_eps)
        squares = jnp.maximum(squares, where_counted(clipped - returns, weight) ** 2)
    return 0.5 * weighted_mean(squares, weight)


def explained_variance(batch: Batch, axis_name: str | None) -> jax.Array:
    """Computes 1 - Var(R - V) / Var(R) of the rollout's values, 0 if all returns are equal."""
    weight = None if batch.weight is None else normalize_weight(batch.weight, axis_name)
    _, error_variance = moments(batch.returns - batch.value, weight, axis_name)
    _, variance = moments(batch.returns, weight, axis_name)
    return jnp.where(variance > 0, 1 - error_variance / jnp.where(variance > 0, variance, 1), 0)


def to_replay(config: Config, collected: Rollout) -> Played:
    """Returns what the replay keeps of a rollout."""
    names = (name for name in Played._fields if name != "memory")
    by_row = {name: swap_time_and_batch(getattr(collected.trajectory, name)) for name in names}
    return Played(**by_row, memory=window_memory(config, collected))


def auxiliary_phase(
    config: Config,
    network: ActorCriticTransformer,
    train_state: TrainState,
    replay: Replay,
    key: jax.Array,
    axis_name: str | None,
) -> tuple[TrainState, Metrics]:
    """Fits the values of R replayed rollouts while the policy stays as it is, every R-th update.

    The auxiliary phase of PPG (Cobbe et al. 2021, arXiv 2009.04416, algorithm 1), on a network that
    policy and value share, and with PPO's optimiser, learning rate and minibatch size.

    Args:
      key: shuffles the rows of all rollouts.

    Returns:
      the train state, and metrics {name: ()}, means over gradient steps; `no_value()` in updates
      without a phase.
    """
    rate = learning_rate(config, train_state.updates)
    optimizer = make_optimizer(config)
    slots, num_rows = num_slots(replay), len(replay.number)
    minibatches = slots * config["NUM_MINIBATCHES"]
    all_rows = minibatch_rows(key, slots * num_rows, config["AUX_EPOCHS"], minibatches)
    all_rows = all_rows.reshape(-1, all_rows.shape[-1])
    due = replay.number[0] % slots == 0

    def phase() -> tuple[TrainState, Metrics]:
        def targets_of(slot: jax.Array) -> AuxiliaryTargets:
            played = jax.tree.map(lambda x: x[:, slot], replay.rollouts)
            return auxiliary_targets(config, network, train_state, played)

        targets = jax.lax.map(targets_of, jnp.arange(slots))  # (R, B, ...)
        batch = replay.rollouts, swap_time_and_batch(targets)  # (B, R, ...)
        batch = jax.tree.map(lambda x: x.reshape(slots * num_rows, *x.shape[2:]), batch)

        def minibatch_step(train_state: TrainState, rows: jax.Array):
            played, targets = jax.tree.map(lambda x: x[rows], batch)
            loss = partial(
                auxiliary_loss,
                config,
                network,
                played=played,
                targets=targets,
                axis_name=axis_name,
            )
            return gradient_step(loss, optimizer, rate, train_state, axis_name)

        after, metrics = jax.lax.scan(minibatch_step, train_state, all_rows)
        return after, {name: jnp.mean(metrics[name]) for name in AUXILIARY_METRICS}

    unchanged = train_state, dict.fromkeys(AUXILIARY_METRICS, jnp.float32(no_value()))
    done = jax.lax.cond(any_across_vmap(due), phase, lambda: unchanged)
    return jax.tree.map(lambda x, y: jnp.where(due, x, y), done, unchanged)


def auxiliary_targets(
    config: Config, network: ActorCriticTransformer, train_state: TrainState, played: Played
) -> AuxiliaryTargets:
    """Computes a rollout's targets with the parameters before the phase.

    Values have V-trace's targets (Espeholt et al. 2018, arXiv 1802.01561, equation 1) of current
    values v, with ratios c = min(1, policy now / policy then) and traces multiplied by GAE_LAMBDA.
    They are v + c (G - v), where G are Retrace's returns with q = v. At truncated steps, and at the
    last step of an unfinished episode, the target is v.
    """
    inputs = played.obs, played.memory, played.reach, config["WINDOW_GRAD"]
    outputs: Any = network.apply(train_state.params, *inputs, method="unroll_windows")
    policy, value = outputs
    scale = Scale(jnp.float32(0), jnp.float32(1))
    if config["NORMALIZE_VALUE"]:
        scale = value_scale(return_moments(config, train_state))
    if predicts_normalized(config):
        value = scale.denormalize(value)
    log_ratio = where_counted(policy.log_prob(played.action) - played.log_prob, played.active)
    trace = jnp.minimum(1, jnp.exp(log_ratio))
    steps = Steps(
        reward=played.reward,
        terminated=played.terminated,
        truncated=played.truncated,
        final_value=jnp.zeros_like(value),
        prior_value=value,
        q=value,
        trace=trace,
        last_value=jnp.zeros_like(value[:, 0]),
        has_return=~needs_old_value(played.terminated, played.truncated, played.active),
        active=played.active,
    )
    returns = retrace(steps, config["GAMMA"], config["GAE_LAMBDA"])
    _, *parameters = take_apart(policy)
    return AuxiliaryTargets(parameters, scale.normalize(value + trace * (returns - value)))


def auxiliary_loss(
    config: Config,
    network: ActorCriticTransformer,
    params: Any,
    played: Played,
    targets: AuxiliaryTargets,
    axis_name: str | None,
) -> tuple[jax.Array, Metrics]:
    """Computes KL(policy before the phase || policy) + VF_COEF L_value.

    L_joint of PPG's algorithm 1 up to its scale, with beta_clone = 1 / VF_COEF.

    Returns:
      the loss (), and metrics {name: ()}.
    """
    weight = None
    if played.active is not None:
        weight = normalize_weight(played.active.astype(jnp.float32), axis_name)
    inputs = played.obs, played.memory, played.reach, config["WINDOW_GRAD"]
    outputs: Any = network.apply(params, *inputs, method="unroll_heads")
    policy, prediction = outputs
    make, *_ = take_apart(policy)
    kl = weighted_mean(make(*targets.policy).kl_divergence(policy), weight)
    loss = value_loss(config, network, prediction, targets.value, None, weight)
    return kl + config["VF_COEF"] * loss, {"aux_kl": kl, "aux_value_loss": loss}


PPO = Algorithm(
    name="PPO",
    keys=KEYS,
    make_env=make_env,
    make_network=make_network,
    init=init,
    update=update,
    must_be_finite=(
        "total_loss",
        "actor_loss",
        "value_loss",
        "entropy",
        "approx_kl",
        "grad_norm",
        "param_norm",
    ),
    has_replay=lambda config: config["AUX_EPOCHS"] > 0,
    to_replay=to_replay,
    agent_params=agent_params,
    saved_params=saved_params,
)
