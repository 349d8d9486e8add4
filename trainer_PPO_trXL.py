"""PPO with a gated Transformer-XL: rollout, advantages, update, and `make_train`.

Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (arXiv 1707.06347) and 2016, "High-
Dimensional Continuous Control Using Generalized Advantage Estimation" (arXiv 1506.02438). Pure
functions of JAX: no files, no printing.

Letters: B environments on one device, or all of their agents, T = NUM_STEPS, W = WINDOW_GRAD,
M = WINDOW_MEM, L layers, E = EMBED_SIZE.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from config import check_config, num_updates
from environments import make_env
from normalization import Moments, first_moments, normalise_obs, scale_reward, update_moments
from policies import sample_each
from spaces import StoredObs, restore_obs, store_obs
from transformerXL import ActorCriticTransformer, make_network

Config = dict[str, Any]
Metrics = dict[str, jax.Array]


class Memory(NamedTuple):
    """What the agent carries from rollout to rollout."""

    hidden: jax.Array  # (B, M, L, E), oldest first
    reach: jax.Array  # (B,) int32, how many of the newest are still valid, 0..M


class Transition(NamedTuple):
    """One step of B environments; stacked over a rollout, leaves are (T, B, ...)."""

    obs: StoredObs  # (B, obs_size)
    action: jax.Array  # (B,), (B, choices) or (B, action_size)
    log_prob: jax.Array  # (B,)
    value: jax.Array  # (B,)
    reward: jax.Array  # (B,)
    done: jax.Array  # (B,)
    terminated: jax.Array  # (B,)
    truncated: jax.Array  # (B,), and not terminated
    final_value: jax.Array  # (B,), V of the final observation where truncated
    hidden: jax.Array  # (B, L, E), what each layer saw
    reach: jax.Array  # (B,) int32, how many steps before this one it attends to
    active: jax.Array | None  # (B,), whether the step counts; None where all do
    returned_episode: jax.Array  # (B,), whether the episode's metrics are to be counted
    episode_metrics: Metrics  # (B,) each, meaningful where an episode returned


class Batch(NamedTuple):
    """A rollout as the loss reads it, one row per environment."""

    obs: StoredObs  # (B, T, obs_size)
    action: jax.Array  # (B, T), (B, T, choices) or (B, T, action_size)
    log_prob: jax.Array  # (B, T)
    value: jax.Array  # (B, T)
    advantage: jax.Array  # (B, T)
    returns: jax.Array  # (B, T)
    reach: jax.Array  # (B, T)
    memory: jax.Array  # (B, M+T-W, L, E), hidden states of the steps -M .. T-W-1
    weight: jax.Array | None  # (B, T) float32, 1 where the step counts; None where all do


class TrainState(NamedTuple):
    params: Any
    opt_state: Any
    updates: jax.Array  # () int32, updates done
    normalizer: dict[str, Moments]  # "obs" with NORMALIZE_OBS, "reward" with NORMALIZE_REWARD


class RunnerState(NamedTuple):
    """Everything that an update starts from."""

    train_state: TrainState
    env_state: Any
    obs: jax.Array  # (B, obs_size), not normalised
    discounted_return: jax.Array  # (B,), what NORMALIZE_REWARD looks at
    memory: Memory
    env_keys: jax.Array  # (B,), each environment's random stream, its actions included
    permutation_key: jax.Array  # the same on every device


def make_train(config: Config, axis_name: str | None = None) -> Callable:
    """A whole training run as one function, PureJaxRL's contract.

    Args:
      config: as in the entry scripts; a missing key takes its default. Left unchanged. The float
        hyperparameters may be traced values.
      axis_name: of the `jax.pmap` over all devices that the function will run under.

    Returns:
      train(rng) -> {"runner_state": RunnerState, "metrics": {name: (NUM_UPDATES,)}}, for `jax.jit`,
      for `jax.vmap` over seeds, and for `jax.pmap` with the same rng on every device.

    Raises:
      config.ConfigError: the config can't be run.
    """
    init, update = make_init_and_update(config, axis_name)
    length = num_updates(check_config(config))

    def train(rng: jax.Array) -> dict[str, Any]:
        runner_state, metrics = jax.lax.scan(
            lambda state, _: update(state), init(rng), None, length
        )
        return {"runner_state": runner_state, "metrics": metrics}

    return train


def make_init_and_update(
    config: Config,
    axis_name: str | None = None,
    num_devices: int | None = None,
    make_network: Callable = make_network,
) -> tuple[Callable, Callable]:
    """The two functions that a run is made of.

    Args:
      config, axis_name: as for `make_train`.
      num_devices: how many devices the axis has; by default all of them.
      make_network: from the checked config and the action space to the network.

    Returns:
      init(rng) -> RunnerState, and update(RunnerState) -> (RunnerState, metrics), a rollout and the
      gradient steps on it; metrics are {name: ()}.

    Raises:
      config.ConfigError: the config can't be run.
    """
    if num_devices is None:
        num_devices = jax.device_count() if axis_name else 1
    config = check_config(config, num_devices)
    env = make_env(config, config["NUM_ENVS"] // num_devices)
    num_rows = env.num_rows
    network = make_network(config, env.action_space)
    optimizer = make_optimizer(config)

    def device_index() -> jax.Array | int:
        return jax.lax.axis_index(axis_name) if axis_name else 0

    def init(rng: jax.Array) -> RunnerState:
        params_key, envs_key, permutation_key = jax.random.split(rng, 3)
        global_index = device_index() * num_rows + jnp.arange(num_rows)
        env_keys = jax.vmap(jax.random.fold_in, (None, 0))(envs_key, global_index)
        env_keys, reset_keys = split_each(env_keys, 2)
        obs, env_state = env.reset(reset_keys)
        # Not weakly typed, as no state is after a step: the update is compiled once.
        env_state = jax.tree.map(lambda x: jnp.array(x, x.dtype), env_state)
        params = init_params(config, network, env.obs_size, params_key)
        normalizer = init_normalizer(config, env)
        real, active = obs[:, env.num_binary :], env_active(env, env_state)
        normalizer = count(normalizer, "obs", real, active, axis_name)
        return RunnerState(
            TrainState(params, optimizer.init(params), jnp.int32(0), normalizer),
            env_state,
            obs,
            jnp.zeros(num_rows),
            empty_memory(config, num_rows),
            env_keys,
            permutation_key,
        )

    def update(state: RunnerState) -> tuple[RunnerState, Metrics]:
        # COLLECT TRAJECTORIES
        old_memory = state.memory.hidden
        state, trajectory, last_value = rollout(config, env, network, state, axis_name)

        # CALCULATE ADVANTAGES
        advantage = generalised_advantages(
            trajectory, last_value, config["GAMMA"], config["GAE_LAMBDA"]
        )

        # UPDATE NETWORK
        batch = make_batch(config, trajectory, advantage, old_memory)
        permutation_key, key = jax.random.split(state.permutation_key)
        key = jax.random.fold_in(key, device_index())
        train_state, metrics = learn(
            config, network, optimizer, state.train_state, batch, key, axis_name
        )
        metrics |= rollout_metrics(trajectory, batch, axis_name)
        return state._replace(train_state=train_state, permutation_key=permutation_key), metrics

    return init, update


def split_each(keys: jax.Array, num: int) -> tuple[jax.Array, ...]:
    """Splits every key of (B,) into `num` of them: a tuple of `num` arrays (B,)."""
    pieces = jax.vmap(lambda key: jax.random.split(key, num))(keys)
    return tuple(pieces[:, i] for i in range(num))


def empty_memory(config: Config, num_rows: int) -> Memory:
    """The memory before the first step of a run."""
    shape = (num_rows, config["WINDOW_MEM"], config["num_layers"], config["EMBED_SIZE"])
    return Memory(jnp.zeros(shape), jnp.zeros(num_rows, jnp.int32))


def init_normalizer(config: Config, env: Any) -> dict[str, Moments]:
    """The statistics that the config asks for; entries that are always 0 or 1 have none."""
    normalizer = {}
    if config["NORMALIZE_OBS"]:
        normalizer["obs"] = first_moments((env.obs_size - env.num_binary,))
    if config["NORMALIZE_REWARD"]:
        normalizer["reward"] = first_moments(())
    return normalizer


def count(
    normalizer: dict[str, Moments],
    name: str,
    batch: jax.Array,
    active: jax.Array | None,
    axis_name: str | None,
) -> dict[str, Moments]:
    """Takes a batch (B, ...) into the statistics of that name, where there are any."""
    if name not in normalizer:
        return normalizer
    return normalizer | {name: update_moments(normalizer[name], batch, active, axis_name)}


def as_seen(normalizer: dict[str, Moments], obs: jax.Array) -> jax.Array:
    """Observations (..., obs_size) as the network gets them."""
    return normalise_obs(normalizer["obs"], obs) if "obs" in normalizer else obs


def env_active(env: Any, env_state: Any) -> jax.Array | None:
    """(B,) bool, which rows the step from this state counts for; None where it does for all."""
    return env.active(env_state) if env.num_agents is not None else None


def init_params(
    config: Config, network: ActorCriticTransformer, obs_size: int, key: jax.Array
) -> Any:
    """Fresh parameters."""
    return network.init(
        key,
        jnp.zeros((1, 1, obs_size)),
        empty_memory(config, 1).hidden,
        jnp.zeros((1, 1), jnp.int32),
        window_grad=1,
        method="window",
    )


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Clipping by the global norm and Adam's direction; `learn` scales it by the learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(config["MAX_GRAD_NORM"]), optax.scale_by_adam(eps=1e-5)
    )


def learning_rate(config: Config, updates: jax.Array) -> jax.Array:
    """The learning rate of a whole update, after `updates` of them: linear to 0 if ANNEAL_LR."""
    fraction_left = 1 - updates / num_updates(config) if config["ANNEAL_LR"] else 1.0
    return jnp.asarray(config["LR"] * fraction_left)


def rollout(
    config: Config,
    env: Any,
    network: ActorCriticTransformer,
    state: RunnerState,
    axis_name: str | None = None,
) -> tuple[RunnerState, Transition, jax.Array]:
    """T steps of every environment with the current parameters.

    Returns:
      the state after them (its parameters and permutation key unchanged), the trajectory with
      leaves (T, B, ...), and V of the last observation (B,), given the memory of that very step.
    """
    params = state.train_state.params
    steps, window_mem = config["NUM_STEPS"], config["WINDOW_MEM"]

    def apply(obs, caches, t, reach):
        return network.apply(params, obs, caches, t, reach, method="step")

    def step(carry, t):
        env_state, obs, discounted_return, caches, reach, env_keys, normalizer = carry
        env_keys, action_keys, step_keys = split_each(env_keys, 3)
        obs = as_seen(normalizer, obs)
        policy, value, caches, hidden = apply(obs, caches, t, reach)
        action = sample_each(policy, action_keys)
        active = env_active(env, env_state)
        next_obs, env_state, reward, done, info = env.step(step_keys, env_state, action)

        real, next_active = next_obs[:, env.num_binary :], env_active(env, env_state)
        normalizer = count(normalizer, "obs", real, next_active, axis_name)
        if "reward" in normalizer:
            discounted_return = config["GAMMA"] * discounted_return * (1 - done) + reward
            normalizer = count(normalizer, "reward", discounted_return, active, axis_name)
            reward = scale_reward(normalizer["reward"], reward)

        # The episode's next step would see this one too.
        next_reach = jnp.minimum(reach + 1, window_mem)
        truncated = info["truncated"] & ~info["terminated"]
        final_value = jnp.zeros_like(value)
        if env.can_truncate:
            final_obs = as_seen(normalizer, info["final_observation"])
            final_value = jax.lax.cond(
                jnp.any(truncated),
                lambda: apply(final_obs, caches, t + 1, next_reach)[1],
                lambda: final_value,
            )
        transition = Transition(
            obs=store_obs(obs, env.num_binary),
            action=action,
            log_prob=policy.log_prob(action),
            value=value,
            reward=reward,
            done=done,
            terminated=info["terminated"],
            truncated=truncated,
            final_value=final_value,
            hidden=hidden,
            reach=reach,
            active=active,
            returned_episode=info.get("returned_episode", done),
            episode_metrics={name: info[name] for name in env.episode_metrics},
        )
        reach = jnp.where(info.get("memory_boundary", done), 0, next_reach)
        carry = env_state, next_obs, discounted_return, caches, reach, env_keys, normalizer
        return carry, transition

    caches = network.apply(params, state.memory.hidden, method="start_rollout")
    normalizer = state.train_state.normalizer
    carry = state.env_state, state.obs, state.discounted_return, caches, state.memory.reach
    carry, trajectory = jax.lax.scan(step, (*carry, state.env_keys, normalizer), jnp.arange(steps))
    env_state, obs, discounted_return, caches, reach, env_keys, normalizer = carry
    last_value = apply(as_seen(normalizer, obs), caches, steps, reach)[1]
    active = env_active(env, env_state)
    if active is not None:
        last_value = jnp.where(active, last_value, 0)

    hidden = jnp.concatenate([state.memory.hidden, by_environment(trajectory.hidden)], axis=1)
    state = state._replace(
        train_state=state.train_state._replace(normalizer=normalizer),
        env_state=env_state,
        obs=obs,
        discounted_return=discounted_return,
        memory=Memory(hidden[:, steps:], reach),
        env_keys=env_keys,
    )
    return state, trajectory, last_value


def generalised_advantages(
    trajectory: Transition, last_value: jax.Array, gamma: float, gae_lambda: float
) -> jax.Array:
    """GAE(lambda) with the values of final observations where an episode was truncated.

    delta_t = r_t + gamma (1 - terminated_t) V'_t - V_t, V'_t the value of the observation that step
    t led to (Pardo et al. 2018, arXiv 1712.00378, "partial-episode bootstrapping"), and
    A_t = delta_t + gamma lambda (1 - done_t) A_{t+1} (Schulman et al. 2016, equation 16).

    While an agent is out and its team plays on, its value is learnt by no loss. Its team's rewards
    then count as they come: in such a step V_t is the return itself, and A_t = 0.

    Args:
      trajectory: leaves (T, B).
      last_value: (B,), 0 for an agent that is out.

    Returns:
      A, (T, B).
    """
    carry_on = gamma * gae_lambda * (1 - trajectory.done)
    discount = gamma * (1 - trajectory.terminated)

    def step(later, inputs):
        next_value, next_advantage = later
        transition, discount, carry_on = inputs
        next_value = jnp.where(transition.truncated, transition.final_value, next_value)
        value = transition.value
        delta = transition.reward + discount * next_value - value
        advantage = delta + carry_on * next_advantage
        if transition.active is not None:
            value = jnp.where(transition.active, value, value + advantage)
            advantage = jnp.where(transition.active, advantage, 0)
        return (value, advantage), advantage

    _, advantages = jax.lax.scan(
        step,
        (last_value, jnp.zeros_like(last_value)),
        (trajectory._replace(obs=None, hidden=None), discount, carry_on),
        reverse=True,
    )
    return advantages


def by_environment(tree: Any) -> Any:
    """(T, B, ...) to (B, T, ...)."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)


def make_batch(
    config: Config, trajectory: Transition, advantage: jax.Array, old_memory: jax.Array
) -> Batch:
    """Joins a trajectory and the memory (B, M, L, E) from before it into what the loss reads."""
    before_last_window = config["NUM_STEPS"] - config["WINDOW_GRAD"]
    recent = by_environment(trajectory.hidden[:before_last_window])
    return Batch(
        obs=by_environment(trajectory.obs),
        action=by_environment(trajectory.action),
        log_prob=by_environment(trajectory.log_prob),
        value=by_environment(trajectory.value),
        advantage=by_environment(advantage),
        returns=by_environment(advantage + trajectory.value),
        reach=by_environment(trajectory.reach),
        memory=jnp.concatenate([old_memory, recent], axis=1),
        weight=None if trajectory.active is None else by_environment(trajectory.active) * 1.0,
    )


def learn(
    config: Config,
    network: ActorCriticTransformer,
    optimizer: optax.GradientTransformation,
    train_state: TrainState,
    batch: Batch,
    key: jax.Array,
    axis_name: str | None,
) -> tuple[TrainState, Metrics]:
    """UPDATE_EPOCHS passes over the environments in NUM_MINIBATCHES minibatches each.

    Returns:
      the new train state, and the means of the losses over all gradient steps.
    """
    num_rows = batch.value.shape[0]
    rate = learning_rate(config, train_state.updates)

    def gradient_step(carry, inputs):
        params, opt_state = carry
        rows, prepared = inputs
        minibatch = jax.tree.map(lambda x: x[rows], batch)._replace(**prepared)
        gradients, metrics = jax.grad(ppo_loss, has_aux=True)(params, config, network, minibatch)
        gradients, metrics = mean_over_devices((gradients, metrics), axis_name)
        metrics["grad_norm"] = optax.tree.norm(gradients)
        direction, opt_state = optimizer.update(gradients, opt_state)
        params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
        return (params, opt_state), metrics

    epochs, minibatches = config["UPDATE_EPOCHS"], config["NUM_MINIBATCHES"]
    permute = jax.vmap(lambda epoch_key: jax.random.permutation(epoch_key, num_rows))
    rows = permute(jax.random.split(key, epochs)).reshape(epochs * minibatches, -1)
    # Of all minibatches at once: many devices then meet only for the gradients in each step.
    prepared = {"advantage": batch.advantage[rows]}
    if batch.weight is not None:
        prepared["weight"] = batch.weight[rows]
    prepared = jax.vmap(partial(prepare, axis_name=axis_name))(prepared)
    (params, opt_state), metrics = jax.lax.scan(
        gradient_step, (train_state.params, train_state.opt_state), (rows, prepared)
    )
    metrics = jax.tree.map(jnp.mean, metrics)
    metrics |= {"learning_rate": rate, "param_norm": optax.tree.norm(params)}
    updates = train_state.updates + 1
    return train_state._replace(params=params, opt_state=opt_state, updates=updates), metrics


def ppo_loss(
    params: Any, config: Config, network: ActorCriticTransformer, batch: Batch
) -> tuple[jax.Array, Metrics]:
    """The clipped surrogate, the clipped value loss and the entropy bonus.

    L = L_clip + VF_COEF L_value - ENT_COEF H (Schulman et al. 2017, equations 7 and 9), of a batch
    whose advantages and weights are normalised, with
    L_value = mean(max((v - R)^2, (v_clip - R)^2)) / 2, v_clip at most CLIP_EPS from the rollout's
    value (Engstrom et al. 2020, arXiv 2005.12729).
    """
    obs = restore_obs(batch.obs)
    policy, value = network.apply(
        params, obs, batch.memory, batch.reach, config["WINDOW_GRAD"], method="window"
    )
    clip_eps = config["CLIP_EPS"]

    def mean(x: jax.Array) -> jax.Array:
        return weighted_mean(x, batch.weight)

    log_ratio = policy.log_prob(batch.action) - batch.log_prob
    ratio = jnp.exp(log_ratio)
    clipped_ratio = jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps)
    actor_loss = -mean(jnp.minimum(ratio * batch.advantage, clipped_ratio * batch.advantage))

    clipped_value = batch.value + jnp.clip(value - batch.value, -clip_eps, clip_eps)
    squared_errors = (value - batch.returns) ** 2, (clipped_value - batch.returns) ** 2
    value_loss = 0.5 * mean(jnp.maximum(*squared_errors))

    entropy = mean(policy.entropy())
    loss = actor_loss + config["VF_COEF"] * value_loss - config["ENT_COEF"] * entropy
    return loss, {
        "total_loss": loss,
        "actor_loss": actor_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "approx_kl": mean(ratio - 1 - log_ratio),
        "clip_fraction": mean(jnp.abs(ratio - 1) > clip_eps),
    }


def rollout_metrics(trajectory: Transition, batch: Batch, axis_name: str | None) -> Metrics:
    """Means over the episodes that returned, NaN where none did, their number, explained variance.

    An episode in which a metric of the environment's own is NaN has none.
    """
    returned = trajectory.returned_episode
    values = trajectory.episode_metrics
    given = {name: returned & ~jnp.isnan(x) for name, x in values.items()}
    # Stacked, so that many devices meet once.
    sums = jnp.stack([jnp.sum(jnp.where(given[name], x, 0.0)) for name, x in values.items()])
    counts = jnp.stack([jnp.sum(given[name]) for name in values])
    sums, counts, episodes = sum_over_devices((sums, counts, jnp.sum(returned)), axis_name)
    weight = None if batch.weight is None else normalise_weight(batch.weight, axis_name)
    _, error_variance = moments(batch.returns - batch.value, weight, axis_name)
    _, variance = moments(batch.returns, weight, axis_name)
    return dict(zip(values, sums / counts, strict=True)) | {
        "episodes": episodes,
        "explained_variance": 1 - error_variance / variance,
    }


def prepare(minibatch: dict[str, jax.Array], axis_name: str | None) -> dict[str, jax.Array]:
    """A minibatch's advantages with mean 0 and deviation 1 over all devices, its weights mean 1."""
    weight = minibatch.get("weight")
    if weight is not None:
        weight = normalise_weight(weight, axis_name)
        minibatch = minibatch | {"weight": weight}
    mean, variance = moments(minibatch["advantage"], weight, axis_name)
    advantage = (minibatch["advantage"] - mean) / (jnp.sqrt(variance) + 1e-8)
    return minibatch | {"advantage": advantage}


def normalise_weight(weight: jax.Array, axis_name: str | None) -> jax.Array:
    """Weights whose mean over all devices is 1, or that are all 0."""
    mean = mean_over_devices(jnp.mean(weight), axis_name)
    return weight / jnp.where(mean == 0, 1, mean)


def weighted_mean(x: jax.Array, weight: jax.Array | None) -> jax.Array:
    """The mean of x over all its elements; weights have mean 1, None stands for all alike."""
    return jnp.mean(x if weight is None else weight * x)


def moments(
    x: jax.Array, weight: jax.Array | None, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """Mean and population variance of x over all its elements on all devices."""
    mean = mean_over_devices(weighted_mean(x, weight), axis_name)
    return mean, mean_over_devices(weighted_mean((x - mean) ** 2, weight), axis_name)


def mean_over_devices(tree: Any, axis_name: str | None) -> Any:
    return jax.lax.pmean(tree, axis_name) if axis_name else tree


def sum_over_devices(tree: Any, axis_name: str | None) -> Any:
    return jax.lax.psum(tree, axis_name) if axis_name else tree
