"""Measures where the time of a training goes, on one device.

    python benchmarks/throughput.py [SCRIPT] [KEY=VALUE ...]

times the parts of a PPO update, each on its own: the environment with random actions and every
reset strategy, the rollout, the whole update, the update with the naive network, the compilation.
SCRIPT is the entry script whose config is timed, train_PPO_trXL.py by default. The last line is a
JSON object.

    python benchmarks/throughput.py turns "[SCRIPT] [KEY=VALUE ...]" ["[SCRIPT] ..." ...]

times whole updates of several configs, which take turns. Use it to compare: algorithms, dtypes,
seeds under one vmap, settings.

    python benchmarks/throughput.py memory [SCRIPT] [KEY=VALUE ...]

compiles the update, runs nothing, and prints the memory that it needs by XLA's own analysis.
"""

import importlib
import json
import os
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
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
from trxl.training import Algorithm, collect, make_init_and_update

from trainer_Muesli_trXL import MUESLI
from trainer_PPO_trXL import PPO
from transformerXL import make_network
from wrappers import make_env

CALLS = 5  # of which the median is taken
WARM_UP_CALLS = 3  # after a few calls episodes end as often as they will
PRODUCT_SIZE = {"cpu": 2048, "gpu": 8192}
ALGORITHMS = {
    "train_PPO_trXL.py": PPO,
    "train_PPO_trXL_pmap.py": PPO,
    "train_Muesli_trXL.py": MUESLI,
}

Config = dict[str, Any]


def main() -> None:
    """Reads the command line and prints what it asks for."""
    mode, *arguments = sys.argv[1:] or [""]
    try:
        if mode == "turns":
            print(compare(arguments or [""]))
        elif mode == "memory":
            print(memory_report(*read_config(arguments)))
        else:
            config = read_ppo_config(sys.argv[1:])
            numbers = measure(config)
            print(report(config, numbers))
            print(json.dumps(numbers))
    except ConfigError as error:
        sys.exit(f"error: {error}")


# ------------------------------------------------------------------ what all benchmarks share


def read_config(
    arguments: list[str], script: str = "train_PPO_trXL.py"
) -> tuple[Config, Algorithm]:
    """Returns the checked config of an entry script with overrides, and its algorithm.

    Args:
      arguments: [SCRIPT] [KEY=VALUE ...].
      script: the one that is meant where the arguments name none.

    Raises:
      ConfigError: the config can't be run on one device.
    """
    if arguments and arguments[0].endswith(".py"):
        script, *arguments = arguments
    if script not in ALGORITHMS:
        raise ConfigError(f"{script} is not one of {', '.join(ALGORITHMS)}")
    algorithm = ALGORITHMS[script]
    config = importlib.import_module(script.removesuffix(".py")).config
    return algorithm.check({**config, **read_overrides(arguments, algorithm.keys)}), algorithm


def read_ppo_config(arguments: list[str], script: str = "train_PPO_trXL.py") -> Config:
    """Returns the config of `read_config`.

    Raises:
      ConfigError: the script trains another algorithm than PPO, or the config can't be run.
    """
    config, algorithm = read_config(arguments, script)
    if algorithm is not PPO:
        raise ConfigError(f"{arguments[0]} is not PPO's, whose parts are timed; see `turns`")
    return {**config, "NUM_SEEDS": 1}


def make_programs(config: Config, algorithm: Algorithm) -> tuple[Callable, Callable, jax.Array]:
    """Returns a run's init and update and the key of init, of NUM_SEEDS runs under `jax.vmap`."""
    init, update = make_init_and_update(config, algorithm)
    key = jax.random.key(config["seed"])
    if config["NUM_SEEDS"] == 1:
        return init, update, key
    return jax.vmap(init), jax.vmap(update), jax.random.split(key, config["NUM_SEEDS"])


def compile_update(config: Config, algorithm: Algorithm) -> tuple[Callable, Any]:
    """Compiles a run's programs.

    Returns:
      () -> the first state; and the compiled update, which donates its state.
    """
    init, update, key = make_programs(config, algorithm)
    first = jax.jit(init).lower(key).compile()
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), first.out_info)
    return partial(first, key), jax.jit(update, donate_argnums=0).lower(state).compile()


def make_rollout(config: Config) -> Callable:
    """Returns a jitted rollout of PPO, state -> (state, trajectories)."""
    env = make_env(config, config["NUM_ENVS"])
    network = make_network(config, env.action_space, obs_space(env))
    return jax.jit(partial(collect, config, env, network, PPO))


def make_environment_run(config: Config) -> tuple[Callable, Any]:
    """Makes a rollout without a network: random actions in all environments.

    Returns:
      carry -> (carry, what a rollout would store), jitted; and a first carry.
    """
    env = make_env(config, config["NUM_ENVS"])

    def step(carry, _):
        keys, state, obs = carry
        keys, action_keys, step_keys = split_keys(keys, 3)
        action = sample_uniformly(env.action_space, obs, action_keys)
        obs, state, reward, _, info = env.step(step_keys, state, action)
        # As results of a jitted function they can't be optimised away.
        return (keys, state, obs), (obs, reward, {name: info[name] for name in env.episode_metrics})

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, config["NUM_STEPS"]))
    keys, reset_keys = split_keys(jax.random.split(jax.random.key(0), env.num_rows), 2)
    obs, state = jax.jit(env.reset)(reset_keys)
    return run, (keys, state, obs)


def median_seconds(function: Callable, carry: Any, calls: int = CALLS) -> tuple[float, Any]:
    """Returns the median time of a call of carry -> (carry, ...), and the last carry."""
    ((seconds, carry),) = seconds_in_turns([(function, carry)], calls)
    return seconds, carry


def seconds_in_turns(parts: list[tuple[Callable, Any]], calls: int) -> list[tuple[float, Any]]:
    """Times functions in turns, so that a machine that slows down slows all of them.

    Args:
      parts: for each function, carry -> (carry, ...), and its first carry.
      calls: timed calls of each function, after `WARM_UP_CALLS` others.

    Returns:
      For each function, the median time of a call and the last carry.
    """
    functions, carries = map(list, zip(*parts, strict=True))
    seconds: list[list[float]] = [[] for _ in parts]
    for _ in range(WARM_UP_CALLS + calls):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            carries[i] = jax.block_until_ready(function(carries[i]))[0]
            seconds[i].append(time.perf_counter() - start)
    medians = [statistics.median(times[WARM_UP_CALLS:]) for times in seconds]
    return [*zip(medians, carries, strict=True)]


def memory_bytes(compiled: Any) -> int:
    """Returns the bytes that a compiled update needs on its device, state included."""
    analysis = compiled.memory_analysis()
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def env_steps(config: Config) -> int:
    """Returns the environment steps of an update, of all seeds together."""
    return config["NUM_SEEDS"] * config["NUM_ENVS"] * config["NUM_STEPS"]


def device_name() -> str:
    """Returns the kind of the first device and the version of JAX."""
    device = jax.devices()[0]
    kind = f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else device.device_kind
    return f"{kind}, JAX {jax.__version__}"


def progress(text: str) -> None:
    """Prints the current step on stderr."""
    print(text, file=sys.stderr, flush=True)


def table(*rows: tuple) -> str:
    """Returns a Markdown table, whose first row is its head."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], "| --- " * len(rows[0]) + "|", *lines[1:]])


# ------------------------------------------------------------------ configs in turns, memory


def compare(texts: list[str]) -> str:
    """Times updates of several configs in turns.

    Args:
      texts: [SCRIPT] [KEY=VALUE ...] of each.

    Returns:
      A table of steps/s, of all seeds together, and of memory.
    """
    configs = [read_config(shlex.split(text)) for text in texts]
    updates = [compile_update(*given) for given in configs]
    times = seconds_in_turns([(update, init()) for init, update in updates], CALLS)
    rates = [env_steps(config) / s for (config, _), (s, _) in zip(configs, times, strict=True)]
    rows = [("config", "steps/s", "times the first", "MB of state", "MB of temporaries")]
    for text, rate, (_, update) in zip(texts, rates, updates, strict=True):
        memory = update.memory_analysis()
        sizes = memory.argument_size_in_bytes / 1e6, memory.temp_size_in_bytes / 1e6
        cells = [f"{rate:,.0f}", f"{rate / rates[0]:.2f}", *(f"{size:,.1f}" for size in sizes)]
        rows.append((f"`{text}`", *cells))
    return f"{device_name()}\n\n{table(*rows)}"


def memory_report(config: Config, algorithm: Algorithm) -> str:
    """Returns what an update needs on its device, in MB."""
    _, update = compile_update(config, algorithm)
    analysis = update.memory_analysis()
    parts = {
        "state of the run, updated in place": analysis.argument_size_in_bytes,
        "temporaries: trajectory, batch, activations": analysis.temp_size_in_bytes,
        "all": memory_bytes(update),
    }
    return "\n".join(f"{size / 1e6:10,.1f} MB  {name}" for name, size in parts.items())


# ------------------------------------------------------------------ the parts of an update


def measure(config: Config) -> dict[str, Any]:
    """Times all parts of a PPO update.

    Returns:
      {name: number or text}; `*_sps` are environment steps per second.
    """
    steps = env_steps(config)
    env = make_env(config, config["NUM_ENVS"])
    platform = jax.devices()[0].platform
    numbers: dict[str, Any] = {"device": device_name()}

    progress("a large matrix product")
    numbers["product_flops"] = product_flops(PRODUCT_SIZE.get(platform, 4096))
    numbers["flops_per_step"] = flops_per_step(config, env.obs_size, env.action_space.num_outputs)

    progress("compilation")
    seconds, init, update = compile_twice(config)
    numbers |= seconds

    progress("the update")
    seconds, state = median_seconds(update, init())
    numbers |= {"update_bytes": memory_bytes(update), "train_sps": steps / seconds}

    progress("the rollout")
    seconds, _ = median_seconds(make_rollout(config), state)
    numbers["rollout_sps"] = steps / seconds
    del state

    progress("the update with the naive network")
    init, update = compile_update(config, NAIVE_PPO)
    numbers["naive_train_sps"] = steps / median_seconds(update, init())[0]

    numbers |= environment_rates(config)
    own = config["RESET_STRATEGY"] or env.default_reset_strategy
    numbers["env_sps"] = numbers[f"env_sps_{own}"]

    numbers["speedup_vs_naive"] = numbers["train_sps"] / numbers["naive_train_sps"]
    numbers["train_over_env"] = numbers["train_sps"] / numbers["env_sps"]
    arithmetic_sps = numbers["product_flops"] / numbers["flops_per_step"]
    numbers["mfu"] = numbers["train_sps"] / arithmetic_sps
    numbers["peak_bytes"] = peak_bytes(jax.devices()[0])
    return numbers


def product_flops(size: int) -> float:
    """Returns floating-point operations per second of a float32 product of square matrices."""
    matrix = jax.random.normal(jax.random.key(0), (size, size)) / size**0.5
    seconds, _ = median_seconds(jax.jit(lambda x: (x @ matrix, ())), matrix, calls=9)
    return 2 * size**3 / seconds


def flops_per_step(config: Config, obs_size: int, outputs: int) -> float:
    """Returns floating-point operations that the algorithm needs per environment step.

    Counts the equations' products, two operations per multiplication. A token passes the network
    once in the rollout (keys and values cached), and in every epoch forward, and backward at twice
    the cost. Observations, hidden states in the memory and sinusoids need no gradient.
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


def environment_rates(config: Config) -> dict[str, float]:
    """Returns steps/s of the environments alone, `env_sps_<strategy>` of each possible one."""
    rates = {}
    for strategy in PPO.keys["RESET_STRATEGY"].choices:
        progress(f"the environment with RESET_STRATEGY={strategy}")
        try:
            checked = PPO.check({**config, "RESET_STRATEGY": strategy})
            seconds, _ = median_seconds(*make_environment_run(checked))
        except ConfigError as error:
            progress(f"  left out: {error}")
            continue
        rates[f"env_sps_{strategy}"] = config["NUM_ENVS"] * config["NUM_STEPS"] / seconds
    return rates


def compile_twice(config: Config) -> tuple[dict[str, float], Callable, Any]:
    """Traces and compiles a run's programs with an empty persistent cache and with a full one.

    Returns:
      {name: seconds}, and what `compile_update` returned first.
    """
    seconds, programs = {}, []
    with tempfile.TemporaryDirectory() as folder:
        old = jax.config.jax_compilation_cache_dir
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()
        for name in ("compile_s", "compile_cached_s"):
            jax.clear_caches()
            start = time.perf_counter()
            programs += compile_update(config, PPO)
            seconds[name] = time.perf_counter() - start
        jax.config.update("jax_compilation_cache_dir", old)
        compilation_cache.reset_cache()
    return seconds, *programs[:2]


def peak_bytes(device: jax.Device) -> int:
    """Returns the peak memory of the device, on a CPU of the whole process."""
    stats = device.memory_stats() or {}
    return stats.get("peak_bytes_in_use", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def report(config: Config, numbers: dict[str, Any]) -> str:
    """Returns a table of what a step costs in each part, in microseconds."""
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
    cells = [(name, f"{us:.2f}", f"{us / whole:.1%}", f"{1e6 / us:,.0f}") for name, us in rows]
    return (
        f"{config['ENV_NAME']}, {config['NUM_ENVS']} environments, {config['NUM_STEPS']} steps,"
        f" on {numbers['device']}\n\n"
        f"{table(('part', 'us per environment step', 'share', 'steps/s'), *cells)}\n\n"
        f"{numbers['flops_per_step'] / 1e6:.1f} MFLOP per step, {numbers['mfu']:.3f} of the"
        f" {numbers['product_flops'] / 1e9:,.0f} GFLOP/s of a large float32 product;"
        f" {numbers['speedup_vs_naive']:.2f} times the naive network\n"
        f"compiled in {numbers['compile_s']:.1f} s, {numbers['compile_cached_s']:.1f} s from the"
        f" cache; an update needs {numbers['update_bytes'] / 1e6:,.0f} MB, the process had at most"
        f" {numbers['peak_bytes'] / 1e6:,.0f} MB in use"
    )


if __name__ == "__main__":
    main()
