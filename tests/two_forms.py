"""Rollouts with random parameters, and how far the window form deviates from them."""

from pathlib import Path

import jax
import jax.numpy as jnp
from support import SMALL, random_params

from trxl.spaces import obs_space
from trxl.training import collect, make_init_and_update

import trainer_PPO_trXL as trainer
from trainer_PPO_trXL import PPO
from transformerXL import make_network
from wrappers import make_env

# Several of these episodes, of four steps, end inside every window.
CHAIN = {**SMALL, "ENV_NAME": "MemoryChain-bsuite", "ENV_KWARGS": {"memory_length": 3}}


def setup(config):
    """Returns checked config, environment, network, and a first state with random parameters."""
    config = PPO.check(config)
    env = make_env(config, config["NUM_ENVS"])
    network = make_network(config, env.action_space, obs_space(env))
    init, _ = make_init_and_update(config, PPO)
    state = jax.jit(init)(jax.random.key(0))
    params = random_params(state.train_state.params)
    state = state._replace(train_state=state.train_state._replace(params=params))
    return config, env, network, state


WIDE = {"NETWORK": "wide", "encoder_features": 16, "NORMALIZE_VALUE": True}
GRIDDED = {
    **SMALL,
    **WIDE,
    "ENV_NAME": f"{Path(__file__).with_name('toys.py')}:Gridded",
    "PREV_ACTION_REWARD": True,
}


def two_rollouts(config):
    """Returns config, network, first state and two successive rollouts."""
    config, env, network, state = setup(config)
    roll = jax.jit(lambda state: collect(config, env, network, PPO, state))
    between, first = roll(state)
    _, second = roll(between)
    return config, network, state, (first, second)


def largest_ratio_error(chain):
    """Returns the largest error of ratios and values in the second update's first minibatch."""
    config, network, state, (_, second) = chain
    assert second.trajectory.done.sum() > 3 * config["NUM_ENVS"]
    zeros = jnp.zeros_like(second.trajectory.value)
    batch = trainer.make_batch(config, second, zeros)
    batch = jax.tree.map(lambda x: x[: len(x) // config["NUM_MINIBATCHES"]], batch)
    policy, value = network.apply(
        state.train_state.params,
        *(batch.obs, batch.memory, batch.reach, config["WINDOW_GRAD"]),
        method="unroll_windows",
    )
    ratio = jnp.exp(policy.log_prob(batch.action) - batch.log_prob)
    return max(float(jnp.abs(ratio - 1).max()), float(jnp.abs(value - batch.value).max()))
