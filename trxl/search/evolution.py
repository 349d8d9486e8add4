"""Neuroevolution: the parameters of a policy with memory, moved by evosax without gradients.

As in Salimans et al. 2017 (arXiv 1703.03864): in each generation an algorithm of evosax proposes
parameters, each plays NUM_STEPS steps in NUM_ENVS environments, all of them in the same ones, and
the algorithm gets the mean return of each environment's first episode. The distribution's mean, or
without one the best parameters, are reported and saved; their return is measured in episodes of
their own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec
from tqdm import tqdm

from trxl.errors import ConfigError
from trxl.rollout import Rollout, init_rollout, rollout
from trxl.runs.interruption import StopOnSignal
from trxl.runs.outputs import save_results
from trxl.runs.processes import print_main
from trxl.runs.saved_config import how_to_go_on
from trxl.search.evosax_strategies import as_fitness, make_algorithm, start
from trxl.search.population import BY_ROW, ROWS
from trxl.search.record import EvolutionRecord, fresh_search_folder
from trxl.search.settings import default_config, read_space
from trxl.spaces import obs_space
from trxl.training import Algorithm, init_params


class Evolving(NamedTuple):
    """What a generation starts from."""

    state: Any  # the algorithm's
    key: jax.Array  # raw, (2,) uint32


class Task(NamedTuple):
    """What is evolved, and on what."""

    algorithm: Any  # of evosax
    params: Any  # of evosax's algorithm
    first: Evolving
    unravel: Callable  # from numbers (dims,) to a network's parameters
    evaluate: Callable  # (numbers (candidates, dims), key) -> mean returns (candidates,)


def make_task(config: dict[str, Any], settings: dict[str, Any], learner: Algorithm) -> Task:
    """The network's parameters as numbers, and how good some are.

    Raises:
      ConfigError: the config can't be run, or asks for what only training has.
    """
    for name in ("NORMALIZE_OBS", "NORMALIZE_REWARD"):
        if config[name]:
            raise ConfigError(f"{name} gathers statistics while it trains; evolution has none")
    env = learner.make_env(config, config["NUM_ENVS"])
    network = learner.make_network(config, env.action_space, obs_space(env))
    key = jax.random.key(config["seed"])
    init_key, start_key, key = jax.random.split(key, 3)
    mean, unravel = ravel_pytree(init_params(config, network, env.obs_size, init_key))
    size = settings["POPULATION"]
    std = settings["ES_STD"]
    algorithm = make_algorithm(settings["STRATEGY"], size, mean.size, std, settings["ES_LR"])
    params, state = start(algorithm, start_key, mean, std)

    def play(numbers: jax.Array, key: jax.Array) -> jax.Array:
        """Returns the mean return of one candidate."""
        state = init_rollout(config, env, key, 0)
        _, _, played = rollout(config, env, network, unravel(numbers), state, {})
        return mean_return(played) / episodes

    # A trial that is one memory is one episode to the learner, see `rollout.episode_boundaries`.
    as_one = config["TRIAL_MEMORY"] and config["TRIAL_CREDIT"]
    episodes = env.episodes_per_trial if as_one else 1
    chunk = settings["CHUNK"] or 16
    devices = jax.local_device_count()

    def evaluate(numbers: jax.Array, key: jax.Array) -> jax.Array:
        return jax.lax.map(lambda x: play(x, key), numbers, batch_size=chunk)

    return Task(
        algorithm,
        params,
        Evolving(state, jax.random.key_data(key)),
        unravel,
        on_devices(evaluate, devices),
    )


def on_devices(evaluate: Callable, devices: int) -> Callable:
    """`evaluate`, jitted, its candidates spread over devices; the last stands in for missing."""
    if devices == 1:
        return jax.jit(evaluate)
    mesh = Mesh(np.array(jax.local_devices()[:devices]), ROWS)
    specs = (BY_ROW, PartitionSpec())
    spread = jax.shard_map(evaluate, mesh=mesh, in_specs=specs, out_specs=BY_ROW, check_vma=False)

    def padded(numbers: jax.Array, key: jax.Array) -> jax.Array:
        missing = -len(numbers) % devices
        full = jnp.concatenate([numbers, jnp.repeat(numbers[-1:], missing, axis=0)])
        return spread(full, key)[: len(numbers)]

    return jax.jit(padded)


def mean_return(played: Rollout) -> jax.Array:
    """Returns the mean return () of the environments' first episodes, in trials of first trials.

    An episode that did not end counts with its return so far: candidates that live long are not
    judged by those of their episodes that were short.
    """
    trajectory = played.trajectory
    ended_before = jnp.cumsum(trajectory.done, axis=0) - trajectory.done
    return jnp.mean(jnp.sum(jnp.where(ended_before == 0, trajectory.reward, 0.0), axis=0))


def chosen(state: Any) -> jax.Array:
    """What a state of the algorithm stands for, (dims,): its mean, else its best."""
    mean = getattr(state, "mean", None)
    return state.best_solution if mean is None else mean


def next_generation(task: Task, at: Evolving) -> tuple[Evolving, dict[str, float]]:
    """Evaluates the algorithm's proposals and updates its state.

    Returns:
      where the next generation starts, and this one's metrics. `returned_episode_returns` is the
      chosen parameters' in episodes that no candidate was chosen by.
    """
    key = jax.random.wrap_key_data(at.key)
    key, ask_key, play_key, tell_key, report_key = jax.random.split(key, 5)
    numbers, state = task.algorithm.ask(ask_key, at.state, task.params)
    returns = np.asarray(task.evaluate(numbers, play_key))
    state, _ = task.algorithm.tell(tell_key, numbers, as_fitness(list(returns)), state, task.params)
    now = float(task.evaluate(chosen(state)[None], report_key)[0])
    finite = returns[np.isfinite(returns)]
    metrics = {
        "returned_episode_returns": now,
        "best_of_population": float(finite.max(initial=-np.inf)),
        "mean_of_population": float(finite.mean()) if len(finite) else float("nan"),
    }
    return Evolving(state, jax.random.key_data(key)), metrics


def evolve(
    asked: dict[str, Any],
    settings: dict[str, Any],
    learner: Algorithm,
    base: dict[str, Any],
    folder: Path | None,
) -> int | None:
    """Evolves a network's parameters, and writes them as a run's that `evaluate` plays with.

    Args, returns and raises as `search.main.search`.
    """
    ignored = ("LR", "GAMMA")  # ranges of the script that mean nothing here
    space, fixed = read_space({k: v for k, v in asked.items() if k not in ignored}, learner.keys)
    if space.dimensions:
        raise ConfigError(
            f"TRAIN=evolution moves parameters, not {space.dimensions[0].name}; give it one value"
        )
    if settings["STRATEGY"] in ("halving", "pbt"):
        raise ConfigError("TRAIN=evolution needs an algorithm of evosax, such as STRATEGY=Open_ES")
    config = default_config(learner, base, fixed)
    task = make_task(config, settings, learner)
    steps = settings["POPULATION"] * config["NUM_ENVS"] * config["NUM_STEPS"]
    generations = (settings["BUDGET"] or config["TOTAL_TIMESTEPS"]) // steps
    if not generations:
        raise ConfigError(f"a generation takes {steps} environment steps; raise BUDGET to that")
    resumed = folder is not None
    folder = folder or fresh_search_folder(config)
    with StopOnSignal() as stop:
        asked = {**asked, "ENV_NAME": config["ENV_NAME"]}
        record = EvolutionRecord(folder, asked, resumed, config["seed"])
        stop.watch(record)
        print_main(
            f"{config['ENV_NAME']}, {task.algorithm.num_dims:,} parameters by"
            f" {settings['STRATEGY']}, {generations} generations of {settings['POPULATION']}, to"
            f" {folder}"
        )
        stop.training = True
        try:
            at = run(task, record, stop, generations, steps)
            if not stop.signal:
                saved = {**config, "ALGORITHM": learner.name}
                params = jax.device_get(task.unravel(chosen(at.state)))
                save_results(folder, saved, [config["seed"]], [record.curve()], [params])
                print(f"saved to {folder}")
        finally:
            record.close()
    if stop.signal:
        print_main(how_to_go_on(folder, config["ENV_NAME"]))
    return stop.signal


def run(
    task: Task, record: EvolutionRecord, stop: StopOnSignal, generations: int, steps: int
) -> Evolving:
    """The generations that are left."""
    at = record.restore(task.first)
    with tqdm(
        total=generations, initial=record.generations, unit="generation", mininterval=1
    ) as bar:
        while record.generations < generations and not stop.signal:
            at, metrics = next_generation(task, at)
            record.note({**metrics, "env_steps": (record.generations + 1) * steps})
            bar.set_postfix_str(f"return {metrics['returned_episode_returns']:.3f}", refresh=False)
            bar.update()
            if record.is_time():
                record.save(at)
            stop.agree()
    record.save(at)
    return at
