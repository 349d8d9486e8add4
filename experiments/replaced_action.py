"""Tests reliance on own actions: `python experiments/replaced_action.py FOLDER STEP [SEED]`.

Plays 32 environments twice with the same keys. The second time, the agent's action at step STEP,
from 0, is replaced by another; the action space is one discrete choice. For the steps around STEP,
prints in how many environments the reward is positive.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from trxl.environments import Discrete
from trxl.errors import ConfigError
from trxl.runs.agent import Agent
from trxl.runs.evaluation import make_loop

from evaluate_PPO_trXL import load_agent
from wrappers import make_env

ENVS = 32
AFTER = 8  # steps that are shown after the one replaced


def replacing(agent: Agent, at: int, num_actions: int) -> Agent:
    """Returns an agent whose action at step `at` is replaced by the next one by number."""

    def initial_memory(batch: int):
        return jnp.int32(0), agent.initial_memory(batch)

    def act(memory, obs: jax.Array, done: jax.Array, key: jax.Array):
        t, memory = memory
        action, memory = agent.act(memory, obs, done, key)
        action = jnp.where(t == at, (action + 1) % num_actions, action)
        return action, (t + 1, memory)

    return agent._replace(initial_memory=initial_memory, act=act)


def rewards(agent: Agent, steps: int, at: int = -1) -> np.ndarray:
    """Returns the rewards (steps, ENVS) of an agent whose action at `at` is replaced, -1 for none.

    Raises:
      ConfigError: the actions are not single numbers.
    """
    env = make_env(agent.config, ENVS)
    if not isinstance(env.action_space, Discrete):
        raise ConfigError(f"{agent.config['ENV_NAME']} has other actions than one discrete one")
    start, step = make_loop(replacing(agent, at, env.action_space.n), env)
    keys = jax.random.split(jax.random.key(1), steps)
    _, (_, reward, _) = jax.lax.scan(step, start(jax.random.key(0)), keys)
    return jax.device_get(reward)


def main(folder: str, step: int, seed: int) -> None:
    """Prints a line for each step."""
    agent = load_agent(folder, seed)
    steps = step + 1 + AFTER
    own, other = (100 * (rewards(agent, steps, at) > 0).mean(1) for at in (-1, step))
    for t in range(max(step - 1, 0), steps):
        print(f"step {t}: {own[t]:5.1f} % of the rewards are positive, {other[t]:5.1f} % replaced")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or not all(number.isdigit() for number in sys.argv[2:]):
        sys.exit(__doc__)
    try:
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    except ConfigError as error:
        sys.exit(f"error: {error}")
