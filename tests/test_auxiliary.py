"""PPG's auxiliary phase: its targets, its loss, and when it runs."""

from functools import partial

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import PLAYED_PROBS, QUICK, random_fields, random_params

from trxl.distributions import make_policy
from trxl.replay import add_rollout, empty_replay
from trxl.rollout import Rollout, Transition
from trxl.spaces import Box, Discrete, MultiDiscrete, obs_space
from trxl.statistics import init_decaying_moments
from trxl.training import collect, make_init_and_update

import trainer_PPO_trXL as trainer
from trainer_PPO_trXL import PPO
from transformerXL import make_network
from wrappers import make_env

CHAIN = {**QUICK, "ENV_KWARGS": {"memory_length": 3}, "AUX_EPOCHS": 2, "REPLAY_ROLLOUTS": 3}
NOW = np.array([0.25, 0.75])
"""Probabilities of two actions before the phase."""


class Known:
    """Network with the policy `NOW` and, in the critic's units, value t."""

    bins = None

    def apply(self, params, obs, *args, method):
        del params, args
        assert method == "unroll_windows"
        logits = jnp.broadcast_to(jnp.log(NOW), (*obs.shape, 2))
        return distrax.Categorical(logits), obs


@pytest.mark.parametrize("teams", [False, True])
def test_targets_of_values_are_those_of_v_trace(teams):
    """Targets equal a loop's over terminations, truncations and inactive agents."""
    rows, length, gamma, decay, mu, sigma = 6, 20, 0.5, 0.75, 3.0, 2.0
    fields = random_fields(np.random.default_rng(4), rows, length)
    fields |= {} if teams else {"active": None}
    config = {"GAMMA": gamma, "GAE_LAMBDA": decay, "WINDOW_GRAD": length, "NUM_STEPS": length}
    config |= {"NORMALIZE_VALUE": True, "VALUE_BINS": None}
    transition = Transition(**jax.tree.map(jnp.asarray, fields))
    collected = Rollout(transition, None, None, jnp.zeros((rows, 0, 1, 1)))
    played = trainer.to_replay(config, collected)
    moments = init_decaying_moments()._replace(mean=mu, variance=sigma**2)
    state = PPO.init(PPO.check(QUICK), {"x": jnp.zeros(1)})
    state = state._replace(algorithm_state=state.algorithm_state._replace(return_moments=moments))
    targets = trainer.auxiliary_targets(config, Known(), state, played)

    expected = np.zeros((rows, length))
    for b in range(rows):
        next_value = correction = 0.0
        for t in reversed(range(length)):
            active = not teams or fields["active"][t, b]
            value, ratio = sigma * t + mu, min(1, NOW[0] / PLAYED_PROBS[0])
            ratio = ratio if fields["action"][t, b] == 0 else 1
            terminated, truncated = fields["terminated"][t, b], fields["truncated"][t, b]
            if terminated or truncated:
                next_value = correction = 0.0
            bracket = next_value + decay * correction
            if not active:
                next_value, correction = fields["reward"][t, b] + gamma * bracket, 0.0
                continue
            if truncated or (t == length - 1 and not terminated):
                correction = 0.0
            else:
                correction = ratio * (fields["reward"][t, b] + gamma * bracket - value)
            expected[b, t], next_value = (value + correction - mu) / sigma, value
    counted = fields["active"].T if teams else np.ones((rows, length), bool)
    np.testing.assert_allclose(targets.value[counted], expected[counted], rtol=1e-4, atol=1e-5)
    (logits,) = targets.policy
    np.testing.assert_allclose(jax.nn.softmax(logits)[0, 0], NOW, rtol=1e-5)


def divergence(space, before, after, log_std):
    """Returns KL(before || after) of two actors' outputs (outputs,)."""
    if isinstance(space, Box):
        std = np.exp(log_std)
        return np.sum((after - before) ** 2 / (2 * std**2))
    sizes = [space.n] if isinstance(space, Discrete) else space.sizes
    total, start = 0.0, 0
    for options in sizes:
        x, y = (z[start : start + options] for z in (before, after))
        p, q = np.exp(x) / np.exp(x).sum(), np.exp(y) / np.exp(y).sum()
        total, start = total + np.sum(p * np.log(p / q)), start + max(sizes)
    return total


class Heads:
    """Network with given outputs of the actor and the critic."""

    bins = None

    def __init__(self, space, log_std):
        self.space, self.log_std = space, log_std

    def apply(self, params, obs, *args, method):
        del args
        assert method == "unroll_heads"
        actor, critic = params
        return make_policy(self.space, actor, obs, self.log_std), critic[..., None]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "space", [Discrete(3), MultiDiscrete((3, 2)), Box((-1.0,) * 2, (1.0,) * 2)], ids=str
)
def test_the_loss_is_the_divergence_and_the_squared_error(space, weighted):
    rng = np.random.default_rng(0)
    rows, length, outputs = 2, 5, space.num_outputs
    before, after = rng.normal(size=(2, rows, length, outputs))
    value, target = rng.normal(size=(2, rows, length))
    log_std = np.float32([-0.5, 0.3]) if isinstance(space, Box) else None
    network, obs = Heads(space, log_std), jnp.zeros((rows, length, 0))
    policy = make_policy(space, jnp.asarray(before), obs, log_std)
    _, *parameters = trainer.take_apart(policy)
    active = rng.random((rows, length)) < 0.6 if weighted else np.ones((rows, length), bool)
    played = trainer.Played(*[None] * 9)._replace(obs=obs, active=active if weighted else None)
    loss, metrics = trainer.auxiliary_loss(
        {"VF_COEF": 0.7, "WINDOW_GRAD": length, "CLIP_EPS": 0.2},
        network,
        (jnp.asarray(after), jnp.asarray(value)),
        played,
        trainer.AuxiliaryTargets(parameters, jnp.asarray(target)),
        None,
    )
    kl = [
        divergence(space, x, y, log_std) for x, y in zip(before[active], after[active], strict=True)
    ]
    squares = 0.5 * (value - target)[active] ** 2
    np.testing.assert_allclose(metrics["aux_kl"], np.mean(kl), rtol=1e-4)
    np.testing.assert_allclose(metrics["aux_value_loss"], squares.mean(), rtol=1e-4)
    np.testing.assert_allclose(loss, np.mean(kl) + 0.7 * squares.mean(), rtol=1e-4)


@pytest.fixture(scope="module")
def states():
    """Returns train states and metrics of six updates, with and without phases."""

    def run(config):
        config = PPO.check(config)
        init, update = make_init_and_update(config, PPO)
        update, state, seen = jax.jit(update), jax.jit(init)(jax.random.key(0)), []
        for _ in range(6):
            state, metrics = update(state)
            seen.append((state, jax.device_get(metrics)))
        return seen

    return run(CHAIN), run({**CHAIN, "AUX_EPOCHS": 0})


def test_a_phase_follows_every_third_update_and_nothing_else_changes(states):
    with_phases, without = states
    phases = [not np.isnan(metrics["aux_kl"]) for _, metrics in with_phases]
    assert phases == [False, False, True, False, False, True]
    assert "aux_kl" not in without[0][1]
    assert without[0][0].replay is None
    for number in range(3):
        (state, metrics), (other, expected) = with_phases[number], without[number]
        norm = optax.tree.norm(state.train_state.params["params"])
        np.testing.assert_allclose(metrics["param_norm"], norm, rtol=1e-5)
        for name in expected.keys() - {"param_norm"}:
            value = expected[name]
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        same = jax.tree.map(
            lambda x, y: np.allclose(x, y, atol=1e-6),
            state.train_state.params,
            other.train_state.params,
        )
        assert all(jax.tree.leaves(same)) == (number < 2)


@pytest.mark.slow
def test_a_phase_fits_the_values_and_the_policy_stays(monkeypatch):
    """The error halves; without the divergence in the loss the policy would leave."""
    config = {**CHAIN, "AUX_EPOCHS": 30, "REPLAY_ROLLOUTS": 1, "NUM_MINIBATCHES": 1, "LR": 3e-3}
    config = PPO.check(config)
    env = make_env(config, config["NUM_ENVS"])
    network = make_network(config, env.action_space, obs_space(env))
    init, _ = make_init_and_update(config, PPO)
    state = jax.jit(init)(jax.random.key(0))
    before = state.train_state._replace(params=random_params(state.train_state.params))
    state, collected = collect(config, env, network, PPO, state._replace(train_state=before))
    played = trainer.to_replay(config, collected)
    replay = add_rollout(empty_replay(played, 1), played)
    targets = trainer.auxiliary_targets(config, network, before, played)

    def after_phase():
        phase = partial(trainer.auxiliary_phase, config, network, axis_name=None)
        return jax.jit(phase)(before, replay, jax.random.key(0))[0].params

    def losses(params):
        return trainer.auxiliary_loss(config, network, params, played, targets, None)[1]

    after = losses(after_phase())
    with monkeypatch.context() as patch:
        patch.setattr(distrax.Categorical, "kl_divergence", lambda policy, _: policy.entropy() * 0)
        free = after_phase()
    assert after["aux_value_loss"] < 0.5 * losses(before.params)["aux_value_loss"]
    assert after["aux_kl"] < 0.1 * losses(free)["aux_kl"]
