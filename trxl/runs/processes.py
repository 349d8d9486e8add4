"""Communication of the processes of a run.

The same script is started once per node, and JAX's distributed runtime connects the processes. Only
process 0 prints and writes files, see `is_main`. All functions also work with one process.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from trxl.errors import ConfigError, shortened

EXIT_RETRYABLE = 75
"""Exit status if another process is missing or lost, so that a retry may succeed (EX_TEMPFAIL)."""

PERMANENT_ERRORS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
"""Prefixes of JaxRuntimeErrors that a retry would raise again."""


def connect(launch: dict[str, Any]) -> None:
    """Connects this process to the others of its run, if any.

    Exits with status `EXIT_RETRYABLE` if the others don't connect in time.

    Args:
      launch: checked values of `config.LAUNCH_KEYS`. Without COORDINATOR, a SLURM step of several
        tasks is detected.

    Raises:
      ConfigError: settings are inconsistent, the address can't be bound, or processes have
        different numbers of devices.
    """
    where = _from_settings(launch) or _from_slurm()
    if not where:
        return
    # Python's own handler would run only after all processes have connected.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    timer = threading.Timer(launch["CONNECT_TIMEOUT"], _nobody_came, [launch])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **where,
            initialization_timeout=launch["CONNECT_TIMEOUT"] + 60,  # JAX aborts without a message
            heartbeat_timeout_seconds=launch["HEARTBEAT_TIMEOUT"],
        )
    except RuntimeError as error:
        address = launch["COORDINATOR"] or "the port that JAX takes from SLURM_JOB_ID"
        raise ConfigError(
            f"process 0 can't listen at {address} ({str(error).splitlines()[0]}); is it in use?"
        ) from error
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, handler)
    if launch["COORDINATOR"] is None:
        _take_all_gpus()
    if not is_main():  # Orbax warns about slow disks in every process
        logging.getLogger("absl").setLevel(logging.ERROR)
    _check_devices()


def status_of(error: Exception) -> int:
    """Returns the exit status of one of several processes after an error."""
    failed = isinstance(error, jax.errors.JaxRuntimeError)
    return EXIT_RETRYABLE if failed and not str(error).startswith(PERMANENT_ERRORS) else 1


def is_main() -> bool:
    """Returns whether this is the process that prints and writes files."""
    return jax.process_index() == 0


def print_main(text: str) -> None:
    """Prints in process 0."""
    if is_main():
        print(text, flush=True)


def warn_main(text: str) -> None:
    """Prints to standard error in process 0, above the progress bar."""
    if is_main():
        tqdm.write(text, file=sys.stderr)


def gather_texts(text: str) -> list[str]:
    """Gathers a text of every process, in order; all processes must call this."""
    data = np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)  # paths may need it
    lengths = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.zeros(max(lengths.max(), 1), np.uint8)
    padded[: data.size] = data
    gathered = multihost_utils.process_allgather(padded)
    pairs = zip(gathered, lengths, strict=True)
    return [row[:n].tobytes().decode(errors="surrogateescape") for row, n in pairs]


def run_on_all(act: Callable, kind: type[Exception] = ConfigError) -> Any:
    """Calls `act` in every process; an error in one is raised in all.

    Args:
      kind: type of error that `act` may raise.

    Returns:
      the result of `act`.

    Raises:
      kind: `act` raised it in any process; with the message of the first such process.
    """
    result, message = None, ""
    try:
        result = act()
    except kind as error:
        message = getattr(error, "strerror", None) or str(error) or type(error).__name__
    messages = [text for text in gather_texts(message) if text]
    if messages:
        raise kind(messages[0])
    return result


def broadcast(act: Callable[[], str]) -> str:
    """Calls `act` in process 0, and returns its result in every process.

    Raises:
      ConfigError: `act` raised it.
    """
    return gather_texts(run_on_all(lambda: act() if is_main() else ""))[0]


def largest(number: int) -> int:
    """Returns the largest of the processes' numbers."""
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def check_same_config(config: dict[str, Any]) -> None:
    """Checks that all processes have the same config.

    Raises:
      ConfigError: keys differ; the message has their values.
    """
    if jax.process_count() == 1:
        return
    first, *others = (json.loads(text) for text in gather_texts(json.dumps(config, default=repr)))
    for process, other in enumerate(others, start=1):
        differing = [key for key in first if other[key] != first[key]]
        if differing:
            values = ", ".join(
                f"{key} is {shortened(first[key])} in process 0"
                f" and {shortened(other[key])} in process {process}"
                for key in differing
            )
            raise ConfigError(f"the processes were started with different configs: {values}")


def check_shared(folder: Path, patience: float = 10.0) -> None:
    """Checks that every process finds the run's folder, which process 0 made.

    Args:
      patience: seconds to wait for a network file system.

    Raises:
      ConfigError: a process does not find the folder.
    """

    def see() -> None:
        end = time.monotonic() + patience
        while not folder.is_dir():
            if time.monotonic() > end:
                raise ConfigError(
                    f"process {jax.process_index()} does not see the folder {folder} of process 0;"
                    " set RESULTS_DIR to a file system that all nodes share"
                )
            time.sleep(0.1)

    run_on_all(see)


def _from_settings(launch: dict[str, Any]) -> dict[str, Any] | None:
    """Returns arguments of `jax.distributed.initialize`, None without launch keys."""
    names = ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID")
    given = [name for name in names if launch[name] is not None]
    if not given:
        return None
    if len(given) < len(names):
        missing = " and ".join(name for name in names if name not in given)
        raise ConfigError(f"{', '.join(names)} go together: {missing} is missing")
    address, processes, process = (launch[name] for name in names)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port[:6]) < 2**16:
        wanted = "host:port, with a port from 1 to 65535"
        raise ConfigError(f"COORDINATOR must be {wanted}, not {shortened(address)}")
    if not 0 <= process < processes:
        raise ConfigError(
            f"PROCESS_ID must be from 0 to NUM_PROCESSES - 1 = {processes - 1}, not {process}"
        )
    return {
        "coordinator_address": address,
        "num_processes": processes,
        "process_id": process,
        "cluster_detection_method": "deactivate",
    }


def _from_slurm() -> dict[str, Any] | None:
    """Returns the same for a step of several tasks that `srun` started, else None."""
    if "SLURM_STEP_NODELIST" not in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) == 1:
        return None
    return {"cluster_detection_method": "slurm"}


def _take_all_gpus() -> None:
    """Makes all GPUs visible to a node's only SLURM task, to which JAX would give one."""
    if os.environ.get("SLURM_NTASKS") == os.environ.get("SLURM_STEP_NUM_NODES"):
        for kind in ("cuda", "rocm"):
            jax.config.update(f"jax_{kind}_visible_devices", "all")


def _nobody_came(launch: dict[str, Any]) -> None:
    """Exits after CONNECT_TIMEOUT, at once, since a normal exit would keep waiting."""
    if launch["COORDINATOR"] is None:
        which = f"all {os.environ['SLURM_NTASKS']} tasks of the SLURM step"
        check = "look at the output of the others"
    else:
        which = f"all {launch['NUM_PROCESSES']} processes"
        check = (
            f"start each with its own PROCESS_ID and see that {launch['COORDINATOR']} can be"
            " reached from every node"
        )
    print(
        f"error: not {which} were there after CONNECT_TIMEOUT = {launch['CONNECT_TIMEOUT']} s;"
        f" {check}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_RETRYABLE)


def _check_devices() -> None:
    """Raises a ConfigError if processes have different numbers of devices."""
    counts = Counter(device.process_index for device in jax.devices())
    for process, count in sorted(counts.items()):
        if count != counts[0]:
            raise ConfigError(
                f"process 0 has {counts[0]} devices and process {process} has {count}; give every"
                " process the same number"
            )
