"""Measures how cost grows with a key: `python benchmarks/growth.py [SCRIPT] [KEY=VALUE ...]`.

SCRIPT and the overrides are those of throughput.py. Prints a table for several values of NUM_ENVS,
WINDOW_MEM and num_layers, one key at a time: microseconds per environment step in the rollout and
in the whole update, the time to read the rollout's cache once, and the memory of an update.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from benchmarks.throughput import (
    Config,
    compile_update,
    env_steps,
    make_rollout,
    median_seconds,
    memory_bytes,
    read_ppo_config,
    table,
)
from trxl.errors import ConfigError
from trxl.spaces import obs_space

from trainer_PPO_trXL import PPO
from transformerXL import make_network
from wrappers import make_env

VALUES = {
    "NUM_ENVS": [8, 16, 32, 64, 128, 256],
    "WINDOW_MEM": [32, 64, 128, 256, 512, 1024],
    "num_layers": [1, 2, 4, 8],
}
CALLS = 3
HEAD = ("", "rollout, us per step", "reading the cache once, us", "whole update, us", "MB")


def main() -> None:
    """Prints a row for each value."""
    try:
        config = read_ppo_config(sys.argv[1:])
        configs = [
            (f"{key}={value}", PPO.check({**config, key: value}))
            for key, values in VALUES.items()
            for value in values
        ]
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(table(HEAD))
    for name, changed in configs:
        rollout, reading, update, size = measure(changed)
        print(f"| {name} | {rollout:.0f} | {reading:.0f} | {update:.0f} | {size / 1e6:,.1f} |")


def measure(config: Config) -> tuple[float, float, float, int]:
    """Returns microseconds per step of rollout, cache read and update, and an update's bytes."""
    init, compiled = compile_update(config, PPO)
    in_update, state = median_seconds(compiled, init(), CALLS)
    in_rollout, state = median_seconds(make_rollout(config), state, CALLS)
    env = make_env(config, config["NUM_ENVS"])
    network = make_network(config, env.action_space, obs_space(env))
    caches = jax.jit(lambda params, memory: network.apply(params, memory, method="init_cache"))(
        state.train_state.params, state.rollout_state.memory
    )
    leaves = [leaf for cache in caches for leaf in (cache.keys, cache.values)]

    @jax.jit
    def read(before):
        products = (jnp.einsum("...n,n->...", leaf, jnp.ones(leaf.shape[-1])) for leaf in leaves)
        return before + 1e-30 * sum(jnp.sum(product) for product in products), ()

    reading, _ = median_seconds(read, jnp.zeros(()), 9)
    per_step = 1e6 / env_steps(config)
    once = 1e6 / config["NUM_ENVS"]
    return per_step * in_rollout, once * reading, per_step * in_update, memory_bytes(compiled)


if __name__ == "__main__":
    main()
