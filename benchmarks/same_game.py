"""Compares Craftax as written with its elementwise form: `python benchmarks/same_game.py [STEPS]`.

Plays STEPS random steps (102,400) of either game in both forms, from the same worlds and with the
same keys, on all floors at once; an ended episode is followed by a fresh world. Compares rewards,
ends and observations (of 8 environments all, of the others their sums), and the whole states after
every 100 steps. Prints the time of a step. Exits with status 1 if anything differs.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from trxl.environments import craftax
from trxl.environments.craftax_gpu import elementwise

NUM_ENVS, CHUNK = 128, 100


def play(env: Any, step: Callable, state: Any, key: jax.Array):
    """Plays CHUNK steps of all environments; returns the states after them, and the results."""

    def one(key: jax.Array, state: Any):
        step_key, reset_key, action_key = jax.random.split(key, 3)
        action = jax.random.randint(action_key, (), 0, env.action_space.n)
        obs, state, reward, done, _ = step(step_key, state, action)
        return obs, state, reward, done, reset_key

    def body(state: Any, key: jax.Array):
        keys = jax.random.split(key, NUM_ENVS)
        obs, state, reward, done, reset_keys = jax.vmap(one)(keys, state)
        return state, (jnp.sum(obs, axis=-1), obs[:8], reward, done, reset_keys)

    return jax.lax.scan(body, state, jax.random.split(key, CHUNK))


def new_worlds(env: Any, keys: jax.Array) -> Any:
    """Returns states of fresh episodes, players spread over all floors if the game has floors."""
    _, state = jax.vmap(env.reset)(keys)
    if hasattr(state, "player_level"):
        floors = jnp.arange(NUM_ENVS) % state.map.shape[1]
        state = state.replace(player_level=floors.astype(state.player_level.dtype))
    return state


def renew(env: Any, state: Any, done: jax.Array, keys: jax.Array) -> Any:
    """Replaces the worlds in which an episode ended within the chunk."""
    fresh = new_worlds(env, keys)
    ended = jnp.any(done, axis=0)

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(ended.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, fresh, state)


def plain(tree: Any) -> list[np.ndarray]:
    """Returns the leaves as NumPy arrays, keys as their numbers."""
    is_key = jax.dtypes.prng_key
    leaves = jax.tree.leaves(tree)
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, is_key) else x) for x in leaves
    ]


def differences(name: str, steps: int) -> int:
    """Returns how many arrays differ; prints what was compared and the times."""
    env = craftax.make(name, {})
    written = env._step_as_written
    forms = {"as written": written, "elementwise": elementwise(written)}
    jitted = {
        form: jax.jit(lambda state, key, step=step: play(env, step, state, key))
        for form, step in forms.items()
    }
    go_on = jax.jit(lambda *args: renew(env, *args))
    state = jax.jit(lambda keys: new_worlds(env, keys))(
        jax.random.split(jax.random.key(0), NUM_ENVS)
    )
    times: dict[str, list[float]] = {form: [] for form in forms}
    differing = episodes = 0
    chunks = max(2, steps // (NUM_ENVS * CHUNK))
    for chunk in range(chunks):
        results = {}
        for form, run in jitted.items():
            start = time.perf_counter()
            results[form] = jax.block_until_ready(run(state, jax.random.key(chunk)))
            times[form].append(time.perf_counter() - start)
        ours, theirs = (plain(result) for result in results.values())
        differing += sum(not np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
        state, (_, _, _, done, reset_keys) = results["as written"]
        episodes += int(np.any(done, axis=0).sum())
        state = go_on(state, done, reset_keys[-1])
    medians = {form: 1e3 * np.median(seconds[1:]) / CHUNK for form, seconds in times.items()}
    print(
        f"{name}: {chunks * CHUNK * NUM_ENVS:,} steps, {episodes} episodes ended, {differing}"
        f" arrays differ; a step of {NUM_ENVS} environments takes"
        f" {medians['as written']:.2f} ms as written, {medians['elementwise']:.2f} ms elementwise"
    )
    return differing


if __name__ == "__main__":
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 102_400
    sys.exit(max(differences(name, number) for name in craftax.NAMES) > 0)
