"""Training with `jax.pmap`: the result does not depend on how many devices did it."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import QUICK

import trainer_PPO_trXL as trainer
from config import check_config
from program import Program

# Episodes of four steps, and a learning rate at which wrong gradients show.
CONFIG = {
    **QUICK,
    "ENV_KWARGS": {"memory_length": 3},
    "NUM_ENVS": 16,
    "NUM_MINIBATCHES": 1,
    "LR": 0.01,
    "TOTAL_TIMESTEPS": 4 * 16 * 16,
}
TOLERANCE = 1e-4


def trained(num_devices):
    """Parameters, metrics and last observations of four updates; leaves (devices, ...), NumPy.

    With `num_devices` None the way of `train_PPO_trXL.py`, without `jax.pmap`.
    """
    key = jax.random.key(0)
    if num_devices is None:
        out = jax.tree.map(lambda x: x[None], jax.jit(results_of(trainer.make_train(CONFIG)))(key))
    else:
        train = make_train_on(num_devices)
        run = jax.pmap(results_of(train), "devices", devices=jax.devices()[:num_devices])
        out = run(jnp.repeat(key, num_devices))
    return jax.device_get(out)


def make_train_on(num_devices):
    if num_devices == jax.device_count():
        return trainer.make_train(CONFIG, "devices")
    init, update = trainer.make_init_and_update(CONFIG, "devices", num_devices)

    def train(key):
        state, metrics = jax.lax.scan(lambda state, _: update(state), init(key), None, 4)
        return {"runner_state": state, "metrics": metrics}

    return train


def results_of(train):
    def run(key):
        out = train(key)
        state = out["runner_state"]
        return state.train_state.params, out["metrics"], state.obs

    return run


@cache
def without_pmap():
    return trained(None)


def largest_difference(params, others):
    """Of the parameters of each first device."""
    differences = jax.tree.map(lambda x, y: np.abs(x[0] - y[0]).max(), params, others)
    return max(jax.tree.leaves(differences))


def assert_alike(tree):
    """Bit for bit on all devices."""
    for leaf in jax.tree.leaves(tree):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))


@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_any_number_of_devices_trains_the_same(num_devices):
    params, metrics, obs = trained(num_devices)
    assert_alike((params, metrics))
    expected_params, expected_metrics, expected_obs = without_pmap()
    assert largest_difference(params, expected_params) < TOLERANCE
    for name, values in expected_metrics.items():
        np.testing.assert_allclose(metrics[name][0], values[0], rtol=1e-4, atol=1e-4, err_msg=name)
    # Every environment did the same, action for action.
    np.testing.assert_array_equal(obs.reshape(expected_obs.shape), expected_obs)


@pytest.mark.parametrize("of_gradients", [True, False], ids=["gradients", "advantages"])
@pytest.mark.parametrize("summed", [True, False], ids=["summed", "not reduced"])
def test_a_wrong_reduction_would_be_seen(of_gradients, summed, monkeypatch):
    right = trainer.mean_over_devices

    def reduce(tree, axis_name):
        if isinstance(tree, tuple) != of_gradients:  # (gradients, metrics), or an array
            return right(tree, axis_name)
        return jax.lax.psum(tree, axis_name) if summed else tree

    monkeypatch.setattr(trainer, "mean_over_devices", reduce)
    assert largest_difference(trained(2)[0], without_pmap()[0]) > 100 * TOLERANCE


def test_with_several_minibatches_devices_stay_equal_and_environments_apart():
    changes = {"NUM_ENVS": 32, "NUM_MINIBATCHES": 2, "TOTAL_TIMESTEPS": 4 * 32 * 16}
    config = check_config({**CONFIG, **changes}, 8)
    program = Program(config, 8)
    state = program.init()
    update = program.compile(state)
    for _ in range(3):
        state, metrics = update(state)
    key = jax.random.key_data(state.permutation_key)
    assert_alike(jax.device_get((state.train_state, key, metrics)))
    assert metrics["episodes"][0] == 32 * 16 / 4
    streams = jax.random.key_data(state.env_keys).reshape(32, -1)
    assert len(np.unique(streams, axis=0)) == 32
