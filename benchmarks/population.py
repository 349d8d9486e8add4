"""A population in one program or run after run: `python benchmarks/population.py [KEY=VALUE ...]`.

Trains 16 runs of one config, each with its own LR, an update at a time: in chunks of 16, 8, 4 and 2
members under `jax.vmap`, and of 1, which is one run after the other. All take turns in one process;
the last line is a JSON object with the medians, environment steps per second of all runs together.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from trxl.config import read_overrides
from trxl.errors import ConfigError
from trxl.search.population import Programs, Row

from train_PPO_trXL import config as defaults
from trainer_PPO_trXL import PPO

RUNS = 16
CHUNKS = (16, 8, 4, 2, 1)  # members; each divides RUNS
ROUNDS = 7
WARM_UP_CALLS = 2


def main() -> None:
    """Prints the medians and the JSON line."""
    try:
        config = PPO.check({**defaults, **read_overrides(sys.argv[1:], PPO.keys)})
    except ConfigError as error:
        sys.exit(f"error: {error}")
    numbers = measure(config)
    one_by_one = numbers["1"]
    for chunk, speed in numbers.items():
        print(f"chunks of {chunk:>2}: {speed:8,.0f} steps/s, {speed / one_by_one:.2f} times")
    print(json.dumps(numbers))


def measure(config: dict[str, Any]) -> dict[str, float]:
    """Median steps per second of all runs together, by the members of a chunk."""
    rates = np.geomspace(1e-4, 1e-3, RUNS)
    rows = [Row({"LR": float(rate)}, seed) for seed, rate in enumerate(rates)]
    chunks = {}
    for size in CHUNKS:
        programs = Programs(config, PPO, size, 1)
        parts = [rows[i : i + size] for i in range(0, RUNS, size)]
        chunks[size] = [programs.load(part, programs.init(part)) for part in parts]
    seconds: dict[int, list[float]] = {size: [] for size in CHUNKS}
    for _ in range(WARM_UP_CALLS + ROUNDS):
        for size, parts in chunks.items():
            start = time.perf_counter()
            for part in parts:
                part.update()
            seconds[size].append(time.perf_counter() - start)
    steps = RUNS * config["NUM_ENVS"] * config["NUM_STEPS"]
    return {
        str(size): steps / statistics.median(times[WARM_UP_CALLS:])
        for size, times in seconds.items()
    }


if __name__ == "__main__":
    main()
