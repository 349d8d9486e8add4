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


class Memory(NamedTuple):
    """What the agent carries from rollout to rollout."""

    layer_inputs: jax.Array  # (B, M, L, E), oldest first
    reach: jax.Array  # (B,) int32, how many of the newest are still valid, 0..M


class RolloutState(NamedTuple):
    """Where the environments stand, everything by row."""

    env_state: Any
    obs: jax.Array  # (B, obs_size), not normalised
    discounted_return: jax.Array  # (B,), what NORMALIZE_REWARD looks at
    memory: Memory
    env_keys: jax.Array  # (B,), each environment's random stream, its actions included


class Transition(NamedTuple):
    """One step of B environments; stacked over a rollout, leaves are (T, B, ...)."""

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
    returned_episode: jax.Array  # (B,), whether the episode's metrics are to be counted
    episode_metrics: Any  # {name: (B,)}, where an episode returned; while scanned: `together`


class Rollout(NamedTuple):
    """What an algorithm learns from."""

    trajectory: Transition  # leaves (T, B, ...)
    last_value: jax.Array  # (B,), of the last observation, given the memory of that very step
    last_active: jax.Array | None  # (B,), whether the step from the last observation would count
    memory: jax.Array  # (B, M, L, E), layer inputs from before the rollout, oldest first
    replay: Any = None  # (B, ...), earlier rollouts, see `training.Algorithm`


class Carry(NamedTuple):
    """What a step of the rollout hands to the next."""

    env_state: Any
    obs: jax.Array  # (B, obs_size), not normalised
    discounted_return: jax.Array  # (B,)
    caches: Any  # the memory as the network's step form reads it
    reach: jax.Array  # (B,) int32
    env_keys: jax.Array  # (B,)
    normalizer: Normalizer


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
        caches = network.apply(params, state.memory.layer_inputs, method="init_cache")
    carry = Carry(
        env_state=state.env_state,
        obs=state.obs,
        discounted_return=state.discounted_return,
        caches=caches,
        reach=state.memory.reach,
        env_keys=state.env_keys,
        normalizer=normalizer,
    )
    step = partial(take_step, config, env, network, params, axis_name)
    carry, trajectory = jax.lax.scan(step, carry, jnp.arange(config["NUM_STEPS"]))
    metrics = apart(trajectory.episode_metrics)
    metrics = {name: metrics[name] for name in env.episode_metrics}
    trajectory = trajectory._replace(episode_metrics=metrics)
    last_obs = network_input(carry.normalizer, carry.obs)
    with jax.named_scope("bootstrap"):
        _, last_value, _, _ = network.apply(
            params, last_obs, carry.caches, config["NUM_STEPS"], carry.reach, method="step"
        )
    last_active = active_rows(env, carry.env_state)
    collected = Rollout(trajectory, last_value, last_active, state.memory.layer_inputs)
    return next_rollout_state(carry, collected), carry.normalizer, collected


def take_step(
    config: Config,
    env: Any,
    network: Any,
    params: Any,
    axis_name: str | None,
    carry: Carry,
    t: jax.Array,
) -> tuple[Carry, Transition]:
    """Takes step t () of the rollout in every environment."""
    env_keys, action_keys, step_keys = split_keys(carry.env_keys, 3)

    # SELECT ACTION
    obs = network_input(carry.normalizer, carry.obs)
    with jax.named_scope("agent"):
        policy, value, caches, layer_inputs = network.apply(
            params, obs, carry.caches, t, carry.reach, method="step"
        )
        action = sample_per_row(policy, action_keys)
        log_prob = policy.log_prob(action)

    # STEP ENV
    active = active_rows(env, carry.env_state)
    next_obs, env_state, reward, done, info = env.step(step_keys, carry.env_state, action)
    returned = info.get("returned_episode", done)
    boundary = info.get("memory_boundary", done)
    done, terminated, truncated = episode_boundaries(config, done, info)

    # UPDATE STATISTICS
    next_active = active_rows(env, env_state)
    normalizer = update_obs_statistics(env, carry.normalizer, next_obs, next_active, axis_name)
    discounted_return, normalizer, reward = update_reward_statistics(
        config["GAMMA"], carry.discounted_return, normalizer, reward, done, active, axis_name
    )

    # EVALUATE FINAL OBSERVATION, as step t + 1 of the old episode
    next_reach = jnp.minimum(carry.reach + 1, config["WINDOW_MEM"])
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
        reach=carry.reach,
        active=active,
        returned_episode=returned,
        episode_metrics=together({name: info[name] for name in env.episode_metrics}),
    )
    reach = jnp.where(boundary, 0, next_reach)
    carry = Carry(env_state, next_obs, discounted_return, caches, reach, env_keys, normalizer)
    return carry, transition


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


def next_rollout_state(carry: Carry, collected: Rollout) -> RolloutState:
    """Where the environments stand after a rollout, the memory with what its steps saw."""
    seen = swap_time_and_batch(collected.trajectory.layer_inputs)  # (B, T, L, E)
    layer_inputs = jnp.concatenate([collected.memory, seen], axis=1)
    memory = Memory(layer_inputs[:, seen.shape[1] :], carry.reach)
    return RolloutState(carry.env_state, carry.obs, carry.discounted_return, memory, carry.env_keys)


def init_rollout(
    config: Config, env: Any, envs_key: jax.Array, first_row: jax.Array | int
) -> RolloutState:
    """Every environment's first observation, and an empty memory.

    Args:
      envs_key: of the run, the same on every device.
      first_row: the global index of this device's first row, from which the rows' streams follow.
    """
    rows = first_row + jnp.arange(env.num_rows)
    env_keys = jax.vmap(jax.random.fold_in, (None, 0))(envs_key, rows)
    env_keys, reset_keys = split_keys(env_keys, 2)
    obs, env_state = env.reset(reset_keys)
    memory = empty_memory(config, env.num_rows)
    nothing = jnp.zeros(env.num_rows)
    return RolloutState(strongly_typed(env_state), obs, nothing, memory, env_keys)


def strongly_typed(env_state: Any) -> Any:
    """A reset's state as steps leave it, nothing weakly typed: what takes it is compiled once."""
    return jax.tree.map(lambda x: jnp.array(x, x.dtype), env_state)


def empty_memory(config: Config, num_rows: int) -> Memory:
    """The memory before the first step of a run."""
    shape = (num_rows, config["WINDOW_MEM"], config["num_layers"], config["EMBED_SIZE"])
    return Memory(jnp.zeros(shape), jnp.zeros(num_rows, jnp.int32))


def window_memory(config: Config, collected: Rollout) -> jax.Array:
    """Returns (B, M+T-W, L, E), layer inputs of the steps -M .. T-W-1, W = WINDOW_GRAD."""
    before_last_window = config["NUM_STEPS"] - config["WINDOW_GRAD"]
    recent = swap_time_and_batch(collected.trajectory.layer_inputs[:before_last_window])
    return jnp.concatenate([collected.memory, recent], axis=1)


@jax.named_scope("keys")
def split_keys(keys: jax.Array, num: int) -> tuple[jax.Array, ...]:
    """Splits every key of (B,) into `num` of them: a tuple of `num` arrays (B,)."""
    pieces = jax.vmap(lambda key: jax.random.split(key, num))(keys)
    return tuple(pieces[:, i] for i in range(num))


def together(arrays: dict[str, jax.Array]) -> dict[tuple[str, ...], jax.Array]:
    """Arrays of one shape and type as one, {their names: (..., their number)}.

    A scan then stores them at once: Craftax's 67 achievements would be as many kernels in every
    step on a GPU.
    """
    alike: dict[Any, list[str]] = {}
    for name, x in arrays.items():
        alike.setdefault((jnp.shape(x), jnp.result_type(x)), []).append(name)
    return {
        tuple(names): jnp.stack([arrays[name] for name in names], axis=-1)
        for names in alike.values()
    }


def apart(stacked: dict[tuple[str, ...], jax.Array]) -> dict[str, jax.Array]:
    """Undoes `together`."""
    return {name: x[..., i] for names, x in stacked.items() for i, name in enumerate(names)}


def active_rows(env: Any, env_state: Any) -> jax.Array | None:
    """(B,) bool, which rows the step from this state counts for; None where it does for all."""
    return env.agents_active(env_state) if env.num_agents is not None else None


def swap_time_and_batch(tree: Any) -> Any:
    """(T, B, ...) to (B, T, ...)."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)
