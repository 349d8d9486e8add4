"""Running means and variances, and that they belong to the agent."""

import jax
import jax.numpy as jnp
import numpy as np
from support import QUICK

import evaluate_PPO_trXL as evaluate
import trainer_PPO_trXL as trainer
from config import check_config
from environments import make_env
from experiment import run
from normalization import first_moments, update_moments
from results import load_results

PENDULUM = {**QUICK, "ENV_NAME": "Pendulum-v1", "NORMALIZE_OBS": True, "NORMALIZE_REWARD": True}


def test_moments_of_batches_are_those_of_everything_seen():
    rng = np.random.default_rng(0)
    batches = rng.normal(3, 2, (20, 8, 5)).astype(np.float32)
    active = rng.random((20, 8)) < 0.6
    active[3] = False  # a batch in which nothing counts
    moments = everything = first_moments((5,))
    for batch, rows in zip(batches, active, strict=True):
        everything = update_moments(everything, batch, None, None)
        moments = update_moments(moments, batch, jnp.asarray(rows), None)
    seen = batches.reshape(-1, 5)
    np.testing.assert_allclose(everything.mean, seen.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(everything.variance, seen.var(axis=0), rtol=1e-3)
    np.testing.assert_allclose(moments.mean, seen[active.ravel()].mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(moments.variance, seen[active.ravel()].var(axis=0), rtol=1e-3)
    np.testing.assert_allclose(moments.count, active.sum(), rtol=1e-4)


def test_moments_are_over_all_devices():
    batch = np.random.default_rng(1).normal(1, 3, (8, 6, 2)).astype(np.float32)
    on_each = jax.pmap(lambda x: update_moments(first_moments((2,)), x, None, "devices"), "devices")
    moments = on_each(batch)
    alone = update_moments(first_moments((2,)), batch.reshape(-1, 2), None, None)
    for joint, expected in zip(moments, alone, strict=True):
        np.testing.assert_allclose(joint, np.broadcast_to(expected, joint.shape), rtol=1e-4)


def test_a_rollout_stores_what_the_network_saw_and_scales_rewards_as_gym_does():
    config = check_config(PENDULUM)
    plain_config = {**config, "NORMALIZE_OBS": False, "NORMALIZE_REWARD": False}

    def play(config):
        env = trainer.make_env(config, 4)
        network = trainer.make_network(config, env.action_space)
        state = trainer.make_init_and_update(config)[0](jax.random.key(0))
        silent = jax.tree.map(jnp.zeros_like, state.train_state.params)  # the same actions
        state = state._replace(train_state=state.train_state._replace(params=silent))
        return state, *trainer.rollout(config, env, network, state)

    first, state, trajectory, _ = play(config)
    _, _, plain, _ = play(plain_config)
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
        if t > 2:  # the first moments' small weight is gone
            deviation = np.concatenate(seen_returns).std()
            np.testing.assert_allclose(
                trajectory.reward[t], plain.reward[t] / deviation, rtol=2e-2, atol=1e-3
            )
    assert first.train_state.normalizer["obs"].count < state.train_state.normalizer["obs"].count
    np.testing.assert_array_equal(state.obs.shape, (4, 3))
    np.testing.assert_allclose(
        trajectory.episode_metrics["returned_episode_returns"][-1],
        plain.reward.sum(axis=0),
        rtol=1e-4,
    )


def test_observations_of_zeros_and_ones_alone_are_left_as_they_are(tmp_path):
    one_hot = {**PENDULUM, "ENV_NAME": "FrozenLake-misc", "NORMALIZE_REWARD": False}
    config = check_config(one_hot)
    env = make_env(config, 1)
    assert env.num_binary == 16
    obs = jnp.eye(16)
    normalizer = trainer.init_normalizer(config, env)
    normalizer = trainer.count(normalizer, "obs", obs[:, env.num_binary :], None, None)
    np.testing.assert_array_equal(trainer.as_seen(normalizer, obs), obs)
    run({**one_hot, "TOTAL_TIMESTEPS": 64, "RESULTS_DIR": str(tmp_path)})
    metrics = load_results(tmp_path / "FrozenLake-misc" / "0_metrics.npy")
    assert np.isfinite(metrics["total_loss"]).all()


def test_the_statistics_are_saved_with_the_agent_and_used_by_it(tmp_path):
    run({**PENDULUM, "RESULTS_DIR": str(tmp_path), "CHECKPOINT_KIND": "learner"})
    folder = tmp_path / "Pendulum-v1"
    saved = load_results(folder / "0_params.npy")
    assert saved["normalizer"]["obs"]["count"] > 256
    agent = evaluate.load_agent(folder, greedy=True)
    obs = jnp.array([[1.0, 0.0, 3.0]])
    config = check_config(PENDULUM)
    network = trainer.make_network(config, evaluate.make_env(config, 1).action_space)
    moments = saved["normalizer"]["obs"]
    seen = (obs - moments["mean"]) / np.sqrt(moments["variance"] + 1e-8)
    caches = network.apply(
        {"params": saved["params"]}, trainer.empty_memory(config, 1).hidden, method="start_rollout"
    )
    policy, *_ = network.apply(
        {"params": saved["params"]}, seen, caches, 0, jnp.zeros(1, jnp.int32), method="step"
    )
    action, _ = agent.act(agent.initial_memory(1), obs, jnp.array([True]), jax.random.key(0))
    np.testing.assert_allclose(action, policy.mode(), rtol=1e-5)
    # A learner-only checkpoint goes on with them.
    run({**PENDULUM, "TOTAL_TIMESTEPS": 512, "RESUME": str(folder), "CHECKPOINT_KIND": "learner"})
    count = load_results(folder / "0_params.npy")["normalizer"]["obs"]["count"]
    np.testing.assert_allclose(count, 512 + 4, rtol=1e-5)
