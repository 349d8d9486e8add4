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
    memory: Any  # (B, M, L, E), layer inputs, oldest first; during a rollout the network's caches
    reach: jax.Array  # (B,) int32, how many of the newest entries of the memory are valid, 0..M
    env_keys: jax.Array  # (B,), each environment's random stream, its actions included


class Transition(NamedTuple):
    """A step of B environments; stacked over a rollout, leaves are (T, B, ...)."""

    obs: StoredObs  # (B, obs_size)
    action: jax.Array  # (B,), (B, choices) or (B, action_size)
    log_prob: jax.Array  # (B,)
    value: jax.Array  # (B,)
    reward: jax.Array  # (B,)
    done: jax.Array  # (B,), see `episode_boundaries`
    terminated: jax.Array  # (B,)
    truncated: jax.Array  # (B,), and not terminated
    final_value: jax.Array  # (B,), of the final observation; means something where truncated
    layer_inputs: jax.Array  # (B, L, E), what each layer saw
    reach: jax.Array  # (B,) int32, how many steps before this one it attends to
    active: jax.Array | None  # (B,), whether the step counts; None where all do
    returned_episode: jax.Array  # (B,), whether an episode ended whose metrics count
    episode_metrics: jax.Array  # (B, K), the K metrics of the environment


class Rollout(NamedTuple):
    """A rollout, from which an algorithm learns."""

    trajectory: Transition  # leaves (T, B, ...)
    last_value: jax.Array  # (B,), of the last observation, given the memory of that very step
    last_active: jax.Array | None  # (B,), whether the step from the last observation would count
    memory: jax.Array  # (B, M, L, E), layer inputs from before the rollout, oldest first
    replay: Any = None  # (B, ...), earlier rollouts, see `training.Algorithm`


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
    memory = state.memory
    with jax.named_scope("agent"):
        caches = network.apply(params, memory, method="init_cache")
    step = partial(take_step, config, env, network, params, axis_name)
    carry = state._replace(memory=caches), normalizer
    (state, normalizer), trajectory = jax.lax.scan(step, carry, jnp.arange(config["NUM_STEPS"]))
    last_obs = network_input(normalizer, state.obs)
    with jax.named_scope("bootstrap"):
        _, last_value, _, _ = network.apply(
            params, last_obs, state.memory, config["NUM_STEPS"], state.reach, method="step"
        )
    collected = Rollout(trajectory, last_value, active_rows(env, state.env_state), memory)
    return state._replace(memory=next_memory(collected)), normalizer, collected


def take_step(
    config: Config,
    env: Any,
    network: Any,
    params: Any,
    axis_name: str | None,
    carry: tuple[RolloutState, Normalizer],
    t: jax.Array,
) -> tuple[tuple[RolloutState, Normalizer], Transition]:
    """Takes step t () of the rollout in every environment."""
    state, normalizer = carry
    env_keys, action_keys, step_keys = split_keys(state.env_keys, 3)

    # SELECT ACTION
    obs = network_input(normalizer, state.obs)
    with jax.named_scope("agent"):
        policy, value, caches, layer_inputs = network.apply(
            params, obs, state.memory, t, state.reach, method="step"
        )
        action = sample_per_row(policy, action_keys)
        log_prob = policy.log_prob(action)

    # STEP ENV
    active = active_rows(env, state.env_state)
    next_obs, env_state, reward, done, info = env.step(step_keys, state.env_state, action)
    returned = info.get("returned_episode", done)
    boundary = info.get("memory_boundary", done)
    done, terminated, truncated = episode_boundaries(config, done, info)

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
        final_value = value_where(
            network, params, truncated, final_obs, caches, t + 1, next_reach, final_value
        )

    with jax.named_scope("storage"):
        stored = pack_obs(obs, obs_space(env))
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
        returned_episode=returned,
        # One array, since Craftax's 67 would be as many kernels in every step on a GPU.
        episode_metrics=jnp.stack([info[name] for name in env.episode_metrics], axis=-1),
    )
    reach = jnp.where(boundary, 0, next_reach)
    state = RolloutState(env_state, next_obs, discounted_return, caches, reach, env_keys)
    return (state, normalizer), transition


def episode_boundaries(
    config: Config, done: jax.Array, info: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns where episodes end for the learner, each (B,): done, terminated, truncated.

    They are the environment's own ends, in a trial of several episodes that of the trial alone. A
    step that is terminated is not truncated.

    An episode of a trial goes on in the next one, as in RL^2 (Duan et al. 2016, arXiv 1611.02779):
    what is found out in the first is worth what it brings in the later ones. How the last one ends,
    by a time limit say, makes no difference to what comes after it, which is nothing.
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
    network: Any,
    params: Any,
    mask: jax.Array,
    obs: jax.Array,
    caches: Any,
    t: jax.Array,
    reach: jax.Array,
    otherwise: jax.Array,
) -> jax.Array:
    """Returns the values (B,) of observations in steps in which `mask` (B,) is true anywhere.

    In the other steps the network does not run, and they are `otherwise`.
    """

    def value() -> jax.Array:
        return network.apply(params, obs, caches, t, reach, method="step")[1]

    return jax.lax.cond(any_across_vmap(mask), value, lambda: otherwise)


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
    rows = first_row + jnp.arange(env.num_rows)
    env_keys = jax.vmap(jax.random.fold_in, (None, 0))(envs_key, rows)
    env_keys, reset_keys = split_keys(env_keys, 2)
    obs, env_state = env.reset(reset_keys)
    return RolloutState(
        strongly_typed(env_state),
        obs,
        discounted_return=jnp.zeros(env.num_rows),
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
    return jnp.zeros(shape)


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
    """(B,) bool, which rows the step from this state counts for; None where it does for all."""
    return env.agents_active(env_state) if env.num_agents is not None else None


def swap_time_and_batch(tree: Any) -> Any:
    """(T, B, ...) to (B, T, ...)."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)
