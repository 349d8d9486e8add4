"""Running means and variances, saved with the agent."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import QUICK, run

from trxl.results import load_results
from trxl.rollout import empty_memory, update_reward_statistics
from trxl.spaces import ObsSpace, obs_space
from trxl.statistics import (
    add_rows,
    as_float,
    exact_count,
    first_moments,
    init_normalizer,
    network_input,
    normalize_obs,
    update_moments,
    update_normalizer,
)
from trxl.training import collect, make_init_and_update

import evaluate_PPO_trXL as evaluate
from trainer_PPO_trXL import PPO
from transformerXL import make_network
from wrappers import make_env

TOYS = Path(__file__).with_name("toys.py")
PENDULUM = {**QUICK, "ENV_NAME": "Pendulum-v1", "NORMALIZE_OBS": True, "NORMALIZE_REWARD": True}


def test_moments_of_batches_are_those_of_everything_seen():
    rng = np.random.default_rng(0)
    batches = rng.normal(3, 2, (20, 8, 5)).astype(np.float32)
    active = rng.random((20, 8)) < 0.6
    active[3] = False  # no row of this batch counts
    moments = everything = first_moments((5,))
    for batch, rows in zip(batches, active, strict=True):
        everything = update_moments(everything, batch, None, None)
        moments = update_moments(moments, batch, jnp.asarray(rows), None)
    seen = batches.reshape(-1, 5)
    np.testing.assert_allclose(everything.mean, seen.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(everything.variance, seen.var(axis=0), rtol=1e-3)
    np.testing.assert_allclose(moments.mean, seen[active.ravel()].mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(moments.variance, seen[active.ravel()].var(axis=0), rtol=1e-3)
    np.testing.assert_array_equal(moments.count, [0, active.sum()])


def test_the_count_of_rows_is_exact_beyond_what_float32_or_one_integer_holds():
    count = jnp.array([0, 2**32 - 3], jnp.uint32)
    np.testing.assert_array_equal(add_rows(count, jnp.uint32(5)), [1, 2])
    assert as_float(jnp.array([3, 7], jnp.uint32)) == 3.0 * 2**32
    moments = first_moments(())._replace(count=jnp.array([0, 2**24], jnp.uint32))
    assert update_moments(moments, jnp.zeros(1), None, None).count[1] == 2**24 + 1


def test_rows_that_do_not_count_may_hold_anything():
    active = jnp.array([True, False])
    moments = update_moments(first_moments(()), jnp.array([2.0, jnp.inf]), active, None)
    np.testing.assert_allclose(moments.mean, 2.0, rtol=1e-3)
    assert np.isfinite(moments.variance)


def test_counts_that_were_saved_as_one_number_are_read():
    np.testing.assert_array_equal(exact_count(np.float32(260.0001)), [0, 260])
    np.testing.assert_array_equal(exact_count(np.array([5.0, 2.0**33])), [[0, 5], [2, 0]])
    np.testing.assert_array_equal(exact_count(np.array([1, 2], np.uint32)), [1, 2])


def test_moments_are_over_all_devices():
    batch = np.random.default_rng(1).normal(1, 3, (8, 6, 2)).astype(np.float32)
    on_each = jax.pmap(lambda x: update_moments(first_moments((2,)), x, None, "devices"), "devices")
    moments = on_each(batch)
    alone = update_moments(first_moments((2,)), batch.reshape(-1, 2), None, None)
    for joint, expected in zip(moments, alone, strict=True):
        np.testing.assert_allclose(joint, np.broadcast_to(expected, joint.shape), rtol=1e-4)


@pytest.mark.slow
def test_a_rollout_stores_what_the_network_saw_and_scales_rewards_as_gym_does():
    config = PPO.check(PENDULUM)
    plain_config = {**config, "NORMALIZE_OBS": False, "NORMALIZE_REWARD": False}

    def play(config):
        env = make_env(config, 4)
        network = make_network(config, env.action_space, obs_space(env))
        state = make_init_and_update(config, PPO)[0](jax.random.key(0))
        silent = jax.tree.map(jnp.zeros_like, state.train_state.params)  # the same actions
        state = state._replace(train_state=state.train_state._replace(params=silent))
        after, collected = collect(config, env, network, PPO, state)
        return state, after, collected.trajectory

    first, state, trajectory = play(config)
    _, _, plain = play(plain_config)
    raw = np.asarray(plain.obs.real)
    mean, variance, count = np.zeros(3), np.ones(3), 1e-4
    returns, seen_returns = np.zeros(4), [np.zeros(0)]
    for t in range(len(raw)):
        total = count + 4
        delta = raw[t].mean(axis=0) - mean
        variance = (
            variance * count + raw[t].var(axis=0) * 4 + delta**2 * count * 4 / total
        ) / total
        mean, count = mean + delta * 4 / total, total
        expected = (raw[t] - mean) / np.sqrt(variance + 1e-8)
        np.testing.assert_allclose(trajectory.obs.real[t], expected, rtol=1e-3, atol=1e-3)
        returns = config["GAMMA"] * returns + np.asarray(plain.reward[t])
        seen_returns.append(returns)
        if t > 2:  # the initial moments weigh little
            deviation = np.concatenate(seen_returns).std()
            np.testing.assert_allclose(
                trajectory.reward[t], plain.reward[t] / deviation, rtol=2e-2, atol=1e-3
            )
    counts = [s.train_state.normalizer["obs"].count[1] for s in (first, state)]
    assert counts == [4, 4 + 4 * len(raw)]
    np.testing.assert_array_equal(state.rollout_state.obs.shape, (4, 3))
    np.testing.assert_allclose(
        trajectory.episode_metrics[-1, :, 0],  # returned_episode_returns
        plain.reward.sum(axis=0),
        rtol=1e-4,
    )


def test_statistics_are_of_who_sees_and_of_who_acts():
    """Observation statistics count agents that observe, reward statistics agents that act.

    Agent i of three is out after step 2 + i.
    """
    changes = {"NUM_STEPS": 3, "WINDOW_GRAD": 3, "NORMALIZE_OBS": True, "NORMALIZE_REWARD": True}
    config = PPO.check({**QUICK, **changes, "ENV_NAME": f"{TOYS}:Team"})
    env = make_env(config, 4)
    network = make_network(config, env.action_space, obs_space(env))
    state = make_init_and_update(config, PPO)[0](jax.random.key(0))
    state, _ = collect(config, env, network, PPO, state)
    counts = {name: int(x.count[1]) for name, x in state.train_state.normalizer.items()}
    assert counts == {"obs": 4 * 3 + 4 * (3 + 2 + 1), "reward": 4 * (3 + 3 + 2)}
    # Every agent observes its number and the step.
    seen = [0, 0, 0, 1, 1, 1, 2, 2, 3]
    np.testing.assert_allclose(
        state.train_state.normalizer["obs"].mean[1], np.mean(seen), rtol=1e-3
    )


def test_an_episodes_return_is_whole_at_its_end_and_gone_after_it():
    """Rewards 1, 2 and 4 in episodes of two steps give returns 1, 2.5 and 4 at discount 1/2."""
    normalizer = {"reward": first_moments(())}
    after = jnp.zeros(1)
    seen = []
    for reward, done in ((1.0, False), (2.0, True), (4.0, False)):
        before = normalizer["reward"]
        after, normalizer, _ = update_reward_statistics(
            0.5, after, normalizer, jnp.array([reward]), jnp.array([done]), None, None
        )
        count = [as_float(x.count) for x in (before, normalizer["reward"])]
        seen.append(normalizer["reward"].mean * count[1] - before.mean * count[0])
    np.testing.assert_allclose(seen, [1, 0.5 * 1 + 2, 4], rtol=1e-3)


def test_an_entry_that_was_always_the_same_does_not_blow_up():
    always_zero = first_moments((1,))._replace(variance=jnp.zeros(1))
    obs = jnp.array([[1.0, 0.0], [0.0, 0.1], [1.0, -0.1]])
    expected = [[1, 0], [0, 10], [1, -10]]
    np.testing.assert_array_equal(normalize_obs(always_zero, obs), expected)


@pytest.mark.slow
def test_observations_of_zeros_and_ones_alone_are_left_as_they_are(tmp_path):
    one_hot = {**PENDULUM, "ENV_NAME": "FrozenLake-misc", "NORMALIZE_REWARD": False}
    config = PPO.check(one_hot)
    env = make_env(config, 1)
    assert env.num_binary == 16
    obs = jnp.eye(16)
    normalizer = init_normalizer(config, env)
    normalizer = update_normalizer(normalizer, "obs", obs[:, env.num_binary :], None, None)
    np.testing.assert_array_equal(network_input(normalizer, obs), obs)
    run({**one_hot, "TOTAL_TIMESTEPS": 64, "RESULTS_DIR": str(tmp_path)})
    metrics = load_results(tmp_path / "FrozenLake-misc" / "0_metrics.npy")
    assert np.isfinite(metrics["total_loss"]).all()


@pytest.mark.slow
def test_the_statistics_are_saved_with_the_agent_and_used_by_it(tmp_path):
    run({**PENDULUM, "RESULTS_DIR": str(tmp_path), "CHECKPOINT_KIND": "learner"})
    folder = tmp_path / "Pendulum-v1"
    saved = load_results(folder / "0_params.npy")
    np.testing.assert_array_equal(saved["normalizer"]["obs"]["count"], [0, 256 + 4])
    agent = evaluate.load_agent(folder, greedy=True)
    obs = jnp.array([[1.0, 0.0, 3.0]])
    config = PPO.check(PENDULUM)
    network = make_network(config, make_env(config, 1).action_space, ObsSpace(3))
    moments = saved["normalizer"]["obs"]
    seen = (obs - moments["mean"]) / np.sqrt(moments["variance"] + 1e-8)
    caches = network.apply(
        {"params": saved["params"]}, empty_memory(config, 1), method="init_cache"
    )
    policy, *_ = network.apply(
        {"params": saved["params"]}, seen, caches, 0, jnp.zeros(1, jnp.int32), method="step"
    )
    action, _ = agent.act(agent.initial_memory(1), obs, jnp.array([True]), jax.random.key(0))
    np.testing.assert_allclose(action, policy.mode(), rtol=1e-5)
    # A learner-only checkpoint has the statistics too.
    run({**PENDULUM, "TOTAL_TIMESTEPS": 512, "RESUME": str(folder), "CHECKPOINT_KIND": "learner"})
    count = load_results(folder / "0_params.npy")["normalizer"]["obs"]["count"]
    np.testing.assert_array_equal(count, [0, 512 + 4])
