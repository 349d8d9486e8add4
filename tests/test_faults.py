"""Faults from outside: a second process, the disk, the terminal, a package, a file."""

import errno
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import QUICK, resumed_config, run, whole_checkpoints

from trxl.errors import ConfigError, RunError
from trxl.results import load_results
from trxl.runs import metrics, outputs, run_folder
from trxl.runs.checkpoints import Checkpoints
from trxl.runs.interruption import LastingStream
from trxl.runs.lock import FolderLock
from trxl.runs.processes import broadcast
from trxl.runs.progress import Progress
from trxl.runs.tracking import CarefulTracker, NoTracker

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = QUICK["NUM_ENVS"] * QUICK["NUM_STEPS"]
CHAIN = {
    **QUICK,
    "ENV_KWARGS": {"memory_length": 3},
    "CHECKPOINT_EVERY": 2,
    "TOTAL_TIMESTEPS": 6 * STEPS,
}
NAME = "MemoryChain-bsuite"


@pytest.fixture
def after_update(monkeypatch):
    """Returns a function that plans `act()` after an update, before its checkpoint."""

    def plan(update, act):
        advance = Progress.advance
        count = iter(range(1, 100))

        def and_act(*arguments):
            advance(*arguments)
            if next(count) == update:
                act()

        monkeypatch.setattr(Progress, "advance", and_act)

    return plan


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Trains six updates with checkpoints of the fourth and the sixth."""
    root = tmp_path_factory.mktemp("stopped")
    run({**CHAIN, "RESULTS_DIR": str(root)})
    return root / NAME


@pytest.fixture
def folder(stopped, tmp_path):
    """Copies the stopped run with its metrics and results."""
    return shutil.copytree(stopped, tmp_path / NAME)


def resume(folder, updates=8):
    run({**resumed_config(folder, {"TOTAL_TIMESTEPS": updates * STEPS}), "RESUME": str(folder)})
    return load_results(folder / "0_metrics.npy")


HOLDS_THE_LOCK = """
import filelock, sys
lock = filelock.FileLock(sys.argv[1], timeout=0)
lock.acquire()
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_folder_that_another_process_writes_to_is_refused_until_that_one_dies(folder):
    command = [sys.executable, "-c", HOLDS_THE_LOCK, str(folder / "lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    before = (folder / "0_metrics.jsonl").read_bytes()
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=r"another process writes to .*; wait for its end"):
            resume(folder)
        process.kill()
    assert (folder / "0_metrics.jsonl").read_bytes() == before
    assert len(resume(folder)["env_steps"]) == 8
    assert not (folder / "lock").exists()


def test_a_lock_keeps_another_process_out_and_goes_with_its_release(tmp_path):
    lock = FolderLock(tmp_path)
    command = [sys.executable, "-c", HOLDS_THE_LOCK, str(tmp_path / "lock")]

    def other():
        return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    assert "Timeout" in other().stderr
    lock.release()
    assert not (tmp_path / "lock").exists()
    assert other().stdout == "locked\n"


def test_a_file_system_without_locks_is_said_and_one_that_is_read_only_refused(
    tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", fail)
    number = errno.ENOLCK
    FolderLock(tmp_path).release()
    assert capsys.readouterr().out.startswith("no locks here (No locks available): don't start a")
    number = errno.EROFS
    with pytest.raises(ConfigError, match=r"can't write to .*: Read-only file system"):
        FolderLock(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", ["null", '{"env_steps": 7}', "\udcff", '{"env_steps": 3'])
def test_a_corrupt_line_of_a_curve_is_named_and_the_checkpoint_before_it_goes_on(folder, spoil):
    path = folder / "0_metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[4] = spoil.encode(errors="surrogateescape") + b"\n"
    path.write_bytes(b"".join(lines))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"line 5 of .* or corrupt; .* after update 4 in .* away"):
        resume(folder)
    assert path.read_bytes() == before
    assert whole_checkpoints(folder) == {4, 6}
    shutil.rmtree(folder / "checkpoints" / "6")  # as the message advises
    np.testing.assert_array_equal(resume(folder)["env_steps"], STEPS * np.arange(1, 9))


def test_an_empty_folder_is_no_checkpoint(folder):
    (folder / "checkpoints" / "999").mkdir()
    assert len(resume(folder)["env_steps"]) == 8


@pytest.mark.parametrize("text", ["[]", "null", "\udcff", "[" * 100_000])
def test_a_run_json_that_is_no_config_is_one_line(folder, text):
    (folder / "run.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"run.json is broken") as error:
        resumed_config(folder, {})
    assert len(str(error.value).splitlines()) == 1


def test_a_run_of_another_version_is_said_to_be_that(folder):
    config = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**config, "NEW_KEY": 3}))
    with pytest.raises(ConfigError, match=r"unknown config key 'NEW_KEY'.*is it another version's"):
        resumed_config(folder, {})


def test_a_finished_run_without_its_results_writes_them_when_it_is_resumed(folder):
    params = (folder / "0_params.npy").read_bytes()
    with pytest.raises(ConfigError, match="has done its 6 updates; set a larger TOTAL_TIMESTEPS"):
        resume(folder, updates=6)
    (folder / "0_params.npy").unlink()
    assert len(resume(folder, updates=6)["env_steps"]) == 6
    assert (folder / "0_params.npy").read_bytes() == params


def results_of(folder):
    return load_results(folder / "0_metrics.npy"), load_results(folder / "0_params.npy")


def test_a_folder_that_vanishes_has_all_results_at_the_end(after_update, stopped, tmp_path):
    after_update(3, lambda: shutil.rmtree(tmp_path / NAME))
    run({**CHAIN, "RESULTS_DIR": str(tmp_path)})
    np.testing.assert_array_equal(
        results_of(tmp_path / NAME)[0]["total_loss"], results_of(stopped)[0]["total_loss"]
    )
    assert results_of(tmp_path / NAME)[1]["params"]


def test_a_full_disk_is_waited_for_and_nothing_is_lost(
    after_update, stopped, tmp_path, monkeypatch, capsys
):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))

    def empty(_seconds):
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(run_folder.time, "sleep", empty)
    after_update(1, fill)
    try:
        run({**CHAIN, "RESULTS_DIR": str(tmp_path)})
    finally:
        empty(0)
    printed = capsys.readouterr()
    assert printed.err.count("File too large; the run goes on in memory") == 1
    assert f"the run is done; waiting for room in {tmp_path / NAME}" in printed.err
    assert f"the checkpoint of update 6 is in {tmp_path / NAME} now" in printed.err
    np.testing.assert_array_equal(
        results_of(tmp_path / NAME)[0]["total_loss"], results_of(stopped)[0]["total_loss"]
    )
    assert whole_checkpoints(tmp_path / NAME) == {6}


def test_a_disk_that_is_full_at_the_start_is_one_line_and_leaves_no_folder(tmp_path, capsys):
    del capsys  # requested so that output goes to memory
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(ConfigError, match=r"can't write to .*: File too large; set"):
            run({**CHAIN, "RESULTS_DIR": str(tmp_path / "runs")})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_not_begun_where_it_has_no_room(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(1, {"x": np.arange(8.0)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoints.save(2, {"x": np.arange(8.0)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in checkpoints.root.iterdir()] == ["1"]


def test_more_seeds_than_a_process_may_open_files_is_one_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(metrics, "open_unbuffered", fail)
    with pytest.raises(ConfigError, match=r"_metrics.jsonl: Too many open files; lower NUM_SEEDS"):
        run({**CHAIN, "NUM_SEEDS": 2, "RESULTS_DIR": str(tmp_path)})
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_not_utf8_is_a_path():
    assert broadcast(lambda: "runs/caf\udce9") == "runs/caf\udce9"


@pytest.mark.slow
def test_an_error_that_nothing_foresaw_leaves_a_checkpoint_a_curve_and_one_line(
    after_update, tmp_path
):
    def fail():
        raise ValueError("what nobody thought of\nand more of it")

    after_update(3, fail)
    with pytest.raises(RunError) as error:
        run({**CHAIN, "RESULTS_DIR": str(tmp_path)})
    folder = tmp_path / NAME
    assert str(error.value) == (
        "after update 3: ValueError: what nobody thought of and more of it;"
        f" RESUME={folder} goes on from update 3; the traceback is in {folder / 'error.txt'}"
    )
    assert "and more of it" in (folder / "error.txt").read_text()
    assert len(resume(folder)["env_steps"]) == 8


def test_a_plot_that_fails_costs_no_parameters(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(outputs, "plot_returns", fail)
    run({**CHAIN, "RESULTS_DIR": str(tmp_path)})
    assert "no plot of the returns: RuntimeError: no fonts" in capsys.readouterr().err
    assert results_of(tmp_path / NAME)[1]["params"]


def test_a_tracker_that_fails_is_given_up_and_the_run_goes_on(capsys):
    class Broken(NoTracker):
        def log(self, metrics):
            raise ConnectionError("no route to host")

    tracker = CarefulTracker(Broken())
    for _ in range(3):
        tracker.log([{}])
    tracker.close()
    assert capsys.readouterr().err == (
        "TRACK: no more metrics are sent (ConnectionError: no route to host); the run goes on\n"
    )


def start(*settings, **pipes):
    words = [f"{key}={value}" for key, value in CHAIN.items()]
    command = [sys.executable, str(REPOSITORY / "train_PPO_trXL.py"), *words, *settings]
    return subprocess.Popen(command, text=True, **pipes)


@pytest.mark.slow
def test_a_run_outlives_its_output(tmp_path):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    words = [f"TOTAL_TIMESTEPS={200 * STEPS}", "CHECKPOINT_EVERY=100"]
    process = start(f"RESULTS_DIR={tmp_path}", *words, **pipes)
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=300) == 0
    assert len(results_of(tmp_path / NAME)[0]["env_steps"]) == 200


WITHOUT_WHAT_WINDOWS_LACKS = """
import os, runpy, signal, sys
sys.modules["fcntl"] = None
for module, names in ((signal, ["SIGHUP"]), (os, ["EX_TEMPFAIL", "posix_fallocate", "sysconf"])):
    for name in names:
        delattr(module, name)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_needs_nothing_that_windows_lacks(tmp_path):
    words = [f"{key}={value}" for key, value in {**CHAIN, "RESULTS_DIR": tmp_path}.items()]
    script = str(REPOSITORY / "train_PPO_trXL.py")
    command = [sys.executable, "-c", WITHOUT_WHAT_WINDOWS_LACKS, script, *words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("MemoryChain-bsuite, PPO on 1 device, ")
    assert len(results_of(tmp_path / NAME)[0]["env_steps"]) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "script", "cure"),
    [
        (
            "JAX_PLATFORMS=tpu",
            ["train_PPO_trXL.py", "RESUME=nowhere"],
            r"pip install 'jax\[tpu\]' .*, or",
        ),
        ("JAX_PLATFORM_NAME=nonsense", ["search_trXL.py"], "set cpu, or"),
        (
            "JAX_PLATFORMS=nonsense",
            ["evaluate_PPO_trXL.py", "results_gymnax/CartPole-v1"],
            "set cpu, or",
        ),
    ],
)
def test_a_platform_that_is_not_there_is_one_line(asked, script, cure):
    variable, _, platform = asked.partition("=")
    done = subprocess.run(
        [sys.executable, *script],
        cwd=REPOSITORY,
        env={**os.environ, variable: platform},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    line = f"error: {asked}: JAX has no such device; {cure} unset {variable}\n"
    assert re.fullmatch(line, done.stderr)


def test_a_closed_output_and_one_of_another_encoding_are_no_reason_to_end():
    program = "from trxl.runs.interruption import lasting_output as l\nwith l(): print('lost')"
    command = f'"{sys.executable}" -c "{program}" >&-'
    done = subprocess.run(command, shell=True, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    bytes_ = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(bytes_, encoding="ascii"))
    print("runs/Läufe\udcff, then more", file=stream, flush=True)
    assert bytes_.getvalue() == b"runs/L\\xe4ufe\\udcff, then more\n"


def test_ctrl_c_while_the_modules_are_imported_ends_it_without_a_traceback(tmp_path):
    for _ in range(2):
        process = start(f"RESULTS_DIR={tmp_path}", stderr=subprocess.PIPE)
        while "jaxlib" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.001)
        time.sleep(random.uniform(0, 1))
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
        assert "Traceback" not in stderr
    assert not list(tmp_path.rglob("*.npy"))
