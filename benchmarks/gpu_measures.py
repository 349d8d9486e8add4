"""What gpu.py measures, each in a process of its own: `python benchmarks/gpu_measures.py JSON`.

JSON has the kind of measurement, the precision of matrix products, and changes of the published
Craftax config; the last line is a JSON object with what was found. Of several at once each compiles
while others do, and is timed when no other compiles or is timed.
"""

import fcntl
import gzip
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

TOLERANCES = {"float32": 1e-4, "TF32": 2e-2, "bfloat16": 2e-1}
"""Largest errors of outputs of order 1, of products with 23, 10 and 7 bits of fraction."""

TINY = {
    "ENV_NAME": "MemoryChain-bsuite",
    "RESET_STRATEGY": None,
    "NUM_ENVS": 16,
    "NUM_STEPS": 8,
    "NUM_MINIBATCHES": 2,
    "UPDATE_EPOCHS": 1,
    "TOTAL_TIMESTEPS": 640,
    "EMBED_SIZE": 16,
    "qkv_features": 16,
    "num_heads": 2,
    "hidden_layers": 16,
    "WINDOW_MEM": 4,
    "WINDOW_GRAD": 8,
}

TOP = 20
"""How many kernels and gaps a profile lists."""

PROFILED_UPDATES = 2

LOCK = os.open(os.environ["PREPARING"], os.O_RDONLY) if "PREPARING" in os.environ else None
"""A file of all measurements at once, locked by each: shared while it prepares, then alone."""


def published(changes: dict[str, Any]) -> dict[str, Any]:
    """The published Craftax config with changes, checked."""
    from train_PPO_trXL_pmap import config
    from trainer_PPO_trXL import PPO

    return PPO.check({**config, **changes})


def device() -> str:
    """What it was measured on."""
    import jax

    return f"{jax.devices()[0].device_kind}, jax {jax.__version__}"


def oracle_error(precision: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The network's step form against the equations in NumPy float64, everything random."""
    import numpy as np
    from support import from_equations, make_step_form, random_case, reach_of

    dtype = changes.get("COMPUTE_DTYPE", "float32")
    case = random_case({"EMBED_SIZE": 64, "qkv_features": 64, "COMPUTE_DTYPE": dtype})
    config, network, params, obs, memory, boundary = case
    values = np.stack([x[1] for x in from_equations(config, params, obs, memory, boundary)])
    reach = reach_of(boundary, config["WINDOW_MEM"])
    ours = np.asarray(make_step_form(network)(params, obs, memory, reach)[1])
    error = np.abs(ours - values).max() / np.abs(values).max()
    return passed(float(error), TOLERANCES[precision])


def ratio_error(precision: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Ratios and values before the first gradient step of an update with many episode ends."""
    from two_forms import CHAIN, largest_ratio_error, two_rollouts

    dtype = changes.get("COMPUTE_DTYPE", "float32")
    chain = two_rollouts({**CHAIN, "COMPUTE_DTYPE": dtype})
    return passed(largest_ratio_error(chain), TOLERANCES[precision])


def passed(error: float, tolerance: float) -> dict[str, Any]:
    """What is noted of a test."""
    return {
        "largest_error": error,
        "tolerance": tolerance,
        "passed": error <= tolerance,
        "device": device(),
    }


def resume_error(_: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Four updates against two, a checkpoint, and two more in another process' program."""
    import jax
    import numpy as np

    from trxl.runs.checkpoints import FullCheckpoints
    from trxl.runs.compiled import Program

    from trainer_PPO_trXL import PPO

    small = {**TINY, "NUM_ENVS": 64, "NUM_STEPS": 32, "WINDOW_GRAD": 32, "TOTAL_TIMESTEPS": 8192}
    program = Program(published({**small, **changes}), PPO, None)
    state = program.init()
    update = program.compile(state)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = FullCheckpoints(Path(folder), 1)
        for updates in range(4):
            if updates == 2:
                checkpoints.save(updates, state)
            state, _ = update(state)
        again = checkpoints.restore(2, program.joined_shapes())
    for _ in range(2):
        again, _ = update(again)
    pairs = zip(jax.tree.leaves(state.train_state), jax.tree.leaves(again.train_state), strict=True)
    return passed(max(float(np.abs(a - b).max(initial=0)) for a, b in jax.device_get([*pairs])), 0)


def environment(_: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Steps per second of the environment alone."""
    from benchmarks.throughput import environment_run

    config = published(changes)
    run, carry = environment_run(config)
    return speed(config, run, carry)


def rollout(_: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Steps per second of rollouts."""
    import jax

    from trxl.spaces import obs_space
    from trxl.training import collect, make_init_and_update

    from trainer_PPO_trXL import PPO
    from transformerXL import make_network
    from wrappers import make_env

    config = published(changes)
    env = make_env(config, config["NUM_ENVS"])
    network = make_network(config, env.action_space, obs_space(env))
    state = jax.jit(make_init_and_update(config, PPO)[0])(jax.random.key(0))
    roll = jax.jit(lambda state: collect(config, env, network, PPO, state))
    return speed(config, roll, state)


def update(_: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Steps per second of whole updates."""
    import jax

    from trxl.training import make_init_and_update

    from trainer_PPO_trXL import PPO

    config = published(changes)
    init, update = make_init_and_update(config, PPO)
    state = jax.jit(init)(jax.random.key(0))
    return speed(config, jax.jit(update, donate_argnums=0), state)


def speed(config: dict[str, Any], function: Any, carry: Any) -> dict[str, Any]:
    """Compiles carry -> (carry, other) of NUM_STEPS steps, and times it alone."""
    from benchmarks.throughput import median_seconds

    start = time.perf_counter()
    compiled = function.lower(carry).compile()
    found = {
        "compile_s": time.perf_counter() - start,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }
    with alone():
        seconds, _ = median_seconds(lambda carry: compiled(carry)[0], carry)
    steps = config["NUM_ENVS"] * config["NUM_STEPS"]
    return found | {"steps_per_second": steps / seconds, "device": device()}


@contextmanager
def alone() -> Iterator[None]:
    """Waits until no other measurement prepares itself or runs, and runs meanwhile."""
    if LOCK is not None:
        fcntl.flock(LOCK, fcntl.LOCK_UN)
        fcntl.flock(LOCK, fcntl.LOCK_EX)
    yield
    if LOCK is not None:
        fcntl.flock(LOCK, fcntl.LOCK_UN)


def profile(_: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The kernels and the gaps of a few updates."""
    import jax

    from trxl.training import make_init_and_update

    from trainer_PPO_trXL import PPO

    config = published(changes)
    init, update = make_init_and_update(config, PPO)
    state = jax.jit(init)(jax.random.key(0))
    compiled = jax.jit(update, donate_argnums=0).lower(state).compile()
    with alone(), tempfile.TemporaryDirectory() as folder:
        for _ in range(3):
            state = jax.block_until_ready(compiled(state)[0])
        with jax.profiler.trace(folder):
            for _ in range(PROFILED_UPDATES):
                state = jax.block_until_ready(compiled(state)[0])
        (path,) = Path(folder).rglob("*.trace.json.gz")
        trace = json.loads(gzip.decompress(path.read_bytes()))
    found = kernels_and_gaps(trace["traceEvents"])
    per_step = found["launches"] / PROFILED_UPDATES / config["NUM_STEPS"]
    return found | {"launches_per_rollout_step": per_step, "device": device()}


def kernels_and_gaps(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What takes most of a trace: kernels by name, and the gaps between them by what follows.

    Args:
      events: of a Chrome trace; kernels are those of processes named after a GPU, and where there
        is none, as on a CPU, those that name an operation of XLA.
    """
    processes = {
        event["pid"]: event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event.get("name") == "process_name"
    }
    gpus = {pid for pid, name in processes.items() if "GPU" in name}
    timed = [event for event in events if event.get("ph") == "X" and "dur" in event]
    kernels = [
        event for event in timed if event["pid"] in gpus and "hlo_op" in event.get("args", {})
    ]
    kernels = kernels or [event for event in timed if "hlo_op" in event.get("args", {})]
    kernels.sort(key=lambda event: event["ts"])
    busy: Counter = Counter()
    counts: Counter = Counter()
    gaps: Counter = Counter()
    end = kernels[0]["ts"] if kernels else 0
    for event in kernels:
        busy[event["name"]] += event["dur"]
        counts[event["name"]] += 1
        if event["ts"] > end:
            gaps[event["name"]] += event["ts"] - end
        end = max(end, event["ts"] + event["dur"])
    span = end - kernels[0]["ts"] if kernels else 0
    return {
        "launches": len(kernels),
        "span_ms": span / 1e3,
        "idle_share": sum(gaps.values()) / span if span else 0.0,
        "kernels_ms": {
            name: [round(us / 1e3, 3), counts[name]] for name, us in busy.most_common(TOP)
        },
        "gaps_before_ms": {name: round(us / 1e3, 3) for name, us in gaps.most_common(TOP)},
    }


KINDS = {
    "oracle": oracle_error,
    "ratio": ratio_error,
    "resume": resume_error,
    "environment": environment,
    "rollout": rollout,
    "update": update,
    "profile": profile,
}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if LOCK is not None:
        fcntl.flock(LOCK, fcntl.LOCK_SH)
    print(json.dumps(KINDS[given["kind"]](given["precision"], given["config"])))
