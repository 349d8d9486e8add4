"""Episodes that a saved agent plays, to be counted or to be seen."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from trxl.config import ConfigError
from trxl.runs.agent import Agent
from trxl.runs.film import check_writable, with_caption, write_gif
from trxl.rollout import strongly_typed

MAX_STEPS = 20_000
"""Of an episode; one that has not ended by then is taken for endless."""

STEPS_PER_CALL = 64
MOST_ENVIRONMENTS = 256


def make_loop(agent: Agent, env: Any) -> tuple[Callable, Callable]:
    """An agent in a batched environment.

    Returns:
      start(key) -> carry, whose first entry is the environment's state, and
      step(carry, key) -> (carry, (returned, reward, {name: (N,)} of the environment's log)), with
      one entry for each environment, not each agent: whether an episode returned, and the reward,
      several agents' mean.
    """
    num_rows, agents = env.num_rows, env.num_rows // env.num_envs

    @jax.jit
    def start(key: jax.Array):
        obs, env_state = env.reset(jax.random.split(key, num_rows))
        forget = jnp.ones(num_rows, bool)
        return strongly_typed(env_state), obs, forget, agent.initial_memory(num_rows)

    def step(carry: Any, key: jax.Array):
        env_state, obs, forget, memory = carry
        act_key, step_key = jax.random.split(key)
        action, memory = agent.act(memory, obs, forget, act_key)
        keys = jax.random.split(step_key, num_rows)
        obs, env_state, reward, done, info = env.step(keys, env_state, action)
        forget = info.get("memory_boundary", done)
        # The log is in the row of the first agent.
        returned = info.get("returned_episode", done)[::agents]
        logged = {name: info[name][::agents] for name in env.episode_metrics}
        reward = reward.reshape(-1, agents).mean(axis=1)
        return (env_state, obs, forget, memory), (returned, reward, logged)

    return start, step


def enough_episodes(agent: Agent) -> int:
    """1,000, or those of the least number of hundreds of trials that has as many.

    Of hundreds, since a number of trials with many divisors is played many at a time.
    """
    per_trial = agent.environment().episodes_per_trial
    return per_trial * 100 * math.ceil(10 / per_trial)


def play(
    agent: Agent, episodes: int, key: jax.Array, max_steps: int = MAX_STEPS
) -> dict[str, np.ndarray]:
    """Plays complete episodes.

    Environments run side by side and each plays the same number of episodes, so that short ones
    are not counted more often than long ones; where episodes make up trials, of whole trials.

    Returns:
      {name: (episodes,)} for everything that the environment logs at an episode's end.

    Raises:
      ConfigError: the episodes are no whole number of trials, or one has more than `max_steps`.
    """
    per_trial = agent.environment().episodes_per_trial
    if episodes % per_trial:
        raise ConfigError(f"EPISODES={episodes} is no multiple of {per_trial}, a trial's episodes")
    trials = episodes // per_trial
    num_envs = max(n for n in range(1, MOST_ENVIRONMENTS + 1) if trials % n == 0)
    per_env = episodes // num_envs
    env = agent.environment(num_envs)
    start, step = make_loop(agent, env)

    @jax.jit
    def run(carry, key):
        return jax.lax.scan(step, carry, jax.random.split(key, STEPS_PER_CALL))

    carry = start(jax.random.fold_in(key, 0))
    finished, length = np.zeros(num_envs, int), np.zeros(num_envs, int)
    results: dict[str, list[np.ndarray]] = {name: [] for name in env.episode_metrics}
    call = 0
    with tqdm(total=episodes, unit="episode") as bar:
        while np.any(finished < per_env):
            call += 1
            carry, logged = run(carry, jax.random.fold_in(key, call))
            returned, _, logged = jax.device_get(logged)
            # How many episodes of its environment each one is, itself counted.
            ordinal = finished + np.cumsum(returned, axis=0)
            counted = returned & (ordinal <= per_env)
            for name, values in logged.items():
                results[name].append(values[counted])
            since = np.argmax(returned[::-1], axis=0)  # steps of the call after the last end
            length = np.where(returned.any(axis=0), since, length + STEPS_PER_CALL)
            finished = ordinal[-1]
            bar.update(int(counted.sum()))
            if np.any(length[finished < per_env] > max_steps):
                raise endless(max_steps)
    return {name: np.concatenate(values) for name, values in results.items()}


def endless(max_steps: int) -> ConfigError:
    """What to say of an episode that does not end."""
    return ConfigError(f"an episode has not ended after MAX_STEPS={max_steps}; raise it if it may")


def check_gif(agent: Agent, path: Path) -> None:
    """Sees that `save_gif` will be able to do what it is to do.

    Raises:
      ConfigError: the path is none, or the environment can't be drawn.
    """
    check_writable("GIF", path, ".gif")
    env = agent.environment()
    start, _ = make_loop(agent, env)  # compiled as `save_gif` compiles it, for the cache
    state, *_ = start(jax.random.key(0))
    env.renderer()(jax.tree.map(lambda x: x[0], env.single_states(state)))


def save_gif(agent: Agent, path: Path, key: jax.Array, max_steps: int = MAX_STEPS) -> float:
    """Plays one episode, or one trial of several, and writes it as a GIF.

    Below each picture are the step and the episode's return so far, in a trial its number too.

    Returns:
      the episode's return, or the trial's.

    Raises:
      ConfigError: the environment can't be drawn, or an episode has more than `max_steps`.
    """
    env = agent.environment()
    start, step = make_loop(agent, env)
    step, render = jax.jit(step), env.renderer()
    carry = start(jax.random.fold_in(key, 0))
    frames: list[Image.Image] = []
    returns = [0.0]  # of the episodes so far
    begun = 0  # at which frame the running one began

    def caption() -> str:
        number = f"episode {len(returns)}  " if env.episodes_per_trial > 1 else ""
        return f"{number}step {len(frames) - begun}  return {returns[-1]:.1f}"

    with tqdm(unit="step") as bar:
        while len(returns) <= env.episodes_per_trial:
            state = jax.tree.map(lambda x: x[0], env.single_states(carry[0]))
            picture = render(state)
            frames.append(with_caption(picture, caption()))
            carry, ((done,), (reward,), _) = step(carry, jax.random.fold_in(key, len(frames)))
            returns[-1] += float(reward)
            bar.update()
            if done:  # what follows is the next episode: the last picture tells how this one ended
                frames[-1] = with_caption(picture, caption())
                returns.append(0.0)
                begun = len(frames)
            if len(frames) - begun > max_steps:
                raise endless(max_steps)
    write_gif(path, frames)
    return sum(returns)
