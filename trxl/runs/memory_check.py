"""Whether a run fits the machine, before anything is compiled."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from trxl.errors import ConfigError

UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB")


class Need(NamedTuple):
    """A part of what a run holds at a time."""

    what: str
    size: int  # bytes, on one device
    keys: tuple[str, ...]  # that make it smaller


def check_capacity(
    config: dict[str, Any],
    num_devices: int = 1,
    environments: int = 0,
    kept: int = 0,
    given: int | None = None,
) -> None:
    """Compares the least that a run holds on a device with the memory that there is.

    Args:
      config: checked.
      num_devices: that the environments are spread over.
      environments: bytes of their states on one device, if that is known already.
      kept: bytes of what the algorithm keeps of rollouts, likewise.
      given: bytes of a device's memory; by default what there is.

    Raises:
      ConfigError: it is more; the line says which keys to lower.
    """
    needs = least_needs(config, num_devices)
    keys: tuple[str, ...] = ("NUM_ENVS", "NUM_SEEDS", "ENV_KWARGS")
    needs.append(Need("for the states of the environments", environments, keys))
    keys = ("REPLAY_ROLLOUTS", "NUM_ENVS", "NUM_STEPS", "WINDOW_MEM", "NUM_SEEDS")
    needs.append(Need("for what is kept of rollouts", kept, tuple(k for k in keys if k in config)))
    total = sum(need.size for need in needs)
    memory = given or device_memory()
    if total > memory:
        largest = max(needs, key=lambda need: need.size)
        raise ConfigError(
            f"this run takes at least {in_units(total)}, and the device has {in_units(memory)}:"
            f" {in_units(largest.size)} of it {largest.what}; lower {listed(largest.keys)}"
        )


def least_needs(config: dict[str, Any], num_devices: int) -> list[Need]:
    """What any algorithm's run holds at least, by the sizes in its config.

    Whole numbers of Python, since such sizes may be beyond all types. What the environments' states
    take is not among it, nor what the compiler adds.
    """
    names = ("NUM_SEEDS", "NUM_STEPS", "WINDOW_MEM", "num_layers", "EMBED_SIZE", "qkv_features")
    seeds, steps, memory, layers, width, qkv = (config[name] for name in names)
    rows = seeds * config["NUM_ENVS"] // num_devices
    hidden = config["hidden_layers"]
    of_a_layer = width * (4 * qkv + 14 * width)
    if config["MEMORY"] == "gru":
        qkv, of_a_layer = 0, 6 * width**2
    parameters = seeds * (layers * of_a_layer + 2 * hidden * (width + hidden))
    epochs = config.get("UPDATE_EPOCHS", 1)
    return [
        Need(
            "for the memory of the last WINDOW_MEM steps",
            4 * rows * memory * layers * (width + 2 * qkv),
            ("NUM_ENVS", "WINDOW_MEM", "num_layers", "EMBED_SIZE", "qkv_features", "NUM_SEEDS"),
        ),
        Need(
            "for a rollout of NUM_STEPS",
            4 * rows * steps * (layers * width + 4),
            ("NUM_ENVS", "NUM_STEPS", "num_layers", "EMBED_SIZE", "NUM_SEEDS"),
        ),
        Need(
            "for parameters and optimiser",
            3 * 4 * parameters,
            ("EMBED_SIZE", "qkv_features", "num_layers", "hidden_layers", "NUM_SEEDS"),
        ),
        Need(
            "for the advantages of all passes over a rollout",
            4 * rows * steps * epochs,
            ("UPDATE_EPOCHS", "NUM_ENVS", "NUM_STEPS", "NUM_SEEDS"),
        ),
    ]


def device_memory() -> int:
    """Bytes of the first device's memory: of a CPU the machine's, or what the process may take."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats.get("bytes_limit", 2**62)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
    return min(limits)


def in_units(size: int) -> str:
    """Bytes in the unit in which they are a short number."""
    unit = min((len(str(size)) - 1) // 3, len(UNITS) - 1)
    return f"{size / 1000**unit:.0f} {UNITS[unit]}"


def listed(keys: Iterable[str]) -> str:
    """Names with commas and a final "or"."""
    *others, last = keys
    return f"{', '.join(others)} or {last}"
