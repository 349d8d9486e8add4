"""Small networks, random parameters, and both forms of the network, for the tests."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle

from trxl.environments import Discrete
from trxl.rollout import Transition
from trxl.runs import run as runs
from trxl.runs import saved_config
from trxl.runs.outputs import save_seed
from trxl.spaces import ObsSpace, obs_space
from trxl.training import init_params

from trainer_PPO_trXL import PPO
from transformerXL import make_network
from wrappers import make_env

SMALL = {
    "NUM_ENVS": 4,
    "NUM_STEPS": 16,
    "NUM_MINIBATCHES": 2,
    "UPDATE_EPOCHS": 2,
    "TOTAL_TIMESTEPS": 256,
    "ANNEAL_LR": False,  # otherwise each TOTAL_TIMESTEPS compiles anew
    "EMBED_SIZE": 16,
    "qkv_features": 16,
    "num_heads": 2,
    "hidden_layers": 16,
    "WINDOW_MEM": 8,
    "WINDOW_GRAD": 4,
}

QUICK = {**SMALL, "num_layers": 1}
"""Config of one layer for tests that are not about the network."""

OBS_SIZE = 3

PLAYED_PROBS = np.array([0.4, 0.6])
"""Probabilities of the two actions of `random_fields` when they were played."""


OWN_ENVIRONMENT = """
from pathlib import Path
import jax.numpy as jnp
from trxl.environments import Discrete, SingleEnvironment

Path(__file__).with_name("ran").touch()


class Corridor(SingleEnvironment):
    action_space = Discrete(2)
    obs_size = 1

    def reset(self, key):
        return jnp.zeros(1), jnp.int32(0)

    def step(self, key, state, action):
        state = state + 1
        return jnp.ones(1), state, action * 1.0, state == 3, jnp.bool_(False), {}
"""
"""Source of a custom environment, `Corridor`, that leaves a file `ran` when it is run."""


def small_network(**changes):
    config = PPO.check({**SMALL, **changes})
    return config, make_network(config, Discrete(3), ObsSpace(OBS_SIZE))


def random_params(params, seed=0, scale=0.4):
    """Replaces every leaf by normal numbers, biases, u, w and LayerNorm scales included."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), jnp.float32), params
    )


def init_random(config, network, obs_size=OBS_SIZE, seed=0):
    memory = jnp.zeros((1, config["WINDOW_MEM"], config["num_layers"], config["EMBED_SIZE"]))
    shapes = jax.eval_shape(
        lambda: network.init(
            jax.random.key(0),
            jnp.zeros((1, 1, obs_size)),
            memory,
            jnp.zeros((1, 1), jnp.int32),
            1,
            method="unroll_windows",
        )
    )
    return random_params(shapes, seed)


def random_fields(rng, rows, length):
    """Returns random steps as fields (T, B) of a `Transition`, None where there is none.

    Observations are t, and agents leave their team for the rest of an episode.
    """
    ends = rng.random((length, rows))
    fields = dict.fromkeys(Transition._fields)
    fields |= {"terminated": ends < 0.1, "truncated": (ends > 0.1) & (ends < 0.2)}
    fields |= {"done": ends < 0.2, "reward": rng.normal(size=(length, rows)), "reach": ends}
    active = np.ones((length, rows), bool)
    for t in range(1, length):
        active[t] = fields["done"][t - 1] | (active[t - 1] & (rng.random(rows) > 0.1))
    action = rng.integers(0, 2, (length, rows))
    fields |= {"active": active, "action": action, "log_prob": np.log(PLAYED_PROBS)[action]}
    fields |= {"obs": np.tile(np.arange(1.0 * length)[:, None], rows)}
    return fields | {"layer_inputs": ends[..., None, None]}


def reach_of(boundary, window_mem):
    """Returns how many steps back each of the last T steps sees: (B, M+T) boundaries to (B, T)."""
    reach = np.zeros(boundary.shape, int)
    for i in range(1, boundary.shape[1]):
        reach[:, i] = np.where(boundary[:, i - 1], 0, np.minimum(reach[:, i - 1] + 1, window_mem))
    return reach[:, window_mem:]


def make_step_form(network):
    """Returns the jitted step form.

    Maps (params, obs (B, T, .), memory (B, M, L, E), reach (B, T)) to outputs, values, hidden.
    """

    @jax.jit
    def run(params, obs, memory, reach):
        caches = network.apply(params, memory, method="init_cache")

        def step(caches, inputs):
            t, obs, reach = inputs
            policy, value, caches, hidden = network.apply(
                params, obs, caches, t, reach, method="step"
            )
            return caches, (policy.logits, value, hidden)

        inputs = jnp.arange(obs.shape[1]), jnp.swapaxes(obs, 0, 1), jnp.swapaxes(reach, 0, 1)
        _, outputs = jax.lax.scan(step, caches, inputs)
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), outputs)

    return run


def make_window_form(network, window_grad):
    """Returns the jitted window form.

    Maps (params, obs (B, T, .), memory (B, M+T-W, L, E), reach (B, T)) to outputs, values.
    """

    @jax.jit
    def run(params, obs, memory, reach):
        policy, value = network.apply(
            params, obs, memory, reach, window_grad, method="unroll_windows"
        )
        return policy.logits, value

    return run


def whole_checkpoints(folder):
    """Returns the updates after which a run's complete checkpoints were saved."""
    return {int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdigit()}


def save_untrained(folder, **changes):
    """Saves an untrained agent, as a run of `QUICK` and `changes` would."""
    config = PPO.check({**QUICK, **changes})
    env = make_env(config, config["NUM_ENVS"])
    network = make_network(config, env.action_space, obs_space(env))
    params = init_params(config, network, env.obs_size, jax.random.key(0))
    save_seed(folder, 0, config, {}, jax.device_get(params))


def run(config, all_devices=False):
    """Calls `trxl.runs.run.run` with PPO."""
    return runs.run(config, PPO, all_devices)


def main(config, all_devices=False):
    """Calls `trxl.runs.run.main` with PPO."""
    runs.main(config, PPO, all_devices)


def resumed_config(folder, overrides):
    """Calls `saved_config.resumed_config` with PPO."""
    return saved_config.resumed_config(folder, overrides, PPO)


def random_case(changes):
    """Returns a random network and inputs, with several episode ends inside its windows."""
    config, network = small_network(NUM_MINIBATCHES=1, **changes)
    params = init_random(config, network)
    rng = np.random.default_rng(1)
    batch, steps, mem = config["NUM_ENVS"], config["NUM_STEPS"], config["WINDOW_MEM"]
    obs = rng.standard_normal((batch, steps, OBS_SIZE)).astype(np.float32)
    memory_shape = (batch, mem, config["num_layers"], config["EMBED_SIZE"])
    memory = rng.standard_normal(memory_shape).astype(np.float32)
    boundary = rng.random((batch, mem + steps)) < 0.12
    boundary[0, mem + 1 : mem + 6 : 2] = True
    boundary[-1, : mem + steps - 2] = False  # one row reaches all the way back
    return config, network, params, obs, memory, boundary


def from_equations(config, params, obs, memory, boundary):
    """Returns outputs, values and hidden states of every environment by the NumPy oracle."""
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    return [
        oracle.forward(
            exact,
            *(obs[b].astype(np.float64), memory[b].astype(np.float64), boundary[b]),
            *(config["num_heads"], config["gating"], config["ACTIVATION"]),
        )
        for b in range(len(obs))
    ]
