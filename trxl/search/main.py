"""Search of hyperparameters, from the command line to the report."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from trxl.config import (
    check_known,
    check_names,
    defaults,
    expanded,
    help_text,
    names_and_texts,
    num_updates,
)
from trxl.environments import named_by_user
from trxl.errors import ConfigError, shortened, told_of
from trxl.runs.memory_check import check_sizes
from trxl.runs.run import run_script
from trxl.runs.saved_config import read_json
from trxl.search.loop import Loop, best_trial
from trxl.search.population import members_at_a_time
from trxl.search.record import open_folder
from trxl.search.report import write_report
from trxl.search.settings import (
    NOT_SEARCHED,
    SEARCH_KEYS,
    Space,
    default_config,
    read_settings,
    read_space,
)
from trxl.search.strategies import (
    MOST_COMBINATIONS,
    STRATEGIES,
    Search,
    combinations,
    cost,
    run_search,
)
from trxl.training import Algorithm

Trainers = Mapping[str, tuple[Algorithm, dict[str, Any]]]
"""Algorithms by name, with the configs of their entry scripts."""

GENERATIONS_OF_EVOSAX = 10
"""Default number of generations of an evosax algorithm; `halving` and `pbt` have 1."""

COMPARED_AFTER = 10
"""Minimum number of updates before `halving` compares members."""


def main(config: dict[str, Any], trainers: Trainers) -> None:
    """Runs the entry script: reads the overrides, searches, and writes the report.

    Exits as `run_script` does.

    Args:
      config: the script's settings; KEY=VALUE arguments of the command line override them.
      trainers: choices of ALGORITHM.
    """
    run_script(lambda: start(config, trainers, sys.argv[1:]))


def start(config: dict[str, Any], trainers: Trainers, arguments: list[str]) -> int | None:
    """Reads the command line and searches.

    Returns:
      the number of the signal that stopped the search; None if it finished.

    Raises:
      ConfigError: a setting is invalid.
    """
    words = [word for word in arguments if word not in ("-h", "--help")]
    given = dict(names_and_texts(words))
    asked, folder = {**config, **given}, None
    if given.get("RESUME", "none").lower() != "none":
        folder = Path(expanded(given["RESUME"]))
        asked = resumed_search(folder, given)
    name = str(asked.get("ALGORITHM", "PPO"))
    if name not in trainers:
        raise ConfigError(f"ALGORITHM must be one of {', '.join(trainers)}, not {shortened(name)}")
    algorithm, base = trainers[name]
    keys = {**SEARCH_KEYS, **algorithm.keys}
    check_names(words, keys)
    for key in asked:
        check_known(key, keys, f"RESUME: {folder / 'search.json'}: " if folder else "")
    if len(words) < len(arguments):
        keys = {name: key for name, key in keys.items() if name not in NOT_SEARCHED}
        usage = "[@SETTINGS] [KEY=VALUE | KEY=LOW..HIGH | KEY=A,B,C ...]"
        print(f"usage: {sys.argv[0]} {usage}\n\nthe keys, with their values here:")
        print(help_text(keys, {**defaults(keys), **base, **config}))
        return None
    settings = read_settings(asked)
    if settings["TRAIN"] == "evolution":
        from trxl.search.evolution import evolve

        # Ignore the script's ranges; `evolve` refuses ranges of the command line.
        ranges = {k for k, v in config.items() if ".." in str(v) and k not in given}
        asked = {k: v for k, v in asked.items() if k not in ranges}
        return evolve(asked, settings, algorithm, base, folder)
    return search(asked, settings, algorithm, base, folder)


def resumed_search(folder: Path, given: Mapping[str, str]) -> dict[str, Any]:
    """Returns the settings of the search in a folder.

    Raises:
      ConfigError: the folder has no search, other settings are given, or the environment is a file
        that the command line does not name.
    """
    if not set(given) <= {"RESUME", "ENV_NAME"}:
        raise ConfigError("RESUME goes on with a search as it is; give no other setting")
    asked = read_json(folder / "search.json", "search")
    with told_of("RESUME"):
        named = named_by_user(str(asked.get("ENV_NAME")), given.get("ENV_NAME"), "ENV_NAME={}")
    return {**asked, "ENV_NAME": named}


def search(
    asked: dict[str, Any],
    settings: dict[str, Any],
    algorithm: Algorithm,
    base: dict[str, Any],
    resumed: Path | None,
) -> int | None:
    """Searches hyperparameters, see `start`.

    Args:
      asked: the search's settings, and the trainer's keys with values, ranges or choices.
      resumed: folder of a search to resume; None for a new one.
    """
    space, fixed = read_space(asked, algorithm.keys)
    if not space.dimensions:
        raise ConfigError("nothing to search; give a range such as LR=1e-5..1e-2, or choices")
    given = default_config(algorithm, base, fixed, space)
    config = algorithm.check(given)
    for shape in combinations(space, MOST_COMBINATIONS):
        algorithm.check({**given, **shape})  # before anything compiles
    devices, name = jax.local_device_count(), settings["STRATEGY"]
    members = settings["CHUNK"] or members_at_a_time(
        config, algorithm, settings["SEEDS"], settings["POPULATION"]
    )
    batch_rows = -(-members * settings["SEEDS"] // devices) * devices
    with told_of(f"{batch_rows // devices} runs at a time, CHUNK * SEEDS"):
        check_sizes({**config, "NUM_SEEDS": batch_rows // devices})
    task = make_task(settings, config, space)
    fresh_seeds = range(config["seed"], config["seed"] + settings["REPORT_SEEDS"])
    if fresh_seeds.stop > 2**32:
        raise ConfigError("seed + REPORT_SEEDS must not exceed 2**32; lower seed")
    next(run_search(name, task, fresh_seeds))  # raises before a folder is made
    of_report = len(fresh_seeds) * (3 if name == "pbt" else 2)  # at most
    runs = settings["SEEDS"] * cost(name, task, task.generations) + of_report
    steps = runs * config["TOTAL_TIMESTEPS"]
    what = (
        f"{', '.join(d.name for d in space.dimensions)} of {algorithm.name} by {name},"
        f" {settings['POPULATION']} members, {steps:.3g} environment steps with the report"
    )
    with open_folder(asked, config, resumed, what) as (folder, stop):
        loop = Loop(given, algorithm, space, settings["SEEDS"], batch_rows, devices, folder)
        best = loop.run(run_search(name, task, fresh_seeds), stop, steps)
        trials = list(loop.trials.values())
        default = {**defaults(algorithm.keys), **base}
        own = {k: v for k, v in fixed.items() if v != default[k] and k != "RESULTS_DIR"}
        own = {"ENV_NAME": config["ENV_NAME"], **own}
        write_report(
            folder.folder,
            f"{config['ENV_NAME']}, {algorithm.name}, searched by {name}",
            space,
            trials,
            loop.trials[best.trial] if best else best_trial(trials),
            ["python", f"train_{algorithm.name}_trXL.py", *(f"{k}={v}" for k, v in own.items())],
        )
    return stop.signal


def make_task(settings: dict[str, Any], config: dict[str, Any], space: Space) -> Search:
    """Makes the inputs of the strategy, with as many generations as fit in BUDGET.

    Raises:
      ConfigError: no generation fits.
    """
    strategy = settings["STRATEGY"]
    task = Search(
        space=space,
        default={d.name: config[d.name] for d in space.dimensions},
        population=settings["POPULATION"],
        generations=1 if strategy in STRATEGIES else GENERATIONS_OF_EVOSAX,
        eta=settings["ETA"],
        intervals=settings["INTERVALS"],
        shortest=min(1.0, COMPARED_AFTER / num_updates(config)),
        es_std=settings["ES_STD"],
        es_lr=settings["ES_LR"],
        seed=config["seed"],
    )
    if settings["BUDGET"] is None:
        return task

    def steps(generations: int) -> int:
        runs = cost(strategy, task, generations) * settings["SEEDS"]
        return round(runs * config["TOTAL_TIMESTEPS"])

    left = settings["BUDGET"] - steps(1)
    if left < 0:
        raise ConfigError(
            f"a generation takes {steps(1)} environment steps, more than BUDGET ="
            f" {settings['BUDGET']}; lower POPULATION, SEEDS or TOTAL_TIMESTEPS"
        )
    return task._replace(generations=1 + left // (steps(2) - steps(1)))
