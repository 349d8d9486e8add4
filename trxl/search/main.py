"""A search from the command line to its report."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from trxl.config import num_updates
from trxl.environments import named_by_user
from trxl.errors import ConfigError, explained, shortened
from trxl.runs.help import help_text, key_lines
from trxl.runs.interruption import StopOnSignal, lasting_output
from trxl.runs.memory_check import check_capacity
from trxl.runs.processes import print_main
from trxl.runs.run import enable_compilation_cache
from trxl.runs.saved_config import how_to_go_on
from trxl.search.loop import Loop, best_of
from trxl.search.plan import make_plan, size_of
from trxl.search.population import chunk_members
from trxl.search.record import SearchRecord, fresh_search_folder, read_asked
from trxl.search.report import by_role, command_line, comparison, write_report
from trxl.search.settings import (
    OF_THE_SEARCH,
    SEARCH_KEYS,
    Space,
    default_config,
    read_arguments,
    read_settings,
    read_space,
)
from trxl.search.strategies import MOST_COMBINATIONS, Best, Search, combinations
from trxl.training import Algorithm

Trainers = Mapping[str, tuple[Algorithm, dict[str, Any]]]
"""By an algorithm's name: the algorithm, and the config of its entry script."""

GENERATIONS = {"halving": 1, "pbt": 1}
"""How many there are where BUDGET says nothing; of any other strategy `OF_EVOSAX`."""

OF_EVOSAX = 10

COMPARED_AFTER = 10
"""Updates that members train at least before `halving` compares them."""


def main(config: dict[str, Any], trainers: Trainers) -> None:
    """What `search_trXL.py` does: reads the overrides, searches, and writes the report.

    Args:
      config: the script's settings; KEY=VALUE arguments of the command line override them.
      trainers: what can be searched.

    Exits with one line and status 1 where the search can't be run, and with 128 + its number after
    a signal.
    """
    enable_compilation_cache()
    with lasting_output():
        try:
            stopped_by = start(config, trainers, sys.argv[1:])
        except ConfigError as error:
            sys.exit(f"error: {error}")
        except Exception as error:
            sys.exit(f"error: {explained(error)}")
    if stopped_by:
        sys.exit(128 + stopped_by)


def start(config: dict[str, Any], trainers: Trainers, arguments: list[str]) -> int | None:
    """Reads the command line and searches.

    Returns:
      the number of the signal that stopped it, None where it came to its end.

    Raises:
      ConfigError: the search can't be run.
    """
    texts = {**config, **dict(a.partition("=")[::2] for a in arguments if "=" in a)}
    algorithm, base = base_config(trainers, str(texts.get("ALGORITHM", "PPO")))
    if {"-h", "--help"} & set(arguments):
        print_help(config, algorithm, base)
        return None
    given = read_arguments(arguments, algorithm.keys)
    asked, folder = {**config, **given}, None
    if given.get("RESUME", "none").lower() != "none":
        folder = Path(given["RESUME"])
        asked = resumed_search(folder, given)
        algorithm, base = base_config(trainers, str(asked.get("ALGORITHM", "PPO")))
    settings = read_settings(asked)
    if settings["TRAIN"] == "evolution":
        from trxl.search.evolution import evolve

        return evolve(asked, settings, algorithm, base, folder)
    return search(asked, settings, algorithm, base, folder)


def resumed_search(folder: Path, given: dict[str, str]) -> dict[str, Any]:
    """What the search in a folder was asked for.

    Raises:
      ConfigError: there is none, or it is to be another one now, or its environment is a file that
        the command line does not name.
    """
    if not set(given) <= {"RESUME", "ENV_NAME"}:
        raise ConfigError("RESUME goes on with a search as it is; give no other setting")
    asked = read_asked(folder)
    saved = str(asked.get("ENV_NAME"))
    try:
        named = named_by_user(saved, given.get("ENV_NAME"), "ENV_NAME={}")
    except ConfigError as error:
        raise ConfigError(f"RESUME: {error}") from error
    return {**asked, "ENV_NAME": named}


def base_config(trainers: Trainers, name: str) -> tuple[Algorithm, dict[str, Any]]:
    """Returns an algorithm and its entry script's config.

    Raises:
      ConfigError: there is none of that name.
    """
    if name not in trainers:
        raise ConfigError(f"ALGORITHM must be one of {', '.join(trainers)}, not {shortened(name)}")
    return trainers[name]


def print_help(config: dict[str, Any], algorithm: Algorithm, base: dict[str, Any]) -> None:
    """Lists the keys of the command line with their values."""
    print(f"usage: {sys.argv[0]} [@SETTINGS] [KEY=VALUE | KEY=LOW..HIGH | KEY=A,B,C ...]\n")
    print("of the search, with their values here:")
    own = {name: key.default for name, key in SEARCH_KEYS.items()}
    print(key_lines(SEARCH_KEYS, {**own, **{k: v for k, v in config.items() if k in own}}))
    print(f"\nof {algorithm.name}, with their values here:\n")
    keys = {name: key for name, key in algorithm.keys.items() if name not in OF_THE_SEARCH}
    defaults = {name: key.default for name, key in keys.items()}
    print(help_text(keys, {**defaults, **base, **config}))


def search(
    asked: dict[str, Any],
    settings: dict[str, Any],
    algorithm: Algorithm,
    base: dict[str, Any],
    folder: Path | None,
) -> int | None:
    """Searches hyperparameters, see `start`.

    Args:
      asked: the search's settings, and the trainer's keys with values, ranges or choices.
      folder: of a search to go on with; None for a new one.
    """
    keys = algorithm.keys
    space, fixed = read_space(asked, keys)
    if not space.dimensions:
        raise ConfigError("nothing to search; give a range such as LR=1e-5..1e-2, or choices")
    devices = jax.local_device_count()
    config = default_config(algorithm, base, fixed)
    check_combinations(algorithm, config, space)
    members = settings["CHUNK"] or chunk_members(config, settings["SEEDS"], settings["POPULATION"])
    chunk_rows = -(-members * settings["SEEDS"] // devices) * devices
    check_rows(config, chunk_rows // devices)
    fresh_seeds = tuple(config["seed"] + i for i in range(settings["REPORT_SEEDS"]))
    task = sized(settings, config, space)
    env_steps = size_of(
        make_plan(settings["STRATEGY"], task, fresh_seeds),
        rows_of=lambda member: len(member.seeds) or settings["SEEDS"],
        steps=lambda _: config["TOTAL_TIMESTEPS"],
    )
    resumed = folder is not None
    folder = folder or fresh_search_folder(config)
    asked = {**asked, "ENV_NAME": config["ENV_NAME"]}
    with StopOnSignal() as stop:
        record = SearchRecord(folder, asked, resumed)
        stop.watch(record)
        print_main(
            f"{config['ENV_NAME']}: {', '.join(d.name for d in space.dimensions)} of"
            f" {algorithm.name} by {settings['STRATEGY']}, {settings['POPULATION']} members,"
            f" {env_steps:.3g} environment steps with the report, to {folder}"
        )
        loop = Loop(config, algorithm, space, settings["SEEDS"], chunk_rows, devices, record)
        stop.training = True
        try:
            plan = make_plan(settings["STRATEGY"], task, fresh_seeds)
            best = loop.run(plan, stop, env_steps)
            default = {name: key.default for name, key in algorithm.keys.items()} | base
            given = {k: v for k, v in fixed.items() if v != default[k] and k != "RESULTS_DIR"}
            given = {"ENV_NAME": config["ENV_NAME"], **given}
            report(folder, settings, algorithm, space, loop, best, given)
        finally:
            record.close()
    if stop.signal:
        print_main(how_to_go_on(folder, config["ENV_NAME"]))
    return stop.signal


def check_rows(config: dict[str, Any], rows: int) -> None:
    """Sees that the device has the memory for so many runs at a time.

    Raises:
      ConfigError: it has not.
    """
    try:
        check_capacity({**config, "NUM_SEEDS": rows})
    except ConfigError as error:
        raise ConfigError(f"{rows} runs at a time, CHUNK * SEEDS: {error}") from error


def check_combinations(algorithm: Algorithm, config: dict[str, Any], space: Space) -> None:
    """Sees that every combination of searched values can be run, before anything compiles.

    Raises:
      ConfigError: one can't.
    """
    for shape in combinations(space, MOST_COMBINATIONS):
        algorithm.check({**config, **shape})


def sized(settings: dict[str, Any], config: dict[str, Any], space: Space) -> Search:
    """What the strategy starts from, with as many generations as the budget has room for.

    Raises:
      ConfigError: it has room for none.
    """
    strategy = settings["STRATEGY"]
    task = Search(
        space=space,
        default={d.name: config[d.name] for d in space.dimensions},
        population=settings["POPULATION"],
        generations=1,
        eta=settings["ETA"],
        intervals=settings["INTERVALS"],
        shortest=min(1.0, COMPARED_AFTER / num_updates(config)),
        es_std=settings["ES_STD"],
        es_lr=settings["ES_LR"],
        seed=config["seed"],
    )
    if settings["BUDGET"] is None:
        return task._replace(generations=GENERATIONS.get(strategy, OF_EVOSAX))
    one = size_of(
        make_plan(strategy, task, ()),
        rows_of=lambda _: settings["SEEDS"],
        steps=lambda _: config["TOTAL_TIMESTEPS"],
    )
    generations = settings["BUDGET"] // one
    if not generations:
        raise ConfigError(
            f"a generation takes {one} environment steps, more than BUDGET ="
            f" {settings['BUDGET']}; lower POPULATION, SEEDS or TOTAL_TIMESTEPS"
        )
    return task._replace(generations=generations)


def report(
    folder: Path,
    settings: dict[str, Any],
    algorithm: Algorithm,
    space: Space,
    loop: Loop,
    best: Best | None,
    given: dict[str, Any],
) -> None:
    """Writes what was found, and says it."""
    trials = list(loop.trials.values())
    winner = loop.trials[best.trial] if best else best_of(trials)
    script = f"train_{algorithm.name}_trXL.py"
    title = f"{given['ENV_NAME']}, {algorithm.name}, searched by {settings['STRATEGY']}"

    def command(values: dict[str, Any]) -> str:
        return command_line(script, given, values)

    write_report(folder, title, space, trials, winner, command)
    if winner is None:
        print("no trial has a score yet")
        return
    print(f"best: trial {winner.trial}, score {winner.score():.4g}\n  {command(winner.values)}")
    if by_role(trials):
        print(comparison(by_role(trials)))
    print(f"report in {folder / 'report.md'}")
