"""How time and memory grow with a key: `python benchmarks/growth.py [SCRIPT] [KEY=VALUE ...]`.

SCRIPT and the overrides are those of throughput.py. Writes growth.json and growth.png beside this
file: microseconds per environment step in the rollout and in the whole update, and what an update
needs in memory, for several values of NUM_ENVS, WINDOW_MEM and num_layers, one key at a time; and
how long it takes to read the rollout's cache once.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from benchmarks.throughput import median_seconds, memory_bytes, progress, read_config
from trxl.errors import ConfigError
from trxl.spaces import obs_space
from trxl.training import collect, make_init_and_update

from trainer_PPO_trXL import PPO
from transformerXL import make_network
from wrappers import make_env

VALUES = {
    "NUM_ENVS": [8, 16, 32, 64, 128, 256],
    "WINDOW_MEM": [32, 64, 128, 256, 512, 1024],
    "num_layers": [1, 2, 4, 8],
}
CALLS = 3
HERE = Path(__file__).resolve().parent
PLOTTED = {
    "update_us": "whole update, us per step",
    "rollout_us": "rollout, us per step",
    "read_cache_us": "reading the cache once, us per step",
}


def main() -> None:
    """Measures, and writes the two files."""
    try:
        config = read_config(sys.argv[1:])
        points = {key: [point(config, key, value) for value in VALUES[key]] for key in VALUES}
    except ConfigError as error:
        sys.exit(f"error: {error}")
    (HERE / "growth.json").write_text(json.dumps({"config": config, "points": points}, indent=1))
    plot(config, points).savefig(HERE / "growth.png", dpi=100)


def point(config: dict[str, Any], key: str, value: int) -> dict[str, float]:
    """The numbers of the config with another value of one key."""
    config = PPO.check({**config, key: value})
    steps = config["NUM_ENVS"] * config["NUM_STEPS"]
    env = make_env(config, config["NUM_ENVS"])
    network = make_network(config, env.action_space, obs_space(env))
    init, update = make_init_and_update(config, PPO)
    state = jax.jit(init)(jax.random.key(0))
    compiled = jax.jit(update, donate_argnums=0).lower(state).compile()
    in_update, state = median_seconds(lambda state: compiled(state)[0], state, CALLS)

    @jax.jit
    def roll(state):
        return collect(config, env, network, PPO, state)[0]

    in_rollout, state = median_seconds(roll, state, CALLS)
    caches = jax.jit(lambda params, memory: network.apply(params, memory, method="init_cache"))(
        state.train_state.params, state.rollout_state.memory
    )
    leaves = [leaf for cache in caches for leaf in (cache.keys, cache.values)]

    @jax.jit
    def read(before, leaves):
        products = (jnp.einsum("...n,n->...", leaf, jnp.ones(leaf.shape[-1])) for leaf in leaves)
        return before + 1e-30 * sum(jnp.sum(product) for product in products)

    reading, _ = median_seconds(lambda before: read(before, leaves), jnp.zeros(()), 9)
    numbers = {
        key: value,
        "update_us": 1e6 * in_update / steps,
        "rollout_us": 1e6 * in_rollout / steps,
        "read_cache_us": 1e6 * reading / config["NUM_ENVS"],
        "update_bytes": memory_bytes(compiled),
    }
    progress(str(numbers))
    return numbers


def plot(config: dict[str, Any], points: dict[str, list[dict[str, float]]]) -> Figure:
    """Time above, memory below, a column for each key."""
    figure = Figure(figsize=(4 * len(points), 6.5), layout="constrained")
    axes = figure.subplots(2, len(points), sharex="col", squeeze=False)
    for column, (key, rows) in enumerate(points.items()):
        values = [row[key] for row in rows]
        above, below = axes[:, column]
        for name, label in PLOTTED.items():
            above.plot(values, [row[name] for row in rows], "o-", label=label)
        below.plot(values, [row["update_bytes"] / 1e6 for row in rows], "o-", color="gray")
        above.set(xscale="log", yscale="log", title=f"{key} ({config[key]} elsewhere)")
        below.set(xscale="log", yscale="log", xlabel=key, xticks=values)
        below.set_xticks(values, map(str, values))
        below.minorticks_off()
        for axis in (above, below):
            axis.grid(alpha=0.3, which="both")
    axes[0, 0].legend(fontsize=8)
    axes[0, 0].set_ylabel("microseconds per environment step")
    axes[1, 0].set_ylabel("MB that an update needs")
    return figure


if __name__ == "__main__":
    main()
