"""Evaluation episodes of a saved agent, and their report."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from trxl.environments import resolve_name
from trxl.errors import ConfigError
from trxl.rollout import strongly_typed
from trxl.runs.agent import Agent
from trxl.runs.outputs import write_whole
from trxl.training import with_nan, without_nan

MAX_STEPS = 20_000
"""Default number of steps after which an episode counts as endless."""

STEPS_PER_CALL = 64
MOST_ENVIRONMENTS = 256


def make_loop(agent: Agent, env: Any) -> tuple[Callable, Callable]:
    """Makes the loop of an agent in a batched environment of N environments.

    Returns:
      start(key) -> carry, whose first entry is the environment's state, and
      step(carry, key) -> (carry, (returned (N,) bool, reward (N,), {name: (N,)} of the log)). The
      reward is the mean over agents.
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
        # The first agent's row has the log.
        returned = info.get("returned_episode", done)[::agents]
        logged = {name: without_nan(info[name][::agents]) for name in env.episode_metrics}
        reward = reward.reshape(-1, agents).mean(axis=1)
        return (env_state, obs, forget, memory), (returned, reward, logged)

    return start, step


def enough_episodes(agent: Agent) -> int:
    """Returns 1,000, or the episodes of the smallest multiple of 100 trials that has as many.

    Multiples of 100 have many divisors, so that many trials are played in parallel.
    """
    per_trial = agent.environment().episodes_per_trial
    return per_trial * 100 * math.ceil(10 / per_trial)


def play(
    agent: Agent, episodes: int, key: jax.Array, max_steps: int = MAX_STEPS
) -> dict[str, np.ndarray]:
    """Plays complete episodes in parallel environments.

    Each environment plays the same number of episodes, or of whole trials, so that short episodes
    are not overrepresented.

    Returns:
      {name: (episodes,)} of the environment's log at each episode's end.

    Raises:
      ConfigError: `episodes` is no multiple of a trial's, or an episode has more than `max_steps`.
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
            returned, _, logged = with_nan(jax.device_get(logged))
            # Number of each episode within its environment, from 1.
            ordinal = finished + np.cumsum(returned, axis=0)
            counted = returned & (ordinal <= per_env)
            for name, values in logged.items():
                results[name].append(values[counted])
            since = np.argmax(returned[::-1], axis=0)  # steps after the last end in this call
            length = np.where(returned.any(axis=0), since, length + STEPS_PER_CALL)
            finished = ordinal[-1]
            bar.update(int(counted.sum()))
            if np.any(length[finished < per_env] > max_steps):
                raise endless(max_steps)
    return {name: np.concatenate(values) for name, values in results.items()}


def endless(max_steps: int) -> ConfigError:
    """Makes the error of an episode that does not end."""
    return ConfigError(f"an episode has not ended after MAX_STEPS={max_steps}; raise it if it may")


MAX_RETURN = {"Craftax-Symbolic-v1": 226.0, "Craftax-Classic-Symbolic-v1": 22.0}
"""Return of a perfect episode (Matthews et al. 2024), 100 % of the score."""

OF_A_TRIAL = "trial_return/episode_"
"""Prefix of a trial's metrics, before the episode's number from 1."""


def describe(values: np.ndarray) -> str:
    """Formats mean, standard error, interquartile mean, minimum and maximum."""
    if not len(values):
        return "none"
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    cut = len(values) // 4
    middle = np.sort(values)[cut : len(values) - cut]
    return (
        f"mean {values.mean():.3f} +- {error:.3f}, interquartile mean {middle.mean():.3f},"
        f" min {values.min():.3f}, max {values.max():.3f}"
    )


def crafter_score(rates: list[float]) -> float:
    """Computes exp(mean(log(1 + s_i))) - 1 of success rates s_i in %.

    Hafner 2021 (arXiv 2109.06780).
    """
    return float(np.expm1(np.mean(np.log1p(rates))))


def report(config: dict[str, Any], results: dict[str, np.ndarray]) -> str:
    """Formats the results of `play`, with Craftax's score and achievements."""
    returns = results["returned_episode_returns"]
    lines = [
        f"return: {describe(returns)}",
        f"length: {describe(results['returned_episode_lengths'])}",
    ]
    _, name = resolve_name(config["ENV_NAME"])
    if name in MAX_RETURN:
        score = 100 * returns.mean() / MAX_RETURN[name]
        lines.append(f"score: {score:.2f} % of the maximum {MAX_RETURN[name]:.0f}")
    for key, values in results.items():
        given = values[~np.isnan(values)]
        if key.startswith(OF_A_TRIAL) and len(given):
            middle, low = np.percentile(given, [50, 20])
            more = f", median {middle:.3f}, 20th percentile {low:.3f}"
            lines.append(f"{key}: {describe(given)}{more}")
        elif not key.startswith(("returned_episode_", "Achievements/")):
            lines.append(f"{key}: {describe(given)}")
    rates = {key: values.mean() for key, values in results.items() if "Achievements/" in key}
    if rates:
        lines.append(f"Crafter score: {crafter_score(list(rates.values())):.2f} %")
    for key, rate in sorted(rates.items(), key=lambda item: -item[1]):
        if rate > 0:
            lines.append(f"  {rate:6.2f} %  {key.partition('/')[2]}")
    if any(rate == 0 for rate in rates.values()):
        never = sum(rate == 0 for rate in rates.values())
        lines.append(f"  never: the other {never} of {len(rates)} achievements")
    return "\n".join(lines)


def plot_trials(path: Path, results: dict[str, dict[str, np.ndarray]]) -> None:
    """Draws the return by an episode's number in its trial.

    Shows mean with standard error, median and 20th percentile over trials, like Nikulin et al. 2024
    (arXiv 2312.12044).

    Args:
      results: results of `play` by split of the rulesets.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (split, metrics) in enumerate(results.items()):
        names = [name for name in metrics if name.startswith(OF_A_TRIAL)]
        values = [metrics[name][~np.isnan(metrics[name])] for name in names]
        numbers = np.arange(1, 1 + len(names))
        mean = [x.mean() for x in values]
        error = [x.std(ddof=1) / np.sqrt(len(x)) for x in values]
        colour = f"C{index}"
        axes.errorbar(numbers, mean, error, color=colour, label=f"{split}, mean", capsize=3)
        for percent, style in ((50, "--"), (20, ":")):
            line = [np.percentile(x, percent) for x in values]
            label = f"{split}, {'median' if percent == 50 else '20th percentile'}"
            axes.plot(numbers, line, style, color=colour, label=label)
    axes.set(xlabel="episode of the trial", ylabel="return", xticks=numbers)
    axes.grid(alpha=0.3)
    axes.legend()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))
