"""Neuroevolution: evosax updates the parameters of a policy with memory, without gradients.

As in Salimans et al. 2017 (arXiv 1703.03864), each generation has four steps:

1. An algorithm of evosax proposes parameters.
2. Each candidate plays NUM_STEPS steps in the same NUM_ENVS environments.
3. Its score is the mean return of the environments' first episodes.
4. The solution, the distribution's mean or else the best candidate, is evaluated in new episodes.

The last solution is saved.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec
from tqdm import tqdm

from trxl.errors import ConfigError
from trxl.rollout import Rollout, init_rollout, rollout
from trxl.runs.outputs import save_results
from trxl.search.evosax_strategies import Evosax
from trxl.search.population import BY_ROW, ROWS
from trxl.search.record import open_folder
from trxl.search.settings import default_config, read_space
from trxl.search.strategies import STRATEGIES
from trxl.spaces import obs_space
from trxl.training import Algorithm, init_params


def evolve(
    asked: dict[str, Any],
    settings: dict[str, Any],
    learner: Algorithm,
    base: dict[str, Any],
    resumed: Path | None,
) -> int | None:
    """Evolves a network's parameters, and saves them like those of a run.

    Args, returns and raises as `search.main.search`.
    """
    space, fixed = read_space(asked, learner.keys)
    if space.dimensions:
        raise ConfigError(
            f"TRAIN=evolution moves parameters, not {space.dimensions[0].name}; give it one value"
        )
    name, size = settings["STRATEGY"], settings["POPULATION"]
    if name in STRATEGIES:
        raise ConfigError("TRAIN=evolution needs an algorithm of evosax, such as STRATEGY=Open_ES")
    config = learner.check(default_config(learner, base, fixed, space))
    for statistics in ("NORMALIZE_OBS", "NORMALIZE_REWARD"):
        if config[statistics]:
            raise ConfigError(
                f"{statistics} gathers statistics while it trains; evolution has none"
            )
    config["MIRRORS"] = False  # mirrored rows only learn
    steps = size * config["NUM_ENVS"] * config["NUM_STEPS"]
    generations = (settings["BUDGET"] or config["TOTAL_TIMESTEPS"]) // steps
    if not generations:
        raise ConfigError(f"a generation takes {steps} environment steps; raise BUDGET to that")
    env = learner.make_env(config, config["NUM_ENVS"])
    network = learner.make_network(config, env.action_space, obs_space(env))
    init_key, start_key, key = jax.random.split(jax.random.key(config["seed"]), 3)
    mean, unravel = ravel_pytree(init_params(config, network, env.obs_size, init_key))
    algorithm = Evosax(name, size, mean, settings["ES_STD"], settings["ES_LR"], start_key)
    # With memory and credit a trial is one episode, see `rollout.episode_boundaries`.
    as_one = config["TRIAL_MEMORY"] and config["TRIAL_CREDIT"]
    episodes = env.episodes_per_trial if as_one else 1

    def play(numbers: jax.Array, key: jax.Array) -> jax.Array:
        """Returns the mean return () of one candidate."""
        state = init_rollout(config, env, key, 0)
        _, _, played = rollout(config, env, network, unravel(numbers), state, {})
        return mean_return(played) / episodes

    evaluate = evaluator(play, settings["CHUNK"] or 16, jax.local_device_count())

    def state() -> tuple[Any, jax.Array]:
        return algorithm.state, jax.random.key_data(key)

    what = f"{mean.size:,} parameters by {name}, {generations} generations of {size}"
    with open_folder(asked, config, resumed, what) as (folder, stop):
        curve: list[dict[str, float]] = folder.notes.get("curve", [])
        if curve:
            restored = jax.device_get(folder.restore(jax.eval_shape(state)))
            algorithm.state, raw = jax.tree.map(jnp.asarray, restored)  # uncommitted to a device
            key = jax.random.wrap_key_data(raw)
        with tqdm(total=generations, initial=len(curve), unit="generation", mininterval=1) as bar:
            while len(curve) < generations and not stop.signal:
                key, metrics = next_generation(algorithm, evaluate, key)
                curve.append({**metrics, "env_steps": (len(curve) + 1) * steps})
                bar.set_postfix_str(f"return {metrics['returned_episode_returns']:.3f}")
                bar.update()
                if folder.is_time():
                    folder.save({"curve": curve}, state())
                stop.agree()
        folder.save({"curve": curve}, state())
        if not stop.signal:
            columns = {name: np.array([row[name] for row in curve]) for name in curve[0]}
            params = jax.device_get(unravel(algorithm.solution()))
            saved = {**config, "ALGORITHM": learner.name}
            save_results(folder.folder, saved, [config["seed"]], [columns], [params])
            print(f"saved to {folder.folder}")
    return stop.signal


def evaluator(play: Callable, at_a_time: int, devices: int) -> Callable:
    """Makes evaluate(numbers (candidates, dims), key) -> mean returns (candidates,), jitted.

    Candidates are sharded over devices, padded with copies of the last.

    Args:
      play: (numbers (dims,), key) -> mean return ().
      at_a_time: candidates per device that play in parallel.
      devices: number of devices.
    """
    mesh = Mesh(np.array(jax.local_devices()[:devices]), ROWS)

    def evaluate_some(numbers: jax.Array, key: jax.Array) -> jax.Array:
        return jax.lax.map(lambda x: play(x, key), numbers, batch_size=at_a_time)

    specs = (BY_ROW, PartitionSpec())
    spread = jax.shard_map(
        evaluate_some, mesh=mesh, in_specs=specs, out_specs=BY_ROW, check_vma=False
    )

    def evaluate(numbers: jax.Array, key: jax.Array) -> jax.Array:
        number = len(numbers)
        full = -(-number // mesh.size) * mesh.size
        return spread(numbers[np.minimum(np.arange(full), number - 1)], key)[:number]

    return jax.jit(evaluate)


def mean_return(played: Rollout) -> jax.Array:
    """Returns the mean return () of the environments' first episodes, or first trials.

    An unfinished episode counts with its return so far, so that long episodes are not ignored.
    """
    trajectory = played.trajectory
    ended_before = jnp.cumsum(trajectory.done, axis=0) - trajectory.done
    return jnp.mean(jnp.sum(jnp.where(ended_before == 0, trajectory.reward, 0.0), axis=0))


def next_generation(
    algorithm: Evosax, evaluate: Callable, key: jax.Array
) -> tuple[jax.Array, dict[str, float]]:
    """Evaluates the algorithm's proposals and updates its state.

    Returns:
      the next key, and the metrics. `returned_episode_returns` is the solution's return in new
      episodes, without selection bias.
    """
    key, ask_key, play_key, tell_key, report_key = jax.random.split(key, 5)
    returns = np.asarray(evaluate(algorithm.ask(ask_key), play_key))
    algorithm.tell(tell_key, returns)
    finite = returns[np.isfinite(returns)]
    return key, {
        "returned_episode_returns": float(evaluate(algorithm.solution()[None], report_key)[0]),
        "best_of_population": float(finite.max(initial=-np.inf)),
        "mean_of_population": float(finite.mean()) if len(finite) else float("nan"),
    }
