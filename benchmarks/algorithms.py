"""What an update of each algorithm costs: `python benchmarks/algorithms.py [KEY=VALUE ...]`.

The configs are those of the entry scripts, KEY=VALUE changes all of them that have the key. Updates
take turns in one process; the last line is a JSON object with the medians and what the compiled
update needs.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

from trxl.config import Keys, read_overrides
from trxl.errors import ConfigError
from trxl.training import Algorithm, make_init_and_update

import train_Muesli_trXL
import train_PPO_trXL
from trainer_Muesli_trXL import MUESLI
from trainer_PPO_trXL import PPO

SCRIPTS = ((PPO, train_PPO_trXL.config), (MUESLI, train_Muesli_trXL.config))
ROUNDS = 7
WARM_UP_CALLS = 2


def main() -> None:
    """Prints a line for each algorithm, and the JSON line."""
    try:
        configs = changed(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"error: {error}")
    numbers = measure(configs)
    for name, found in numbers.items():
        update, state = (found[f"{what}_bytes"] / 1e6 for what in ("temporary", "state"))
        print(
            f"{name:>8}: {found['sps']:8,.0f} steps/s; the update needs {update:,.0f} MB, the state"
            f" {state:,.0f} MB"
        )
    print(json.dumps(numbers))


Configs = dict[str, tuple[Algorithm, dict[str, Any]]]
"""What is timed, by name: an algorithm and its checked config."""


def changed(arguments: list[str]) -> Configs:
    """The scripts' configs, each with what the arguments say of its keys, by algorithm."""
    keys: Keys = {}
    for algorithm, _ in SCRIPTS:
        keys |= algorithm.keys
    overrides = read_overrides(arguments, keys)
    configs = {}
    for algorithm, config in SCRIPTS:
        own = {name: overrides[name] for name in overrides.keys() & algorithm.keys}
        configs[algorithm.name] = algorithm, algorithm.check(config | own)
    return configs


def measure(configs: Configs) -> dict[str, dict[str, float]]:
    """By name: median steps per second, and bytes of an update's state and temporaries."""
    numbers: dict[str, dict[str, float]] = {}
    running = {}
    for name, (algorithm, config) in configs.items():
        init, update = make_init_and_update(config, algorithm)
        state = jax.jit(init)(jax.random.key(config["seed"]))
        compiled = jax.jit(update, donate_argnums=0).lower(state).compile()
        memory = compiled.memory_analysis()
        numbers[name] = {
            "state_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
        }
        running[name] = (compiled, state, config["NUM_ENVS"] * config["NUM_STEPS"])
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(WARM_UP_CALLS + ROUNDS):
        for name, (compiled, state, steps) in running.items():
            start = time.perf_counter()
            state = jax.block_until_ready(compiled(state)[0])
            seconds[name].append(time.perf_counter() - start)
            running[name] = (compiled, state, steps)
    for name, times in seconds.items():
        numbers[name]["sps"] = running[name][2] / statistics.median(times[WARM_UP_CALLS:])
    return numbers


if __name__ == "__main__":
    main()
