"""Measures on a GPU: `python benchmarks/gpu.py MODE [SCRIPT] [KEY=VALUE ...]`.

MODE is one of

    check     compares the network with its NumPy oracle, the ratio before the first gradient step
              with 1, and a resumed run with an uninterrupted one. Exits with 1 if an error is too
              large. On a GPU, resuming needs XLA_FLAGS=--xla_gpu_deterministic_ops=true.
    speed     times the environment, the rollout and the whole update, by environments and dtype.
              With NUM_ENVS or COMPUTE_DTYPE, times only that value.
    profile   lists the kernels of an update and the gaps before them.
    launches  counts the kernels of the compiled update by its parts. Needs no GPU: XLA's CUDA
              plugin, `pip install "jax[cuda13]"`, compiles for a described H100.

SCRIPT is the entry script whose config is measured, train_PPO_trXL_pmap.py by default, on one
device. Each result is printed at once. Compiled programs are cached, so a second call soon reaches
the point where the first was stopped.
"""

import gzip
import json
import math
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.throughput import (
    WARM_UP_CALLS,
    Config,
    compile_update,
    device_name,
    env_steps,
    make_environment_run,
    make_programs,
    make_rollout,
    median_seconds,
    read_config,
    read_ppo_config,
    table,
)
from trxl.errors import ConfigError
from trxl.results import load_results
from trxl.runs.run import enable_compilation_cache
from trxl.training import Algorithm

from trainer_PPO_trXL import PPO

SIZES = (1024, 4096, 8192)
PRECISIONS = {
    "float32": ("float32", "highest"),
    "TF32": ("float32", "tensorfloat32"),
    "bfloat16": ("bfloat16", None),
}
"""COMPUTE_DTYPE and JAX's precision of float32 products, by name."""

TOLERANCES = {"float32": 1e-4, "TF32": 2e-2, "bfloat16": 2e-1}
"""Tolerated errors of outputs of order 1, from products with 23, 10 and 7 bits of fraction."""

TOP = 20  # kernels and gaps that a profile lists
PROFILED_UPDATES = 2


def main() -> None:
    """Reads the command line, measures and prints."""
    mode, *arguments = sys.argv[1:] or [""]
    if mode not in MODES:
        sys.exit(f"error: {mode or 'no mode'} is none of {', '.join(MODES)}")
    enable_compilation_cache()
    try:
        MODES[mode](arguments)
    except ConfigError as error:
        sys.exit(f"error: {error}")


# ------------------------------------------------------------------ correctness


def check(arguments: list[str]) -> None:
    """Prints the largest error of each test; exits with status 1 if one exceeds its tolerance."""
    if arguments:
        raise ConfigError(f"check takes no argument: {arguments[0]}")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    print(f"{device_name()}\n\n{table(('test', 'largest error', 'tolerance', ''))}", flush=True)
    passed = []
    for (name, test), kind in product(TESTS.items(), PRECISIONS):
        dtype, precision = PRECISIONS[kind]
        with jax.default_matmul_precision(precision):
            error = test(dtype)
        tolerance = 0.0 if test is resume_error else TOLERANCES[kind]
        passed.append(error <= tolerance)
        verdict = "passed" if passed[-1] else "FAILED"
        print(f"| {name}, {kind} | {error:.2g} | {tolerance:g} | {verdict} |", flush=True)
    sys.exit(not all(passed))


def oracle_error(dtype: str) -> float:
    """Returns the relative error of the step form's values, with random parameters and inputs."""
    from support import from_equations, make_step_form, random_case, reach_of

    case = random_case({"EMBED_SIZE": 64, "qkv_features": 64, "COMPUTE_DTYPE": dtype})
    config, network, params, obs, memory, boundary = case
    values = np.stack([x[1] for x in from_equations(config, params, obs, memory, boundary)])
    reach = reach_of(boundary, config["WINDOW_MEM"])
    ours = np.asarray(make_step_form(network)(params, obs, memory, reach)[1])
    return float(np.abs(ours - values).max() / np.abs(values).max())


def ratio_error(dtype: str) -> float:
    """Returns max |ratio - 1| or value error of a rollout with many episode ends."""
    from two_forms import CHAIN, largest_ratio_error, two_rollouts

    return largest_ratio_error(two_rollouts({**CHAIN, "COMPUTE_DTYPE": dtype}))


def resume_error(dtype: str) -> float:
    """Returns the largest parameter difference between a resumed run and an uninterrupted one."""
    from support import SMALL, resumed_config, run

    config = {**SMALL, "ENV_NAME": "MemoryChain-bsuite", "COMPUTE_DTYPE": dtype}
    config |= {"NUM_ENVS": 64, "TOTAL_TIMESTEPS": 4096, "ANNEAL_LR": False}
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        run({**config, "RESULTS_DIR": f"{folder}/whole"})
        run({**config, "RESULTS_DIR": f"{folder}/half", "TOTAL_TIMESTEPS": 2048})
        (half,) = Path(folder, "half").iterdir()
        run(resumed_config(half, {"TOTAL_TIMESTEPS": 4096}))  # its folder sorts after half's
        files = (sorted(Path(folder, x).glob("*/0_params.npy"))[-1] for x in ("whole", "half"))
        ours, theirs = (jax.tree.leaves(load_results(file)) for file in files)
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


TESTS = {
    "network against the NumPy oracle": oracle_error,
    "ratio and value before the first gradient step": ratio_error,
    "a resumed run against one that was not stopped": resume_error,
}

# ------------------------------------------------------------------ steps per second


def speed(arguments: list[str]) -> None:
    """Prints steps/s of the environment with random actions, of rollouts and of whole updates."""
    asked = read_ppo_config(arguments, "train_PPO_trXL_pmap.py")
    given = {argument.partition("=")[0] for argument in arguments}
    head = ("NUM_ENVS", "part", "precision", "steps/s", "of the environment's")
    print(f"{asked['ENV_NAME']} on {device_name()}\n\n{table(head)}", flush=True)
    for size in [asked["NUM_ENVS"]] if "NUM_ENVS" in given else SIZES:
        total = max(asked["TOTAL_TIMESTEPS"], size * asked["NUM_STEPS"])
        config = PPO.check({**asked, "NUM_ENVS": size, "TOTAL_TIMESTEPS": total})
        alone = print_rate(config, ("environment", ""), *make_environment_run(config))
        for name, (dtype, precision) in PRECISIONS.items():
            if "COMPUTE_DTYPE" in given and dtype != asked["COMPUTE_DTYPE"]:
                continue
            config["COMPUTE_DTYPE"] = dtype
            with jax.default_matmul_precision(precision):
                init, update = compile_update(config, PPO)
                state = init()
                print_rate(config, ("rollout", name), make_rollout(config), state, alone)
                print_rate(config, ("update", name), update, state, alone)


def print_rate(
    config: Config, cells: tuple[str, str], function: Callable, carry: Any, alone: float = math.nan
) -> float:
    """Times carry -> (carry, ...) and prints a row; returns environment steps per second."""
    seconds, _ = median_seconds(function, carry)
    rate = env_steps(config) / seconds
    share = f"{rate / alone:.3f}" if alone == alone else ""
    print(f"| {config['NUM_ENVS']} | {' | '.join(cells)} | {rate:,.0f} | {share} |", flush=True)
    return rate


# ------------------------------------------------------------------ a profile


def profile(arguments: list[str]) -> None:
    """Prints the kernels of a few updates and the gaps before them."""
    config, algorithm = read_config(arguments, "train_PPO_trXL_pmap.py")
    init, update = compile_update(config, algorithm)
    state = init()
    for _ in range(WARM_UP_CALLS):
        state = jax.block_until_ready(update(state)[0])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(PROFILED_UPDATES):
                state = jax.block_until_ready(update(state)[0])
        (path,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    found = kernels_and_gaps(events)
    rows = [
        (name, f"{busy / 1e3:,.3f}", found.counts[name], f"{found.gaps[name] / 1e3:,.3f}")
        for name, busy in found.busy.most_common(TOP)
    ]
    number = found.counts.total()
    print(
        f"{config['ENV_NAME']}, {config['NUM_ENVS']} environments, on {device_name()}:"
        f" {number / PROFILED_UPDATES:,.0f} kernels per update,"
        f" {number / PROFILED_UPDATES / config['NUM_STEPS']:,.0f} per rollout step;"
        f" {100 * found.idle_share:.0f} % of {found.span / 1e3:,.0f} ms idle\n\n"
        f"{table(('kernel', 'ms', 'launches', 'gaps before, ms'), *rows)}"
    )


class Profile(NamedTuple):
    """Kernels of a trace, in microseconds, by name."""

    busy: Counter[str]
    counts: Counter[str]
    gaps: Counter[str]  # idle time by the next kernel
    span: float

    @property
    def idle_share(self) -> float:
        """Share of the time in which no kernel ran."""
        return self.gaps.total() / self.span if self.span else 0.0


def kernels_and_gaps(events: list[dict[str, Any]]) -> Profile:
    """Finds the kernels of a trace and the gaps between them.

    Args:
      events: those of a Chrome trace. Kernels are the events of processes named after a GPU;
        without a GPU, all events that name an operation of XLA.
    """
    gpus = {
        event["pid"]
        for event in events
        if event.get("name") == "process_name" and "GPU" in event["args"]["name"]
    }
    kernels = [event for event in events if "dur" in event and "hlo_op" in event.get("args", {})]
    kernels = [event for event in kernels if event["pid"] in gpus] or kernels
    kernels.sort(key=lambda event: event["ts"])
    found = Profile(Counter(), Counter(), Counter(), 0.0)
    start = end = kernels[0]["ts"] if kernels else 0.0
    for event in kernels:
        found.busy[event["name"]] += event["dur"]
        found.counts[event["name"]] += 1
        found.gaps[event["name"]] += max(0.0, event["ts"] - end)
        end = max(end, event["ts"] + event["dur"])
    return found._replace(span=end - start)


# ------------------------------------------------------------------ the compiled program

H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""Description of the device to compile for, from NVIDIA's data sheet."""

SCOPES = (
    *("agent", "game", "worlds", "resets", "logging", "keys", "bootstrap", "statistics"),
    *("storage", "advantages", "gradients", "metrics"),
)
"""Parts of an update named by `jax.named_scope`; of nested ones the innermost counts."""

NOT_LAUNCHED = {
    *("parameter", "get-tuple-element", "tuple", "constant", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier"),
}
WORLDS_EVERY = 19  # steps of Craftax with RESET_RATIO=16, whose episodes last some 300 steps


def launches(arguments: list[str]) -> None:
    """Prints the kernels of an update compiled for a described H100, by part."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # checks the driver
    jax.config.update("jax_platforms", "cuda,cpu")
    config, algorithm = read_config(arguments, "train_PPO_trXL_pmap.py")
    compiled = compile_for_gpu(config, algorithm)
    memory = compiled.memory_analysis()
    counts = launches_by_part(compiled.as_text())
    rows = [(part, f"{number:,.0f}") for part, number in counts.most_common()]
    print(
        f"{config['ENV_NAME']}, {config['NUM_ENVS']} environments:"
        f" state {memory.argument_size_in_bytes / 1e6:,.0f} MB,"
        f" temporaries {memory.temp_size_in_bytes / 1e6:,.0f} MB\n\n"
        f"{table(('part of an update', 'launches'), *rows, ('all', f'{counts.total():,.0f}'))}"
    )


def compile_for_gpu(config: Config, algorithm: Algorithm) -> Any:
    """Returns an update compiled for the described device.

    Raises:
      ConfigError: XLA's CUDA plugin is not installed.
    """
    try:
        target = topologies.get_topology_desc("gpu", "cuda", target_config=H100, topology="1x1x1")
    except Exception as error:
        raise ConfigError(f"launches needs `pip install jax[cuda13]`: {error}") from error
    placed = NamedSharding(Mesh(np.array(target.devices[:1]), ("x",)), PartitionSpec())
    on_gpu = mock.patch.object(jax, "default_backend", return_value="gpu")
    with jax.default_device(jax.devices("cpu")[0]), on_gpu:
        init, update, key = make_programs(config, algorithm)
        shapes = jax.eval_shape(init, key)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), shapes)
    return jax.jit(update, donate_argnums=0).lower(state).compile()


def launches_by_part(program: str) -> Counter[str]:
    """Counts the kernels of one run of a compiled program, by the scope they were traced in.

    Loops of unknown length count once, except the loop in which the pool makes worlds.
    """
    return count(
        program,
        lambda op, part: Counter() if op.kind in NOT_LAUNCHED else Counter({part: 1}),
        lambda part: 1 / WORLDS_EVERY if part == "worlds" else 1,
    )


class Op(NamedTuple):
    """Operation of a compiled program."""

    shape: str
    kind: str
    line: str

    def called(self, *names: str) -> list[str]:
        """Returns the computations that the operation calls under these names."""
        found = re.findall(rf"(?:{'|'.join(names)})=(\{{[^}}]*\}}|[^,\s]+)", self.line)
        return re.findall(r"[\w.\-]+", " ".join(found))


def count(
    program: str,
    value: Callable[[Op, str], Counter],
    unknown_trips: Callable[[str], float] = lambda part: math.nan,
) -> Counter:
    """Sums a value of each operation over one run of a compiled program.

    Args:
      program: `compiled.as_text()`.
      value: (operation, the scope it was traced in) -> the numbers to sum.
      unknown_trips: scope -> iterations of a loop whose length the compiler does not know.

    Returns:
      The sum: a loop's times its iterations, a conditional's from the branch with the larger sum.
    """
    computations: dict[str, list[Op]] = {}
    for line in re.sub(r"/\*.*?\*/", "", program).splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        found = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (\([^=]*?\)|\S+) ([\w\-]+)\(", line)
        if head:
            computations["ENTRY" if head[1] else head[2]] = current = []
        elif found:
            current.append(Op(*found.groups(), line))

    def total(computation: str, around: str) -> Counter:
        result: Counter = Counter()
        for op in computations[computation]:
            scopes = re.findall(r"\w+", "".join(re.findall(r'op_name="([^"]*)"', op.line)))
            part = next((scope for scope in reversed(scopes) if scope in SCOPES), around)
            if op.kind == "while":
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', op.line)
                trips = int(known[1]) if known else unknown_trips(part)
                for called in op.called("body", "condition"):
                    inner = total(called, part)
                    result.update({key: trips * number for key, number in inner.items()})
            elif op.kind == "conditional":
                names = "true_computation", "false_computation", "branch_computations"
                branches = [total(called, part) for called in op.called(*names)]
                result.update(max(branches, key=Counter.total))
            elif op.kind == "call":
                result.update(total(*op.called("to_apply"), part))
            else:
                result.update(value(op, part))
        return result

    return total("ENTRY", "else")


MODES = {"check": check, "speed": speed, "profile": profile, "launches": launches}

if __name__ == "__main__":
    main()
