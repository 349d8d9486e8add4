"""Rollout: T steps of B environments with any algorithm's network.

Letters: B environments of one device, times agents; T = NUM_STEPS, M = WINDOW_MEM, L layers,
E = EMBED_SIZE.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trxl.collectives import any_across_vmap
from trxl.distributions import sample_per_row
from trxl.replay import Replay
from trxl.spaces import StoredObs, obs_space, pack_obs
from trxl.statistics import Normalizer, network_input, scale_reward, update_normalizer

Config = dict[str, Any]
Metrics = dict[str, jax.Array]


class RolloutState(NamedTuple):
    """State of the environments between two steps, and the memory before the rollout."""

    env_state: Any
    obs: jax.Array  # (B, obs_size) float32, not normalised
    discounted_return: jax.Array  # (B,), of the episode so far, for NORMALIZE_REWARD
    memory: jax.Array  # (B, M, L, E), layer inputs before the rollout, oldest first
    reach: jax.Array  # (B,) int32, number of previous steps to attend to, 0..M
    env_keys: jax.Array  # (B,), random streams of environments and actions


class Transition(NamedTuple):
    """Step of B environments; stacked over a rollout, leaves are (T, B, ...)."""

    obs: StoredObs  # (B, obs_size), as the network reads it, packed
    action: jax.Array  # (B,), (B, choices) or (B, action_size)
    log_prob: jax.Array  # (B,)
    value: jax.Array  # (B,)
    reward: jax.Array  # (B,)
    done: jax.Array  # (B,) bool, see `episode_boundaries`
    terminated: jax.Array  # (B,) bool
    truncated: jax.Array  # (B,) bool, ended by a limit and not terminated
    final_value: jax.Array  # (B,), of the final observation; valid where truncated
    layer_inputs: jax.Array  # (B, L, E), the memory entry: layer inputs, or a GRU's carries
    reach: jax.Array  # (B,) int32, number of previous steps attended to
    active: jax.Array | None  # (B,) bool, whether the agent takes part; None: all
    returned_episode: jax.Array  # (B,) bool, whether `episode_metrics` are valid
    episode_metrics: jax.Array  # (B, number of metrics), in the order of `env.episode_metrics`


class Rollout(NamedTuple):
    """Rollout that an algorithm learns from."""

    trajectory: Transition  # leaves (T, B, ...)
    last_value: jax.Array  # (B,), of the observation after step T - 1
    last_active: jax.Array | None  # (B,) bool, `active` after step T - 1
    memory: jax.Array  # (B, M, L, E), layer inputs before the rollout, oldest first
    replay: Replay | None = None  # up to this rollout, see `training.Algorithm`


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
      network: Flax module with `init_cache` and `step` of `ActorCriticTransformer`.
      params: parameters of the policy that acts, constant during the rollout.
      normalizer: running statistics of observations and rewards.
      axis_name: axis of devices; None for one device.

    Returns:
      the new state, the updated statistics, and the rollout.
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
    """Takes step t () int32 of the rollout in every environment.

    Args:
      carry: state, caches of the network, and statistics.

    Returns:
      the new carry, and the transition.
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
    if config["MIRRORS"]:
        action, log_prob = env.as_played(action, log_prob)

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

    # EVALUATE FINAL OBSERVATION, as step t + 1 of the finished episode
    next_reach = jnp.minimum(state.reach + 1, config["WINDOW_MEM"])
    final_value = jnp.zeros_like(value)
    if env.can_truncate:
        final_obs = network_input(normalizer, info["final_observation"])
        final_value = value_where(truncated, network, params, final_obs, caches, t + 1, next_reach)

    with jax.named_scope("storage"):
        stored = pack_obs(obs, obs_space(env))
    # One array, since each metric (Craftax has 67) would be a GPU kernel per step.
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
    """Returns done, terminated and truncated for the learner, (B,) bool each.

    An episode that is both terminated and truncated counts as terminated. With TRIAL_CREDIT, in an
    environment of trials, only a trial's end counts, as a termination. Returns then continue in the
    next episode, which rewards exploration, as in RL^2 (Duan et al. 2016, arXiv 1611.02779).
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
    """Updates the statistics of observations (B, obs_size), except for binary entries."""
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
    """Updates the statistics of discounted returns, and scales rewards by them.

    The return is reset after an episode's last reward is added. Gym's NormalizeReward and PureJaxRL
    reset it before, so that reward leaks into the next episode.

    Returns:
      the discounted returns (B,) after the step, the statistics, and the scaled rewards (B,).
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
    """Returns the values (B,) of observations (B, obs_size) where `mask` (B,) is true, else 0.

    The network runs only if any entry of the mask is true.
    """

    def value() -> jax.Array:
        return jnp.where(mask, network.apply(params, obs, caches, t, reach, method="step")[1], 0)

    return jax.lax.cond(any_across_vmap(mask), value, lambda: jnp.zeros(mask.shape, jnp.float32))


def next_memory(collected: Rollout) -> jax.Array:
    """Returns the memory after a rollout, (B, M, L, E): the newest M entries."""
    recent = swap_time_and_batch(collected.trajectory.layer_inputs)  # (B, T, L, E)
    return jnp.concatenate([collected.memory, recent], axis=1)[:, recent.shape[1] :]


def init_rollout(
    config: Config, env: Any, envs_key: jax.Array, first_row: jax.Array | int
) -> RolloutState:
    """Resets every environment, with an empty memory.

    Args:
      envs_key: the same on every device.
      first_row: global index of this device's first row. Each row's random stream follows from its
        global index.
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
    """Removes weak types from a reset's state, so that functions of the state compile once."""
    return jax.tree.map(lambda x: jnp.array(x, x.dtype), env_state)


def empty_memory(config: Config, num_rows: int) -> jax.Array:
    """Returns the memory before the first step of a run, (B, M, L, E) zeros."""
    shape = (num_rows, config["WINDOW_MEM"], config["num_layers"], config["EMBED_SIZE"])
    return jnp.zeros(shape, jnp.float32)


def window_memory(config: Config, collected: Rollout) -> jax.Array:
    """Returns the memory entries (B, M+T-W, L, E) of steps -M .. T-W-1, W = WINDOW_GRAD."""
    before_last_window = config["NUM_STEPS"] - config["WINDOW_GRAD"]
    recent = swap_time_and_batch(collected.trajectory.layer_inputs[:before_last_window])
    return jnp.concatenate([collected.memory, recent], axis=1)


@jax.named_scope("keys")
def split_keys(keys: jax.Array, num: int) -> tuple[jax.Array, ...]:
    """Splits keys (B,) into a tuple of `num` arrays (B,)."""
    split = jax.vmap(lambda key: jax.random.split(key, num))(keys)
    return tuple(split[:, i] for i in range(num))


def active_rows(env: Any, env_state: Any) -> jax.Array | None:
    """Returns (B,) bool, which agents take part in the next step; None: all."""
    return env.agents_active(env_state) if env.num_agents is not None else None


def swap_time_and_batch(tree: Any) -> Any:
    """Transposes (T, B, ...) to (B, T, ...)."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)
