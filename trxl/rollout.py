"""Rollout: T steps of B environments with any algorithm's network.

Letters: B environments on one device, or all of their agents, T = NUM_STEPS, M = WINDOW_MEM,
L layers, E = EMBED_SIZE.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trxl.collectives import any_across_vmap
from trxl.distributions import sample_per_row
from trxl.spaces import StoredObs, obs_space, pack_obs
from trxl.statistics import Normalizer, network_input, scale_reward, update_normalizer

Config = dict[str, Any]
Metrics = dict[str, jax.Array]


class RolloutState(NamedTuple):
    """The environments between two steps, with a row for each."""

    env_state: Any
    obs: jax.Array  # (B, obs_size), not normalised
    discounted_return: jax.Array  # (B,), of the episode so far, for NORMALIZE_REWARD
    memory: jax.Array  # (B, M, L, E), layer inputs before the rollout, oldest first
    reach: jax.Array  # (B,) int32, how many of the newest entries of the memory are valid, 0..M
    env_keys: jax.Array  # (B,), each row's random stream, its actions included


class Transition(NamedTuple):
    """A step of B environments; stacked over a rollout, leaves are (T, B, ...)."""

    obs: StoredObs  # (B, obs_size)
    action: jax.Array  # (B,), (B, choices) or (B, action_size)
    log_prob: jax.Array  # (B,)
    value: jax.Array  # (B,)
    reward: jax.Array  # (B,)
    done: jax.Array  # (B,), see `episode_boundaries`
    terminated: jax.Array  # (B,)
    truncated: jax.Array  # (B,), ended by a limit and not terminated
    final_value: jax.Array  # (B,), of the final observation; means something where truncated
    layer_inputs: jax.Array  # (B, L, E), the memory entry; of a GRU its carry
    reach: jax.Array  # (B,) int32, how many steps before this one it attends to
    active: jax.Array | None  # (B,), whether the agent has a part in the step; None: all have
    returned_episode: jax.Array  # (B,), whether an episode ended whose metrics count
    episode_metrics: jax.Array  # (B, number of metrics), in the order of `env.episode_metrics`


class Rollout(NamedTuple):
    """A rollout, from which an algorithm learns."""

    trajectory: Transition  # leaves (T, B, ...)
    last_value: jax.Array  # (B,), of the last observation, given the memory of that very step
    last_active: jax.Array | None  # (B,), likewise for the step after the last
    memory: jax.Array  # (B, M, L, E), layer inputs from before the rollout, oldest first
    replay: Any = None  # (B, ...), rollouts up to this one, see `training.Algorithm`


def rollout(
    config: Config,
    env: Any,
    network: Any,
    params: Any,
    state: RolloutState,
    normalizer: Normalizer,
    axis_name: str | None = None,
) -> tuple[RolloutState, Normalizer, Rollout]:
    """Plays T steps of every environment.

    Args:
      network: a Flax module with `init_cache` and `step`, as `ActorCriticTransformer` has them.
      params: of the network that acts, fixed over the rollout.
      normalizer: the running statistics, which the rollout's observations and rewards join.
      axis_name: of the devices.

    Returns:
      the state after the steps, the statistics, and the trajectories.
    """
    with jax.named_scope("agent"):
        caches = network.apply(params, state.memory, method="init_cache")
    step = partial(take_step, config, env, network, params, axis_name)
    steps = jnp.arange(config["NUM_STEPS"], dtype=jnp.int32)
    (state, caches, normalizer), trajectory = jax.lax.scan(step, (state, caches, normalizer), steps)
    last_obs = network_input(normalizer, state.obs)
    with jax.named_scope("bootstrap"):
        _, last_value, _, _ = network.apply(
            params, last_obs, caches, config["NUM_STEPS"], state.reach, method="step"
        )
    last_active = active_rows(env, state.env_state)
    collected = Rollout(trajectory, last_value, last_active, state.memory)
    return state._replace(memory=next_memory(collected)), normalizer, collected


def take_step(
    config: Config,
    env: Any,
    network: Any,
    params: Any,
    axis_name: str | None,
    carry: tuple[RolloutState, Any, Normalizer],
    t: jax.Array,
) -> tuple[tuple[RolloutState, Any, Normalizer], Transition]:
    """Takes step t () of the rollout in every environment.

    Args:
      carry: the state, the network's caches, and the statistics.
    """
    state, caches, normalizer = carry
    env_keys, action_keys, step_keys = split_keys(state.env_keys, 3)

    # SELECT ACTION
    obs = network_input(normalizer, state.obs)
    with jax.named_scope("agent"):
        policy, value, caches, layer_inputs = network.apply(
            params, obs, caches, t, state.reach, method="step"
        )
        action = sample_per_row(policy, action_keys)
        log_prob = policy.log_prob(action)

    # STEP ENV
    active = active_rows(env, state.env_state)
    next_obs, env_state, reward, env_done, info = env.step(step_keys, state.env_state, action)
    done, terminated, truncated = episode_boundaries(config, env_done, info)

    # UPDATE STATISTICS
    next_active = active_rows(env, env_state)
    normalizer = update_obs_statistics(env, normalizer, next_obs, next_active, axis_name)
    discounted_return, normalizer, reward = update_reward_statistics(
        config["GAMMA"], state.discounted_return, normalizer, reward, done, active, axis_name
    )

    # EVALUATE FINAL OBSERVATION, as step t + 1 of the old episode
    next_reach = jnp.minimum(state.reach + 1, config["WINDOW_MEM"])
    final_value = jnp.zeros_like(value)
    if env.can_truncate:
        final_obs = network_input(normalizer, info["final_observation"])
        final_value = value_where(truncated, network, params, final_obs, caches, t + 1, next_reach)

    with jax.named_scope("storage"):
        stored = pack_obs(obs, obs_space(env))
    # One array, since Craftax's 67 would be as many kernels in every step on a GPU.
    metrics = jnp.stack([info[name] for name in env.episode_metrics], axis=-1)
    transition = Transition(
        obs=stored,
        action=action,
        log_prob=log_prob,
        value=value,
        reward=reward,
        done=done,
        terminated=terminated,
        truncated=truncated,
        final_value=final_value,
        layer_inputs=layer_inputs,
        reach=state.reach,
        active=active,
        returned_episode=info.get("returned_episode", env_done),
        episode_metrics=metrics.astype(jnp.float32),
    )
    reach = jnp.where(info.get("memory_boundary", env_done), 0, next_reach)
    state = RolloutState(env_state, next_obs, discounted_return, state.memory, reach, env_keys)
    return (state, caches, normalizer), transition


def episode_boundaries(
    config: Config, done: jax.Array, info: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns where episodes end for the learner, each (B,): done, terminated, truncated.

    These are the environment's own ends; termination wins over truncation. With TRIAL_CREDIT, in an
    environment of trials, only the trial's end counts, always as termination: an episode goes on in
    the next one, as in RL^2 (Duan et al. 2016, arXiv 1611.02779), so that finding something out is
    worth what it brings later in the trial.
    """
    if "memory_boundary" in info and config["TRIAL_CREDIT"]:
        boundary = info["memory_boundary"]
        return boundary, boundary, jnp.zeros_like(boundary)
    truncated = info["truncated"] & ~info["terminated"]
    return done, info["terminated"], truncated


@jax.named_scope("statistics")
def update_obs_statistics(
    env: Any,
    normalizer: Normalizer,
    obs: jax.Array,
    active: jax.Array | None,
    axis_name: str | None,
) -> Normalizer:
    """Updates the statistics of observations (B, obs_size), but for their binary columns."""
    return update_normalizer(normalizer, "obs", obs[:, env.num_binary :], active, axis_name)


@jax.named_scope("statistics")
def update_reward_statistics(
    gamma: float,
    discounted_return: jax.Array,
    normalizer: Normalizer,
    reward: jax.Array,
    done: jax.Array,
    active: jax.Array | None,
    axis_name: str | None,
) -> tuple[jax.Array, Normalizer, jax.Array]:
    """Updates the statistics of discounted returns, and scales the rewards by them.

    Gym's NormalizeReward and PureJaxRL forget the return before they add the last reward of an
    episode, which the next episode then inherits; here it is forgotten after that.

    Returns:
      the discounted return (B,) that the next step continues, the statistics, the rewards (B,).
    """
    if "reward" not in normalizer:
        return discounted_return, normalizer, reward
    discounted_return = gamma * discounted_return + reward
    normalizer = update_normalizer(normalizer, "reward", discounted_return, active, axis_name)
    reward = scale_reward(normalizer["reward"], reward)
    return discounted_return * (1 - done), normalizer, reward


@jax.named_scope("bootstrap")
def value_where(
    mask: jax.Array,
    network: Any,
    params: Any,
    obs: jax.Array,
    caches: Any,
    t: jax.Array,
    reach: jax.Array,
) -> jax.Array:
    """Returns the values (B,) of observations where `mask` (B,) is true, 0 elsewhere.

    The network runs only in steps in which the mask is true anywhere.
    """

    def value() -> jax.Array:
        return jnp.where(mask, network.apply(params, obs, caches, t, reach, method="step")[1], 0)

    return jax.lax.cond(any_across_vmap(mask), value, lambda: jnp.zeros(mask.shape, jnp.float32))


def next_memory(collected: Rollout) -> jax.Array:
    """Returns (B, M, L, E), the memory after a rollout: the newest M layer inputs."""
    recent = swap_time_and_batch(collected.trajectory.layer_inputs)  # (B, T, L, E)
    return jnp.concatenate([collected.memory, recent], axis=1)[:, recent.shape[1] :]


def init_rollout(
    config: Config, env: Any, envs_key: jax.Array, first_row: jax.Array | int
) -> RolloutState:
    """Resets every environment, with an empty memory.

    Args:
      envs_key: of the run, the same on every device.
      first_row: the global index of this device's first row, from which the rows' streams follow.
    """
    rows = first_row + jnp.arange(env.num_rows, dtype=jnp.int32)
    env_keys = jax.vmap(jax.random.fold_in, (None, 0))(envs_key, rows)
    env_keys, reset_keys = split_keys(env_keys, 2)
    obs, env_state = env.reset(reset_keys)
    return RolloutState(
        strongly_typed(env_state),
        obs,
        discounted_return=jnp.zeros(env.num_rows, jnp.float32),
        memory=empty_memory(config, env.num_rows),
        reach=jnp.zeros(env.num_rows, jnp.int32),
        env_keys=env_keys,
    )


def strongly_typed(env_state: Any) -> Any:
    """A reset's state as steps leave it, nothing weakly typed: what takes it is compiled once."""
    return jax.tree.map(lambda x: jnp.array(x, x.dtype), env_state)


def empty_memory(config: Config, num_rows: int) -> jax.Array:
    """Returns (B, M, L, E) zeros, the memory before the first step of a run."""
    shape = (num_rows, config["WINDOW_MEM"], config["num_layers"], config["EMBED_SIZE"])
    return jnp.zeros(shape, jnp.float32)


def window_memory(config: Config, collected: Rollout) -> jax.Array:
    """Returns (B, M+T-W, L, E), layer inputs of the steps -M .. T-W-1, W = WINDOW_GRAD."""
    before_last_window = config["NUM_STEPS"] - config["WINDOW_GRAD"]
    recent = swap_time_and_batch(collected.trajectory.layer_inputs[:before_last_window])
    return jnp.concatenate([collected.memory, recent], axis=1)


@jax.named_scope("keys")
def split_keys(keys: jax.Array, num: int) -> tuple[jax.Array, ...]:
    """Splits every key of (B,) into `num` of them: a tuple of `num` arrays (B,)."""
    split = jax.vmap(lambda key: jax.random.split(key, num))(keys)
    return tuple(split[:, i] for i in range(num))


def active_rows(env: Any, env_state: Any) -> jax.Array | None:
    """Returns (B,) bool, which agents have a part in the step from this state; None: all have."""
    return env.agents_active(env_state) if env.num_agents is not None else None


def swap_time_and_batch(tree: Any) -> Any:
    """Transposes (T, B, ...) to (B, T, ...)."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)
