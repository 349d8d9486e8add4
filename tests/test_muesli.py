"""Muesli's targets and losses against loops in NumPy, and the whole algorithm."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import PLAYED_PROBS, SMALL, random_fields, random_params

from trxl.distributions import Bins, squash, unsquash
from trxl.errors import ConfigError
from trxl.muesli import (
    PolicyTarget,
    advantage_std,
    clipped_mpo,
    kl_to_target,
    sampled_mpo_weights,
    update_advantage_moments,
)
from trxl.replay import Steps, add_rollout, draw_rows, empty_replay, retrace
from trxl.results import load_results
from trxl.rollout import Rollout, Transition
from trxl.runs import run as runs
from trxl.runs.checkpoints import kept_of
from trxl.runs.saved_config import resumed_config
from trxl.spaces import Discrete, obs_space, unpack_obs
from trxl.statistics import init_decaying_moments
from trxl.training import collect, make_init_and_update

import trainer_Muesli_trXL as muesli
from evaluate_PPO_trXL import load_agent, play
from trainer_Muesli_trXL import MUESLI
from trainer_PPO_trXL import PPO
from wrappers import make_env

TOYS = Path(__file__).with_name("toys.py")
TINY = {**SMALL, "num_layers": 1, "MODEL_SIZE": 16, "VALUE_BINS": 11, "VALUE_LIMIT": 5.0}
TINY |= {"MODEL_STEPS": 2}  # each step is compiled
CHAIN = {**TINY, "ENV_NAME": "MemoryChain-bsuite", "ENV_KWARGS": {"memory_length": 3}}
GAMMA, DECAY = 0.9, 0.8


# ---------------------------------------------------------------- scalars as distributions


def test_the_scale_and_its_inverse():
    x = np.array([-1e4, -300.0, -1.0, -1e-3, 0, 1e-3, 0.5, 1.0, 499.0, 1e5], np.float32)
    expected = np.sign(x) * (np.sqrt(np.abs(x) + 1) - 1) + 1e-3 * x
    np.testing.assert_allclose(squash(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(unsquash(squash(jnp.asarray(x))), x, rtol=1e-3, atol=1e-6)


def test_a_number_is_spread_over_the_two_bins_beside_it():
    bins = Bins(11, 5.0, squashed=True, sigma=0)  # a bin per unit, from -5 to 5
    x = unsquash(jnp.array([-7.0, -5.0, 0.25, 2.0, 4.9, 9.0]))
    two_hot = np.asarray(bins.target(x))
    expected = np.zeros((6, 11))
    expected[0, 0] = expected[1, 0] = expected[5, 10] = 1
    expected[2, [5, 6]] = 0.75, 0.25
    expected[3, 7] = 1
    expected[4, [9, 10]] = 0.1, 0.9
    np.testing.assert_allclose(two_hot, expected, atol=1e-5)
    np.testing.assert_allclose(bins.mean(jnp.log(two_hot[2:5] + 1e-12)), x[2:5], rtol=1e-3)


def test_numbers_beyond_the_outermost_bins_are_told_apart():
    bins = Bins(81, 20.0, squashed=True, sigma=0)
    x = jnp.array([-423.0, -422.0, 0.0, 422.0, 423.0])
    assert bins.clips(x).tolist() == [True, False, False, False, True]


def test_the_cross_entropy_is_least_where_the_prediction_is_the_target():
    bins = Bins(11, 5.0, squashed=True, sigma=0)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 11)))
    x = jnp.array([-3.0, 0.0, 0.7, 12.0])
    pairs = zip(bins.target(x), jax.nn.softmax(logits), strict=True)
    by_hand = [-(t * np.log(p)).sum() for t, p in pairs]
    np.testing.assert_allclose(bins.cross_entropy(logits, x), by_hand, rtol=1e-5)
    fit = jnp.log(bins.target(x) + 1e-9)
    assert (bins.cross_entropy(fit, x) < bins.cross_entropy(logits, x)).all()


# ---------------------------------------------------------------- Retrace


def random_steps(active=False, shape=(5, 12)):
    rng = np.random.default_rng(0)
    terminated = rng.random(shape) < 0.15
    fields = {name: rng.normal(size=shape) for name in Steps._fields if name != "has_return"}
    fields |= {
        "terminated": terminated,
        "truncated": (rng.random(shape) < 0.2) & ~terminated,
        "trace": np.minimum(1, np.exp(rng.normal(size=shape))),
        "last_value": rng.normal(size=shape[0]),
        "active": rng.random(shape) < 0.7 if active else None,
        "has_return": np.random.default_rng(2).random(shape) < 0.8,
    }
    return Steps(**fields)


@pytest.mark.parametrize("active", [False, True])
def test_retrace_is_the_loop(active):
    steps = random_steps(active)
    batch, length = steps.reward.shape
    expected = np.zeros((batch, length))
    for b in range(batch):
        bracket = steps.last_value[b]
        for t in reversed(range(length)):
            if steps.terminated[b, t]:
                bracket = 0.0
            elif steps.truncated[b, t]:
                bracket = steps.final_value[b, t]
            expected[b, t] = steps.reward[b, t] + GAMMA * bracket
            correction = steps.trace[b, t] * (expected[b, t] - steps.q[b, t])
            if not steps.has_return[b, t]:
                expected[b, t], correction = steps.prior_value[b, t], 0.0
            bracket = steps.prior_value[b, t] + DECAY * correction
            if active and not steps.active[b, t]:
                bracket = expected[b, t]
    found = retrace(jax.tree.map(jnp.asarray, steps), GAMMA, DECAY)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_on_policy_retrace_with_decay_1_is_the_discounted_return():
    steps = random_steps()
    same = {"trace": np.ones_like(steps.trace), "prior_value": steps.q}
    never = np.zeros_like(steps.terminated)
    steps = steps._replace(**same, terminated=never, truncated=never, has_return=~never)
    returns, length = retrace(jax.tree.map(jnp.asarray, steps), GAMMA, 1.0), steps.reward.shape[1]
    discounts = GAMMA ** np.arange(length)
    expected = steps.reward @ discounts + GAMMA**length * steps.last_value
    np.testing.assert_allclose(returns[:, 0], expected, rtol=1e-4)


# ---------------------------------------------------------------- CMPO


def test_cmpo_over_all_actions_is_the_priors_times_the_clipped_exponential():
    rng = np.random.default_rng(0)
    logits, advantage = rng.normal(size=(6, 4)), rng.normal(0, 3, size=(6, 4))
    weights = np.exp(logits) * np.exp(np.clip(advantage, -1, 1))
    expected = weights / weights.sum(axis=1, keepdims=True)
    found = jax.nn.softmax(clipped_mpo(jnp.asarray(logits), jnp.asarray(advantage), 1.0))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_samples_weights_are_the_loop():
    advantage = np.random.default_rng(0).normal(0, 2, size=(3, 16))
    expected = np.zeros_like(advantage)
    for row, weights in zip(advantage, expected, strict=True):
        ratio = np.exp(np.clip(row, -1, 1))
        for i in range(16):
            z = (1 + sum(ratio[k] for k in range(16) if k != i)) / 16
            weights[i] = ratio[i] / z
    np.testing.assert_allclose(
        sampled_mpo_weights(jnp.asarray(advantage), 1.0), expected, rtol=1e-5
    )


def test_with_many_samples_the_sampled_gradient_is_the_exact_one():
    rng = np.random.default_rng(0)
    prior = distrax.Categorical(logits=jnp.asarray(rng.normal(size=(1, 1, 5)), jnp.float32))
    q = jnp.asarray(rng.normal(0, 2, size=5), jnp.float32)
    logits = jnp.asarray(rng.normal(size=(1, 1, 5)), jnp.float32)
    exact = PolicyTarget(jax.nn.softmax(clipped_mpo(prior.logits, q, 1.0)), None, None)
    actions = jnp.moveaxis(prior.sample(seed=jax.random.key(0), sample_shape=4096), 0, 2)
    sampled = PolicyTarget(None, actions, sampled_mpo_weights(q[actions], 1.0))

    def gradient(target):
        return jax.grad(lambda x: kl_to_target(target, distrax.Categorical(logits=x)).sum())(logits)

    np.testing.assert_allclose(gradient(sampled), gradient(exact), atol=0.03)
    assert np.abs(gradient(exact)).max() > 0.1


def test_the_divergence_is_that_of_the_distributions_and_leaves_illegal_actions_alone():
    logits = jnp.array([[[0.3, -1.0, -1e9]]])
    target = jnp.array([[[0.25, 0.75, 0.0]]])
    policy = distrax.Categorical(logits=logits)
    probs = np.exp([0.3, -1.0]) / np.exp([0.3, -1.0]).sum()
    expected = (np.array([0.25, 0.75]) * np.log(np.array([0.25, 0.75]) / probs)).sum()
    found = kl_to_target(PolicyTarget(target, None, None), policy)
    np.testing.assert_allclose(found, [[expected]], rtol=1e-5)


def test_the_variance_is_an_average_without_the_bias_of_its_start():
    rng = np.random.default_rng(0)
    variance, square, seen = init_decaying_moments(), 0.0, 0.0
    for _ in range(5):
        advantage = rng.normal(1.0, 2.0, size=(3, 4))
        square = 0.9 * square + 0.1 * np.mean(advantage**2)
        seen = 0.9 * seen + 0.1
        variance = update_advantage_moments(variance, jnp.asarray(advantage), None, 0.9, None)
        np.testing.assert_allclose(advantage_std(variance), np.sqrt(square / seen), rtol=1e-5)
    assert seen == pytest.approx(1 - 0.9**5)
    masked = update_advantage_moments(
        init_decaying_moments(), jnp.array([[2.0, 9.0]]), jnp.array([[1.0, 0]]), 0.9, None
    )
    assert advantage_std(masked) == pytest.approx(2)


# ---------------------------------------------------------------- the model's targets


def random_batch(length=7, batch=4):
    steps = random_steps(shape=(batch, length))
    rng = np.random.default_rng(1)
    zeros = np.zeros((batch, length))
    fields = {
        **{name: getattr(steps, name) for name in ("reward", "terminated", "truncated")},
        **{name: getattr(steps, name) for name in ("final_value", "last_value", "has_return")},
        "obs": rng.normal(size=(batch, length, 3)),
        "action": rng.integers(0, 5, (batch, length)),
    }
    blank = {"log_prob": zeros, "reach": zeros, "memory": zeros, "active": None}
    probs = rng.random((batch, length, 5))
    returns = rng.normal(size=(batch, length))
    policy = PolicyTarget(probs, None, None)
    return muesli.Batch(**fields, **blank), muesli.Targets(zeros, returns, zeros, policy)


def test_the_models_targets_are_the_loop():
    batch, targets = jax.tree.map(jnp.asarray, random_batch())
    count, (rows, length) = 5, batch.reward.shape
    ahead = muesli.look_ahead(batch, targets, count)
    seen = {"reward": 0, "value": 0, "policy": 0, "absorbed": 0}
    for b, t in np.ndindex(rows, length):
        state = "running"
        for k in range(1, count + 1):
            now, j = ahead[k - 1], t + k - 1
            if state == "running" and j >= length:
                state = "unknown"
            reward = value = policy = None
            known = j >= length or batch.has_return[b, j]
            if state == "absorbed":
                reward = value = 0.0
                seen["absorbed"] += 1
            elif state == "running":
                assert now.action[b, t] == batch.action[b, j]
                reward = batch.reward[b, j]
                if batch.terminated[b, j]:
                    state, value = "absorbed", 0.0
                elif batch.truncated[b, j]:
                    state, value = "unknown", batch.final_value[b, j]
                elif j + 1 == length:
                    state, value = "unknown", batch.last_value[b]
                else:
                    value, policy = targets.returns[b, j + 1], targets.policy.probs[b, j + 1]
                if not known:
                    value = None
            for name, expected in (("reward", reward), ("value", value), ("policy", policy)):
                sees = bool(getattr(now, f"sees_{name}")[b, t])
                assert sees == (expected is not None), (name, b, t, k)
                seen[name] += sees
            if reward is not None:
                assert now.reward[b, t] == reward
            if value is not None:
                assert now.value[b, t] == value
            if policy is not None:
                np.testing.assert_array_equal(now.policy.probs[b, t], policy)
                np.testing.assert_array_equal(now.obs[b, t], batch.obs[b, j + 1])
    assert min(seen.values()) > 5


def test_the_model_has_no_policy_to_learn_where_an_agent_is_out():
    batch, targets = jax.tree.map(jnp.asarray, random_batch())
    active = jnp.arange(7) != jnp.array([[2], [3], [4], [5]])
    everywhere, without = (
        muesli.look_ahead(batch._replace(active=given), targets, 3) for given in (None, active)
    )
    for k, (one, other) in enumerate(zip(everywhere, without, strict=True), start=1):
        sees = one.sees_policy & jnp.roll(active, -k, axis=1)
        np.testing.assert_array_equal(other.sees_policy, sees)
        assert (one.sees_policy & ~other.sees_policy).any()
        np.testing.assert_array_equal(other.sees_value, one.sees_value)


# ---------------------------------------------------------------- the replay


@pytest.mark.slow
def test_the_newest_rollouts_are_kept_and_drawn_alike(played):
    config, _, _, collected = played
    reward = collected.trajectory.reward
    kept = empty_replay(muesli.make_batch(config, collected), 3)
    for number in range(5):
        trajectory = collected.trajectory._replace(reward=jnp.full_like(reward, number))
        fresh = muesli.make_batch(config, collected._replace(trajectory=trajectory))
        kept = add_rollout(kept, fresh)
        assert kept.number.tolist() == [number + 1] * config["NUM_ENVS"]
        there = set(np.asarray(kept.rollouts.reward[:, : number + 1]).ravel().tolist())
        assert there == {float(n) for n in range(max(0, number - 2), number + 1)}
    keys = jax.random.split(jax.random.key(0), 200)
    drawn = jax.vmap(lambda key: draw_rows(kept, 6, key))(keys)
    assert drawn.reward.shape == (200, 6, 16)
    found = np.bincount(np.asarray(drawn.reward[..., 0], int).ravel(), minlength=5) / 1200
    assert found[:2].tolist() == [0, 0]
    np.testing.assert_allclose(found[2:], 1 / 3, atol=0.06)
    # A replayed rollout keeps its own initial memory.
    memories = np.asarray(kept.rollouts.memory)[:, 0].reshape(config["NUM_ENVS"], -1)
    rows = np.asarray(drawn.memory)[0].reshape(6, -1)
    assert all(any(np.array_equal(row, memory) for memory in memories) for row in rows)


def test_without_a_share_nothing_is_kept(played):
    config = {**played[0], "REPLAY_SHARE": 0.0}
    init, _ = make_init_and_update(config, MUESLI)
    assert jax.eval_shape(init, jax.random.key(0)).replay is None
    assert muesli.num_replayed({"REPLAY_SHARE": 0.75}, 8) == 24
    assert muesli.num_replayed({"REPLAY_SHARE": 0.5}, 8) == 8


# ---------------------------------------------------------------- the whole update


def setup(config):
    """Returns checked config, network, a state with random theta and theta', and a rollout."""
    config = MUESLI.check(config)
    env = make_env(config, config["NUM_ENVS"])
    network = MUESLI.make_network(config, env.action_space, obs_space(env))
    init, _ = make_init_and_update(config, MUESLI)
    state = jax.jit(init)(jax.random.key(0))
    train_state = state.train_state
    params = random_params(train_state.params, 1, 0.3)
    extra = train_state.algorithm_state._replace(target=random_params(params, 2, 0.3))
    state = state._replace(train_state=train_state._replace(params=params, algorithm_state=extra))
    state, collected = jax.jit(lambda state: collect(config, env, network, MUESLI, state))(state)
    return config, network, state, collected


@pytest.fixture(scope="module")
def played():
    return setup(CHAIN)


def test_the_target_network_acts_and_its_window_form_is_what_acted(played):
    config, network, state, collected = played
    batch = muesli.make_batch(config, collected)
    learner = state.train_state.algorithm_state
    targets, _ = muesli.make_targets(config, network, learner, batch, jax.random.key(0), None)
    assert batch.terminated.sum() > 10
    values = np.swapaxes(collected.trajectory.value, 0, 1)
    np.testing.assert_allclose(targets.value, values, rtol=1e-4, atol=1e-4)
    # Every trace is 1 on the prior's own rollout.
    same = muesli.make_targets(
        {**config, "RETRACE_LAMBDA": 1.0}, network, learner, batch, jax.random.key(0), None
    )[0]
    zero = batch._replace(log_prob=batch.log_prob - 5)  # as if unlikely: c is 1 too
    other = muesli.make_targets(
        {**config, "RETRACE_LAMBDA": 1.0}, network, learner, zero, jax.random.key(0), None
    )[0]
    np.testing.assert_allclose(same.returns, other.returns, rtol=1e-4, atol=1e-4)


def test_advantages_are_divided_by_the_floor_where_they_deviate_less(played):
    """The floor applies to the advantages of the policy gradient and of CMPO."""
    config, network, state, collected = played
    batch = muesli.make_batch(config, collected)
    learner = state.train_state.algorithm_state

    def targets_of(floor):
        changed = {**config, "ADVANTAGE_FLOOR": floor, "CMPO_CLIP": 1e6}
        return muesli.make_targets(changed, network, learner, batch, jax.random.key(0), None)

    plain, variance = targets_of(0.0)
    size = np.sqrt(np.mean(np.square(plain.returns)))
    share = float(advantage_std(variance)) / size

    def odds(targets):
        log_probs = np.log(targets.policy.probs)
        return log_probs[..., 1] - log_probs[..., 0]

    prior = odds(targets_of(1e6)[0])
    for floor, factor in ((share / 2, 1.0), (share * 4, 0.25)):
        floored, same = targets_of(floor)
        assert advantage_std(same) == advantage_std(variance)
        np.testing.assert_allclose(floored.advantage, factor * plain.advantage, rtol=1e-4)
        expected = factor * (odds(plain) - prior)
        np.testing.assert_allclose(odds(floored) - prior, expected, rtol=1e-3, atol=1e-4)
    assert np.abs(odds(plain) - prior).max() > 0.05


def test_action_values_are_one_step_of_the_model(played):
    config, network, state, collected = played
    params = state.train_state.algorithm_state.target
    batch = muesli.make_batch(config, collected)

    def call(method, *args):
        return network.apply(params, *args, method=method)

    latent = call("unroll_windows", batch.obs, batch.memory, batch.reach, config["WINDOW_GRAD"])
    q = call("action_values", latent, muesli.every_action(network.action_space), 0.9)
    for action in range(2):
        imagined = call("imagine", latent, jnp.broadcast_to(jnp.eye(2)[action], (4, 16, 2)))
        expected = network.bins.mean(imagined.reward) + 0.9 * network.bins.mean(imagined.value)
        np.testing.assert_allclose(q[..., action], expected, rtol=1e-5, atol=1e-5)


def test_replayed_rows_are_of_the_replay(played):
    """Changed rewards in the replay change the reward loss."""
    config, network, state, collected = played
    fresh = muesli.make_batch(config, collected)
    kept = add_rollout(empty_replay(fresh, 1), fresh)
    other = kept._replace(rollouts=kept.rollouts._replace(reward=kept.rollouts.reward + 3))

    @jax.jit
    def reward_loss(kept):
        rollout, key = collected._replace(replay=kept), jax.random.key(0)
        return muesli.update(config, network, state.train_state, rollout, key, None)[1][
            "reward_loss"
        ]

    assert abs(reward_loss(other) - reward_loss(kept)) > 0.1


def test_steps_without_the_agent_are_in_no_loss(played):
    config, network, state, collected = played
    batch = muesli.make_batch(config, collected)
    active = jnp.asarray(np.random.default_rng(0).random(batch.reward.shape) < 0.6)
    batch = batch._replace(active=active)
    learner, params = state.train_state.algorithm_state, state.train_state.params
    targets, _ = muesli.make_targets(config, network, learner, batch, jax.random.key(0), None)
    config = {**config, "MODEL_STEPS": 1}

    @jax.jit
    def losses(batch, targets):
        return muesli.loss(config, network, params, batch, targets, None)[1]

    def elsewhere(x, other):
        where = active.reshape(*active.shape, *(1,) * (x.ndim - 2))
        return jnp.where(where, x, other)

    # The latent after step t is trained on the return of step t + 1, which then counts too.
    follows = jnp.roll(active, 1, axis=1).at[:, 0].set(False) | active
    changed = batch._replace(
        log_prob=elsewhere(batch.log_prob, 1.0),
        reward=elsewhere(batch.reward, 50.0),
        action=elsewhere(batch.action, 1 - batch.action),
    )
    probs = jnp.where(active[..., None], targets.policy.probs, 0.5)
    changed_targets = targets._replace(
        returns=jnp.where(follows, targets.returns, 40.0),
        value=elsewhere(targets.value, 7.0),
        advantage=elsewhere(targets.advantage, -20.0),
        policy=targets.policy._replace(probs=probs),
    )
    assert not follows.all()
    expected, found = losses(batch, targets), losses(changed, changed_targets)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


class Known:
    """Network with value 10 t and action values 10 t + 1 and 10 t + 5."""

    action_space = Discrete(2)
    bins = SimpleNamespace(mean=lambda x: x)

    def apply(self, params, *args, method):
        del params
        if method == "unroll_windows":
            return args[0]
        latent = args[0]
        if method == "policy":
            logits = jnp.log(jnp.array([0.25, 0.75]))
            return distrax.Categorical(jnp.broadcast_to(logits, (*latent.shape, 2)))
        if method == "value":
            return 10 * latent
        encoded = args[1]  # (2, 2) for all actions, (B, T, 1, 2) for one
        return 10 * latent[..., None] + encoded @ jnp.array([1.0, 5.0])


@pytest.mark.parametrize("replayed", [False, True])
def test_the_targets_of_a_known_batch_are_those_of_a_loop(replayed):
    """Targets equal a loop's over terminations, truncations and inactive agents.

    Replayed rows have no values but the current network's.
    """
    rng = np.random.default_rng(4)
    rows, length, gamma, decay = 6, 20, 0.5, 0.75
    fields = random_fields(rng, rows, length)
    fields |= {"final_value": rng.normal(100, 10, (length, rows))}
    active, action = fields["active"], fields["action"]
    last_active = fields["done"][-1] | (active[-1] & (np.arange(rows) > 1))
    last_value = rng.normal(100, 10, rows)
    config = {"GAMMA": gamma, "RETRACE_LAMBDA": decay, "WINDOW_GRAD": 20, "NUM_STEPS": 20}
    config |= {"ADVANTAGE_DECAY": 0.9, "ADVANTAGE_FLOOR": 0.0, "CMPO_CLIP": 1.0, "EXACT_ACTIONS": 2}
    collected = Rollout(
        Transition(**jax.tree.map(jnp.asarray, fields)),
        *map(jnp.asarray, (last_value, last_active, np.zeros((rows, 0, 1, 1)))),
    )
    batch = muesli.make_batch(config, collected)
    batch = muesli.without_old_values(batch) if replayed else batch
    learner = muesli.Learner(None, init_decaying_moments())
    targets, variance = muesli.make_targets(config, Known(), learner, batch, None, None)

    expected, gained = np.zeros((rows, length)), []
    for b in range(rows):
        bracket = last_value[b] if last_active[b] else 0.0
        for t in reversed(range(length)):
            cut = fields["truncated"][t, b] or (t == length - 1 and not fields["terminated"][t, b])
            if fields["terminated"][t, b]:
                bracket = 0.0
            elif fields["truncated"][t, b]:
                bracket = fields["final_value"][t, b] if active[t, b] else 0.0
            returns = fields["reward"][t, b] + gamma * bracket
            q, trace = 10 * t + (1, 5)[action[t, b]], (0.25 / PLAYED_PROBS[0], 1)[action[t, b]]
            prior = 10 * t + 0.25 * 1 + 0.75 * 5
            if not active[t, b]:
                bracket = returns
            elif replayed and cut:
                bracket = returns = prior
            else:
                bracket = prior + decay * trace * (returns - q)
                gained.append(returns - 10 * t)
            expected[b, t] = returns
    np.testing.assert_allclose(targets.returns, expected, rtol=1e-4)
    np.testing.assert_allclose(variance.variance, np.mean(np.square(gained)), rtol=1e-4)
    counted = batch.has_return & batch.active
    np.testing.assert_allclose(
        np.sort(targets.advantage[counted]), np.sort(gained) / advantage_std(variance), rtol=1e-4
    )
    assert not np.any(targets.advantage[~batch.has_return])
    assert replayed == bool((~batch.has_return).any())


def test_theta_prime_follows_theta_and_no_gradient_reaches_it(played):
    config, network, state, collected = played
    config = {**config, "NUM_MINIBATCHES": 1, "UPDATE_EPOCHS": 1, "LR": 0.1}
    config |= {"ANNEAL_LR": False}
    replay = add_rollout(state.replay, muesli.make_batch(config, collected))
    collected = collected._replace(replay=replay)
    before = state.train_state
    after, metrics = jax.jit(
        lambda s, c: muesli.update(config, network, s, c, jax.random.key(0), None)
    )(before, collected)
    expected = optax.incremental_update(after.params, before.algorithm_state.target, 0.1)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        after.algorithm_state.target,
        expected,
    )
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after.params, before.params)
    assert 0.05 < max(jax.tree.leaves(moved)) <= 0.1001  # LR times a direction clipped to 1
    assert metrics["grad_norm"] > 0


def test_the_loss_is_its_parts(played):
    config, network, state, collected = played
    batch = muesli.make_batch(config, collected)
    learner = state.train_state.algorithm_state
    targets, _ = muesli.make_targets(config, network, learner, batch, jax.random.key(0), None)

    def total(**weights):
        chosen = dict.fromkeys(
            ("PG_COEF", "CMPO_COEF", "MODEL_COEF", "REWARD_COEF", "VF_COEF", "ENT_COEF"), 0.0
        )
        params = state.train_state.params
        return muesli.loss({**config, **chosen, **weights}, network, params, batch, targets, None)

    _, parts = total()
    for key, name in (
        ("PG_COEF", "actor_loss"),
        ("CMPO_COEF", "cmpo_loss"),
        ("MODEL_COEF", "model_loss"),
        ("REWARD_COEF", "reward_loss"),
        ("VF_COEF", "value_loss"),
    ):
        np.testing.assert_allclose(total(**{key: 2.0})[0], 2 * parts[name], rtol=1e-5)
    np.testing.assert_allclose(total(ENT_COEF=2.0)[0], -2 * parts["entropy"], rtol=1e-5)
    # The policy gradient by hand: clipped importance weights, normalised G - v.
    policy = network.apply(
        state.train_state.params,
        network.apply(
            state.train_state.params,
            *(batch.obs, batch.memory, batch.reach, config["WINDOW_GRAD"]),
            method="unroll_windows",
        ),
        batch.obs,
        method="policy",
    )
    log_prob = np.asarray(policy.log_prob(batch.action))
    importance = np.minimum(1, np.exp(log_prob - np.asarray(batch.log_prob)))
    assert 0.1 < np.mean(importance < 1) < 0.9
    expected = -np.mean(importance * np.asarray(targets.advantage) * log_prob)
    np.testing.assert_allclose(parts["actor_loss"], expected, rtol=1e-4)


@pytest.mark.weekly
def test_in_a_world_of_two_states_it_finds_the_values_that_are_known():
    """The optimal policy alternates: at gamma 1/2, v(1) = 1 + v(0) / 2 and v(0) = v(1) / 2."""
    config = MUESLI.check(
        {
            **TINY,
            **{"ENV_NAME": f"{TOYS}:TwoStates", "GAMMA": 0.5, "WINDOW_MEM": 0, "LR": 3e-3},
            **{"ADVANTAGE_FLOOR": 0.0, "MODEL_STEPS": 5, "ANNEAL_LR": True},
            **{"NUM_ENVS": 8, "NUM_STEPS": 8, "REPLAY_ROLLOUTS": 4, "VALUE_LIMIT": 1.5},
            "TOTAL_TIMESTEPS": 8 * 8 * 150,
        }
    )
    out = jax.jit(muesli.make_train(config))(jax.random.key(0))
    state = out["runner_state"]
    env = make_env(config, 8)
    network = MUESLI.make_network(config, env.action_space, obs_space(env))
    batch = jax.tree.map(lambda x: x[:, 0], state.replay.rollouts)
    learner = state.train_state.algorithm_state
    targets, variance = muesli.make_targets(config, network, learner, batch, None, None)
    obs = unpack_obs(batch.obs, obs_space(env))

    def call(method, *args):
        return network.apply(learner.target, *args, method=method)

    latent = call("unroll_windows", batch.obs, batch.memory, batch.reach, config["WINDOW_GRAD"])
    q = call("action_values", latent, muesli.every_action(env.action_space), 0.5)
    in_0, in_1 = (np.asarray(obs[..., i]) == 1 for i in range(2))
    v_1 = 1 / (1 - 0.25)
    v_0 = v_1 / 2
    prior = call("policy", latent, batch.obs)
    for where, value, values in ((in_0, v_0, [0.2 + v_0 / 2, v_0]), (in_1, v_1, [v_1, v_1 / 2])):
        assert where.any()
        np.testing.assert_allclose(targets.value[where].mean(), value, atol=0.08)
        found, best = np.asarray(q[where].mean(axis=0)), np.argmax(values)
        np.testing.assert_allclose(found[best], values[best], atol=0.05)
        np.testing.assert_allclose(found, values, atol=0.25)  # the other is hardly tried
        advantage = (q[where] - targets.value[where][:, None]) / advantage_std(variance)
        weights = prior.probs[where] * np.exp(np.clip(advantage, -1, 1))
        expected = weights / weights.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(targets.policy.probs[where], expected, rtol=1e-4)
    assert np.asarray(prior.probs)[in_0, 1].mean() > 0.8
    assert np.asarray(prior.probs)[in_1, 0].mean() > 0.9


ENVIRONMENTS = {
    "discrete": CHAIN,
    "sampled": {**CHAIN, "EXACT_ACTIONS": 1, "CMPO_SAMPLES": 3},
    "multi-discrete": {**TINY, "ENV_NAME": "popgym/MineSweeperEasy"},
    "real": {**TINY, "ENV_NAME": "Pendulum-v1"},
    "trials": {**TINY, "ENV_NAME": f"{TOYS}:Quest"},
    "agents": {**TINY, "ENV_NAME": f"{TOYS}:Team"},
    "wide": {**TINY, "ENV_NAME": "Pendulum-v1", "NETWORK": "wide", "encoder_features": 16},
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("discrete", marks=pytest.mark.slow),
        *(
            pytest.param(name, marks=pytest.mark.weekly)
            for name in ("real", "sampled", "multi-discrete", "trials", "agents", "wide")
        ),
    ],
)
def test_it_trains_and_plays(name, tmp_path):
    config = {**ENVIRONMENTS[name], "RESULTS_DIR": str(tmp_path)}
    runs.run(config, MUESLI)
    (folder,) = tmp_path.iterdir()
    metrics = load_results(folder / "0_metrics.npy")
    assert all(np.isfinite(metrics[key]).all() for key in MUESLI.must_be_finite)
    if name == "discrete":
        agent = load_agent(folder)
        assert len(play(agent, 8, jax.random.key(0))["returned_episode_returns"]) == 8


def metrics_of(folder, seed=0):
    metrics = load_results(folder / f"{seed}_metrics.npy")
    del metrics["steps_per_second"]
    return metrics


@pytest.mark.slow
def test_a_resumed_run_ends_as_one_that_never_stopped(tmp_path):
    steps = CHAIN["NUM_ENVS"] * CHAIN["NUM_STEPS"]
    config = {**CHAIN, "RESULTS_DIR": str(tmp_path), "TOTAL_TIMESTEPS": 4 * steps}
    runs.run({**config, "CHECKPOINT_EVERY": 2}, MUESLI)
    whole = tmp_path / "MemoryChain-bsuite_Muesli"
    stopped = shutil.copytree(whole, tmp_path / "stopped", ignore=shutil.ignore_patterns("*.npy"))
    shutil.rmtree(stopped / "checkpoints" / "4")
    runs.run(resumed_config(stopped, {"RESUME": str(stopped)}, MUESLI), MUESLI)
    jax.tree.map(np.testing.assert_array_equal, metrics_of(stopped), metrics_of(whole))
    with pytest.raises(ConfigError, match="was trained by Muesli, and this script trains PPO"):
        resumed_config(stopped, {}, PPO)


def test_what_an_algorithm_does_not_keep_is_in_no_checkpoint(played):
    _, _, state, _ = played
    assert "replay" in kept_of(state, "full")
    assert "replay" not in kept_of(state._replace(replay=None), "full")


@pytest.mark.weekly
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"seed": 1}, id="devices"),
        pytest.param({"NUM_SEEDS": 2}, id="seeds under vmap"),
    ],
)
def test_devices_and_seeds_under_vmap_give_what_one_gives(changes, tmp_path):
    config = {**CHAIN, "NUM_ENVS": 16, "NUM_MINIBATCHES": 1, "TOTAL_TIMESTEPS": 2 * 16 * 16}
    config |= {"REPLAY_SHARE": 0.0}  # each device draws its own replay
    runs.run({**config, "seed": 1, "RESULTS_DIR": str(tmp_path / "one")}, MUESLI)
    changed = {**config, **changes, "RESULTS_DIR": str(tmp_path / "other")}
    runs.run(changed, MUESLI, all_devices="NUM_SEEDS" not in changes)
    other, one = (
        metrics_of(tmp_path / name / "MemoryChain-bsuite_Muesli", 1) for name in ("other", "one")
    )
    for name in one:
        np.testing.assert_allclose(other[name], one[name], rtol=2e-3, atol=1e-4, err_msg=name)


def test_a_replay_that_no_device_holds_is_one_line_before_anything_compiles(tmp_path):
    config = {**CHAIN, "REPLAY_ROLLOUTS": 10**9, "RESULTS_DIR": str(tmp_path / "runs")}
    with pytest.raises(ConfigError, match="of it for what is kept of rollouts; lower REPLAY_ROLL"):
        runs.run(config, MUESLI)
    assert not list(tmp_path.iterdir())
