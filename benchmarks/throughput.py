"""Where the time of a training goes: `python benchmarks/throughput.py [SCRIPT] [KEY=VALUE ...]`.

SCRIPT, train_PPO_trXL.py by default, is the entry script whose config is timed, on one device. The
parts are timed in one process, each on its own after a warm-up, as the median of several calls: the
environment alone with random actions and every reset strategy, the rollout, the whole update, the
update with the naive network, and the compilation. The last line is a JSON object.
"""

import importlib
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.naive import NAIVE_PPO
from trxl.config import read_overrides
from trxl.distributions import sample_uniformly
from trxl.errors import ConfigError
from trxl.rollout import split_keys
from trxl.spaces import obs_space
from trxl.training import collect, make_init_and_update

from trainer_PPO_trXL import PPO
from transformerXL import make_network
from wrappers import make_env

CALLS = 5  # of which the median is taken
WARM_UP_CALLS = 3  # the first compiles; after a few, episodes end as often as they will
PRODUCT_SIZE = {"cpu": 2048, "gpu": 8192}


def main() -> None:
    """Prints the table and the JSON line."""
    try:
        config = read_config(sys.argv[1:])
        numbers = measure(config)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(report(config, numbers))
    print(json.dumps(numbers))


def read_config(arguments: list[str]) -> dict[str, Any]:
    """The checked config of an entry script with the overrides of a command line.

    Raises:
      ConfigError: it can't be run on one device.
    """
    script = "train_PPO_trXL.py"
    if arguments and arguments[0].endswith(".py"):
        script, *arguments = arguments
    if script not in ("train_PPO_trXL.py", "train_PPO_trXL_pmap.py"):
        raise ConfigError(f"{script} is not one of train_PPO_trXL.py and train_PPO_trXL_pmap.py")
    config = importlib.import_module(script.removesuffix(".py")).config
    return PPO.check({**config, **read_overrides(arguments, PPO.keys)})


def measure(config: dict[str, Any]) -> dict[str, Any]:
    """Times all parts; says on stderr which one is under way.

    Returns:
      {name: number or text}; `*_sps` are environment steps per second.
    """
    steps = config["NUM_ENVS"] * config["NUM_STEPS"]
    env = make_env(config, config["NUM_ENVS"])
    device = jax.devices()[0]
    kind = f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else device.device_kind
    numbers = {"device": kind, "jax": jax.__version__}

    progress("a large matrix product")
    numbers["product_flops"] = product_flops(PRODUCT_SIZE.get(device.platform, 4096))
    numbers["flops_per_step"] = flops_per_step(config, env.obs_size, env.action_space.num_outputs)

    progress("compilation")
    seconds, init, update = compile_programs(config)
    numbers |= seconds

    progress("the update")
    state = init(jax.random.key(config["seed"]))
    numbers["update_bytes"] = memory_bytes(update)
    seconds, state = median_seconds(lambda state: update(state)[0], state)
    numbers["train_sps"] = steps / seconds

    progress("the rollout")
    network = make_network(config, env.action_space, obs_space(env))

    @jax.jit
    def roll(state):
        return collect(config, env, network, PPO, state)[0]

    seconds, _ = median_seconds(roll, state)
    numbers["rollout_sps"] = steps / seconds
    del state

    progress("the update with the naive network")
    init, update = make_init_and_update(config, NAIVE_PPO)
    state = jax.jit(init)(jax.random.key(config["seed"]))
    update = jax.jit(update, donate_argnums=0)
    seconds, state = median_seconds(lambda state: update(state)[0], state)
    numbers["naive_train_sps"] = steps / seconds
    del state

    numbers |= environment_rates(config)
    own = config["RESET_STRATEGY"] or env.default_reset_strategy
    numbers["env_sps"] = numbers[f"env_sps_{own}"]

    numbers["speedup_vs_naive"] = numbers["train_sps"] / numbers["naive_train_sps"]
    numbers["train_over_env"] = numbers["train_sps"] / numbers["env_sps"]
    arithmetic_sps = numbers["product_flops"] / numbers["flops_per_step"]
    numbers["mfu"] = numbers["train_sps"] / arithmetic_sps
    numbers["peak_bytes"] = peak_bytes(device)
    return numbers


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def median_seconds(function: Callable, carry: Any, calls: int = CALLS) -> tuple[float, Any]:
    """The median time of a call, after a warm-up, each call on what the one before returned.

    Returns:
      seconds, and what the last call returned.
    """
    for _ in range(WARM_UP_CALLS):
        carry = jax.block_until_ready(function(carry))
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        carry = jax.block_until_ready(function(carry))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), carry


def product_flops(size: int) -> float:
    """Floating-point operations per second of a float32 product of two square matrices."""
    matrix = jax.random.normal(jax.random.key(0), (size, size)) / size**0.5
    seconds, _ = median_seconds(jax.jit(lambda x: x @ matrix), matrix, calls=9)
    return 2 * size**3 / seconds


def flops_per_step(config: dict[str, Any], obs_size: int, outputs: int) -> float:
    """Floating-point operations that the algorithm needs per environment step.

    Counted from the equations, products alone, two operations per multiplication: a token's way
    through the network once in the rollout (keys and values cached), and in every epoch forward,
    and backward at twice that. A gradient with respect to an input is not needed for observations,
    hidden states in the memory, and sinusoids.
    """
    width, heads = config["EMBED_SIZE"], config["qkv_features"]
    hidden, layers = config["hidden_layers"], config["num_layers"]
    envs, steps, memory = config["NUM_ENVS"], config["NUM_STEPS"], config["WINDOW_MEM"]
    encoder = obs_size * width
    query_and_output, key_and_value = 2 * width * heads, 2 * width * heads
    gates = 2 * 6 * width**2 if config["gating"] else 0
    attention = 3 * (memory + 1) * heads  # content, position, values
    layer = query_and_output + key_and_value + attention + 2 * width**2 + gates
    if config["MEMORY"] == "gru":
        layer, key_and_value, memory = 6 * width**2, 0, -1
    actor_and_critic = 2 * (width + hidden) * hidden + hidden * (outputs + 1)
    token = layers * layer + actor_and_critic

    remembered = layers * key_and_value / steps  # per hidden state in an environment's memory
    positions = layers * (memory + 1) * width * heads / (envs * steps)  # all of them, once
    in_rollout = encoder + token + memory * remembered + positions
    in_epoch = (
        2 * encoder
        + 3 * token
        + 2 * (memory + steps - config["WINDOW_GRAD"]) * remembered
        + 2 * config["NUM_MINIBATCHES"] * positions
    )
    return 2 * (in_rollout + config["UPDATE_EPOCHS"] * in_epoch)


def environment_rates(config: dict[str, Any]) -> dict[str, float]:
    """Steps per second of the environments alone, `env_sps_<strategy>` of each that can be."""
    rates = {}
    for strategy in PPO.keys["RESET_STRATEGY"].choices:
        progress(f"the environment with RESET_STRATEGY={strategy}")
        try:
            checked = PPO.check({**config, "RESET_STRATEGY": strategy})
            run, carry = environment_run(checked)
            seconds, _ = median_seconds(lambda carry, run=run: run(carry)[0], carry)
        except ConfigError as error:
            progress(f"  left out: {error}")
            continue
        rates[f"env_sps_{strategy}"] = config["NUM_ENVS"] * config["NUM_STEPS"] / seconds
    return rates


def environment_run(config: dict[str, Any]) -> tuple[Callable, Any]:
    """A rollout's steps of all environments with random actions, and a carry to start from.

    Returns:
      carry -> (carry, what a rollout would store), jitted, and the carry.
    """
    num_envs = config["NUM_ENVS"]
    env = make_env(config, num_envs)

    def step(carry, _):
        keys, state, obs = carry
        keys, action_keys, step_keys = split_keys(keys, 3)
        action = sample_uniformly(env.action_space, obs, action_keys)
        obs, state, reward, _, info = env.step(step_keys, state, action)
        # What a rollout would store is written out, so that XLA can't leave it uncomputed.
        return (keys, state, obs), (obs, reward, {name: info[name] for name in env.episode_metrics})

    @jax.jit
    def run(carry):
        return jax.lax.scan(step, carry, None, config["NUM_STEPS"])

    keys, reset_keys = split_keys(jax.random.split(jax.random.key(0), env.num_rows), 2)
    obs, state = jax.jit(env.reset)(reset_keys)
    return run, (keys, state, obs)


def compile_programs(config: dict[str, Any]) -> tuple[dict[str, float], Any, Any]:
    """Traces and compiles a run's two programs, with an empty persistent cache and a full one.

    Returns:
      {name: seconds}, and the first state's and the update's program as they were compiled first.
    """
    seconds, programs = {}, []
    with tempfile.TemporaryDirectory() as folder:
        old = jax.config.jax_compilation_cache_dir
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()
        for name in ("compile_s", "compile_cached_s"):
            jax.clear_caches()
            start = time.perf_counter()
            init, update = make_init_and_update(config, PPO)
            init = jax.jit(init).lower(jax.random.key(0)).compile()
            state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), init.out_info)
            update = jax.jit(update, donate_argnums=0).lower(state).compile()
            seconds[name] = time.perf_counter() - start
            programs += [init, update]
        jax.config.update("jax_compilation_cache_dir", old)
        compilation_cache.reset_cache()
    return seconds, *programs[:2]


def memory_bytes(compiled: Any) -> int:
    """What a compiled update needs on its device by XLA's own analysis, its state included."""
    analysis = compiled.memory_analysis()
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def peak_bytes(device: jax.Device) -> int:
    """The most memory that was in use: the device's own count, or that of the process on a CPU."""
    stats = device.memory_stats() or {}
    return stats.get("peak_bytes_in_use", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def report(config: dict[str, Any], numbers: dict[str, Any]) -> str:
    """The numbers as a table: what a step costs in each part, in microseconds."""
    whole = 1e6 / numbers["train_sps"]
    env = 1e6 / numbers["env_sps"]
    in_rollout = 1e6 / numbers["rollout_sps"]
    arithmetic = 1e6 * numbers["flops_per_step"] / numbers["product_flops"]
    rows = [
        ("environment alone, random actions", env),
        ("the rest of the rollout: the agent", in_rollout - env),
        ("gradient steps", whole - in_rollout),
        ("the whole update", whole),
        ("for comparison: the arithmetic at full speed", arithmetic),
        ("for comparison: the update with the naive network", 1e6 / numbers["naive_train_sps"]),
    ]
    rows += [
        (f"for comparison: environment, RESET_STRATEGY={name.removeprefix('env_sps_')}", 1e6 / sps)
        for name, sps in numbers.items()
        if name.startswith("env_sps_")
    ]
    lines = [
        f"{config['ENV_NAME']}, {config['NUM_ENVS']} environments, {config['NUM_STEPS']} steps,"
        f" on {numbers['device']}, JAX {numbers['jax']}",
        "",
        "| part | us per environment step | share | steps/s |",
        "| --- | --- | --- | --- |",
        *(f"| {name} | {us:.2f} | {us / whole:.1%} | {1e6 / us:,.0f} |" for name, us in rows),
        "",
        f"{numbers['flops_per_step'] / 1e6:.1f} MFLOP per step, {numbers['mfu']:.3f} of the"
        f" {numbers['product_flops'] / 1e9:,.0f} GFLOP/s of a large float32 product;"
        f" {numbers['speedup_vs_naive']:.2f} times the naive network",
        f"compiled in {numbers['compile_s']:.1f} s, {numbers['compile_cached_s']:.1f} s from the"
        f" cache; an update needs {numbers['update_bytes'] / 1e6:,.0f} MB, the process had at most"
        f" {numbers['peak_bytes'] / 1e6:,.0f} MB in use",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
