"""The host side of a run: the command line, the loop over jitted updates, the signals."""

import os
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from checkpoints import resumed_config
from config import (
    DEFAULTS,
    LAUNCH,
    ConfigError,
    check_config,
    check_values,
    num_updates,
    read_overrides,
)
from multihost import check_same_config, connect, in_all, is_main, largest, say
from program import Program
from record import NotFiniteError, Record, save_results
from trainer_PPO_trXL import RunnerState

REPOSITORY = Path(__file__).resolve().parent


def main(config: dict[str, Any], all_devices: bool = False) -> None:
    """What an entry script does: reads the overrides, trains, and writes the files of the run.

    Args:
      config: the script's settings; KEY=VALUE arguments of the command line override them.
      all_devices: trains on every device of every process with `jax.pmap` instead of on one.

    Exits with one line and status 1 where the config can't be run, and with 128 + its number after
    a signal.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print_help(config, all_devices)
        return
    enable_compilation_cache()
    try:
        launch, overrides = read_command_line(all_devices)
        connect(launch)
        config = in_all(lambda: started_config(config, overrides))
        check_same_config(config)
        stopped_by = run(config, all_devices)
    except (ConfigError, NotFiniteError) as error:
        sys.exit(f"error: {error}" if is_main() else 1)
    except Exception:
        if jax.process_count() == 1:
            raise
        # An orderly exit would wait for the other processes, and they for this one.
        traceback.print_exc()
        os._exit(1)
    if stopped_by:
        sys.exit(128 + stopped_by)


def print_help(config: dict[str, Any], all_devices: bool) -> None:
    """Lists the keys of the command line with their values."""
    print(f"usage: {sys.argv[0]} [KEY=VALUE ...]\n\nthe keys, with their values here:")
    keys = check_config(config) | (LAUNCH if all_devices else {})
    print("\n".join(f"  {key}={value!r}" for key, value in keys.items()))


def read_command_line(all_devices: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where this process stands among others, `config.LAUNCH`, and the overrides of the config.

    The former may be environment variables too; both are for the script of all devices only.

    Raises:
      ConfigError: an argument that can't be read.
    """
    if not all_devices:
        return LAUNCH, read_overrides(sys.argv[1:])
    variables = [f"{key}={os.environ[key]}" for key in LAUNCH if key in os.environ]
    given = read_overrides(variables + sys.argv[1:], DEFAULTS | LAUNCH)
    overrides = {key: value for key, value in given.items() if key in DEFAULTS}
    launch = {key: value for key, value in given.items() if key in LAUNCH}
    return check_values(launch, LAUNCH), overrides


def started_config(config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The config of a run that starts, or goes on with RESUME.

    Raises:
      ConfigError: a value that can't be, or a run that can't go on so.
    """
    config = {**config, **overrides}
    if config.get("RESUME"):
        return resumed_config(Path(config["RESUME"]), overrides)
    return check_values(config, DEFAULTS)


def enable_compilation_cache() -> None:
    """Turns JAX's persistent compilation cache on, so that a second start is quick."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(REPOSITORY / ".jax_cache"))


def run(config: dict[str, Any], all_devices: bool = False) -> int | None:
    """Trains with a config and writes the files of the run, whole or after a signal.

    Returns:
      The number of the signal that stopped it, None where it ran to its end.

    Raises:
      ConfigError: the config can't be run or its results folder can't be written; nothing was
        compiled, and no folder is left behind.
      NotFiniteError: a loss or a parameter stopped being finite.
    """
    num_devices = jax.device_count() if all_devices else 1
    config = check_config(config, num_devices)
    if all_devices and config["NUM_SEEDS"] > 1:
        raise ConfigError(
            f"NUM_SEEDS = {config['NUM_SEEDS']} needs train_PPO_trXL.py: the pmap script"
            " spreads one seed over all devices"
        )
    program = Program(config, num_devices if all_devices else None)
    record = Record(config, program.seeds)
    with StopOnSignal(record) as stop, closing(record):
        state = train(config, program, record, stop)
        learners = program.per_seed(state.train_state)
        if is_main():
            curves = record.curves()
            save_results(record.folder, config, program.seeds, curves, learners)
            print(summary(config, curves, stop.signal))
            print(f"saved to {record.folder}")
    if stop.signal:
        say(f"go on with RESUME={record.folder}")
    return stop.signal


class StopOnSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to stop; the second ends the process.

    `signal` is the number of the signal to stop for, or None. Of several processes all must stop
    after the same update, whichever got it: they `agree`. Before `training` is set there is nothing
    to save, so the first one ends the process too.
    """

    def __init__(self, record: Record):
        self._record = record
        self._own = 0
        self.signal = None
        self.training = False

    def agree(self) -> None:
        """Sets `signal` to what any of the processes got; all of them call it after an update."""
        self.signal = largest(self._own) or None
        if self.signal and not self._own and is_main():
            tqdm.write("stopping: another process was asked to", file=sys.stderr)

    def __enter__(self):
        signals = (signal.SIGINT, signal.SIGTERM)
        self._previous = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: Any) -> None:
        if self._own or not self.training:
            tqdm.write("stopped at once", file=sys.stderr)
            self._record.discard_if_empty()
            # XLA's threads may be at work for minutes yet; an orderly exit would wait for them.
            os._exit(128 + number)
        self._own = number
        if is_main():
            tqdm.write("stopping after this update (once more to quit at once)", file=sys.stderr)


def train(
    config: dict[str, Any], program: Program, record: Record, stop: StopOnSignal
) -> RunnerState:
    """Runs the updates, with a bar, until they are done or a signal asks to stop.

    Returns:
      the last state; its checkpoint is written, and the metrics are in the record.
    """
    steps_per_update = config["NUM_STEPS"] * config["NUM_ENVS"]
    # JAX works in a thread of its own: while it compiles or waits for the device, the main thread
    # can still take signals.
    worker = ThreadPoolExecutor(1)
    say(f"compiling for {jax.devices()[0].device_kind} (tens of seconds the first time) ...")
    start = time.perf_counter()
    state = worker.submit(record.first_state, program).result()
    update = worker.submit(program.compile, state).result()
    say(f"compiled in {time.perf_counter() - start:.1f} s")

    stop.training = True
    newest_return = np.nan
    interval = 0.1 if sys.stderr.isatty() else 30
    total = num_updates(config)
    with tqdm(
        total=total,
        initial=record.updates,
        unit="update",
        mininterval=interval,
        disable=not is_main(),
    ) as bar:
        while record.updates < total and not stop.signal:
            start = time.perf_counter()
            state, metrics = update(state)
            metrics = worker.submit(program.per_seed, metrics).result()
            steps_per_second = steps_per_update / (time.perf_counter() - start)
            extra = {
                "steps_per_second": steps_per_second,
                "env_steps": (record.updates + 1) * steps_per_update,
            }
            record.append([one_seed | extra for one_seed in metrics])
            if record.updates % config["CHECKPOINT_EVERY"] == 0:
                record.save_checkpoint(program, state)
            returns = [one_seed["returned_episode_returns"] for one_seed in metrics]
            newest_return = np.nanmean(returns) if np.any(np.isfinite(returns)) else newest_return
            bar.set_postfix_str(
                f"{steps_per_second:,.0f} steps/s, return {newest_return:.2f}", refresh=False
            )
            bar.update()
            worker.submit(stop.agree).result()
    record.save_checkpoint(program, state)
    return state


def summary(
    config: dict[str, Any], curves: list[dict[str, np.ndarray]], stopped_by: int | None
) -> str:
    """One line on how the run went."""
    done, total = len(curves[0]["env_steps"]), num_updates(config)
    tenth = max(1, done // 10)
    returns = np.array([curve["returned_episode_returns"][-tenth:] for curve in curves])
    result = f"{np.nanmean(returns):.4f}" if np.any(np.isfinite(returns)) else "none ended"
    how = f"stopped after {done} of {total} updates" if stopped_by else f"{total} updates"
    return f"{how}; mean return over the last {tenth}: {result}"
