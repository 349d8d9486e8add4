"""Training run of any `Algorithm`: `init`, `update`, `make_train`, gradient steps and metrics.

Pure functions: no files, no printing. Letters as in rollout.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trxl.collectives import mean_over_devices, sum_over_devices
from trxl.config import Keys, check_config, num_updates
from trxl.errors import ConfigError
from trxl.replay import Replay, add_rollout, empty_replay
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
    """State of the learner, the same on every device."""

    params: Any
    opt_state: Any
    updates: jax.Array  # () int32, number of updates done
    normalizer: dict[str, Moments]  # "obs" with NORMALIZE_OBS, "reward" with NORMALIZE_REWARD
    algorithm_state: Any = None  # PPO's moments of returns, Muesli's target parameters


class RunnerState(NamedTuple):
    """State of a run between two updates.

    `train_state` and `permutation_key` are the same on every device. Other fields have a row per
    environment.
    """

    train_state: TrainState
    rollout_state: RolloutState
    permutation_key: jax.Array
    replay: Any = None  # `Replay`, None if the algorithm has none


class Start(NamedTuple):
    """Parameters and statistics of an earlier run, from which a new run starts."""

    params: Any
    normalizer: dict[str, Moments]


class Algorithm(NamedTuple):
    """Functions and settings of an algorithm."""

    name: str
    """Saved in the config of a run."""
    keys: Keys
    """Whole table of settings, see `config.with_shared`."""
    make_env: Callable
    """`make_env(config, num_envs)` returns the batched environment, see `wrappers.make_env`."""
    make_network: Callable
    """`make_network(config, action_space, obs_space)` returns a Flax module.

    It has `init_cache`, `step` and `unroll_windows`, as `ActorCriticTransformer` has them.
    `unroll_windows` initialises all parameters.
    """
    init: Callable
    """`init(config, params)` returns the first `TrainState`, with an empty normalizer."""
    update: Callable
    """`update(config, network, train_state, rollout, key, axis_name)` does the gradient steps.

    It returns (train_state, metrics). key differs between devices; each metric is a scalar ().
    """
    must_be_finite: tuple[str, ...]
    """Metrics; a seed has diverged once one is not finite."""
    behaviour_params: Callable = lambda train_state: train_state.params
    """`behaviour_params(train_state)` returns the parameters of the policy that plays rollouts."""
    agent_params: Callable | None = None
    """`agent_params(train_state)` returns those of the trained agent; None: `behaviour_params`."""
    has_replay: Callable = lambda config: False
    """`has_replay(config)` returns whether `update` reads a replay of the REPLAY_ROLLOUTS newest
    rollouts, this one included, from `rollout.replay`."""
    to_replay: Callable = lambda config, rollout: None
    """`to_replay(config, rollout)` returns what the replay keeps of a rollout, leaves (B, ...)."""
    saved_params: Callable | None = None
    """`saved_params(config, train_state)` returns the saved parameters; None: `agent_params`."""

    def check(self, config: Config, num_devices: int = 1) -> Config:
        """Completes and checks a config against the algorithm's table, see `check_config`."""
        return check_config(config, self.keys, num_devices)


def make_train(config: Config, algorithm: Algorithm, axis_name: str | None = None) -> Callable:
    """Makes a whole training run one function, see `trainer_PPO_trXL.make_train`."""
    num_devices = jax.device_count() if axis_name else 1
    config = algorithm.check(config, num_devices)
    init, update = make_init_and_update(config, algorithm, axis_name, num_devices)

    def train(rng: jax.Array) -> dict[str, Any]:
        runner_state, metrics = jax.lax.scan(
            lambda state, _: update(state), init(rng), length=num_updates(config)
        )
        return {"runner_state": runner_state, "metrics": metrics}

    return train


def make_init_and_update(
    config: Config,
    algorithm: Algorithm,
    axis_name: str | None = None,
    num_devices: int = 1,
) -> tuple[Callable, Callable]:
    """Makes the two functions of a run.

    Args:
      config: checked.
      axis_name: axis of devices, under `jax.pmap` or `jax.shard_map`.
      num_devices: size of that axis.

    Returns:
      init(rng, start=None) -> RunnerState, from a `Start` or fresh parameters, and
      update(RunnerState) -> (RunnerState, metrics {name: ()}), a rollout and its gradient steps.

    Raises:
      ConfigError: the environment can't be made.
    """
    # With JAX_ENABLE_X64 traced values may be float64.
    config = {
        name: x.astype(jnp.float32) if isinstance(x, jax.Array) else x for name, x in config.items()
    }
    env = algorithm.make_env(config, config["NUM_ENVS"] // num_devices)
    network = algorithm.make_network(config, env.action_space, obs_space(env))

    def init(rng: jax.Array, start: Start | None = None) -> RunnerState:
        params_key, envs_key, permutation_key = jax.random.split(rng, 3)
        state = init_rollout(config, env, envs_key, device_index(axis_name) * env.num_rows)
        if start is None:
            params = init_params(config, network, env.obs_size, params_key)
            start = Start(params, init_normalizer(config, env))
        active = active_rows(env, state.env_state)
        normalizer = update_obs_statistics(env, start.normalizer, state.obs, active, axis_name)
        train_state = algorithm.init(config, start.params)._replace(normalizer=normalizer)
        runner_state = RunnerState(train_state, state, permutation_key)
        return runner_state._replace(replay=init_replay(runner_state))

    def collect_trajectories(state: RunnerState) -> tuple[RunnerState, Rollout]:
        return collect(config, env, network, algorithm, state, axis_name)

    def init_replay(state: RunnerState) -> Replay | None:
        if not algorithm.has_replay(config):
            return None
        kept = jax.eval_shape(lambda: algorithm.to_replay(config, collect_trajectories(state)[1]))
        return empty_replay(kept, config["REPLAY_ROLLOUTS"])

    def update(state: RunnerState) -> tuple[RunnerState, Metrics]:
        # COLLECT TRAJECTORIES
        state, collected = collect_trajectories(state)
        if state.replay is not None:
            replay = add_rollout(state.replay, algorithm.to_replay(config, collected))
            state, collected = state._replace(replay=replay), collected._replace(replay=replay)

        # UPDATE NETWORK
        permutation_key, key = jax.random.split(state.permutation_key)
        key = jax.random.fold_in(key, device_index(axis_name))
        train_state, metrics = algorithm.update(
            config, network, state.train_state, collected, key, axis_name
        )
        train_state = train_state._replace(updates=train_state.updates + 1)
        metrics |= input_metrics(collected.trajectory, axis_name)
        check_metric_names(env.episode_metrics, metrics)
        metrics |= episode_metrics(env.episode_metrics, collected.trajectory, axis_name)
        return state._replace(train_state=train_state, permutation_key=permutation_key), metrics

    return init, update


def device_index(axis_name: str | None) -> jax.Array | int:
    """Returns this device's index on the axis, 0 without an axis."""
    return jax.lax.axis_index(axis_name) if axis_name else 0


def collect(
    config: Config,
    env: Any,
    network: Any,
    algorithm: Algorithm,
    state: RunnerState,
    axis_name: str | None = None,
) -> tuple[RunnerState, Rollout]:
    """Plays a rollout with `behaviour_params`.

    Returns:
      the new state, and the rollout.
    """
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


def init_params(config: Config, network: Any, obs_size: int, key: jax.Array) -> Any:
    """Returns fresh parameters."""
    return network.init(
        key,
        jnp.zeros((1, 1, obs_size), jnp.float32),
        empty_memory(config, 1),
        jnp.zeros((1, 1), jnp.int32),
        window_grad=1,
        method="unroll_windows",
    )


def fresh_train_state(
    params: Any, optimizer: optax.GradientTransformation, algorithm_state: Any = None
) -> TrainState:
    """Makes the state before the first update, without statistics."""
    return TrainState(params, optimizer.init(params), jnp.int32(0), {}, algorithm_state)


def learning_rate(config: Config, updates: jax.Array) -> jax.Array:
    """Returns the learning rate () after `updates` updates; with ANNEAL_LR it decays to 0."""
    fraction_left = 1 - updates / num_updates(config) if config["ANNEAL_LR"] else 1.0
    return jnp.asarray(config["LR"] * fraction_left, jnp.float32)


def minibatch_rows(key: jax.Array, num_rows: int, epochs: int, minibatches: int) -> jax.Array:
    """Permutes the rows per epoch: (epochs, minibatches, num_rows / minibatches) int32."""
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    permute = jax.vmap(lambda epoch_key: jax.random.permutation(epoch_key, rows))
    return permute(jax.random.split(key, epochs)).reshape(epochs, minibatches, -1)


@jax.named_scope("gradients")
def gradient_step(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    rate: jax.Array,
    train_state: TrainState,
    axis_name: str | None,
) -> tuple[TrainState, Metrics]:
    """Takes a gradient step on the mean of `loss` over all devices.

    Args:
      loss: params -> (loss (), metrics {name: ()}).
      optimizer: without a learning rate.
      rate: (), the learning rate.

    Returns:
      the train state with new parameters and optimiser state, and metrics {name: ()}.
    """
    gradients, metrics = jax.grad(loss, has_aux=True)(train_state.params)
    gradients, metrics = mean_over_devices((gradients, metrics), axis_name)
    metrics["grad_norm"] = optax.tree.norm(gradients)
    direction, opt_state = optimizer.update(gradients, train_state.opt_state)
    params = optax.apply_updates(train_state.params, optax.tree.scale(-rate, direction))
    return train_state._replace(params=params, opt_state=opt_state), metrics


def mean_metrics(metrics: Metrics, rate: jax.Array, params: Any) -> Metrics:
    """Averages metrics {name: (epochs, minibatches)}; adds the learning rate and parameter norm."""
    metrics = jax.tree.map(jnp.mean, metrics)
    return metrics | {"learning_rate": rate, "param_norm": optax.tree.norm(params)}


INPUTS = {
    "mean_reward": "a reward of the environment",
    "mean_observation": "an observation of the environment",
}
"""Metrics that are not finite if the environment's rewards or observations are not."""


@jax.named_scope("metrics")
def input_metrics(trajectory: Transition, axis_name: str | None) -> Metrics:
    """Returns the means of rewards and of non-binary observations, as the loss reads them."""
    real = trajectory.obs.real
    means = {
        "mean_reward": jnp.mean(trajectory.reward),
        "mean_observation": jnp.mean(real) if real.size else jnp.float32(0),
    }
    return mean_over_devices(means, axis_name)


def check_metric_names(names: tuple[str, ...], metrics: Metrics) -> None:
    """Raises a ConfigError if a metric of the environment has the name of another metric."""
    taken = {*metrics, "num_episodes", "steps_per_second", "env_steps"}
    for index, name in enumerate(names):
        if name in taken or name in names[:index]:
            raise ConfigError(
                f"info[{name!r}] of the environment has the name of a metric of the run; rename it"
            )


@jax.named_scope("metrics")
def episode_metrics(
    names: tuple[str, ...], trajectory: Transition, axis_name: str | None
) -> Metrics:
    """Averages the environment's metrics over the episodes that ended, and counts these.

    A NaN is left out of its metric's mean. Without any value the mean is `no_value()`.

    Args:
      names: names of `trajectory.episode_metrics` (T, B, K), K of them.
    """
    values = trajectory.episode_metrics  # (T, B, K)
    counted = trajectory.returned_episode[..., None] & ~jnp.isnan(values)
    sums = jnp.sum(jnp.where(counted, values, 0), axis=(0, 1))
    counts = jnp.sum(counted, axis=(0, 1), dtype=jnp.int32)
    episodes = jnp.sum(trajectory.returned_episode, dtype=jnp.int32)
    sums, counts, episodes = sum_over_devices((sums, counts, episodes), axis_name)
    means = jnp.where(counts > 0, sums / jnp.maximum(counts, 1), no_value())
    return dict(zip(names, means, strict=True)) | {"num_episodes": episodes}


def no_value() -> np.float32:
    """Returns the placeholder of a missing metric on a device.

    It is NaN. With JAX_DEBUG_NANS, which raises on NaN, it is the lowest float32.
    """
    debugging = jax.config.jax_debug_nans  # type: ignore[attr-defined]
    return np.finfo(np.float32).min if debugging else np.float32(np.nan)


def without_nan(x: jax.Array) -> jax.Array:
    """Replaces NaN in a metric of the environment by `no_value()`."""
    return jnp.where(jnp.isnan(x), no_value(), x) if jnp.issubdtype(x.dtype, jnp.floating) else x


def with_nan(metrics: Any) -> Any:
    """Replaces `no_value()` by NaN in a tree of metrics on the host."""
    none = no_value()
    if np.isnan(none):
        return metrics
    return jax.tree.map(lambda x: np.where(x == none, np.nan, x).astype(x.dtype), metrics)
