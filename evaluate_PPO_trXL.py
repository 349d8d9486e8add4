"""Plays episodes with a saved agent: `python evaluate_PPO_trXL.py FOLDER [KEY=VALUE ...]`.

FOLDER is the folder of a run, such as results_craftax/Craftax-Symbolic-v1.
"""

import host.interrupt  # noqa: F401  # isort: skip, first

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from algorithms import resolve_algorithm
from config import ConfigError, Key, check_values, defaults, read_overrides
from environments import make_env, named_by_user
from host.experiment import enable_compilation_cache
from host.failures import explained
from host.film import check_writable, with_caption, write_gif
from host.help import key_lines
from host.report import plot_trials, report
from learning import Algorithm, init_params
from normalization import init_normalizer, network_input, restored_normalizer
from policies import sample_each, sample_uniformly
from results import load_results
from rollout import empty_memory, network_actor
from spaces import obs_space

OPTIONS = {
    "seed": Key(0, "of the agent", low=0, high=2**32 - 1),
    "EPISODES": Key(1000, "complete episodes", low=1),
    "POLICY": Key(
        "sampled",
        "`sampled`, `greedy`, or `random`: uniform over the actions",
        choices=("sampled", "greedy", "random"),
    ),
    "EVAL_SEED": Key(0, "of the environments and of the sampled actions", low=0, high=2**32 - 1),
    "ENV_NAME": Key(
        None,
        "`<file.py>:<class>`, where the agent's environment is a file of your own",
        type=str,
    ),
    "GIF": Key("", "where to write a picture of one more episode, `<file>.gif`; empty: nowhere"),
    "SPLIT": Key(
        None,
        "of trials whose rulesets are partly held out: `train` or `held_out`; None: as trained",
        type=str,
        choices=("train", "held_out"),
    ),
    "PLOT": Key(
        "",
        "where to draw a trial's return by the episode's number, of both splits if there are two,"
        " `<file>.png`; empty: nowhere",
    ),
    "MAX_STEPS": Key(
        20_000, "of an episode; one that has not ended by then is taken for endless", low=1
    ),
}
"""The settings of the command line."""

STEPS_PER_CALL = 64
MOST_ENVIRONMENTS = 256
ENVIRONMENT_ARGUMENT = 'environment="{0}" (on the command line ENV_NAME={0})'


class AgentMemory(NamedTuple):
    """The keys and values of the last steps, and how many of them are of the running episode."""

    caches: Any
    t: jax.Array  # () int32, the slot that the next step writes
    reach: jax.Array  # (B,) int32


class Agent(NamedTuple):
    """A trained agent for a loop of one's own; both functions are jitted.

    initial_memory(batch) -> memory of `batch` environments, empty.

    act(memory, obs, done, key) -> (action, memory): one step of all of them. obs is
    (batch, obs_size), flat float32, as `make_env` gives it; done (batch,) says whose episode ended
    in the step before, so that the observation is a new episode's first and the memory is to be
    emptied.

    config is the run's, but for the reset strategy: the suite's own, with a world of its own for
    every episode.
    """

    initial_memory: Callable
    act: Callable
    config: dict[str, Any]


def load_agent(
    folder: str | Path,
    seed: int = 0,
    greedy: bool = False,
    algorithm: Algorithm | None = None,
    environment: str | None = None,
) -> Agent:
    """The agent that a run saved.

    Args:
      folder: of the run.
      seed: of the agent.
      greedy: takes the most probable action instead of sampling one.
      algorithm: that trained it; None: the one of this repository that the run names.
      environment: `<file.py>:<class>` of an agent whose environment is a file. The run's files may
        be a stranger's, so that no file is run that is not named here.

    Raises:
      ConfigError: there is no such agent, or its files are broken or don't fit together, or its
        environment is a file that `environment` doesn't name.
    """
    config, params = read_agent(folder, seed)
    algorithm = resolve_algorithm(config.pop("ALGORITHM", "PPO"), algorithm)
    config = algorithm.check(config)
    config["ENV_NAME"] = named_by_user(config["ENV_NAME"], environment, ENVIRONMENT_ARGUMENT)
    config["RESET_STRATEGY"] = None  # with worlds that environments share, returns would be alike
    env = make_env(config, 1)
    network = algorithm.make_network(config, env.action_space, obs_space(env))
    actor = network_actor(network)
    window_mem = config["WINDOW_MEM"]
    normalizer = restored_normalizer(params.pop("normalizer", {}))

    def fresh() -> Any:
        fresh_params = init_params(config, network, env.obs_size, jax.random.key(0))
        acting = algorithm.acting_params(algorithm.init(config, fresh_params))
        return acting, init_normalizer(config, env)

    expected = jax.eval_shape(fresh)
    if jax.tree.map(jnp.shape, (params, normalizer)) != jax.tree.map(jnp.shape, expected):
        raise ConfigError(f"{folder}/{seed}_params.npy does not fit {seed}_config.npy beside it")
    if not all(np.all(np.isfinite(x)) for x in jax.tree.leaves(params)):
        raise ConfigError(f"{folder}/{seed}_params.npy: not all parameters are finite; it diverged")

    def initial_memory(batch: int) -> AgentMemory:
        hidden, reach = empty_memory(config, batch)
        return AgentMemory(actor.start(params, hidden), jnp.int32(0), reach)

    def act(memory: AgentMemory, obs: jax.Array, done: jax.Array, key: jax.Array):
        reach = jnp.where(done, 0, memory.reach)
        policy, _, caches, _ = actor.act(
            params, network_input(normalizer, obs), memory.caches, memory.t, reach
        )
        keys = jax.random.split(key, len(obs))
        action = policy.mode() if greedy else sample_each(policy, keys)
        t = (memory.t + 1) % (window_mem + 1)
        return action, AgentMemory(caches, t, jnp.minimum(reach + 1, window_mem))

    return Agent(jax.jit(initial_memory, static_argnums=0), jax.jit(act), config)


def read_agent(folder: str | Path, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config and the parameters of a seed, as they were saved.

    Raises:
      ConfigError: there are none, or they are broken.
    """
    try:
        config, params = (
            load_results(Path(folder) / f"{seed}_{name}.npy") for name in ("config", "params")
        )
    except OSError as error:
        raise ConfigError(f"no agent of seed {seed} in {folder}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return config, params


def random_agent(agent: Agent) -> Agent:
    """An agent for the same environment that takes every legal action with equal probability."""
    action_space = make_env(agent.config, 1).action_space

    def act(memory: Any, obs: jax.Array, done: jax.Array, key: jax.Array):
        return sample_uniformly(action_space, obs, jax.random.split(key, len(obs))), memory

    return Agent(lambda batch: (), act, agent.config)


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
        return env_state, obs, jnp.ones(num_rows, bool), agent.initial_memory(num_rows)

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


def play(
    agent: Agent, episodes: int, key: jax.Array, max_steps: int = OPTIONS["MAX_STEPS"].default
) -> dict[str, np.ndarray]:
    """Plays complete episodes.

    Environments run side by side and each plays the same number of episodes, so that short ones
    are not counted more often than long ones; where episodes make up trials, of whole trials.

    Returns:
      {name: (episodes,)} for everything that the environment logs at an episode's end.

    Raises:
      ConfigError: the episodes are no whole number of trials, or one has more than `max_steps`.
    """
    per_trial = make_env(agent.config, 1).episodes_per_trial
    if episodes % per_trial:
        raise ConfigError(f"EPISODES={episodes} is no multiple of {per_trial}, a trial's episodes")
    trials = episodes // per_trial
    num_envs = max(n for n in range(1, MOST_ENVIRONMENTS + 1) if trials % n == 0)
    per_env = episodes // num_envs
    env = make_env(agent.config, num_envs)
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
    env = make_env(agent.config, 1)
    _, state = env.reset(jax.random.split(jax.random.key(0), env.num_rows))
    env.renderer()(jax.tree.map(lambda x: x[0], env.single_states(state)))


def save_gif(
    agent: Agent, path: Path, key: jax.Array, max_steps: int = OPTIONS["MAX_STEPS"].default
) -> float:
    """Plays one episode and writes it as a GIF, with the step and the return so far below.

    Returns:
      the episode's return.

    Raises:
      ConfigError: the environment can't be drawn, or the episode has more than `max_steps`.
    """
    env = make_env(agent.config, 1)
    start, step = make_loop(agent, env)
    step, render = jax.jit(step), env.renderer()
    carry = start(jax.random.fold_in(key, 0))
    frames: list[Image.Image] = []
    total, done = 0.0, False
    with tqdm(unit="step") as bar:
        while not done:
            state = jax.tree.map(lambda x: x[0], env.single_states(carry[0]))
            frames.append(with_caption(render(state), f"step {len(frames)}  return {total:.1f}"))
            carry, ((done,), (reward,), _) = step(carry, jax.random.fold_in(key, len(frames)))
            total += float(reward)
            bar.update()
            if len(frames) > max_steps:
                raise endless(max_steps)
    frames[-1] = with_caption(render(state), f"step {len(frames)}  return {total:.1f}")
    write_gif(path, frames)
    return total


def main() -> None:
    """Reads the command line, plays, and prints the report."""
    enable_compilation_cache()
    arguments = sys.argv[1:]
    values = defaults(OPTIONS)
    if {"-h", "--help"} & set(arguments):
        print(f"usage: {sys.argv[0]} FOLDER [KEY=VALUE ...]\n\n{key_lines(OPTIONS, values)}")
        return
    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        sys.exit(f"usage: {sys.argv[0]} FOLDER {' '.join(f'{k}={v}' for k, v in values.items())}")
    try:
        evaluate(arguments[0], check_values(read_overrides(arguments[1:], OPTIONS), OPTIONS))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except Exception as error:  # a suite's, or the device's
        sys.exit(f"error: {explained(error)}")


def evaluate(folder: str, chosen: dict[str, Any]) -> None:
    """Plays with the agent in a folder and prints the report.

    Args:
      chosen: checked values of `OPTIONS`.

    Raises:
      ConfigError: it can't be done; if it can be told before, nothing was played.
    """
    greedy = chosen["POLICY"] == "greedy"
    agent = load_agent(folder, chosen["seed"], greedy, environment=chosen["ENV_NAME"])
    if chosen["POLICY"] == "random":
        agent = random_agent(agent)
    splits = {split: of_split(agent, split) for split in splits_to_play(agent, chosen)}
    gif, plot = (Path(chosen[key]) if chosen[key] else None for key in ("GIF", "PLOT"))
    if gif:
        check_gif(agent, gif)
    if plot:
        check_writable("PLOT", plot, ".png")
    results = {}
    for split, agent in splits.items():
        key = jax.random.key(chosen["EVAL_SEED"])
        results[split] = play(agent, chosen["EPISODES"], key, chosen["MAX_STEPS"])
        of = f" of the rulesets {split}" if len(splits) > 1 or chosen["SPLIT"] else ""
        name = agent.config["ENV_NAME"]
        print(f"{chosen['EPISODES']} episodes of {name}{of}, {chosen['POLICY']} actions")
        print(report(agent.config, results[split]))
    if plot:
        plot_trials(plot, results)
        print(f"the return by the episode's number in its trial is drawn in {plot}")
    if gif:
        key = jax.random.key(chosen["EVAL_SEED"] + 1)
        total = save_gif(agent, gif, key, chosen["MAX_STEPS"])
        print(f"an episode with return {total:.1f} is in {gif}")


def splits_to_play(agent: Agent, chosen: dict[str, Any]) -> list[str]:
    """What SPLIT says, or as trained; for a PLOT both where a share of the rulesets is held out.

    Raises:
      ConfigError: the agent's environment has no trials, or none of its rulesets is held out.
    """
    env = make_env(agent.config, 1)
    kwargs = agent.config["ENV_KWARGS"]
    if (chosen["SPLIT"] or chosen["PLOT"]) and env.episodes_per_trial == 1:
        raise ConfigError("SPLIT and PLOT are for trials of several episodes")
    if chosen["SPLIT"] == "held_out" and not kwargs.get("held_out"):
        raise ConfigError("SPLIT=held_out: the agent was trained on all rulesets (held_out is 0)")
    if chosen["PLOT"] and not chosen["SPLIT"] and kwargs.get("held_out"):
        return ["train", "held_out"]
    return [chosen["SPLIT"] or kwargs.get("split", "train")]


def of_split(agent: Agent, split: str) -> Agent:
    """The agent in trials of that part of the rulesets."""
    kwargs = agent.config["ENV_KWARGS"]
    if kwargs.get("split", "train") == split:
        return agent
    return agent._replace(config={**agent.config, "ENV_KWARGS": {**kwargs, "split": split}})


if __name__ == "__main__":
    main()
