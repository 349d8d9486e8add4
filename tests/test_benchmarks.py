"""The naive network against the fast one, and that the benchmarks report what they say."""

import json
import math
import sys
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import QUICK, SMALL

from benchmarks import (
    algorithms,
    gpu_program,
    growth,
    memory,
    pieces,
    population,
    scaling,
    scaling_model,
    throughput,
)
from benchmarks.naive import NAIVE_PPO, make_naive_network
from trxl.encoders import Convolution
from trxl.environments import Discrete
from trxl.errors import ConfigError
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
    """A second rollout as the loss reads it: its memory is not empty; and the parameters."""
    init, update = make_init_and_update(config, PPO)
    env = make_env(config, config["NUM_ENVS"])
    network = make_network(config, env.action_space, obs_space(env))
    state, _ = jax.jit(update)(jax.jit(init)(jax.random.key(0)))

    @jax.jit
    def run(state):
        _, collected = collect(config, env, network, PPO, state)
        return make_batch(config, collected, generalized_advantages(collected, 0.99, 0.8))

    return env, state.train_state.params, run(state)


@pytest.mark.parametrize(
    "config",
    [
        SHORT_EPISODES,
        {**SHORT_EPISODES, "gating": False, "WINDOW_MEM": 5},
        {**QUICK, "ENV_NAME": "CartPole-v1", "ENV_KWARGS": {"max_steps_in_episode": 7}},
        {**QUICK, "ENV_NAME": "Pendulum-v1"},
    ],
    ids=["MemoryChain", "without gates", "CartPole", "Pendulum"],
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


def test_bfloat16_changes_the_products_and_nothing_else():
    config = PPO.check(SHORT_EPISODES)
    env, params, batch = stored_batch(config)
    half = PPO.check({**config, "COMPUTE_DTYPE": "bfloat16"})
    outputs = {}
    for c in (config, half):
        network = make_network(c, env.action_space, obs_space(env))
        policy, value = network.apply(
            params, batch.obs, batch.memory, batch.reach, c["WINDOW_GRAD"], method="unroll_windows"
        )
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
    """81 MFLOP for the published network on MemoryChain, of which 73 are the tokens' own."""
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


SECONDS = 0.5
"""What everything takes by the clock of these tests, so that rates are known."""


def set_clock(monkeypatch, module):
    """Gives a benchmark a clock that is `SECONDS` further whenever it is read."""
    clock = SimpleNamespace(perf_counter=count(0.0, SECONDS).__next__)
    monkeypatch.setattr(module, "time", clock)


def set_seconds(monkeypatch, module, *seconds):
    """Has a benchmark find these median times, one after the other."""
    left = iter(seconds)
    take = lambda function, carry, calls=1: (next(left), function(carry))  # noqa: E731
    monkeypatch.setattr(module, "median_seconds", take)


def test_a_median_is_of_the_calls_behind_the_warm_up(monkeypatch):
    calls = []
    times = iter([0, 1, 10, 15, 20, 22])  # start and end of three calls
    clock = SimpleNamespace(perf_counter=lambda: float(next(times)))
    monkeypatch.setattr(throughput, "time", clock)
    seconds, last = throughput.median_seconds(lambda x: calls.append(x) or x + 1, 0, calls=3)
    assert (seconds, last) == (2.0, throughput.WARM_UP_CALLS + 3)
    assert calls == [*range(last)]


def test_throughput_prints_a_table_and_a_json_object(monkeypatch, capsys):
    set_clock(monkeypatch, throughput)  # of the compilation
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
    assert numbers["compile_s"] == numbers["compile_cached_s"] == SECONDS
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


def test_growth_and_memory_measure_what_an_update_needs(monkeypatch, capsys):
    set_seconds(monkeypatch, growth, 4.0, 2.0, 1.0)
    config = PPO.check(QUICK)
    point = growth.point(config, "WINDOW_MEM", 2)
    assert point["WINDOW_MEM"] == 2
    assert (point["update_us"], point["rollout_us"]) == (4e6 / STEPS, 2e6 / STEPS)
    assert point["read_cache_us"] == 1e6 / QUICK["NUM_ENVS"]
    assert len(growth.plot(config, {"WINDOW_MEM": [point]}).axes) == 2

    settings = [f"{key}={value}" for key, value in {**QUICK, "WINDOW_MEM": 2}.items()]
    monkeypatch.setattr(sys, "argv", ["memory.py", *settings])
    memory.main()
    everything = capsys.readouterr().out.splitlines()[-1].split()
    assert float(everything[0]) == round(point["update_bytes"] / 1e6)
    assert everything[1:] == ["MB", "all"]


def test_scaling_counts_what_devices_exchange(monkeypatch):
    set_seconds(monkeypatch, scaling, SECONDS)
    config = PPO.check({**QUICK, "NUM_ENVS": 8, "NORMALIZE_VALUE": False})
    row = scaling.measure(config, 16, 2)
    assert row["sps"] == 16 * QUICK["NUM_STEPS"] / SECONDS
    assert "| 2 | 16 |" in scaling.report(config, [{**row, "devices": 1}, row])
    gradient_steps = config["UPDATE_EPOCHS"] * config["NUM_MINIBATCHES"]
    gradients = 4 * num_params(config, obs_size=3, actions=2)
    losses = 4 * 6
    # Beside the gradients: mean and variance of the advantages, and the rollout's metrics.
    assert gradient_steps < row["all_reduces"] <= gradient_steps + 6
    exchanged = row["all_reduce_bytes"] - gradient_steps * (gradients + losses)
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
ENTRY %main (x: f32[]) -> f32[] {
  ROOT %loop = f32[] while(%x), condition=%c, body=%body TURNS
}
"""
    known = 'backend_config={"known_trip_count":{"n":"7"}}'
    assert scaling.all_reduces(program.replace("TURNS", known)) == (7, 28)
    with pytest.raises(ValueError, match="a loop of unknown length"):
        scaling.all_reduces(program)


def test_the_scaling_model_starts_from_one_gpu_and_the_published_config():
    run = scaling_model.RUN
    config = PPO.check(train_PPO_trXL_pmap.config)
    assert (run.envs, run.steps, run.minibatches) == tuple(
        config[key] for key in ("NUM_ENVS", "NUM_STEPS", "NUM_MINIBATCHES")
    )
    assert run.gradient_steps == config["UPDATE_EPOCHS"] * config["NUM_MINIBATCHES"]
    assert run.all_reduce_bytes == 4 * (num_params(config, obs_size=8268, actions=43) + 6)
    for machine in scaling_model.MACHINES:
        assert scaling_model.update_seconds(machine, run, 1, run.envs) == (machine.compute_s, 0.0)
        one_node = scaling_model.all_reduce_seconds(machine, 1e11, 8)
        assert one_node == pytest.approx(1.75e11 / machine.node_bandwidth, rel=0.01)


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


def test_the_pieces_are_timed_beside_forms_of_the_same_function():
    cells = jax.random.normal(jax.random.key(0), (3, 2, 5, 4))
    variables = Convolution().init(jax.random.key(1), cells)
    forms = {"as committed": Convolution().apply, "plain": pieces.nine_neighbours}
    outputs = [form(variables, cells) for form in forms.values()]
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)
    seconds = pieces.take_turns(forms, None, (variables, cells), rounds=1)
    assert set(seconds) == set(forms)
    assert all(0 < value < 60 for value in seconds.values())


PROGRAM = Path(__file__).with_name("compiled_program.txt").read_text()


def test_a_compiled_programs_kernels_bytes_and_operations_are_counted_by_part():
    program = gpu_program.CompiledProgram(PROGRAM)
    (loop,) = program.loops()
    assert loop.trips == 5
    cost = program.cost(loop.called("body"))
    assert cost["agent"] == (1, 2 * 8 * 4 * 4, 2 * 8 * 4 * 4)  # 8 x 4 by 4 x 4
    assert cost["storage"].launches == 1
    assert cost["storage"].bytes == 2 * 8 * 4 * 4 + 4  # read, written in its place, and where
    assert cost["game"] == (3 * (2 + 1), 3 * (20 + 1), 0)  # three trips and their condition
    assert cost["worlds"].launches == pytest.approx((2 + 1) / gpu_program.WORLDS_EVERY)
    assert cost["bootstrap"] == (2, 20, 0)  # the longer branch
    total = gpu_program.total_of(program.cost(program.entry))
    assert total.launches == pytest.approx(5 * (1 + 1 + 9 + 3 / 19 + 2 + 1))


def test_a_population_is_timed_in_chunks(monkeypatch):
    monkeypatch.setattr(population, "RUNS", 2)
    monkeypatch.setattr(population, "CHUNKS", (2, 1))
    monkeypatch.setattr(population, "ROUNDS", 1)
    monkeypatch.setattr(population, "WARM_UP_CALLS", 1)
    set_clock(monkeypatch, population)
    numbers = population.measure(PPO.check(QUICK))
    assert numbers == {"2": 2 * STEPS / SECONDS, "1": 2 * STEPS / SECONDS}


def test_a_key_of_one_algorithm_changes_that_one_alone():
    configs = algorithms.changed(["MODEL_SIZE=32", "EMBED_SIZE=128"])
    ppo, muesli = (configs[name][1] for name in ("PPO", "Muesli"))
    assert (ppo["EMBED_SIZE"], muesli["EMBED_SIZE"], muesli["MODEL_SIZE"]) == (128, 128, 32)
    assert "MODEL_SIZE" not in ppo
    with pytest.raises(ConfigError, match="WIDTH"):
        algorithms.changed(["WIDTH=32"])


def test_algorithms_are_timed_in_turns(monkeypatch):
    monkeypatch.setattr(algorithms, "ROUNDS", 1)
    monkeypatch.setattr(algorithms, "WARM_UP_CALLS", 1)
    config = QUICK | {"UPDATE_EPOCHS": 1}
    small = {algo.name: (algo, algo.check(config)) for algo, _ in algorithms.SCRIPTS}
    set_clock(monkeypatch, algorithms)
    numbers = algorithms.measure(small)
    assert numbers.keys() == {"PPO", "Muesli"}
    least = 3 * parameter_bytes(config)  # with the two moments of Adam
    assert numbers["Muesli"]["state_bytes"] > numbers["PPO"]["state_bytes"] > least
    assert all(found["sps"] == STEPS / SECONDS for found in numbers.values())
