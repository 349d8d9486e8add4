"""Does an agent go by its own actions? `python benchmarks/replaced_action.py FOLDER STEP [SEED]`.

Plays 32 environments twice with the same keys, the second time with another action in the place of
the agent's at step STEP, from 0, of an environment with one discrete action. Prints for the steps
around it in how many of them the reward is positive.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from config import ConfigError
from environments import Discrete, make_env
from host.agent import Agent, load_agent

ENVS = 32
AFTER = 8  # steps that are shown after the one replaced


def play(agent: Agent, steps: int, replaced: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Actions and rewards, (steps, ENVS) each, the action of one step replaced by the next number.

    Raises:
      ConfigError: the actions are not single numbers.
    """
    env = make_env(agent.config, ENVS)
    if not isinstance(env.action_space, Discrete):
        raise ConfigError(f"{agent.config['ENV_NAME']} has other actions than one discrete one")
    at = -1 if replaced is None else replaced

    def step(carry, inputs):
        (obs, state, memory, first), (t, key) = carry, inputs
        action, memory = agent.act(memory, obs, first, key)
        action = jnp.where(t == at, (action + 1) % env.action_space.n, action)
        obs, state, reward, done, _ = env.step(jax.random.split(key, ENVS), state, action)
        return (obs, state, memory, done), (action, reward)

    start = env.reset(jax.random.split(jax.random.key(0), ENVS))
    carry = (*start, agent.initial_memory(ENVS), jnp.ones(ENVS, bool))
    inputs = jnp.arange(steps), jax.random.split(jax.random.key(1), steps)
    return jax.device_get(jax.lax.scan(step, carry, inputs)[1])


def main(folder: str, step: int, seed: int) -> None:
    """Prints a line for each step."""
    agent = load_agent(folder, seed)
    steps = step + 1 + AFTER
    own, other = (100 * (play(agent, steps, at)[1] > 0).mean(1) for at in (None, step))
    for t in range(step - 1, steps):
        print(f"step {t}: {own[t]:5.1f} % of the rewards are positive, {other[t]:5.1f} % replaced")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or not all(number.isdigit() for number in sys.argv[2:]):
        sys.exit(__doc__)
    try:
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    except ConfigError as error:
        sys.exit(f"error: {error}")
