"""Trains on 1, 2, 4 ... devices: `python benchmarks/scaling.py [SCRIPT] [KEY=VALUE ...]`.

SCRIPT and the overrides are those of throughput.py. Strong scaling spreads NUM_ENVS over the
devices, weak scaling gives each device NUM_ENVS. Without GPUs it uses 8 virtual devices, which
share the CPU's cores: compared with one device of as many environments, they show the cost of
communication and of uneven work. Communication is counted from the compiled update.
"""

import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp

from benchmarks.gpu import Op, count
from benchmarks.throughput import (
    Config,
    device_name,
    env_steps,
    median_seconds,
    progress,
    read_ppo_config,
    table,
)
from trxl.errors import ConfigError
from trxl.training import make_init_and_update

from trainer_PPO_trXL import PPO

HEAD = ("devices", "environments", "steps/s", "times one device", "all-reduces", "MB")


def main() -> None:
    """Prints a table: one device, then strong scaling, then weak."""
    try:
        config = read_ppo_config(sys.argv[1:])
        envs = config["NUM_ENVS"]
        counts = [2**i for i in range(jax.device_count().bit_length())]
        for number in counts:
            PPO.check(config, number)  # before minutes of measurements
        rows = [(envs * number, 1) for number in counts]
        rows += [(envs, number) for number in counts[1:]]
        rows += [(envs * number, number) for number in counts[1:]]
        measured = [(*row, *measure(config, *row)) for row in rows]
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(
        f"{config['ENV_NAME']}, {config['NUM_STEPS']} steps, {device_name()}\n\n{report(measured)}"
    )


def measure(config: Config, envs: int, devices: int) -> tuple[float, int, int]:
    """Times updates of this many environments on this many devices.

    Returns:
      Environment steps per second of all devices; an update's number of all-reduces, and the bytes
      that each device puts in.

    Raises:
      ConfigError: the environments can't be spread over the devices.
    """
    progress(f"{envs} environments on {devices} devices")
    total = max(config["TOTAL_TIMESTEPS"], envs * config["NUM_STEPS"])
    config = PPO.check({**config, "NUM_ENVS": envs, "TOTAL_TIMESTEPS": total}, devices)
    init, update = make_init_and_update(config, PPO, "devices", devices)
    key = jax.random.key(config["seed"])
    on = jax.devices()[:devices]
    state = jax.pmap(init, "devices", devices=on)(jnp.repeat(key, devices))
    update = jax.pmap(update, "devices", devices=on, donate_argnums=0)
    compiled = update.lower(state).compile()
    seconds, _ = median_seconds(compiled, state)
    return env_steps(config) / seconds, *all_reduces(compiled.as_text())


def all_reduces(program: str) -> tuple[int, int]:
    """Counts the all-reduces of one run of a compiled program, and the bytes that go in.

    Raises:
      ValueError: a loop of unknown length has one.
    """

    def exchanged(op: Op, _: str) -> Counter:
        is_one = op.kind in ("all-reduce", "all-reduce-start")
        return Counter(number=1, bytes=size_of(op.shape)) if is_one else Counter()

    total = count(program, exchanged)
    if math.isnan(total["number"]):
        raise ValueError("a loop of unknown length exchanges data")
    return total["number"], total["bytes"]


def size_of(shape: str) -> int:
    """Returns the bytes of an HLO type such as `(f32[64,64]{1,0}, s32[])`."""
    arrays = re.findall(r"(?:pred|[a-z]+(\d+))\[([\d,]*)\]", shape)
    return sum(math.prod(map(int, re.findall(r"\d+", x))) * int(b or 8) // 8 for b, x in arrays)


def report(rows: list[tuple[int, int, float, int, int]]) -> str:
    """Returns a table of (environments, devices, steps/s, all-reduces, bytes)."""
    alone = {envs: rate for envs, devices, rate, _, _ in rows if devices == 1}
    cells = [
        (devices, envs, f"{rate:,.0f}", f"{rate / alone[envs]:.2f}", number, f"{size / 1e6:.2f}")
        for envs, devices, rate, number, size in rows
    ]
    return table(HEAD, *cells)


if __name__ == "__main__":
    main()
