"""Training on 1, 2, 4 ... devices: `python benchmarks/scaling.py [SCRIPT] [KEY=VALUE ...]`.

SCRIPT and the overrides are those of throughput.py. Strong scaling spreads NUM_ENVS over the
devices, weak scaling gives each NUM_ENVS of its own. Without GPUs it takes 8 virtual devices, which
share the cores of the CPU: compared with one device that has as many environments, they show what
the exchange and the uneven work cost. What the devices exchange is counted from the compiled
update. The last line is a JSON object.
"""

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp

from benchmarks.throughput import median_seconds, progress, read_config
from trxl.errors import ConfigError
from trxl.training import make_init_and_update

from trainer_PPO_trXL import PPO


def main() -> None:
    """Prints the table and the JSON line."""
    try:
        config = read_config(sys.argv[1:])
        envs = config["NUM_ENVS"]
        counts = [2**i for i in range(jax.device_count().bit_length())]
        for count in counts:
            PPO.check(config, count)  # rather than after minutes
        alone = [measure(config, envs * count, 1) for count in counts]
        strong = [measure(config, envs, count) for count in counts[1:]]
        weak = [measure(config, envs * count, count) for count in counts[1:]]
    except ConfigError as error:
        sys.exit(f"error: {error}")
    rows = [*alone, *strong, *weak]
    print(report(config, rows))
    print(json.dumps(rows))


def measure(config: dict[str, Any], envs: int, count: int) -> dict[str, Any]:
    """Times updates of so many environments on so many devices.

    Returns:
      "devices", "envs", "sps", environment steps per second of all devices, and of an update on
      each device "all_reduces", their number, and "all_reduce_bytes".

    Raises:
      ConfigError: the environments can't be spread over so many devices.
    """
    progress(f"{envs} environments on {count} devices")
    total = max(config["TOTAL_TIMESTEPS"], envs * config["NUM_STEPS"])
    config = PPO.check({**config, "NUM_ENVS": envs, "TOTAL_TIMESTEPS": total}, count)
    devices = jax.devices()[:count]
    init, update = make_init_and_update(config, PPO, "devices", count)
    key = jax.random.key(config["seed"])
    state = jax.pmap(init, "devices", devices=devices)(jnp.repeat(key, count))
    update = jax.pmap(update, "devices", devices=devices, donate_argnums=0)
    compiled = update.lower(state).compile()
    seconds, _ = median_seconds(lambda state: compiled(state)[0], state)
    number, size = all_reduces(compiled.as_text())
    return {
        "devices": count,
        "envs": envs,
        "sps": envs * config["NUM_STEPS"] / seconds,
        "all_reduces": number,
        "all_reduce_bytes": size,
    }


def all_reduces(program: str) -> tuple[int, int]:
    """How many all-reduces one run of a compiled program makes, and the bytes that go in.

    Args:
      program: the text of an optimised HLO module. Loops that hold one must have a known number of
        turns.
    """
    computations, entry = {}, ""
    for line in program.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif line.startswith("  "):
            computations[name].append(line)

    def count(name: str) -> Counter:
        total = Counter()
        for line in computations[name]:
            operation = re.search(r" = (.*?) all-reduce(?:-start)?\(", line)
            if operation:
                total += Counter(number=1, bytes=size_of(operation[1]))
            inner = Counter()
            for callee in re.findall(r"(?:body|calls)=%([\w.\-]+)", line):
                inner += count(callee)
            if inner:
                turns = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                if " while(" in line and not turns:
                    raise ValueError(f"a loop of unknown length exchanges data: {line.strip()}")
                turns = int(turns[1]) if turns else 1
                total += Counter({key: turns * value for key, value in inner.items()})
        return total

    total = count(entry)
    return total["number"], total["bytes"]


def size_of(shape: str) -> int:
    """Bytes of an HLO type such as `(f32[64,64]{1,0}, s32[])`."""
    total = 0
    for bits, dimensions in re.findall(r"(?:pred|[a-z]+(\d+))\[([\d,]*)\]", shape):
        elements = 1
        for dimension in filter(None, dimensions.split(",")):
            elements *= int(dimension)
        total += elements * int(bits or 8) // 8
    return total


def report(config: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The numbers as a table."""
    device = jax.devices()[0]
    virtual = f"virtual devices on {os.cpu_count()} CPU cores"
    alone = {row["envs"]: row["sps"] for row in rows if row["devices"] == 1}
    lines = [
        f"{config['ENV_NAME']}, {config['NUM_STEPS']} steps,"
        f" {virtual if device.platform == 'cpu' else device.device_kind}, JAX {jax.__version__}",
        "",
        "| devices | environments | steps/s | times one device with as many environments"
        " | all-reduces | MB |",
        "| --- " * 6 + "|",
    ]
    for row in rows:
        lines.append(
            f"| {row['devices']} | {row['envs']} | {row['sps']:,.0f}"
            f" | {row['sps'] / alone[row['envs']]:.2f} | {row['all_reduces']}"
            f" | {row['all_reduce_bytes'] / 1e6:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
