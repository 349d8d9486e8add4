"""Command line of a run, and the loop over jitted updates."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import compress
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from trxl.config import LAUNCH_KEYS, check_values, help_text, num_updates, read_overrides
from trxl.environments import is_own, located
from trxl.errors import ConfigError, RunError, explained, one_line
from trxl.rollout import Metrics
from trxl.runs.compiled import Program
from trxl.runs.divergence import NotFiniteError
from trxl.runs.interruption import StopOnSignal, lasting_output
from trxl.runs.memory_check import check_sizes, compare, least_bytes
from trxl.runs.outputs import save_results
from trxl.runs.parameters import saved_params
from trxl.runs.processes import (
    check_same_config,
    connect,
    is_main,
    print_main,
    run_on_all,
    status_of,
)
from trxl.runs.progress import Progress
from trxl.runs.run_folder import RunFolder
from trxl.runs.saved_config import how_to_go_on, resumed_config
from trxl.training import Algorithm, RunnerState, TrainState, with_nan

REPOSITORY = Path(__file__).resolve().parents[2]


def main(config: dict[str, Any], algorithm: Algorithm, all_devices: bool = False) -> None:
    """Runs an entry script: reads the overrides, trains, and writes the files of the run.

    Exits as `run_script` does.

    Args:
      config: the script's settings; KEY=VALUE arguments of the command line override them.
      algorithm: algorithm that trains.
      all_devices: default of ALL_DEVICES.
    """
    run_script(lambda: start(config, algorithm, all_devices))


def run_script(act: Callable[[], int | None]) -> None:
    """Calls the function of a script, with a compilation cache and output that can't fail.

    Exit status:

    | status | cause |
    | --- | --- |
    | 1 | an exception, printed in one line, or a line per diverged seed |
    | `EXIT_RETRYABLE` | another process was lost |
    | 128 + n | signal n |

    Args:
      act: returns the number of the signal that stopped it, or None.
    """
    enable_compilation_cache()
    with lasting_output():
        try:
            stopped_by = act()
        except Exception as error:
            fail(error)
    if stopped_by:
        sys.exit(128 + stopped_by)


def fail(error: Exception) -> NoReturn:
    """Ends the process, see `run_script`."""
    if line := missing_platform():  # the cause of whatever failed
        sys.exit(f"error: {line}")
    if isinstance(error, ConfigError | NotFiniteError | RunError):
        lines = "\n".join(f"error: {line}" for line in str(error).splitlines())
        sys.exit(lines if is_main() else 1)
    if jax.process_count() == 1:
        sys.exit(f"error: {explained(error)}")
    # A normal exit would wait for the other processes, which wait for this one.
    traceback.print_exc()
    os._exit(status_of(error))


INSTALLED_BY = {"cuda": "cuda13", "gpu": "cuda13", "tpu": "tpu"}
"""Extras of JAX's package, by platform."""


def missing_platform() -> str:
    """Explains in one line why JAX has no devices; returns "" if it has some."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        older = os.environ.get("JAX_PLATFORM_NAME")
        variable = "JAX_PLATFORM_NAME" if older else "JAX_PLATFORMS"
        asked = older or jax.config.jax_platforms  # type: ignore[attr-defined]
        if not asked:
            return f"JAX has no device ({one_line(error)}); JAX_PLATFORMS=cpu uses the CPU"
        extra = INSTALLED_BY.get(asked)
        install = f"pip install 'jax[{extra}]' on a machine that has one" if extra else "set cpu"
        return f"{variable}={asked}: JAX has no such device; {install}, or unset {variable}"
    return ""


def start(config: dict[str, Any], algorithm: Algorithm, all_devices: bool) -> int | None:
    """Reads the command line and trains, see `main`."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print_help(config, algorithm, all_devices)
        return None
    launch, overrides = read_command_line(algorithm, all_devices)
    if launch["ALL_DEVICES"]:
        connect(launch)
    config = run_on_all(lambda: resolve_config(config, overrides, algorithm))
    check_same_config(config)
    return run(config, algorithm, launch["ALL_DEVICES"])


def print_help(config: dict[str, Any], algorithm: Algorithm, all_devices: bool) -> None:
    """Prints the keys of the command line with values and help."""
    print(f"usage: {sys.argv[0]} [@SETTINGS] [KEY=VALUE ...]\n\nthe keys, with their values here:")
    values = check_values(config, algorithm.keys)
    launch = check_values({"ALL_DEVICES": all_devices}, LAUNCH_KEYS)
    print(help_text({**algorithm.keys, **LAUNCH_KEYS}, {**values, **launch}))


def read_command_line(
    algorithm: Algorithm, all_devices: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the values of `LAUNCH_KEYS`, and the overrides of the config.

    With ALL_DEVICES, launch keys may also be environment variables.

    Args:
      all_devices: default of ALL_DEVICES.

    Raises:
      ConfigError: an argument can't be read, or a launch key is given without ALL_DEVICES.
    """
    given = read_overrides(sys.argv[1:], {**algorithm.keys, **LAUNCH_KEYS})
    overrides = {name: value for name, value in given.items() if name in algorithm.keys}
    launch = {name: value for name, value in given.items() if name in LAUNCH_KEYS}
    launch = check_values({"ALL_DEVICES": all_devices, **launch}, LAUNCH_KEYS)
    if launch["ALL_DEVICES"]:
        names = [name for name in LAUNCH_KEYS if name in os.environ and name not in given]
        launch |= read_overrides([f"{name}={os.environ[name]}" for name in names], LAUNCH_KEYS)
    elif alone := [name for name in given if name in LAUNCH_KEYS and name != "ALL_DEVICES"]:
        raise ConfigError(f"{alone[0]} is for runs on all devices; set ALL_DEVICES=True as well")
    return check_values(launch, LAUNCH_KEYS), overrides


def resolve_config(
    config: dict[str, Any], overrides: dict[str, Any], algorithm: Algorithm
) -> dict[str, Any]:
    """Returns the config of a new run, or of a resumed one.

    Raises:
      ConfigError: a value is invalid, or the run can't be resumed so.
    """
    own = {key: config[key] for key in ["ENV_NAME"] if is_own(str(config.get(key)))}
    config = {**config, **overrides}
    if config.get("RESUME") is not None:
        checked = check_values({"RESUME": config["RESUME"]}, {"RESUME": algorithm.keys["RESUME"]})
        # The run's settings win over the script's, but the script may name its own environment.
        return resumed_config(Path(checked["RESUME"]), own | overrides, algorithm)
    return check_values(config, algorithm.keys)


def enable_compilation_cache() -> None:
    """Turns on JAX's persistent compilation cache."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(REPOSITORY / ".jax_cache"))


def run(config: dict[str, Any], algorithm: Algorithm, all_devices: bool = False) -> int | None:
    """Trains with a config, and writes the files of the run, also after a signal.

    Returns:
      the number of the signal that stopped the run; None if it finished.

    Raises:
      ConfigError: the config can't be run, or the results folder can't be written. Nothing was
        compiled, and no folder is left.
      NotFiniteError: a loss or a parameter is not finite. With several seeds, raised after the
        others have finished and their files are written.
      RunError: any other error in a run of one process; the parameters are saved.
    """
    num_devices = jax.device_count() if all_devices else 1
    config = algorithm.check(config, num_devices)
    config["ENV_NAME"] = located(config["ENV_NAME"])
    if all_devices and config["NUM_SEEDS"] > 1:
        raise ConfigError(
            f"NUM_SEEDS = {config['NUM_SEEDS']} needs train_{algorithm.name}_trXL.py with"
            " ALL_DEVICES=False: over all devices one seed is spread"
        )
    check_sizes(config, num_devices)
    program = Program(config, algorithm, num_devices if all_devices else None)
    compare(least_bytes(program))
    with StopOnSignal() as stop:
        record = RunFolder(config, algorithm, program.seeds)
        stop.watch(record)
        with closing(record), failing_in_one_line(record):
            state = train(config, program, record, stop)
            train_states = program.per_seed(state.train_state)
            if is_main():
                save(config, algorithm, record, program.seeds, train_states, stop.signal)
    if stop.signal:
        print_main(how_to_go_on(record.folder, config["ENV_NAME"]))
    elif record.diverged:
        raise NotFiniteError("\n".join(record.divergences(record.diverged)))
    return stop.signal


@contextmanager
def failing_in_one_line(record: RunFolder) -> Iterator[None]:
    """Turns unexpected errors into a `RunError`, in a run of one process."""
    try:
        yield
    except (ConfigError, NotFiniteError):
        raise
    except Exception as error:
        if jax.process_count() > 1:
            raise
        raise RunError(record.explain(error)) from error


def save(
    config: dict[str, Any],
    algorithm: Algorithm,
    record: RunFolder,
    seeds: list[int],
    train_states: list[TrainState],
    stopped_by: int | None,
) -> None:
    """Writes the files of every seed, without parameters of diverged ones."""
    whole = [seed not in record.diverged for seed in seeds]
    curves = record.curves()
    params = [
        saved_params(config, algorithm, train_state) if ok else None
        for train_state, ok in zip(train_states, whole, strict=True)
    ]
    saved_config = {**config, "ALGORITHM": algorithm.name}
    save_results(record.folder, saved_config, seeds, curves, params)
    lost = f"; {len(record.diverged)} of {len(seeds)} seeds diverged" if record.diverged else ""
    print(summary(config, list(compress(curves, whole)), stopped_by) + lost)
    print(f"saved to {record.folder}")


def train(
    config: dict[str, Any], program: Program, record: RunFolder, stop: StopOnSignal
) -> RunnerState:
    """Runs the updates until they are done or a signal stops the run.

    Returns:
      the last state, of which a checkpoint is written.
    """
    # JAX runs in its own thread, so that the main thread handles signals while JAX compiles.
    worker = ThreadPoolExecutor(1)
    total = num_updates(config)
    devices = f"{program.num_devices} device{'s' if program.num_devices > 1 else ''}"
    parameters = f"{program.num_parameters():,} parameters, {total} updates"
    print_main(
        f"{config['ENV_NAME']}, {program.algorithm} on {devices}, {parameters}, to {record.folder}"
    )
    print_main(f"compiling for {jax.devices()[0].device_kind} (tens of seconds the first time) ...")
    start = time.perf_counter()
    state = worker.submit(record.first_state, program).result()
    update = worker.submit(program.compile, state).result()
    print_main(f"compiled in {time.perf_counter() - start:.1f} s")

    stop.training = True
    try:
        with Progress(total, record.updates) as progress:
            while record.updates < total and not stop.signal:
                start = time.perf_counter()
                state, metrics = update(state)
                metrics = with_nan(worker.submit(program.per_seed, metrics).result())
                log_update(config, program, record, progress, metrics, time.perf_counter() - start)
                if record.updates % config["CHECKPOINT_EVERY"] == 0 or record.owes_checkpoint():
                    record.save_checkpoint(program, state)
                worker.submit(stop.agree).result()
    except NotFiniteError:
        raise
    except Exception:
        if jax.process_count() == 1 and is_intact(state, record.updates):
            record.save_checkpoint(program, state)
        raise
    record.save_last(program, state)
    return state


def log_update(
    config: dict[str, Any],
    program: Program,
    record: RunFolder,
    progress: Progress,
    metrics: list[Metrics],
    seconds: float,
) -> None:
    """Adds an update's metrics to the record and the progress bar.

    Raises:
      NotFiniteError: all seeds have diverged.
    """
    steps_per_update = config["NUM_STEPS"] * config["NUM_ENVS"]
    extra = {
        "steps_per_second": steps_per_update / seconds,
        "env_steps": (record.updates + 1) * steps_per_update,
    }
    record.append([one_seed | extra for one_seed in metrics])
    returns = [
        one_seed["returned_episode_returns"]
        for seed, one_seed in zip(program.seeds, metrics, strict=True)
        if seed not in record.diverged
    ]
    progress.advance(extra["steps_per_second"], returns)


def is_intact(state: RunnerState, updates: int) -> bool:
    """Returns whether a state is complete, not donated to a failed update, and after `updates`."""
    leaves = jax.tree.leaves(state)
    if any(leaf.is_deleted() for leaf in leaves if isinstance(leaf, jax.Array)):
        return False
    return bool(np.all(jax.device_get(state.train_state.updates) == updates))


def summary(
    config: dict[str, Any], curves: list[dict[str, np.ndarray]], stopped_by: int | None
) -> str:
    """Summarises a run in a line."""
    done, total = len(curves[0]["env_steps"]), num_updates(config)
    tenth = max(1, done // 10)
    returns = np.array([curve["returned_episode_returns"][-tenth:] for curve in curves])
    result = f"{np.nanmean(returns):.4f}" if np.any(np.isfinite(returns)) else "none ended"
    how = f"stopped after {done} of {total} updates" if stopped_by else f"{total} updates"
    return f"{how}; mean return over the last {tenth}: {result}"
