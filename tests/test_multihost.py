"""Real processes on this machine train one run, joined by JAX's distributed runtime."""

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from support import QUICK, main, whole_checkpoints

from trxl.config import LAUNCH_KEYS, check_values
from trxl.errors import ConfigError
from trxl.runs import run as runs
from trxl.runs.processes import (
    EXIT_RETRYABLE,
    broadcast,
    check_shared,
    connect,
    gather_texts,
    run_on_all,
)

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "train_PPO_trXL_pmap.py"
UPDATES = 24
SETTINGS = {
    **QUICK,
    "ENV_NAME": "MemoryChain-bsuite",
    "RESET_STRATEGY": None,
    "NUM_ENVS": 8,
    "NUM_MINIBATCHES": 1,
    "TOTAL_TIMESTEPS": UPDATES * 8 * QUICK["NUM_STEPS"],
    "CHECKPOINT_EVERY": 3,
    "HEARTBEAT_TIMEOUT": 10,
}


def start(devices, *settings, **environment):
    """Starts a process with this many virtual devices, stdout and stderr in one pipe."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, SCRIPT, *(f"{k}={v}" for k, v in SETTINGS.items()), *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags, **environment},
    )


def free_port():
    """Returns a port of this machine that no process uses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start_two(*settings, of_each=((), ()), **environment):
    """Starts two processes of two devices each."""
    common = (*settings, f"COORDINATOR=localhost:{free_port()}", "NUM_PROCESSES=2")
    return [start(2, *common, f"PROCESS_ID={i}", *of_each[i], **environment) for i in range(2)]


def finish(*processes, timeout=300):
    """Waits for the processes and returns their exit statuses and outputs."""
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    return [process.returncode for process in processes], outputs


@pytest.fixture(autouse=True)
def no_process_is_left_behind(monkeypatch):
    started = []
    original = subprocess.Popen

    def popen(*args, **kwargs):
        started.append(original(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    yield
    for process in started:
        process.kill()
        process.communicate()


def results(root):
    """Returns metrics without the clock, and parameters, of the only run under a folder."""
    (path,) = root.rglob("0_metrics.npy")
    metrics, params = (
        np.load(path.with_name(f"0_{name}.npy"), allow_pickle=True).item()
        for name in ("metrics", "params")
    )
    del metrics["steps_per_second"]
    return metrics, params


def assert_same_results(a, b):
    assert len(results(a)[0]["total_loss"]) == UPDATES
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), results(a), results(b)
    )


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Trains one process with four devices and returns its RESULTS_DIR."""
    root = tmp_path_factory.mktemp("one")
    statuses, outputs = finish(start(4, f"RESULTS_DIR={root}"))
    assert statuses == [0], outputs
    return root


def wait_for_checkpoint(root, processes):
    """Waits until the run in this RESULTS_DIR has a complete checkpoint."""
    while not whole_checkpoints(root / SETTINGS["ENV_NAME"]):
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


OF_GLOO = (
    r"\[Gloo\] Rank |\d+| is connected to | peer ranks\. "
    r"|Expected number of connected peer ranks is : |\s"
)
"""Fragments of lines that Gloo's threads write into each other."""


@pytest.mark.weekly
def test_when_a_process_is_killed_the_other_ends_and_the_run_goes_on_with_one(
    one_process, tmp_path
):
    processes = start_two(f"RESULTS_DIR={tmp_path}")
    wait_for_checkpoint(tmp_path, processes)
    processes[1].kill()
    (status, _), (output, _) = finish(*processes, timeout=300)
    assert status in (EXIT_RETRYABLE, -signal.SIGABRT), output
    # Either JAX's runtime noticed, or the current all-reduce failed.
    assert "stopped sending heartbeats" in output or "JaxRuntimeError" in output
    (folder,) = tmp_path.iterdir()
    statuses, outputs = finish(start(4, f"RESUME={folder}"))
    assert statuses == [0], outputs
    assert "going on after update" in outputs[0]
    assert_same_results(one_process, tmp_path)


@pytest.mark.weekly
def test_a_process_without_a_disk_ends_no_run_of_several(one_process, tmp_path):
    processes = start_two(f"RESULTS_DIR={tmp_path}")
    wait_for_checkpoint(tmp_path, processes)
    resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    told = ""
    while "the run goes on in memory" not in told:
        told = processes[0].stdout.readline()
        assert told, processes[1].communicate()[0]
    assert "File too large" in told
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE, unlimited)
    statuses, outputs = finish(*processes)
    assert statuses == [0, 0], outputs
    assert re.search(r"the checkpoint of update \d+ is in \S+ now", outputs[0])
    assert "the run goes on in memory" not in outputs[0]  # printed once
    assert_same_results(one_process, tmp_path)
    assert UPDATES in whole_checkpoints(tmp_path / SETTINGS["ENV_NAME"])


FAKE_SRUN = """#!/usr/bin/env bash
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=2 SLURM_LOCALID=0
for i in 0 1; do SLURM_PROCID=$i "$@" > "output$i" 2>&1 & tasks[i]=$!; done
echo "${tasks[@]}" > tasks
highest=0
for i in 0 1; do wait "${tasks[i]}" || { status=$?; ((status > highest)) && highest=$status; }; done
cat output0 output1
exit $highest
"""


@pytest.mark.weekly
def test_two_processes_train_as_one_does_and_the_slurm_script_requeues_and_resumes(
    one_process, tmp_path
):
    """Stand-ins replace SLURM's commands; the variables are those of two nodes."""
    commands = {"srun": FAKE_SRUN, "scontrol": '#!/usr/bin/env bash\necho "$@" > scontrol\n'}
    for name, text in commands.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    for module in REPOSITORY.glob("*.py"):
        (tmp_path / module.name).symlink_to(module)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),  # JAX derives its port from it
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    command = ["bash", REPOSITORY / "train_slurm.sh", *(f"{k}={v}" for k, v in SETTINGS.items())]

    def sbatch():
        return subprocess.Popen(command, cwd=tmp_path, env=environment)

    def outputs():
        return [(tmp_path / f"output{i}").read_text() for i in range(2)]

    job = sbatch()
    wait_for_checkpoint(tmp_path / "runs" / "slurm" / environment["SLURM_JOB_ID"], [job])
    one_task = int((tmp_path / "tasks").read_text().split()[1])
    os.kill(one_task, signal.SIGTERM)  # all tasks must stop after the same update
    assert job.wait(timeout=300) == 128 + signal.SIGTERM, outputs()
    assert "stopping: another process was asked to" in outputs()[0]
    assert (tmp_path / "scontrol").read_text().split() == ["requeue", environment["SLURM_JOB_ID"]]

    assert sbatch().wait(timeout=300) == 0, outputs()
    first, second = outputs()
    assert "going on after update" in first
    assert f"{UPDATES} updates; mean return" in first
    assert re.sub(OF_GLOO, "", second) == ""
    assert_same_results(one_process, tmp_path / "runs" / "slurm")
    (folder,) = (tmp_path / "runs" / "slurm" / environment["SLURM_JOB_ID"]).iterdir()
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in one_process.glob("*/*")} == names


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [
        *((status, 0, True) for status in (EXIT_RETRYABLE, 128 + signal.SIGTERM, 134, 137)),
        *((status, 0, False) for status in (0, 1, 2)),
        (EXIT_RETRYABLE, 20, False),
    ],
)
def test_the_slurm_script_requeues_what_is_worth_another_start(
    status, restarts, requeued, tmp_path
):
    for name, text in {
        "srun": f'echo "$@" > ran; exit {status}',
        "scontrol": 'echo "$@" > called',
    }.items():
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    variables |= {"SCRIPT": "train_Muesli_trXL.py"}
    result = subprocess.run(
        ["bash", REPOSITORY / "train_slurm.sh"],
        cwd=tmp_path,
        env={**os.environ, **variables, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert result.returncode == status
    assert (tmp_path / "called").exists() == requeued
    assert (tmp_path / "ran").read_text().startswith("python train_Muesli_trXL.py ")


@pytest.mark.parametrize(
    ("given", "checkpoint", "added"),
    [
        ("", "", "RESULTS_DIR=runs/slurm/7"),
        ("", "runs/slurm/7/x/checkpoints/3", "RESULTS_DIR=runs/slurm/7 RESUME=runs/slurm/7/x"),
        ("RESULTS_DIR=mine", "", "RESULTS_DIR=mine/7"),
        ("RESULTS_DIR=mine", "mine/7/x/checkpoints/3", "RESULTS_DIR=mine/7 RESUME=mine/7/x"),
        ("RESUME=runs/slurm/6/x", "runs/slurm/7/x/checkpoints/3", ""),
    ],
)
def test_the_slurm_script_says_where_the_results_go(given, checkpoint, added, tmp_path):
    (tmp_path / "srun").write_text('#!/usr/bin/env bash\necho "$@" > ran\n')
    (tmp_path / "srun").chmod(0o755)
    if checkpoint:
        (tmp_path / checkpoint).mkdir(parents=True)
    variables = {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", REPOSITORY / "train_slurm.sh", "LR=0.1", *given.split()]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **variables}, check=True)
    expected = f"python train_PPO_trXL_pmap.py LR=0.1 {given} {added}"
    assert (tmp_path / "ran").read_text().split() == expected.split()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (
            JaxRuntimeError("INTERNAL: Gloo all-reduce failed: connection reset by peer"),
            EXIT_RETRYABLE,
        ),
        (JaxRuntimeError("UNAVAILABLE: connection to the coordinator was lost"), EXIT_RETRYABLE),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"), 1),
        (JaxRuntimeError("INVALID_ARGUMENT: the executable expected 3 arguments"), 1),
        (TypeError("a mistake in the program"), 1),
    ],
)
def test_a_process_of_several_says_by_its_status_whether_to_try_again(
    error, status, monkeypatch, capsys
):
    class EndedError(BaseException):
        pass

    def fail(*_):
        raise error

    def end(with_status):
        raise EndedError(with_status)

    monkeypatch.setattr(runs, "run", fail)
    monkeypatch.setattr(runs, "check_same_config", lambda _: None)
    monkeypatch.setattr(runs, "run_on_all", lambda act: act())
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(sys, "argv", ["train_PPO_trXL_pmap.py"])
    with pytest.raises(EndedError) as ended:
        main({}, all_devices=True)
    assert ended.value.args == (status,)
    assert str(error) in capsys.readouterr().err


@pytest.mark.slow
def test_processes_with_different_configs_are_refused_with_the_keys(tmp_path):
    processes = start_two(
        f"RESULTS_DIR={tmp_path}", of_each=(("LR=0.1",), ("LR=0.2", "gating=False"))
    )
    statuses, outputs = finish(*processes)
    assert statuses == [1, 1]
    assert outputs[0].endswith(
        "error: the processes were started with different configs: LR is 0.1 in process 0 and 0.2"
        " in process 1, gating is True in process 0 and False in process 1\n"
    )
    assert "error" not in outputs[1]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_peer_that_never_appears_is_one_line_after_the_time_limit(process, tmp_path):
    port = free_port() if process == 0 else 9  # process 0 listens there
    settings = (f"COORDINATOR=localhost:{port}", "NUM_PROCESSES=2", f"PROCESS_ID={process}")
    # Settings may be environment variables.
    variables = dict(setting.split("=") for setting in (*settings, "CONNECT_TIMEOUT=1"))
    statuses, outputs = finish(start(1, f"RESULTS_DIR={tmp_path}", **variables), timeout=300)
    assert statuses == [EXIT_RETRYABLE]
    assert outputs[0].startswith(
        "error: not all 2 processes were there after CONNECT_TIMEOUT = 1 s"
    )
    assert outputs[0].count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"COORDINATOR": "a:1"}, "NUM_PROCESSES and PROCESS_ID is missing"),
        ({"COORDINATOR": "a", "NUM_PROCESSES": 2, "PROCESS_ID": 0}, "to 65535, not 'a'"),
        (
            {"COORDINATOR": "a:99999", "NUM_PROCESSES": 2, "PROCESS_ID": 0},
            "with a port from 1 to 65535",
        ),
        ({"COORDINATOR": "a:1", "NUM_PROCESSES": 2, "PROCESS_ID": 2}, "NUM_PROCESSES - 1 = 1"),
        ({"NUM_PROCESSES": 0}, "NUM_PROCESSES must be at least 1"),
        ({"HEARTBEAT_TIMEOUT": "short"}, "HEARTBEAT_TIMEOUT must be a whole number"),
    ],
)
def test_wrong_settings_of_a_process_are_one_line(settings, message):
    with pytest.raises(ConfigError) as error:
        connect(check_values(settings, LAUNCH_KEYS))
    assert message in str(error.value)


def test_a_process_alone_agrees_with_itself():
    assert gather_texts("héllo") == ["héllo"]
    assert broadcast(lambda: "") == ""

    def fail():
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        run_on_all(fail)

    def fill():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run_on_all(fill, OSError)


def test_a_folder_that_a_process_does_not_see_is_named(tmp_path):
    check_shared(tmp_path)
    with pytest.raises(ConfigError, match=r"does not see the folder \S+nowhere of process 0"):
        check_shared(tmp_path / "nowhere", patience=0.2)
