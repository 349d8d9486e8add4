"""What runs under one vmap skip together: `python benchmarks/seeds.py [KEY=VALUE ...]`.

Times the update of NUM_SEEDS seeds under `jax.vmap` (4 unless given), with loops and conditions on
one predicate for all seeds (`collectives.any_across_vmap`) and with one for each, which `jax.vmap`
turns into selects. Both run in one process and take turns; the last line is a JSON object with the
medians.
"""

import json
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from trxl import encoders, rollout
from trxl.config import read_overrides
from trxl.errors import ConfigError
from trxl.training import make_init_and_update

import wrappers
from train_PPO_trXL import config as defaults
from trainer_PPO_trXL import PPO

ROUNDS = 15  # of one call of each, of which the medians are taken
WARM_UP_CALLS = 3


def main() -> None:
    """Prints the medians and the JSON line."""
    try:
        config = PPO.check({**defaults, "NUM_SEEDS": 4, **read_overrides(sys.argv[1:], PPO.keys)})
        numbers = measure(config)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    together, apart = numbers["together_s"], numbers["apart_s"]
    print(
        f"{config['NUM_SEEDS']} seeds of {config['ENV_NAME']}: an update takes"
        f" {1000 * together:.1f} ms with one predicate, {1000 * apart:.1f} ms with one for each,"
        f" {apart / together:.2f} times as long"
    )
    print(json.dumps(numbers))


def measure(config: dict[str, Any]) -> dict[str, float]:
    """Median seconds of an update either way."""
    updates = {"together_s": compile_update(config)}
    with ExitStack() as patches:
        for module in (encoders, wrappers, rollout):
            patches.enter_context(mock.patch.object(module, "any_across_vmap", jnp.any))
        updates["apart_s"] = compile_update(config)
    seeds = jnp.arange(config["NUM_SEEDS"]) + config["seed"]
    first = jax.jit(jax.vmap(make_init_and_update(config, PPO)[0]))(jax.vmap(jax.random.key)(seeds))
    states = dict.fromkeys(updates, first)
    seconds = {name: [] for name in updates}
    for _ in range(WARM_UP_CALLS + ROUNDS):
        for name, update in updates.items():
            start = time.perf_counter()
            states[name] = jax.block_until_ready(update(states[name]))[0]
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[WARM_UP_CALLS:]) for name, times in seconds.items()}


def compile_update(config: dict[str, Any]) -> Any:
    """The vmapped update, compiled."""
    init, update = make_init_and_update(config, PPO)
    keys = jax.vmap(jax.random.key)(jnp.arange(config["NUM_SEEDS"]))
    return jax.jit(jax.vmap(update)).lower(jax.eval_shape(jax.vmap(init), keys)).compile()


if __name__ == "__main__":
    main()
