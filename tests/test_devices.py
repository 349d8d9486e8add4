"""Training with `jax.pmap` gives the same result on any number of devices."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import QUICK

from trxl import collectives, training
from trxl.runs.compiled import Program
from trxl.training import make_init_and_update

import trainer_PPO_trXL as trainer
from trainer_PPO_trXL import PPO

# Short episodes, and a learning rate at which wrong gradients show.
CONFIG = {
    **QUICK,
    "ENV_KWARGS": {"memory_length": 3},
    "NUM_ENVS": 16,
    "NUM_MINIBATCHES": 1,
    "LR": 0.01,
    "TOTAL_TIMESTEPS": 4 * 16 * 16,
}
TOLERANCE = 1e-4

KINDS = {
    "one agent": {},
    "a pool, a grid and values in their own scale": {
        "ENV_NAME": f"{Path(__file__).with_name('toys.py')}:Gridded",
        "ENV_KWARGS": {},
        "RESET_STRATEGY": "pool",
        "RESET_RATIO": 4,
        "NETWORK": "wide",
        "encoder_features": 16,
        "NORMALIZE_VALUE": True,
    },
    "three agents": {"ENV_NAME": f"{Path(__file__).with_name('toys.py')}:Team", "ENV_KWARGS": {}},
    # A phase of whole rollouts, since each device draws its own minibatches.
    "three agents, auxiliary phases": {
        "ENV_NAME": f"{Path(__file__).with_name('toys.py')}:Team",
        "ENV_KWARGS": {},
        "AUX_EPOCHS": 2,
        "REPLAY_ROLLOUTS": 1,
    },
}


def trained(num_devices, kind="one agent"):
    """Returns parameters, metrics and last observations of four updates, leaves (devices, ...).

    `num_devices=None` trains without `jax.pmap`, as `train_PPO_trXL.py` does.
    """
    key, config = jax.random.key(0), CONFIG | KINDS[kind]
    if num_devices is None:
        out = jax.tree.map(lambda x: x[None], jax.jit(results_of(trainer.make_train(config)))(key))
    else:
        train = make_train_on(config, num_devices)
        run = jax.pmap(results_of(train), "devices", devices=jax.devices()[:num_devices])
        out = run(jnp.repeat(key, num_devices))
    return jax.device_get(out)


def make_train_on(config, num_devices):
    if num_devices == jax.device_count():
        return trainer.make_train(config, "devices")
    config = PPO.check(config, num_devices)
    init, update = make_init_and_update(config, PPO, "devices", num_devices)

    def train(key):
        state, metrics = jax.lax.scan(lambda state, _: update(state), init(key), None, 4)
        return {"runner_state": state, "metrics": metrics}

    return train


def results_of(train):
    def run(key):
        out = train(key)
        state = out["runner_state"]
        return state.train_state.params, out["metrics"], state.rollout_state.obs

    return run


@cache
def without_pmap(kind):
    return trained(None, kind)


def largest_difference(params, others):
    """Returns the largest difference between the first devices' parameters."""
    differences = jax.tree.map(lambda x, y: np.abs(x[0] - y[0]).max(), params, others)
    return max(jax.tree.leaves(differences))


def assert_alike(tree):
    """Asserts that all devices hold the same bits."""
    for leaf in jax.tree.leaves(tree):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))


@pytest.mark.weekly
@pytest.mark.parametrize(
    ("num_devices", "kind"),
    [
        (8, "one agent"),
        (2, "a pool, a grid and values in their own scale"),
        (8, "three agents"),
        (2, "three agents, auxiliary phases"),
    ],
)
def test_any_number_of_devices_trains_the_same(num_devices, kind):
    params, metrics, obs = trained(num_devices, kind)
    assert_alike((params, metrics))
    expected_params, expected_metrics, expected_obs = without_pmap(kind)
    assert largest_difference(params, expected_params) < TOLERANCE
    for name, values in expected_metrics.items():
        np.testing.assert_allclose(metrics[name][0], values[0], rtol=1e-4, atol=1e-4, err_msg=name)
    # Equal observations imply equal actions in every environment.
    np.testing.assert_array_equal(obs.reshape(expected_obs.shape), expected_obs)


OPTIMISED = """
import jax
import test_devices as tests

params, metrics, obs = tests.trained(2)
alone, of_alone, seen = tests.trained(None)
print(tests.largest_difference(params, alone), (obs.reshape(seen.shape) == seen).all())
"""


@pytest.mark.slow
def test_two_devices_train_as_one_with_the_compilers_optimisations_on():
    """Two devices equal one with XLA's optimisations, which other tests switch off."""
    flags = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    flags["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    tests = Path(__file__).parent
    flags["PYTHONPATH"] = f"{tests}:{tests.parent}"
    command = [sys.executable, "-c", OPTIMISED]
    done = subprocess.run(command, env=os.environ | flags, check=True, capture_output=True)
    difference, alike = done.stdout.split()
    assert float(difference) < TOLERANCE
    assert alike == b"True"


@pytest.mark.weekly
@pytest.mark.parametrize(
    ("of_gradients", "summed"),
    [(True, True), (False, False)],
    ids=["summed gradients", "advantages of one device"],
)
def test_a_wrong_reduction_would_be_seen(of_gradients, summed, monkeypatch):
    right, expected = collectives.mean_over_devices, without_pmap("one agent")

    def reduce(tree, axis_name):
        if isinstance(tree, tuple) != of_gradients:  # (gradients, metrics), or an array
            return right(tree, axis_name)
        return jax.lax.psum(tree, axis_name) if summed else tree

    monkeypatch.setattr(collectives, "mean_over_devices", reduce)
    monkeypatch.setattr(training, "mean_over_devices", reduce)
    assert largest_difference(trained(2)[0], expected[0]) > 100 * TOLERANCE


def shards(x):
    return np.stack([shard.data for shard in x.addressable_shards])


@pytest.mark.slow
def test_with_several_minibatches_devices_stay_equal_and_environments_apart():
    changes = {"NUM_ENVS": 32, "NUM_MINIBATCHES": 2, "TOTAL_TIMESTEPS": 4 * 32 * 16}
    config = PPO.check({**CONFIG, **changes}, 8)
    program = Program(config, PPO, 8)
    state = program.init()
    update = program.compile(state)
    for _ in range(3):
        state, metrics = update(state)
    alike = state.train_state, jax.random.key_data(state.permutation_key), metrics
    on_each = [shards(x) for x in jax.tree.leaves(alike)]
    assert_alike(on_each)
    assert len(on_each[0]) == 8
    assert metrics["num_episodes"] == 32 * 16 / 4
    streams = jax.random.key_data(state.rollout_state.env_keys).reshape(32, -1)
    assert len(np.unique(streams, axis=0)) == 32


@pytest.mark.weekly
def test_optimistic_resets_share_worlds_among_the_environments_of_one_device():
    """A device's rollout equals the rollout of its environments alone."""
    config = PPO.check({**CONFIG, "RESET_STRATEGY": "optimistic", "RESET_RATIO": 4}, 2)
    devices = jax.devices()[:2]
    init, update = make_init_and_update(config, PPO, "devices", 2)
    keys = jnp.repeat(jax.random.key(0), 2)
    state = jax.pmap(init, "devices", devices=devices)(keys)
    together, _ = jax.pmap(update, "devices", devices=devices)(state)
    assert_alike(jax.device_get(together.train_state))
    _, update = make_init_and_update({**config, "NUM_ENVS": config["NUM_ENVS"] // 2}, PPO)
    update = jax.jit(update)
    for device in range(2):
        alone, _ = update(jax.tree.map(lambda x, device=device: x[device], state))
        by_device = jax.tree.map(lambda x, device=device: x[device], together)
        by_device, alone = by_device.rollout_state, alone.rollout_state
        np.testing.assert_array_equal(by_device.obs, alone.obs)
        jax.tree.map(np.testing.assert_array_equal, by_device.env_state, alone.env_state)
        np.testing.assert_array_equal(by_device.reach, alone.reach)
