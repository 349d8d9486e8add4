"""The training loop: both forms of the network, targets, transforms."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import SMALL
from two_forms import CHAIN, GRIDDED, largest_ratio_error, setup, two_rollouts

from trxl.rollout import Rollout, Transition, empty_memory
from trxl.spaces import obs_space, unpack_obs
from trxl.training import collect, episode_metrics, learning_rate, make_init_and_update

import trainer_PPO_trXL as trainer
import transformerXL
from trainer_PPO_trXL import PPO
from wrappers import Wrapper

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", params=[CHAIN, GRIDDED], ids=["published", "wide"])
def chain(request):
    return two_rollouts(request.param)


def test_the_ratio_is_one_before_the_first_gradient_step(chain):
    assert largest_ratio_error(chain) <= 1e-5


@pytest.mark.parametrize("offset", [-1, 1])
def test_a_mask_that_is_off_by_one_would_be_seen(chain, offset, monkeypatch):
    monkeypatch.setattr(
        transformerXL.TransformerXLLayer, "unroll_windows", window_with_other_reach(offset)
    )
    assert largest_ratio_error(chain) > 1e-3


def window_with_other_reach(offset):
    original = transformerXL.TransformerXLLayer.unroll_windows

    def unroll_windows(self, x, memory, reach, window_grad):
        reach = jnp.clip(reach + offset, 0, self.window_mem)
        return original(self, x, memory, reach, window_grad)

    return unroll_windows


def test_a_relative_shift_that_is_off_by_one_would_be_seen(chain, monkeypatch):
    original = transformerXL.relative_shift

    def shifted_once_more(by_distance):
        # Shifts the finite terms by one distance, not the mask.
        moved = jnp.where(jnp.isfinite(by_distance), jnp.roll(by_distance, 1, axis=-1), -jnp.inf)
        moved = jnp.where(jnp.isfinite(moved) | ~jnp.isfinite(by_distance), moved, 0.0)
        return original(moved)

    monkeypatch.setattr(transformerXL, "relative_shift", shifted_once_more)
    assert largest_ratio_error(chain) > 1e-3


def test_last_value_is_what_the_next_rollout_computes_for_it(chain):
    _, _, _, (first, second) = chain
    np.testing.assert_allclose(first.last_value, second.trajectory.value[0], atol=1e-5)


def test_advantages_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    steps, envs = 40, 3
    fields = dict.fromkeys(Transition._fields)
    for name in ("value", "reward", "final_value"):
        fields[name] = rng.standard_normal((steps, envs))
    terminated = rng.random((steps, envs)) < 0.15
    at_limit = rng.random((steps, envs)) < 0.15
    assert (terminated & at_limit).any()
    fields |= {"terminated": terminated, "done": terminated | at_limit}
    fields["truncated"] = at_limit & ~terminated
    last_value = rng.standard_normal(envs)
    gamma, gae_lambda = 0.9, 0.7

    expected = np.zeros((steps, envs))
    for b in range(envs):
        advantage = 0.0
        for t in reversed(range(steps)):
            if terminated[t, b]:
                next_value = 0.0
            elif at_limit[t, b]:
                next_value = fields["final_value"][t, b]
            else:
                next_value = fields["value"][t + 1, b] if t + 1 < steps else last_value[b]
            delta = fields["reward"][t, b] + gamma * next_value - fields["value"][t, b]
            ended = terminated[t, b] or at_limit[t, b]
            advantage = delta + (0.0 if ended else gamma * gae_lambda * advantage)
            expected[t, b] = advantage

    collected = Rollout(arrays(fields), jnp.asarray(last_value), None, None)
    advantages = trainer.generalized_advantages(collected, gamma, gae_lambda)
    np.testing.assert_allclose(advantages, expected, atol=1e-5)


QUEST = {
    **SMALL,
    **{"ENV_NAME": f"{Path(__file__).with_name('toys.py')}:Quest", "EPISODE_END": "none"},
    "NUM_STEPS": 32,
}


@pytest.mark.parametrize("trial_credit", [True, False])
def test_advantages_run_on_to_the_next_episode_of_a_trial(trial_credit):
    """Advantages equal a loop's that reads ends and boundaries from the observations."""
    config, env, network, state = setup({**QUEST, "TRIAL_CREDIT": trial_credit})
    state, collected = jax.jit(lambda state: collect(config, env, network, PPO, state))(state)
    obs = unpack_obs(collected.trajectory.obs, obs_space(env))  # (T, B, 3)
    episode, left, limit = np.moveaxis(np.asarray(obs), -1, 0)
    fields = jax.device_get(collected.trajectory)
    values = np.append(fields.value, collected.last_value[None], axis=0)
    over, limit = left == 1, limit == 1
    assert (over & limit & (episode < 2)).any()
    assert (over & limit & (episode == 2)).any()
    assert (over & ~limit & (episode < 2)).any()

    expected = np.zeros_like(fields.reward)
    gamma, gae_lambda = 0.9, 0.7
    for b in range(config["NUM_ENVS"]):
        advantage = 0.0
        for t in reversed(range(config["NUM_STEPS"])):
            next_value = values[t + 1, b]
            ended = over[t, b] and (episode[t, b] == 2 or not trial_credit)
            if ended:
                cut_off = limit[t, b] and not trial_credit
                next_value = fields.final_value[t, b] if cut_off else 0.0
            delta = fields.reward[t, b] + gamma * next_value - values[t, b]
            advantage = delta + (0.0 if ended else gamma * gae_lambda * advantage)
            expected[t, b] = advantage
    advantages = trainer.generalized_advantages(collected, gamma, gae_lambda)
    np.testing.assert_allclose(advantages, expected, atol=1e-5)


def test_an_episode_of_a_trial_is_logged_when_it_ends():
    config, env, network, state = setup(QUEST)
    _, collected = jax.jit(lambda state: collect(config, env, network, PPO, state))(state)
    trajectory = collected.trajectory
    left = unpack_obs(trajectory.obs, obs_space(env))[..., 1]
    np.testing.assert_array_equal(trajectory.returned_episode, left == 1)
    assert trajectory.done.sum() < trajectory.returned_episode.sum() / 2


@pytest.mark.slow
def test_rewards_are_scaled_by_the_return_of_the_whole_trial():
    ends = {}
    for scaled in (False, True):
        config, env, network, state = setup({**QUEST, "NORMALIZE_REWARD": scaled, "GAMMA": 0.9})
        ends[scaled] = jax.jit(partial(collect, config, env, network, PPO))(state)
    trajectory = ends[False][1].trajectory
    episode, left, _ = np.moveaxis(np.asarray(unpack_obs(trajectory.obs, obs_space(env))), -1, 0)
    total = np.zeros(config["NUM_ENVS"])
    for t in range(config["NUM_STEPS"]):
        boundary = (left[t] == 1) & (episode[t] == 2)
        total = (0.9 * total + np.asarray(trajectory.reward[t])) * ~boundary
    state = ends[True][0].rollout_state
    np.testing.assert_allclose(state.discounted_return, total, rtol=1e-4)


def arrays(fields):
    return Transition(**jax.tree.map(jnp.asarray, fields))


class RecordFinalObservation(Wrapper):
    """Wrapper that adds the final observations' entries to the metrics."""

    def __init__(self, env):
        super().__init__(env)
        self.episode_metrics = (*env.episode_metrics, *map(str, range(env.obs_size)))

    def step(self, keys, state, action):
        *step, info = self._env.step(keys, state, action)
        entries = info["final_observation"].T
        return *step, info | {str(i): entry for i, entry in enumerate(entries)}


def test_a_truncated_step_is_worth_the_old_episodes_next_value():
    """CartPole cut off after 3 steps bootstraps from the final observation as step 4."""
    changes = {"ENV_NAME": "CartPole-v1", "ENV_KWARGS": {"max_steps_in_episode": 3}}
    config, env, network, state = setup({**SMALL, **changes})
    recording = RecordFinalObservation(env)
    collected = jax.jit(lambda s: collect(config, recording, network, PPO, s))(state)[1]
    trajectory = collected.trajectory
    final_observations = trajectory.episode_metrics[..., -env.obs_size :]
    for end in (2, 5):
        assert trajectory.truncated[end].all()
        assert not trajectory.terminated[end].any()
        episode = unpack_obs(trajectory.obs, obs_space(env))[end - 2 : end + 1]  # (3, B, .)
        obs = jnp.swapaxes(jnp.concatenate([episode, final_observations[end][None]]), 0, 1)
        no_memory = empty_memory(config, config["NUM_ENVS"])
        reach = jnp.broadcast_to(jnp.arange(4), (config["NUM_ENVS"], 4))
        _, value = network.apply(
            state.train_state.params, obs, no_memory, reach, 4, method="unroll_windows"
        )
        np.testing.assert_allclose(trajectory.final_value[end], value[:, 3], atol=1e-5)
    np.testing.assert_array_equal(trajectory.final_value[~trajectory.truncated], 0.0)

    # By hand: reward 1, so the last step's advantage is 1 + gamma V(final) - V.
    advantages = trainer.generalized_advantages(collected, 0.9, 0.8)
    by_hand = 1 + 0.9 * trajectory.final_value[2] - trajectory.value[2]
    np.testing.assert_allclose(advantages[2], by_hand, atol=1e-6)


def test_bootstrap_truncated_false_makes_the_time_limit_an_end():
    changes = {"ENV_NAME": "CartPole-v1", "ENV_KWARGS": {"max_steps_in_episode": 3}}
    config = {**SMALL, **changes, "BOOTSTRAP_TRUNCATED": False}
    config, env, network, state = setup(config)
    trajectory = jax.jit(lambda s: collect(config, env, network, PPO, s))(state)[1].trajectory
    assert trajectory.terminated[2::3].all()
    assert not trajectory.truncated.any()


@pytest.mark.slow
def test_vmap_over_seeds_gives_what_single_runs_give():
    train = trainer.make_train({**CHAIN, "TOTAL_TIMESTEPS": 128, "LR": 5e-4, "ANNEAL_LR": True})
    keys = jax.random.split(jax.random.key(7), 3)
    alone, together = jax.jit(train), jax.jit(jax.vmap(train))(keys)
    assert together["metrics"]["total_loss"].shape == (3, 2)
    for i, single in enumerate(map(alone, keys)):
        np.testing.assert_allclose(single["metrics"]["learning_rate"], [5e-4, 2.5e-4])
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=2e-3, atol=1e-4),
            (together["metrics"], together["runner_state"].train_state.params),
            (single["metrics"], single["runner_state"].train_state.params),
        )


@pytest.mark.slow
@pytest.mark.weekly
def test_seeds_of_the_default_config_train_in_one_program():
    """The default size compiles; jaxlib 0.10.2 hung there, see `trxl.layers.orthogonal`."""
    code = (
        "import jax, trainer_PPO_trXL, train_PPO_trXL\n"
        "train = trainer_PPO_trXL.make_train({**train_PPO_trXL.config, 'TOTAL_TIMESTEPS': 4096})\n"
        "out = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 3))\n"
        "jax.block_until_ready(out)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, timeout=300)


@pytest.mark.slow
def test_float_hyperparameters_may_be_traced():
    config = {**CHAIN, "num_layers": 1, "TOTAL_TIMESTEPS": 64}
    swept = {
        "LR": [1e-3, 1e-2],
        "GAMMA": [0.9, 0.8],
        "GAE_LAMBDA": [0.8, 0.7],
        "CLIP_EPS": [0.2, 0.1],
        "ENT_COEF": [0.01, 0.1],
        "VF_COEF": [0.5, 1.0],
        "MAX_GRAD_NORM": [1.0, 0.2],
        "ADVANTAGE_FLOOR": [0.0, 0.5],
        "ADAM_EPSILON": [1e-5, 1e-3],
    }

    def run(values):
        return trainer.make_train({**config, **values})(jax.random.key(0))["metrics"]

    together = jax.jit(jax.vmap(run))({name: jnp.array(values) for name, values in swept.items()})
    second = jax.jit(lambda: run({name: values[1] for name, values in swept.items()}))()
    for name, metric in second.items():
        np.testing.assert_allclose(together[name][1], metric, rtol=1e-3, atol=1e-5)
    assert not np.allclose(together["total_loss"][0], together["total_loss"][1])


@pytest.mark.parametrize(("anneal", "expected"), [(True, [0.1, 0.05]), (False, [0.1, 0.1])])
def test_the_learning_rate_anneals_over_updates_or_is_constant(anneal, expected):
    config = PPO.check({**CHAIN, "TOTAL_TIMESTEPS": 128, "LR": 0.1, "ANNEAL_LR": anneal})
    rates = [learning_rate(config, jnp.int32(update)) for update in range(2)]
    np.testing.assert_allclose(rates, expected)


def test_make_train_leaves_the_config_unchanged():
    config = {**CHAIN, "TOTAL_TIMESTEPS": 1e3}
    before = dict(config)
    trainer.make_train(config)
    assert config == before


def test_memory_holds_the_newest_hidden_states(chain):
    config, _, _, (first, second) = chain
    hidden = jnp.swapaxes(first.trajectory.layer_inputs, 0, 1)
    expected = jnp.concatenate([first.memory, hidden], axis=1)[:, -config["WINDOW_MEM"] :]
    np.testing.assert_array_equal(second.memory, expected)


@pytest.mark.slow
def test_a_box_policy_learns_on_clipped_actions_with_unclipped_log_probabilities():
    config, env, network, state = setup({**SMALL, "ENV_NAME": "Pendulum-v1"})
    trajectory = jax.jit(lambda s: collect(config, env, network, PPO, s))(state)[1].trajectory
    assert trajectory.action.shape == (config["NUM_STEPS"], config["NUM_ENVS"], 1)
    assert np.abs(trajectory.action).max() > 2.0  # beyond Pendulum's bounds
    _, update = make_init_and_update(config, PPO)
    metrics = jax.jit(update)(state)[1]
    assert np.isfinite(metrics["total_loss"])


def test_metrics_of_episodes_are_means_over_those_that_ended(chain):
    trajectory = chain[-1][0].trajectory
    names = "returned_episode_returns", "returned_episode_lengths"
    returned = trajectory.episode_metrics[..., 0]
    metrics = episode_metrics(names, trajectory, None)
    assert metrics["num_episodes"] == trajectory.done.sum() == 16  # of 4 steps each
    assert metrics["returned_episode_lengths"] == 4.0
    np.testing.assert_allclose(
        metrics["returned_episode_returns"], np.mean(returned[trajectory.done])
    )
    none = jnp.zeros_like(trajectory.done)
    none_ended = episode_metrics(names, trajectory._replace(returned_episode=none), None)
    assert none_ended["num_episodes"] == 0
    assert np.isnan(none_ended["returned_episode_returns"])


def test_what_a_team_earns_counts_for_an_agent_that_is_out_and_for_no_loss():
    """Advantages equal a loop's that ignores the values of inactive agents."""
    rng = np.random.default_rng(3)
    steps, rows, gamma, gae_lambda = 30, 5, 0.9, 0.7
    done = rng.random((steps, rows)) < 0.15
    active = np.ones((steps, rows), bool)
    for t in range(1, steps):
        active[t] = done[t - 1] | (active[t - 1] & (rng.random(rows) > 0.2))
    assert 0.2 < active.mean() < 0.8
    fields = dict.fromkeys(Transition._fields)
    for name in ("value", "reward", "final_value"):
        fields[name] = rng.standard_normal((steps, rows))
    cut_off = done & (rng.random((steps, rows)) < 0.5)
    fields |= {"terminated": done & ~cut_off, "done": done, "truncated": cut_off, "active": active}
    last_active = done[-1] | active[-1]
    last_value = np.where(last_active, rng.standard_normal(rows), 77.0)

    expected = np.zeros((steps, rows))
    for b in range(rows):
        value, advantage = last_value[b] if last_active[b] else 0.0, 0.0
        for t in reversed(range(steps)):
            if done[t, b]:
                advantage, known = 0.0, cut_off[t, b] and active[t, b]
                value = fields["final_value"][t, b] if known else 0.0
            returns = fields["reward"][t, b] + gamma * (value + gae_lambda * advantage)
            value = fields["value"][t, b] if active[t, b] else returns
            advantage = returns - value
            expected[t, b] = advantage

    def advantages(fields):
        collected = Rollout(arrays(fields), jnp.asarray(last_value), jnp.asarray(last_active), None)
        return trainer.generalized_advantages(collected, gamma, gae_lambda)

    np.testing.assert_allclose(advantages(fields), expected, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(advantages(fields))[~active], 0)
    other = {**fields, "value": np.where(active, fields["value"], 99.0)}
    np.testing.assert_allclose(advantages(other), expected, atol=1e-5)


@pytest.mark.slow
def test_steps_in_which_an_agent_is_out_change_nothing_in_learning(chain):
    """Inactive steps change nothing, and active steps weigh the same."""
    config, network, state, (collected, _) = chain
    trajectory = collected.trajectory
    active = jnp.asarray(np.random.default_rng(0).random(trajectory.value.shape) < 0.6)
    collected = collected._replace(
        trajectory=trajectory._replace(active=active), last_active=active[-1]
    )
    advantage = trainer.generalized_advantages(collected, 0.99, 0.8)
    batch = trainer.make_batch(config, collected, advantage)

    @jax.jit
    def learn(batch):
        return trainer.update_network(
            config, network, state.train_state, batch, 0.0, jax.random.key(1), None
        )

    def elsewhere(x, other):
        return jnp.where(batch.weight > 0, x, other)

    changed = batch._replace(
        log_prob=elsewhere(batch.log_prob, -jnp.inf),
        value=elsewhere(batch.value, 3.0),
        advantage=elsewhere(batch.advantage, -20.0),
        returns=elsewhere(batch.returns, jnp.inf),
        action=elsewhere(batch.action, 1 - batch.action),
    )
    (first, metrics), (second, other_metrics) = learn(batch), learn(changed)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), first.params, second.params
    )
    for name, value in metrics.items():
        np.testing.assert_allclose(other_metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    everything = learn(batch._replace(weight=jnp.ones_like(batch.weight)))[1]
    assert abs(everything["value_loss"] - metrics["value_loss"]) > 1e-4
    # The loss is the plain one over active steps.
    advantage, weight = trainer.normalize_advantages(batch.advantage, batch.weight, None)
    counted = np.asarray(batch.weight) > 0
    advantages = np.asarray(batch.advantage)[counted]
    expected = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    np.testing.assert_allclose(advantage[counted], expected, rtol=1e-3, atol=1e-4)
    minibatch = batch._replace(advantage=advantage, weight=weight)
    _, loss = trainer.ppo_loss(config, network, state.train_state.params, minibatch)
    np.testing.assert_allclose(loss["actor_loss"], -expected.mean(), atol=1e-4)  # ratios are 1
    errors = (np.asarray(batch.value - batch.returns) ** 2)[counted]
    np.testing.assert_allclose(loss["value_loss"], 0.5 * errors.mean(), rtol=1e-3)


def test_advantages_that_are_noise_are_not_blown_up(chain):
    """A floor far above the deviation leaves the actor where it is, entropy bonus included."""
    config, network, state, (collected, _) = chain
    before = state.train_state

    @jax.jit
    def largest_change(floor):
        settings = {**config, "ADVANTAGE_FLOOR": floor, "ENT_COEF": 0.1, "VF_COEF": 0.0}
        after, _ = trainer.update(settings, network, before, collected, jax.random.key(1), None)
        changes = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), after.params, before.params)
        return jax.tree.reduce(jnp.maximum, changes["params"]["actor"])

    assert largest_change(1e9) < 0.01 * largest_change(0.0)


def test_the_loss_clips_ratios_and_values_as_the_paper_says():
    """Losses equal NumPy's, with ratios and values far from the rollout's."""
    rng = np.random.default_rng(5)
    ratio = np.exp(rng.normal(0, 0.6, 200)).astype(np.float32)
    advantage, value, old_value, returns = rng.normal(0, 1, (4, 200)).astype(np.float32)
    eps, surrogate, errors = 0.2, [], []
    for r, a, v, old, target in zip(ratio, advantage, value, old_value, returns, strict=True):
        surrogate.append(min(r * a, min(max(r, 1 - eps), 1 + eps) * a))
        clipped = old + min(max(v - old, -eps), eps)
        errors.append(max((v - target) ** 2, (clipped - target) ** 2))
    assert np.mean(np.abs(ratio - 1) > eps) > 0.5
    actor_loss = trainer.clipped_surrogate(ratio, advantage, eps, None)
    value_loss = trainer.squared_value_loss(value, old_value, returns, eps, None)
    np.testing.assert_allclose(actor_loss, -np.mean(surrogate), rtol=1e-5)
    np.testing.assert_allclose(value_loss, 0.5 * np.mean(errors), rtol=1e-5)
    # No gradient pushes a ratio further beyond the clip.
    gradient = jax.grad(trainer.clipped_surrogate)(jnp.asarray(ratio), advantage, eps, None)
    beyond = ((ratio > 1 + eps) & (advantage > 0)) | ((ratio < 1 - eps) & (advantage < 0))
    np.testing.assert_array_equal(np.asarray(gradient)[beyond], 0)
    np.testing.assert_allclose(np.asarray(gradient)[~beyond], -advantage[~beyond] / 200, rtol=1e-5)
