"""The naive network equals the fast one, and benchmarks print what they measure."""

import json
import math
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import QUICK, SMALL

from benchmarks import growth, scaling, throughput
from benchmarks.naive import NAIVE_PPO, make_naive_network
from trxl.encoders import Convolution
from trxl.environments import Discrete
from trxl.spaces import ObsSpace, obs_space
from trxl.training import collect, init_params, make_init_and_update

import train_PPO_trXL
import train_PPO_trXL_pmap
from trainer_PPO_trXL import PPO, generalized_advantages, make_batch, ppo_loss
from transformerXL import make_network
from wrappers import make_env

pytestmark = pytest.mark.slow

STEPS = QUICK["NUM_ENVS"] * QUICK["NUM_STEPS"]
SHORT_EPISODES = {**SMALL, "ENV_KWARGS": {"memory_length": 3}}


def stored_batch(config):
    """Returns environment, parameters and a second rollout's batch, whose memory is not empty."""
    init, update = make_init_and_update(config, PPO)
    env = make_env(config, config["NUM_ENVS"])
    network = make_network(config, env.action_space, obs_space(env))
    state, _ = jax.jit(update)(jax.jit(init)(jax.random.key(0)))

    @jax.jit
    def run(state):
        _, collected = collect(config, env, network, PPO, state)
        return make_batch(config, collected, generalized_advantages(collected, 0.99, 0.8))

    return env, state.train_state.params, run(state)


@pytest.mark.weekly
@pytest.mark.parametrize(
    "config",
    [
        pytest.param({**SHORT_EPISODES, "gating": False, "WINDOW_MEM": 5}, id="without gates"),
        pytest.param(SHORT_EPISODES, id="MemoryChain"),
        pytest.param(
            {**QUICK, "ENV_NAME": "CartPole-v1", "ENV_KWARGS": {"max_steps_in_episode": 7}},
            id="CartPole",
        ),
        pytest.param({**QUICK, "ENV_NAME": "Pendulum-v1"}, id="Pendulum"),
    ],
)
def test_naive_and_fast_have_the_same_losses_and_gradients(config):
    config = PPO.check(config)
    env, params, batch = stored_batch(config)

    def losses(network):
        loss = partial(ppo_loss, config, network)
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)

    (_, metrics), gradients = losses(make_network(config, env.action_space, obs_space(env)))
    (_, naive_metrics), naive_gradients = losses(
        make_naive_network(config, env.action_space, obs_space(env))
    )
    assert float(metrics["value_loss"]) != 0
    for name, value in metrics.items():
        np.testing.assert_allclose(value, naive_metrics[name], rtol=1e-5, atol=1e-5, err_msg=name)
    scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(naive_gradients))
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(naive_gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.weekly
def test_whole_updates_with_the_naive_network_are_the_same():
    curves = []
    for algorithm in (PPO, NAIVE_PPO):
        init, update = make_init_and_update(PPO.check(SHORT_EPISODES), algorithm)
        state = jax.jit(init)(jax.random.key(1))
        _, metrics = jax.jit(
            lambda state, update=update: jax.lax.scan(
                lambda state, _: update(state), state, None, 4
            )
        )(state)
        curves.append(metrics)
    fast, naive = curves
    np.testing.assert_array_equal(fast["num_episodes"], naive["num_episodes"])
    assert np.all(fast["num_episodes"] > 0)
    for name, values in fast.items():
        np.testing.assert_allclose(values, naive[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.weekly
def test_bfloat16_changes_the_products_and_nothing_else():
    config = PPO.check(SHORT_EPISODES)
    env, params, batch = stored_batch(config)
    half = PPO.check({**config, "COMPUTE_DTYPE": "bfloat16"})
    outputs = {}
    for c in (config, half):
        network = make_network(c, env.action_space, obs_space(env))
        inputs = batch.obs, batch.memory, batch.reach
        unroll = partial(network.apply, window_grad=c["WINDOW_GRAD"], method="unroll_windows")
        policy, value = jax.jit(unroll)(params, *inputs)
        outputs[c["COMPUTE_DTYPE"]] = np.concatenate([policy.logits, value[..., None]], axis=-1)
        assert policy.logits.dtype == value.dtype == jnp.float32
    difference = np.abs(outputs["bfloat16"] - outputs["float32"])
    assert 1e-5 < difference.max() < 0.02

    init, update = make_init_and_update(half, PPO)
    state, metrics = jax.jit(update)(jax.jit(init)(jax.random.key(0)))
    for leaf in jax.tree.leaves(state.train_state):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    assert state.rollout_state.memory.dtype == jnp.float32
    assert np.isfinite(metrics["total_loss"])


def test_the_arithmetic_of_a_step():
    """The published network takes 81 MFLOP per step on MemoryChain, 73 of them for the tokens."""
    config = PPO.check({**train_PPO_trXL_pmap.config, "NUM_ENVS": 64})
    assert throughput.flops_per_step(config, obs_size=3, outputs=2) == pytest.approx(81e6, rel=0.02)
    no_training = {**config, "UPDATE_EPOCHS": 0}
    no_memory = {**no_training, "WINDOW_MEM": 0, "num_layers": 1, "gating": False}
    matrices = 3 * 256 + 6 * 256**2  # encoder, layer
    heads = 2 * (2 * 256**2) + 256 * 3
    attention_and_positions = 3 * 256 + 256**2 / (64 * 128)
    assert throughput.flops_per_step(no_memory, 3, 2) == pytest.approx(
        2 * (matrices + heads + attention_and_positions)
    )


def set_seconds(monkeypatch, module, *seconds):
    """Makes a benchmark measure these median times, one after the other."""
    left = iter(seconds)
    take = lambda function, carry, calls=1: (next(left), function(carry)[0])  # noqa: E731
    monkeypatch.setattr(module, "median_seconds", take)


def test_functions_take_turns_and_a_median_is_of_the_calls_behind_the_warm_up(monkeypatch):
    calls = []
    durations = iter([100.0] * 6 + [1, 7, 5, 8, 2, 9])  # two functions, three calls each
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def function(name):
        def run(x):
            calls.append(name)
            clock.now += next(durations)
            return x + 1, None

        return run

    found = throughput.seconds_in_turns([(function("a"), 0), (function("b"), 10)], calls=3)
    turns = throughput.WARM_UP_CALLS + 3
    assert found == [(2.0, turns), (8.0, 10 + turns)]
    assert calls == ["a", "b"] * turns


@pytest.mark.weekly
def test_throughput_prints_a_table_and_a_json_object(monkeypatch, capsys):
    clock = SimpleNamespace(perf_counter=iter([0.0, 8.0, 10.0, 12.0]).__next__)
    monkeypatch.setattr(throughput, "time", clock)  # for the compilation
    set_seconds(monkeypatch, throughput, 0.25, 4.0, 2.0, 6.0, 0.5, 1.0)
    settings = [f"{key}={value}" for key, value in QUICK.items()]
    monkeypatch.setattr(sys, "argv", ["throughput.py", "train_PPO_trXL.py", *settings])
    monkeypatch.setitem(throughput.PRODUCT_SIZE, "cpu", 64)
    throughput.main()
    output = capsys.readouterr().out
    numbers = json.loads(output.splitlines()[-1])
    seconds = {"train_sps": 4, "rollout_sps": 2, "naive_train_sps": 6}
    seconds |= {"env_sps": 0.5, "env_sps_auto": 0.5, "env_sps_pool": 1}
    for name, expected in seconds.items():
        assert numbers[name] == STEPS / expected, name
    assert "| gradient steps | 31250.00 | 50.0% |" in output
    assert (numbers["compile_s"], numbers["compile_cached_s"]) == (8.0, 2.0)
    assert numbers["speedup_vs_naive"] == 1.5
    assert numbers["train_over_env"] == 0.125
    assert numbers["product_flops"] == 2 * 64**3 / 0.25
    config = train_PPO_trXL.config | QUICK
    assert numbers["flops_per_step"] == throughput.flops_per_step(PPO.check(config), 3, 2)
    assert numbers["mfu"] == pytest.approx(
        numbers["flops_per_step"] * numbers["train_sps"] / numbers["product_flops"]
    )
    assert numbers["update_bytes"] > parameter_bytes(config)
    assert numbers["device"]


@pytest.mark.weekly
def test_growth_and_memory_measure_what_an_update_needs(monkeypatch, capsys):
    config = {**QUICK, "WINDOW_MEM": 2}
    set_seconds(monkeypatch, growth, 4.0, 2.0, 1.0)
    monkeypatch.setattr(growth, "VALUES", {"WINDOW_MEM": [2]})
    settings = [f"{key}={value}" for key, value in QUICK.items()]
    monkeypatch.setattr(sys, "argv", ["growth.py", *settings])
    growth.main()
    row = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    micro = [f"{1e6 * x:.0f}" for x in (2 / STEPS, 1 / QUICK["NUM_ENVS"], 4 / STEPS)]
    assert row[:-1] == ["WINDOW_MEM=2", *micro]

    settings = [f"{key}={value}" for key, value in config.items()]
    monkeypatch.setattr(sys, "argv", ["throughput.py", "memory", *settings])
    throughput.main()
    everything = capsys.readouterr().out.splitlines()[-1].split()
    assert everything == [row[-1], "MB", "all"]
    assert float(row[-1]) * 1e6 > parameter_bytes(config)


@pytest.mark.weekly
def test_configs_in_turns_have_rates_of_all_seeds_and_their_own_memory(monkeypatch, capsys):
    def seconds_in_turns(parts, calls):
        for update, state in parts:
            state, _ = update(state)
            assert np.isfinite(jax.tree.leaves(state.train_state.params)[0]).all()
        return [(2.0, None), (1.0, None), (4.0, None)]

    monkeypatch.setattr(throughput, "seconds_in_turns", seconds_in_turns)
    quick = " ".join(f"{key}={value}" for key, value in {**QUICK, "UPDATE_EPOCHS": 1}.items())
    texts = [quick, f"train_Muesli_trXL.py {quick} MODEL_SIZE=16", f"{quick} NUM_SEEDS=2"]
    monkeypatch.setattr(sys, "argv", ["throughput.py", "turns", *texts])
    throughput.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[1:3] for row in rows] == [
        [f"{STEPS / 2:,.0f}", "1.00"],
        [f"{STEPS:,.0f}", "2.00"],
        [f"{2 * STEPS / 4:,.0f}", "1.00"],
    ]
    assert rows[1][0] == f"| `{texts[1]}`"
    # Two seeds have two states; Muesli's state has a replay.
    one, muesli, two = (float(row[3]) for row in rows)
    assert two > one < muesli


@pytest.mark.weekly
def test_scaling_counts_what_devices_exchange(monkeypatch):
    set_seconds(monkeypatch, scaling, 0.5)
    config = PPO.check({**QUICK, "NUM_ENVS": 8, "NORMALIZE_VALUE": False})
    rate, number, size = scaling.measure(config, 16, 2)
    assert rate == 16 * QUICK["NUM_STEPS"] / 0.5
    rows = [(16, 1, 2 * rate, number, size), (16, 2, rate, number, size)]
    assert f"| 2 | 16 | {rate:,.0f} | 0.50 | {number} |" in scaling.report(rows)
    gradient_steps = config["UPDATE_EPOCHS"] * config["NUM_MINIBATCHES"]
    gradients = 4 * num_params(config, obs_size=3, actions=2)
    losses = 4 * 6
    # Besides gradients: mean and variance of the advantages, and the rollout's metrics.
    assert gradient_steps < number <= gradient_steps + 6
    exchanged = size - gradient_steps * (gradients + losses)
    assert 0 < exchanged <= 4 * (2 * gradient_steps + 12)


def parameter_bytes(config):
    return 4 * num_params(PPO.check(config), obs_size=3, actions=2)


def num_params(config, obs_size, actions):
    network = make_network(config, Discrete(actions), ObsSpace(obs_size))
    shapes = jax.eval_shape(
        lambda key: init_params(config, network, obs_size, key), jax.random.key(0)
    )
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def test_an_exchange_of_unknown_length_is_not_counted_as_one():
    program = """
%body (x: f32[]) -> f32[] {
  ROOT %sum = f32[] all-reduce(%x), to_apply=%add
}
%c (x: f32[]) -> pred[] {
  ROOT %less = pred[] compare(%x, %x)
}
ENTRY %main (x: f32[]) -> f32[] {
  ROOT %loop = f32[] while(%x), condition=%c, body=%body TURNS
}
"""
    known = 'backend_config={"known_trip_count":{"n":"7"}}'
    assert scaling.all_reduces(program.replace("TURNS", known)) == (7, 28)
    with pytest.raises(ValueError, match="a loop of unknown length"):
        scaling.all_reduces(program)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["setup.py"], "error: setup.py is not one of"),
        (["NUM_ENV=3"], "error: unknown config key 'NUM_ENV'; did you mean NUM_ENVS"),
    ],
)
def test_bad_input_is_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["throughput.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        throughput.main()
    assert exit.value.code.startswith(message)


def test_the_wide_networks_convolution_is_a_dense_layer_of_nine_neighbours():
    grid = jax.random.normal(jax.random.key(0), (3, 2, 5, 4))
    variables = Convolution().init(jax.random.key(1), grid)
    padded = jnp.pad(grid, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + 2, j : j + 5] for i in range(3) for j in range(3)]
    params = variables["params"]
    dense = jnp.concatenate(shifted, axis=-1) @ params["kernel"] + params["bias"]
    np.testing.assert_allclose(Convolution().apply(variables, grid), dense, rtol=1e-4, atol=1e-5)
