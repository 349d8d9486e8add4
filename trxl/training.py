"""What algorithms share: a run's init and update, minibatches, the optimiser, metrics of episodes.

An algorithm is a value, `Algorithm`; this file, rollout.py and runs/ work with any of them. Pure
functions of JAX: no files, no printing. Letters as in rollout.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from trxl.collectives import mean_over_devices, sum_over_devices
from trxl.config import Keys, check_config, num_updates
from trxl.rollout import (
    Config,
    Metrics,
    Rollout,
    RolloutState,
    Transition,
    active_rows,
    empty_memory,
    init_rollout,
    rollout,
    update_obs_statistics,
)
from trxl.spaces import obs_space
from trxl.statistics import Moments, init_normalizer


class TrainState(NamedTuple):
    """What is learnt, the same on every device."""

    params: Any
    opt_state: Any  # of the parameters as one vector
    updates: jax.Array  # () int32, updates done
    normalizer: dict[str, Moments]  # "obs" with NORMALIZE_OBS, "reward" with NORMALIZE_REWARD
    algorithm_state: Any = None  # what else the algorithm learns or averages


class RunnerState(NamedTuple):
    """Everything that an update starts from."""

    train_state: TrainState
    rollout_state: RolloutState
    permutation_key: jax.Array
    replay: Any = None  # (B, ...), earlier rollouts, see `Algorithm.add_to_replay`


class Start(NamedTuple):
    """What a run may start with in place of fresh parameters, see `make_init_and_update`."""

    params: Any
    normalizer: dict[str, Moments]


ALIKE = ("train_state", "permutation_key")
"""The fields of a `RunnerState` that all devices have alike; the others are rows."""


class Algorithm(NamedTuple):
    """What is an algorithm's own.

    make_env(config, num_envs) -> the batched environment, see wrappers.py.

    make_network(config, action_space, obs_space) -> a Flax module with `init_cache` and `step`,
    see `rollout.rollout`, and `unroll_windows`, by which its parameters are initialised.

    init(config, params) -> the `TrainState` of fresh parameters, without statistics.

    update(config, network, train_state, rollout, key, axis_name) -> (train_state, metrics): the
    gradient steps on a rollout. `key` differs between devices; metrics are {name: ()}.

    add_to_replay(config, replay, rollout) -> the replay with this rollout, leaves (B, ...), which
    `update` finds in `rollout.replay`. The first call has None for the replay.
    """

    name: str  # stands in a saved config
    keys: Keys  # its whole table of settings, see `config.with_shared`
    make_env: Callable
    make_network: Callable
    init: Callable
    update: Callable
    must_be_finite: tuple[str, ...]  # metrics that are numbers as long as the agent is whole
    behaviour_params: Callable = lambda train_state: train_state.params  # those that act
    add_to_replay: Callable | None = None
    # (config, train_state) -> the parameters that a run saves; None: those that act.
    saved_params: Callable | None = None

    def check(self, config: Config, num_devices: int = 1) -> Config:
        """The config, completed and checked against the algorithm's table: `check_config`."""
        return check_config(config, self.keys, num_devices)


def make_train(config: Config, algorithm: Algorithm, axis_name: str | None = None) -> Callable:
    """A whole training run as one function, see `trainer_PPO_trXL.make_train`."""
    init, update = make_init_and_update(config, algorithm, axis_name)
    length = num_updates(algorithm.check(config))

    def train(rng: jax.Array) -> dict[str, Any]:
        runner_state, metrics = jax.lax.scan(
            lambda state, _: update(state), init(rng), None, length
        )
        return {"runner_state": runner_state, "metrics": metrics}

    return train


def make_init_and_update(
    config: Config,
    algorithm: Algorithm,
    axis_name: str | None = None,
    num_devices: int | None = None,
) -> tuple[Callable, Callable]:
    """The two functions that a run is made of.

    Args:
      config: a missing key takes its default. Left unchanged.
      axis_name: of the `jax.pmap` over all devices that the functions will run under.
      num_devices: how many devices the axis has; by default all of them.

    Returns:
      init(rng, start=None) -> RunnerState, with the parameters and statistics of a `Start` or fresh
      ones, and update(RunnerState) -> (RunnerState, metrics), a rollout and the gradient steps on
      it; metrics are {name: ()}.

    Raises:
      config.ConfigError: the config can't be run.
    """
    num_devices = num_devices or (jax.device_count() if axis_name else 1)
    config = algorithm.check(config, num_devices)
    env = algorithm.make_env(config, config["NUM_ENVS"] // num_devices)
    network = algorithm.make_network(config, env.action_space, obs_space(env))

    def init(rng: jax.Array, start: Start | None = None) -> RunnerState:
        params_key, envs_key, permutation_key = jax.random.split(rng, 3)
        state = init_rollout(config, env, envs_key, device_index(axis_name) * env.num_rows)
        active = active_rows(env, state.env_state)
        if start is None:
            params = init_params(config, network, env.obs_size, params_key)
            start = Start(params, init_normalizer(config, env))
        normalizer = update_obs_statistics(env, start.normalizer, state.obs, active, axis_name)
        train_state = algorithm.init(config, start.params)._replace(normalizer=normalizer)
        runner_state = RunnerState(train_state, state, permutation_key)
        replay = empty_replay(config, env, network, algorithm, runner_state, axis_name)
        return runner_state._replace(replay=replay)

    def update(state: RunnerState) -> tuple[RunnerState, Metrics]:
        # COLLECT TRAJECTORIES
        state, collected = collect(config, env, network, algorithm, state, axis_name)
        if algorithm.add_to_replay is not None:
            replay = algorithm.add_to_replay(config, state.replay, collected)
            collected = collected._replace(replay=replay)

        # LEARN FROM THEM
        permutation_key, key = jax.random.split(state.permutation_key)
        key = jax.random.fold_in(key, device_index(axis_name))
        train_state, metrics = algorithm.update(
            config, network, state.train_state, collected, key, axis_name
        )
        train_state = train_state._replace(updates=train_state.updates + 1)
        metrics |= input_metrics(collected.trajectory, axis_name)
        metrics |= episode_metrics(collected.trajectory, axis_name)
        state = state._replace(
            train_state=train_state, permutation_key=permutation_key, replay=collected.replay
        )
        return state, metrics

    return init, update


def device_index(axis_name: str | None) -> jax.Array | int:
    """Of this device on the axis of a `jax.pmap`; 0 without one."""
    return jax.lax.axis_index(axis_name) if axis_name else 0


def collect(
    config: Config,
    env: Any,
    network: Any,
    algorithm: Algorithm,
    state: RunnerState,
    axis_name: str | None = None,
) -> tuple[RunnerState, Rollout]:
    """A rollout with the parameters that act: the state after it, and what was collected."""
    train_state = state.train_state
    rollout_state, normalizer, collected = rollout(
        config,
        env,
        network,
        algorithm.behaviour_params(train_state),
        state.rollout_state,
        train_state.normalizer,
        axis_name,
    )
    train_state = train_state._replace(normalizer=normalizer)
    return state._replace(train_state=train_state, rollout_state=rollout_state), collected


def empty_replay(
    config: Config,
    env: Any,
    network: Any,
    algorithm: Algorithm,
    state: RunnerState,
    axis_name: str | None,
) -> Any:
    """Returns the replay before the first update, all zeros; None if the algorithm has none."""
    add_to_replay = algorithm.add_to_replay
    if add_to_replay is None:
        return None

    def first_replay() -> Any:
        _, collected = collect(config, env, network, algorithm, state, axis_name)
        return add_to_replay(config, None, collected)

    shapes = jax.eval_shape(first_replay)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def init_params(config: Config, network: Any, obs_size: int, key: jax.Array) -> Any:
    """Fresh parameters."""
    return network.init(
        key,
        jnp.zeros((1, 1, obs_size)),
        empty_memory(config, 1).layer_inputs,
        jnp.zeros((1, 1), jnp.int32),
        window_grad=1,
        method="unroll_windows",
    )


def clipped_adam(max_grad_norm: float, epsilon: float = 1e-5) -> optax.GradientTransformation:
    """Returns clipping by the global norm and Adam's direction, without the learning rate."""
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optax.scale_by_adam(eps=epsilon))


def learning_rate(config: Config, updates: jax.Array) -> jax.Array:
    """The learning rate of a whole update, after `updates` of them: linear to 0 if ANNEAL_LR."""
    fraction_left = 1 - updates / num_updates(config) if config["ANNEAL_LR"] else 1.0
    return jnp.asarray(config["LR"] * fraction_left)


def minibatch_rows(key: jax.Array, num_rows: int, epochs: int, minibatches: int) -> jax.Array:
    """Returns (epochs, minibatches, num_rows / minibatches): per epoch a fresh permutation."""
    permute = jax.vmap(lambda epoch_key: jax.random.permutation(epoch_key, num_rows))
    return permute(jax.random.split(key, epochs)).reshape(epochs, minibatches, -1)


@jax.named_scope("gradients")
def gradient_step(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    rate: jax.Array,
    train_state: TrainState,
    axis_name: str | None,
) -> tuple[TrainState, Metrics]:
    """Takes a step down the gradient of `loss`.

    To the optimiser the parameters are one vector (`fresh_train_state`): devices meet once, and a
    GPU launches a few kernels in place of three for each array.

    Args:
      loss: params -> (loss (), metrics {name: ()}).
      rate: (), the learning rate.

    Returns:
      the train state with new parameters and optimiser state, metrics {name: ()}.
    """
    gradients, metrics = jax.grad(loss, has_aux=True)(train_state.params)
    gradients, unravel = ravel_pytree(gradients)
    gradients, metrics = mean_over_devices((gradients, metrics), axis_name)
    metrics["grad_norm"] = jnp.linalg.norm(gradients)
    direction, opt_state = optimizer.update(gradients, train_state.opt_state)
    params = jax.tree.map(lambda p, d: p - rate * d, train_state.params, unravel(direction))
    return train_state._replace(params=params, opt_state=opt_state), metrics


def mean_metrics(metrics: Metrics, rate: jax.Array, params: Any) -> Metrics:
    """Returns an update's metrics: means over its gradient steps, the rate, the parameters' norm.

    Args:
      metrics: of all gradient steps, {name: (epochs, minibatches)}.
    """
    metrics = jax.tree.map(jnp.mean, metrics)
    return metrics | {"learning_rate": rate, "param_norm": optax.tree.norm(params)}


INPUTS = {
    "mean_reward": "a reward of the environment",
    "mean_observation": "an observation of the environment",
}
"""Metrics that are infinite or NaN where a reward or an observation of the environment is."""


@jax.named_scope("metrics")
def input_metrics(trajectory: Transition, axis_name: str | None) -> Metrics:
    """Returns the means of rewards and of entries that are not binary, as the loss reads them."""
    real = trajectory.obs.real
    means = [jnp.mean(trajectory.reward), jnp.mean(real) if real.size else jnp.float32(0)]
    return dict(zip(INPUTS, mean_over_devices(means, axis_name), strict=True))


@jax.named_scope("metrics")
def episode_metrics(trajectory: Transition, axis_name: str | None) -> Metrics:
    """Means over the episodes that returned, NaN where none did, and their number.

    An episode in which a metric of the environment's own is NaN has none.
    """
    returned = trajectory.returned_episode
    values = trajectory.episode_metrics
    given = {name: returned & ~jnp.isnan(x) for name, x in values.items()}
    # Stacked, so that many devices meet once.
    sums = jnp.stack([jnp.sum(jnp.where(given[name], x, 0.0)) for name, x in values.items()])
    counts = jnp.stack([jnp.sum(given[name]) for name in values])
    sums, counts, episodes = sum_over_devices((sums, counts, jnp.sum(returned)), axis_name)
    return dict(zip(values, sums / counts, strict=True)) | {"num_episodes": episodes}


def fresh_train_state(
    params: Any, optimizer: optax.GradientTransformation, algorithm_state: Any = None
) -> TrainState:
    """Before the first update, without statistics."""
    opt_state = optimizer.init(ravel_pytree(params)[0])
    return TrainState(params, opt_state, jnp.int32(0), {}, algorithm_state)
