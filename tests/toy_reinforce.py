"""REINFORCE with a baseline on the same network: a custom algorithm in one file.

Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement
learning", equation 11 with a learnt baseline. Returns are cut off at the rollout's end.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from trxl.config import Key, with_shared
from trxl.rollout import swap_time_and_batch, window_memory
from trxl.training import (
    Algorithm,
    fresh_train_state,
    gradient_step,
    learning_rate,
    mean_metrics,
    minibatch_rows,
)

from transformerXL import make_network
from wrappers import make_env

OPTIMIZER = optax.scale_by_adam()

KEYS = with_shared({"BASELINE_COEF": Key(0.5, "weight of the baseline's loss", low=0, traced=True)})


class Batch(NamedTuple):
    obs: jax.Array  # (B, T, obs_size), stored
    action: jax.Array  # (B, T)
    returns: jax.Array  # (B, T)
    reach: jax.Array  # (B, T)
    memory: jax.Array  # (B, M+T-W, L, E)


def init(config, params):
    return fresh_train_state(params, OPTIMIZER, algorithm_state=jnp.zeros(()))


def update(config, network, train_state, collected, key, axis_name):
    trajectory = collected.trajectory

    def discount(later, step):
        reward, done = step
        returns = reward + config["GAMMA"] * (1 - done) * later
        return returns, returns

    steps = trajectory.reward, trajectory.done
    _, returns = jax.lax.scan(discount, jnp.zeros_like(trajectory.reward[0]), steps, reverse=True)
    fields = trajectory.obs, trajectory.action, returns, trajectory.reach
    batch = Batch(*map(swap_time_and_batch, fields), window_memory(config, collected))
    (rows,) = minibatch_rows(key, len(batch.reach), 1, config["NUM_MINIBATCHES"])
    loss = partial(reinforce_loss, network, config["WINDOW_GRAD"], config["BASELINE_COEF"])
    rate = learning_rate(config, train_state.updates)

    def step(train_state, rows):
        minibatch = jax.tree.map(lambda x: x[rows], batch)
        of_minibatch = partial(loss, batch=minibatch)
        return gradient_step(of_minibatch, OPTIMIZER, rate, train_state, axis_name)

    train_state, metrics = jax.lax.scan(step, train_state, rows)
    metrics = mean_metrics(metrics, rate, train_state.params)
    best = jnp.maximum(train_state.algorithm_state, returns.max())
    return train_state._replace(algorithm_state=best), metrics | {"best_return": best}


def reinforce_loss(network, window_grad, baseline_coef, params, batch):
    policy, value = network.apply(
        params, batch.obs, batch.memory, batch.reach, window_grad, method="unroll_windows"
    )
    error = batch.returns - value
    weight = jax.lax.stop_gradient(error)
    policy_loss = -jnp.mean(weight * policy.log_prob(batch.action))
    baseline_loss = 0.5 * jnp.mean(error**2)
    loss = policy_loss + baseline_coef * baseline_loss
    return loss, {"policy_loss": policy_loss, "baseline_loss": baseline_loss}


REINFORCE = Algorithm(
    "REINFORCE", KEYS, make_env, make_network, init, update, ("policy_loss", "param_norm")
)
