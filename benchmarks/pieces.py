"""Pieces of the network beside their plain forms: `python benchmarks/pieces.py [ROUNDS]`.

The linear encoder on Craftax against one product over all entries, and the wide network's 3 x 3
convolution against a dense layer of all nine neighbours: a gradient of each, within a scan as in an
update. Both forms run in one process and take turns; the last line is a JSON object of medians.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from trxl.encoders import CELL_WIDTH, Convolution, LinearEncoder
from trxl.layers import matmul
from trxl.rollout import split_keys
from trxl.spaces import ObsSpace, StoredObs, obs_space, pack_obs, unpack_obs

from trainer_PPO_trXL import PPO
from wrappers import make_env

ENVIRONMENTS, STEPS, WIDTH = 8, 128, 256
GRADIENTS = 8  # per call


def main(rounds: int) -> None:
    """Prints the medians and the JSON line."""
    space, observations = craftax_observations()
    grid = space.grid
    assert grid is not None
    shape = (ENVIRONMENTS * STEPS, grid.rows, grid.columns, CELL_WIDTH)
    cells = jax.random.normal(jax.random.key(0), shape)
    encoder, convolution = LinearEncoder(space, WIDTH), Convolution()
    of_encoder = jax.jit(encoder.init)(jax.random.key(1), observations)
    of_convolution = jax.jit(convolution.init)(jax.random.key(1), cells)
    numbers = {}
    # The convolution's gradient goes on to its input, the encoder's ends with the observations.
    for name, module, inputs, params, plain in (
        ("linear encoder", encoder, observations, (of_encoder, None), partial(linear, space)),
        ("convolution", convolution, None, (of_convolution, cells), nine_neighbours),
    ):
        forms = {"as committed": module.apply, "plain": plain}
        seconds = take_turns(forms, inputs, params, rounds)
        numbers[name] = {k: v / GRADIENTS / shape[0] * 1e6 for k, v in seconds.items()}
        numbers[name]["ratio"] = numbers[name]["as committed"] / numbers[name]["plain"]
        print(f"{name}, us per observation and pass: {numbers[name]}")
    print(json.dumps(numbers))


def craftax_observations() -> tuple[ObsSpace, StoredObs]:
    """A rollout of random actions, (STEPS, ENVIRONMENTS, ...)."""
    config = PPO.check({"ENV_NAME": "Craftax-Symbolic-v1", "NUM_ENVS": ENVIRONMENTS})
    env = make_env({**config, "RESET_RATIO": ENVIRONMENTS}, ENVIRONMENTS)
    space = obs_space(env)

    def step(carry, _):
        keys, env_state = carry
        keys, action_keys, step_keys = split_keys(keys, 3)
        actions = jax.vmap(lambda key: jax.random.randint(key, (), 0, env.action_space.n))
        obs, env_state, *_ = env.step(step_keys, env_state, actions(action_keys))
        return (keys, env_state), pack_obs(obs, space)

    def play(keys):
        keys, reset_keys = split_keys(keys, 2)
        return jax.lax.scan(step, (keys, env.reset(reset_keys)[1]), None, STEPS)[1]

    return space, jax.jit(play)(jax.random.split(jax.random.key(0), ENVIRONMENTS))


def linear(space: ObsSpace, variables: Any, obs: StoredObs) -> jax.Array:
    """One product over all entries."""
    params = variables["params"]
    return matmul(unpack_obs(obs, space), params["kernel"]) + params["bias"]


def nine_neighbours(variables: Any, grid: jax.Array) -> jax.Array:
    """A dense layer of all nine neighbours side by side."""
    params = variables["params"]
    rows, columns = grid.shape[1:3]
    padded = jnp.pad(grid, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    return matmul(jnp.concatenate(shifted, axis=-1), params["kernel"]) + params["bias"]


def take_turns(
    forms: dict[str, Callable], inputs: Any, params: Any, rounds: int
) -> dict[str, float]:
    """Median seconds of GRADIENTS gradients of each form's sum of squares.

    Args:
      params: variables, and the inputs where they have a gradient too.
    """

    def descend(form: Callable) -> Callable:
        def loss(params, inputs):
            variables, x = params
            return jnp.sum(form(variables, inputs if x is None else x) ** 2)

        @jax.jit
        def run(params, inputs):
            def step(params, _):
                gradients = jax.grad(loss)(params, inputs)
                return jax.tree.map(lambda p, g: p - 1e-9 * g, params, gradients), None

            return jax.lax.scan(step, params, None, GRADIENTS)[0]

        return run

    runs = {name: descend(form) for name, form in forms.items()}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(1 + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(params, inputs))
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
