"""PopArt: moments of the returns, and a critic rescaled with them, or its bins."""

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import QUICK, random_params, run

from trxl import statistics
from trxl.distributions import Bins
from trxl.results import load_results
from trxl.spaces import Discrete, ObsSpace, obs_space, pack_obs
from trxl.training import collect, init_params, make_init_and_update

import trainer_PPO_trXL as trainer
from trainer_PPO_trXL import PPO
from transformerXL import make_network
from wrappers import make_env

CHAIN = {**QUICK, "ENV_KWARGS": {"memory_length": 3}, "NORMALIZE_VALUE": True}
THOUSANDS = {
    **QUICK,
    "ENV_NAME": f"{Path(__file__).with_name('toys.py')}:TwoStatesInThousands",
    **{"NUM_ENVS": 8, "NUM_STEPS": 12, "WINDOW_MEM": 0, "GAMMA": 0.9, "NORMALIZE_VALUE": True},
}


def test_the_scale_follows_the_returns_and_outputs_stay():
    """Moments equal a loop's, and the critic's values stay the same when they change."""
    rng = np.random.default_rng(0)
    moments, decay, mean, square, weight = statistics.init_decaying_moments(), 0.9, 0.0, 0.0, 0.0
    first = statistics.value_scale(moments)
    assert (float(first.mu), float(first.sigma)) == (0, 1)
    kernel, bias = rng.standard_normal((6, 1)), rng.standard_normal(1)
    layer = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
    x = rng.standard_normal((9, 6))
    says = first.denormalize(x @ kernel + bias)
    for scale in (1.0, 30.0, 1e-3):
        returns = (scale * (rng.standard_normal((4, 5)) + 2)).astype(np.float32)
        counts = (rng.random((4, 5)) < 0.7) * 1.0
        old = statistics.value_scale(moments)
        moments = statistics.update_return_moments(
            moments, returns, jnp.asarray(counts), decay, None
        )
        new = statistics.value_scale(moments)
        counted = returns[counts > 0]
        mean = decay * mean + (1 - decay) * counted.mean()
        square = decay * square + (1 - decay) * (counted**2).mean()
        weight = decay * weight + (1 - decay)
        np.testing.assert_allclose(new.mu, mean / weight, rtol=1e-4)
        deviation = np.sqrt(square / weight - (mean / weight) ** 2)
        np.testing.assert_allclose(new.sigma, deviation, rtol=1e-3)
        layer = statistics.preserve_outputs(layer, old, new)
        after = new.denormalize(x @ layer["kernel"] + layer["bias"])
        np.testing.assert_allclose(after, says, rtol=1e-3, atol=1e-3)
    still = statistics.update_return_moments(
        statistics.init_decaying_moments(), jnp.full((2, 2), 3.0), None, decay, None
    )
    np.testing.assert_allclose(
        statistics.value_scale(still).sigma, statistics.LEAST_SIGMA, rtol=1e-5
    )


@pytest.mark.parametrize("heads", ["mlp", "residual"])
def test_an_update_learns_returns_in_the_new_scale_from_values_of_the_same_critic(heads):
    """Values of the batch, in units of the return, are the same after rescaling."""
    config = PPO.check({**QUICK, "NORMALIZE_VALUE": True, "HEADS": heads})
    network = make_network(config, Discrete(3), ObsSpace(2))
    params = random_params(init_params(config, network, 2, jax.random.key(0)))
    state = PPO.init(config, params)
    rng = np.random.default_rng(0)
    obs = pack_obs(jnp.asarray(rng.standard_normal((4, 16, 2)), jnp.float32), ObsSpace(2))
    memory = jnp.zeros((4, 8 + 16 - 4, 1, 16))
    reach = jnp.zeros((4, 16), jnp.int32)

    def values(state):
        x = network.apply(state.params, obs, memory, reach, 4, method="unroll_windows")[1]
        return statistics.value_scale(state.algorithm_state.return_moments).denormalize(x)

    before = values(state)
    returns = jnp.asarray(50 + 20 * rng.standard_normal((4, 16)), jnp.float32)
    batch = trainer.Batch(*[None] * 9)._replace(value=before, returns=returns)
    state, batch = trainer.rescale(config, state, batch, None)
    np.testing.assert_allclose(values(state), before, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(batch.returns, (returns - returns.mean()) / returns.std(), atol=1e-3)
    np.testing.assert_allclose(batch.value, (before - returns.mean()) / returns.std(), atol=1e-3)


def test_values_are_clipped_unless_they_have_a_scale_of_their_own():
    for changes, clipped in [
        ({}, False),
        ({"NORMALIZE_VALUE": False}, True),
        ({"NORMALIZE_VALUE": True, "CLIP_VALUE": True}, True),
        ({"NORMALIZE_VALUE": False, "CLIP_VALUE": False}, False),
    ]:
        assert PPO.check(changes)["CLIP_VALUE"] == clipped
    value, old, returns = jnp.float32([3.0]), jnp.float32([0.0]), jnp.float32([2.0])
    assert float(trainer.squared_value_loss(value, None, returns, 0.2, None)) == 0.5
    assert float(trainer.squared_value_loss(value, old, returns, 0.2, None)) == pytest.approx(1.62)


def test_a_small_variance_beside_a_large_mean_is_exact():
    """The variance is exact where E[x^2] - E[x]^2 in float32 varies from 0.001 to 0.22."""
    rng = np.random.default_rng(0)
    moments = statistics.init_decaying_moments()
    for _ in range(60):
        returns = jnp.asarray(500 + 0.1 * rng.standard_normal((16, 64)), jnp.float32)
        moments = statistics.update_return_moments(moments, returns, None, 0.95, None)
        np.testing.assert_allclose(statistics.value_scale(moments).sigma, 0.1, rtol=0.06)
    assert float(moments.mean) == pytest.approx(500, abs=0.01)


def test_with_a_decay_of_1_the_moments_are_of_all_updates_alike():
    returns = np.random.default_rng(0).normal(3, 2, (5, 4, 6)).astype(np.float32)
    moments = statistics.init_decaying_moments()
    for batch in returns:
        moments = statistics.update_return_moments(moments, batch, None, 1.0, None)
    np.testing.assert_allclose(moments[:2], (returns.mean(), returns.var()), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("bins", [None, 51])
def test_the_returns_of_a_fixed_policy_are_found_in_a_world_of_two_states(bins):
    """The critic learns v(0) = 100 + 0.45 (v(0) + v(1)) = 2,800 and v(1) = v(0) + 400.

    A limit of 8 steps cuts off episodes within rollouts of 12, so a value mistaken for a return,
    anywhere in the advantages, would show.
    """
    config = PPO.check(
        {
            **THOUSANDS,
            **{"CLIP_EPS": 0.0, "ENT_COEF": 0.0, "ADVANTAGE_FLOOR": 1e9, "LR": 3e-3},
            **{"ANNEAL_LR": True, "TOTAL_TIMESTEPS": 8 * 12 * 150, "VALUE_BINS": bins},
        }
    )
    train_state = jax.jit(trainer.make_train(config))(jax.random.key(0))["runner_state"].train_state
    network = make_network(config, Discrete(2), ObsSpace(2, 2))
    params = PPO.saved_params(config, train_state)
    obs, no_memory, reach = jnp.eye(2)[:, None], jnp.zeros((2, 0, 1, 16)), jnp.zeros((2, 1), int)
    policy, value = network.apply(params, obs, no_memory, reach, 1, method="unroll_windows")
    np.testing.assert_allclose(policy.probs, 0.5, atol=0.02)
    np.testing.assert_allclose(value[:, 0], [2800, 3200], rtol=0.02)
    moments = train_state.algorithm_state.return_moments
    if bins is not None:
        assert moments is None
        moments = statistics.Moments(**params["return_moments"])
    scale = statistics.value_scale(moments)
    assert 2500 < scale.mu < 3500
    assert 100 < scale.sigma < 400


@pytest.mark.slow
def test_the_floor_is_a_share_of_the_largest_deviation_of_advantages_so_far():
    """The policy's gradient shrinks with the deviation below it; it falls by 2 % per update.

    With so large an epsilon Adam's steps are proportional to the gradients.
    """
    config = PPO.check(
        {
            **{**THOUSANDS, "UPDATE_EPOCHS": 1, "NUM_MINIBATCHES": 1, "MAX_GRAD_NORM": 1e9},
            **{"ENT_COEF": 0.5, "VF_COEF": 0.0, "ADAM_EPSILON": 1e3, "ANNEAL_LR": False},
        }
    )
    env = make_env(config, config["NUM_ENVS"])
    network = make_network(config, env.action_space, obs_space(env))
    state = jax.jit(make_init_and_update(config, PPO)[0])(jax.random.key(0))
    params = random_params(state.train_state.params)
    state = state._replace(train_state=state.train_state._replace(params=params))
    state, collected = jax.jit(lambda s: collect(config, env, network, PPO, s))(state)

    @jax.jit
    def moved(floor, largest=0.0):
        settings = {**config, "ADVANTAGE_FLOOR": floor}
        before = state.train_state
        own = before.algorithm_state._replace(largest_deviation=largest)
        before = before._replace(algorithm_state=own)
        after, _ = trainer.update(settings, network, before, collected, jax.random.key(1), None)
        kernels = (x.params["params"]["actor"]["Dense_2"]["kernel"] for x in (after, before))
        return jnp.linalg.norm(jnp.subtract(*kernels)), after.algorithm_state.largest_deviation

    advantage = trainer.generalized_advantages(collected, config["GAMMA"], config["GAE_LAMBDA"])
    deviation, (without, _) = np.std(advantage), moved(0.0)
    for floor, before, largest in ((10, 0.0, 1), (1, 10.0, 9.8), (1, 0.5, 1), (5, 10.0, 9.8)):
        change, after = moved(floor, before * deviation)
        np.testing.assert_allclose(after, largest * deviation, rtol=1e-3)
        np.testing.assert_allclose(change / without, 1 / (floor * largest), rtol=0.01)


def test_steps_without_the_agent_are_no_part_of_the_moments():
    config = PPO.check(CHAIN)
    network = make_network(config, Discrete(3), ObsSpace(2))
    state = PPO.init(config, init_params(config, network, 2, jax.random.key(0)))
    rng = np.random.default_rng(0)
    returns = rng.normal(50, 20, (4, 16)).astype(np.float32)
    weight = (rng.random((4, 16)) < 0.6).astype(np.float32)
    batch = trainer.Batch(*[None] * 9)._replace(
        value=jnp.zeros((4, 16)), returns=jnp.where(weight, returns, jnp.inf), weight=weight
    )
    after, _ = trainer.rescale(config, state, batch, None)
    counted = returns[weight > 0]
    np.testing.assert_allclose(
        after.algorithm_state.return_moments[:2], (counted.mean(), counted.var()), rtol=1e-4
    )


@pytest.mark.parametrize("heads", ["mlp", "residual"])
def test_saved_parameters_predict_returns(heads):
    config = PPO.check({**QUICK, "NORMALIZE_VALUE": True, "HEADS": heads})
    network = make_network(config, Discrete(3), ObsSpace(2))
    params = random_params(init_params(config, network, 2, jax.random.key(0)))
    scale = statistics.Moments(jnp.float32(500.0), jnp.float32(400.0), jnp.int32(1))
    state = PPO.init(config, params)
    state = state._replace(algorithm_state=state.algorithm_state._replace(return_moments=scale))

    def values(params):
        obs = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16, 2)), jnp.float32)
        memory, reach = jnp.zeros((4, 8 + 16 - 4, 1, 16)), jnp.zeros((4, 16), int)
        return network.apply(params, obs, memory, reach, 4, method="unroll_windows")[1]

    saved = PPO.saved_params(config, state)
    np.testing.assert_allclose(values(saved), 500 + 20 * values(params), rtol=1e-4)
    raw = PPO.check({**QUICK, "NORMALIZE_VALUE": False, "HEADS": heads})
    assert PPO.saved_params(raw, state) is params


def test_the_saved_agent_is_an_average_in_units_of_the_return():
    """The critic's scale moves between the updates."""
    config = PPO.check({**CHAIN, "EMA_RATE": 0.4})
    init, update = make_init_and_update(config, PPO)
    update, state, expected = jax.jit(update), jax.jit(init)(jax.random.key(0)), None
    for rate in (1, 1 / 2, 0.4, 0.4):
        state, _ = update(state)
        algorithm_state = state.train_state.algorithm_state
        without = state.train_state._replace(algorithm_state=algorithm_state._replace(average=None))
        last = PPO.saved_params(config, without)
        before = last if expected is None else expected
        expected = jax.tree.map(lambda x, y, rate=rate: (1 - rate) * x + rate * y, before, last)
    found = PPO.saved_params(config, state.train_state)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)
    assert not jax.tree.all(jax.tree.map(partial(np.allclose, atol=1e-4), found, last))


@pytest.mark.slow
@pytest.mark.parametrize("bins", [None, pytest.param(11, marks=pytest.mark.weekly)])
def test_a_run_that_starts_from_saved_parameters_goes_on_with_their_values(tmp_path, bins):
    """A run with LR=0 saves the values it started from, though its scale has moved.

    The scale of bins is saved and continues from there.
    """
    chain = {**CHAIN, "VALUE_BINS": bins}
    run({**chain, "LR": 1e-2, "ANNEAL_LR": False, "RESULTS_DIR": str(tmp_path / "first")})
    first = tmp_path / "first" / "MemoryChain-bsuite"
    again = {**chain, "LR": 0.0, "PARAMS": str(first), "RESULTS_DIR": str(tmp_path / "second")}
    run(again)
    saved = [
        load_results(tmp_path / root / "MemoryChain-bsuite" / "0_params.npy")
        for root in ("first", "second")
    ]
    if bins is not None:
        moments = [params.pop("return_moments") for params in saved]
        assert [float(x["count"]) for x in moments] == [4, 8]
        assert moments[0]["mean"] != moments[1]["mean"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *saved)


# ---------------------------------------------------------------- a critic that classifies


def hl_gauss(x, number, limit, sigma):
    """A target by the loop of Farebrother et al. 2024, appendix A; sigma in units of x."""
    width = 2 * limit / (number - 1)
    support = np.linspace(-limit - width / 2, limit + width / 2, number + 1)
    below = [math.erf((edge - x) / (math.sqrt(2) * sigma)) for edge in support]
    return np.diff(below) / (below[-1] - below[0])


def test_a_target_is_the_gaussian_around_a_number_that_is_cut_off_at_the_outermost_bins():
    bins = Bins(11, 10.0, squashed=False, sigma=0.75)  # every 2
    x = np.array([-30.0, -10.0, -9.0, 0.0, 0.7, 5.0, 10.0, 12.0], np.float32)
    target = np.asarray(bins.target(jnp.asarray(x)))
    expected = [hl_gauss(number, 11, 10.0, 1.5) for number in np.clip(x, -10, 10)]
    np.testing.assert_allclose(target, expected, atol=1e-6)
    np.testing.assert_allclose(target.sum(axis=-1), 1, rtol=1e-5)
    assert target[-1, -1] > 0.6  # two thirds of what is not cut off

    mean = bins.mean(jnp.log(jnp.asarray(target)))
    np.testing.assert_allclose(mean[3:6], x[3:6], atol=1e-3)
    np.testing.assert_allclose(mean[-1], expected[-1] @ np.linspace(-10, 10, 11), rtol=1e-4)
    assert bins.clips(x).tolist() == [True, *[False] * 6, True]


def test_the_gradient_of_the_cross_entropy_is_prediction_less_target():
    bins = Bins(11, 10.0, squashed=False, sigma=0.75)
    logits = np.random.default_rng(0).normal(size=(3, 11)).astype(np.float32)
    x = np.array([-3.0, 0.2, 40.0], np.float32)
    gradient = jax.grad(lambda y: bins.cross_entropy(y, x).sum())(jnp.asarray(logits))
    predicted = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    target = [hl_gauss(number, 11, 10.0, 1.5) for number in np.clip(x, -10, 10)]
    np.testing.assert_allclose(gradient, predicted - target, atol=1e-5)


def classifier(**changes):
    """A checked config, its network, a state with random parameters and moments 50 and 400."""
    config = PPO.check({**QUICK, "VALUE_BINS": 11, **changes})
    network = make_network(config, Discrete(3), ObsSpace(2))
    params = init_params(config, network, 2, jax.random.key(0))
    moments = {"mean": 50.0, "variance": 400.0, "count": 1.0}
    params = {
        **random_params({"params": params["params"]}),
        "return_moments": jax.tree.map(jnp.float32, moments),
    }
    return config, network, PPO.init(config, params)


def test_the_value_is_the_mean_over_bins_that_move_with_the_returns():
    config, network, state = classifier()
    rng = np.random.default_rng(0)
    obs = jnp.asarray(rng.standard_normal((4, 16, 2)), jnp.float32)
    inputs = obs, jnp.zeros((4, 8 + 16 - 4, 1, 16)), jnp.zeros((4, 16), int), 4
    logits = np.asarray(network.apply(state.params, *inputs, method="unroll_heads")[1])
    probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    mean = probs @ np.linspace(-10, 10, 11)

    def values(state):
        return network.apply(state.params, *inputs, method="unroll_windows")[1]

    np.testing.assert_allclose(values(state), 50 + 20 * mean, rtol=1e-4)
    assert PPO.saved_params(config, state) is state.params

    returns = rng.normal(80, 30, (4, 16)).astype(np.float32)
    weight = (rng.random((4, 16)) < 0.6).astype(np.float32)
    batch = trainer.Batch(*[None] * 9)._replace(
        value=values(state), returns=jnp.where(weight, returns, jnp.inf), weight=weight
    )
    after, batch = trainer.rescale(config, state, batch, None)
    old = statistics.Moments(jnp.float32(50.0), jnp.float32(400.0), jnp.int32(1))
    new = statistics.value_scale(
        statistics.update_return_moments(old, returns, jnp.asarray(weight), 0.95, None)
    )
    np.testing.assert_allclose(values(after), new.mu + new.sigma * mean, rtol=1e-4)
    np.testing.assert_allclose(
        batch.returns[weight > 0], (returns[weight > 0] - new.mu) / new.sigma, rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_the_value_loss_is_the_cross_entropy_of_the_steps_that_count():
    config, network, state = classifier(VF_COEF=1.0, ENT_COEF=0.0)
    rng = np.random.default_rng(0)
    obs = pack_obs(jnp.asarray(rng.standard_normal((4, 16, 2)), jnp.float32), ObsSpace(2))
    returns = rng.normal(0, 4, (4, 16)).astype(np.float32)
    weight = (rng.random((4, 16)) < 0.6).astype(np.float32)
    memory, reach = jnp.zeros((4, 8 + 16 - 4, 1, 16)), jnp.zeros((4, 16), jnp.int32)
    logits = network.apply(state.params, obs, memory, reach, 4, method="unroll_heads")[1]
    batch = trainer.Batch(
        *(obs, jnp.zeros((4, 16), int), jnp.zeros((4, 16)), jnp.zeros((4, 16))),
        *(jnp.zeros((4, 16)), jnp.where(weight, returns, jnp.nan), reach, memory),
        weight=jnp.asarray(weight / weight.mean()),
    )
    gradient, metrics = jax.grad(
        lambda params: trainer.ppo_loss(config, network, params, batch), has_aux=True
    )(state.params)
    target = [hl_gauss(number, 11, 10.0, 1.5) for number in np.clip(returns[weight > 0], -10, 10)]
    losses = -np.sum(target * np.asarray(jax.nn.log_softmax(logits))[weight > 0], axis=-1)
    np.testing.assert_allclose(metrics["value_loss"], losses.mean(), rtol=1e-4)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    assert all(x == 0 for x in jax.tree.leaves(gradient["return_moments"]))
