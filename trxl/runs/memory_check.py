"""Check that a run fits into the device's memory, before anything is compiled."""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from trxl.errors import ConfigError
from trxl.runs.compiled import Program

UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB")

STATE = "for parameters and optimiser"
MEMORY = "for the memory of the last WINDOW_MEM steps"
ENVIRONMENTS = "for the states of the environments"
KEPT = "for what is kept of rollouts"
ROLLOUT = "for a rollout and the passes over it"

KEYS = {
    STATE: ("EMBED_SIZE", "qkv_features", "num_layers", "hidden_layers", "NUM_SEEDS"),
    MEMORY: ("NUM_ENVS", "WINDOW_MEM", "num_layers", "EMBED_SIZE", "NUM_SEEDS"),
    ENVIRONMENTS: ("NUM_ENVS", "NUM_SEEDS", "ENV_KWARGS"),
    KEPT: ("REPLAY_ROLLOUTS", "NUM_ENVS", "NUM_STEPS", "WINDOW_MEM", "NUM_SEEDS"),
    ROLLOUT: ("NUM_ENVS", "NUM_STEPS", "EMBED_SIZE", "num_layers", "NUM_SEEDS", "UPDATE_EPOCHS"),
}
"""Keys that reduce each part of a run's memory."""


def check_sizes(config: dict[str, Any], num_devices: int = 1) -> None:
    """Checks sizes by the config alone, since JAX can't trace arrays beyond its integers.

    Args:
      config: checked.
      num_devices: devices that share the environments.

    Raises:
      ConfigError: see `compare`.
    """
    width = max(1, config["num_layers"] * config["EMBED_SIZE"])  # of a memory entry
    of_a_step = 4 * width * config["NUM_SEEDS"] * config["NUM_ENVS"] // num_devices
    compare({MEMORY: of_a_step * config["WINDOW_MEM"], ROLLOUT: of_a_step * config["NUM_STEPS"]})


def least_bytes(program: Program) -> dict[str, int]:
    """Returns a lower bound of a run's memory on one device, {part: bytes}."""
    state = program.shapes()
    update = program.trace_update().jaxpr.jaxpr
    rollout_state = state.rollout_state
    return {
        STATE: bytes_of(state.train_state),
        MEMORY: bytes_of(rollout_state.memory),
        ENVIRONMENTS: bytes_of(rollout_state) - bytes_of(rollout_state.memory),
        KEPT: bytes_of(state.replay),
        ROLLOUT: stacked_bytes(update),
    }


def compare(needs: dict[str, int]) -> None:
    """Compares a run's memory with that of the device.

    Args:
      needs: {part: bytes}.

    Raises:
      ConfigError: the run needs more; the message says which keys to lower.
    """
    total, memory = sum(needs.values()), device_memory()
    if total > memory:
        largest = max(needs, key=lambda what: needs[what])
        raise ConfigError(
            f"this run takes at least {in_units(total)}, and the device has {in_units(memory)}:"
            f" {in_units(needs[largest])} of it {largest}; lower {listed(KEYS[largest])}"
        )


def bytes_of(shapes: Any) -> int:
    """Returns the bytes per device of a tree of `jax.ShapeDtypeStruct` with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(shapes)
    )


def stacked_bytes(jaxpr: Any) -> int:
    """Returns the bytes of the stacked outputs of a function's largest scan."""
    most = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            stacked = [x.aval for x in equation.outvars[equation.params["num_carry"] :]]
            most = max(most, sum(math.prod(x.shape) * x.dtype.itemsize for x in stacked))
        elif inner := equation.params.get("jaxpr"):  # of a jit or a shard_map
            most = max(most, stacked_bytes(getattr(inner, "jaxpr", inner)))
    return most


def device_memory() -> int:
    """Returns the bytes of the first device's memory; on a CPU the machine's or cgroup's limit."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats.get("bytes_limit", 2**62)
    limits = [2**62]
    if hasattr(os, "sysconf"):  # not on Windows
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(limits)


def in_units(size: int) -> str:
    """Formats bytes in a suitable unit."""
    unit = min((len(str(size)) - 1) // 3, len(UNITS) - 1)
    return f"{size / 1000**unit:.0f} {UNITS[unit]}"


def listed(keys: Iterable[str]) -> str:
    """Joins names with commas and a final "or"."""
    *others, last = keys
    return f"{', '.join(others)} or {last}"
