"""What a rented GPU is asked, on a CPU with tiny sizes: a kill loses a measurement, not a part."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks import gpu, gpu_measures
from benchmarks.gpu import Measurement
from benchmarks.gpu_measures import kernels_and_gaps


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    gpu.main()
    return capsys.readouterr().out


def only(monkeypatch, *wanted):
    monkeypatch.setattr(gpu, "measurements", lambda tiny: iter(wanted))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_every_measurement_has_a_name_and_a_part_of_its_own():
    for tiny in (True, False):
        names = [measurement.name for measurement in gpu.measurements(tiny)]
        assert len(set(names)) == len(names)
    speeds = [m for m in gpu.measurements(False) if m.kind in ("rollout", "update")]
    assert len(speeds) == 2 * 3 * 3 * 2
    assert {m.changes["NUM_ENVS"] for m in speeds} == {1024, 4096, 8192}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["oracle", "ratio", "resume", "environment", "rollout", "update", "profile"]
)
def test_each_kind_measures_after_a_kill(kind, tmp_path, monkeypatch, capsys):
    (first, *_) = [m for m in gpu.measurements(True) if m.kind == kind]
    only(monkeypatch, first)
    arguments = f"part={first.part}", f"out={tmp_path}", "tiny=1"
    command = [sys.executable, gpu.__file__, *arguments, f"only=^{re.escape(first.name)}$"]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert killed.stdout.readline() == f"{first.name} ...\n"
    time.sleep(0.5)  # its process has begun; to import JAX alone takes longer
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "results.jsonl").exists()
    out = call(monkeypatch, capsys, *arguments)
    (row,) = rows_of(tmp_path)
    assert "error" not in row, row
    assert row["device"].startswith("cpu")
    assert row["name"] in out
    if first.part == 1:
        assert row["passed"]
    if first.part == 2:
        share = "1.000" if kind == "environment" else ""
        assert f"| {row['steps_per_second']:,.0f} | {share} |" in out
    if kind == "profile":
        assert row["launches"] > 100
        assert 0 <= row["idle_share"] < 1


@pytest.mark.slow
def test_at_once_with_what_is_named_so(tmp_path, monkeypatch, capsys):
    arguments = "part=2", f"out={tmp_path}", "tiny=1", "at_once=2"
    out = call(monkeypatch, capsys, *arguments, "only=^(environment|rollout TF32.*=4.*published)")
    rows = rows_of(tmp_path)
    assert not [row["error"] for row in rows if "error" in row]
    names = [f"environment TF32 NUM_ENVS={number}" for number in (4, 8)]
    assert {row["name"] for row in rows} == {*names, "rollout TF32 NUM_ENVS=4, NETWORK=published"}
    assert all(f"{row['steps_per_second']:,.0f}" in out for row in rows)


def test_what_is_timed_waits_for_what_compiles(tmp_path, monkeypatch):
    events = []
    lock = tmp_path / "lock"
    lock.touch()
    with open(lock) as ours, open(lock) as other:
        fcntl.flock(ours, fcntl.LOCK_SH)
        fcntl.flock(other, fcntl.LOCK_SH)
        monkeypatch.setattr(gpu_measures, "LOCK", ours.fileno())

        def timed():
            with gpu_measures.alone():
                events.append("timed")
                with pytest.raises(BlockingIOError):
                    fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(timed)
            time.sleep(0.2)
            events.append("compiled")
            fcntl.flock(other, fcntl.LOCK_UN)
            future.result(timeout=60)
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert events == ["compiled", "timed"]


def test_what_is_missing_is_measured_and_what_failed_again(tmp_path, monkeypatch, capsys):
    taken = []

    class Done:
        returncode, stderr = 0, "Traceback\nValueError: no such device\n"
        stdout = 'noise\n{"largest_error": 1e-6, "tolerance": 1e-4, "passed": true}\n'

    def run(command, env, **_):
        taken.append((json.loads(command[-1]), env))
        return Done()

    monkeypatch.setattr(gpu.subprocess, "run", run)
    first, second, third = (
        Measurement(1, kind, "TF32", {}) for kind in ("oracle", "ratio", "resume")
    )
    only(monkeypatch, first, second, third)
    arguments = "part=1", f"out={tmp_path}"
    assert "call it again" in call(monkeypatch, capsys, *arguments, "minutes=0")
    assert not taken
    monkeypatch.setattr(Done, "returncode", 1)
    assert "failed: ValueError: no such device" in call(monkeypatch, capsys, *arguments)
    assert len(taken) == 3
    monkeypatch.setattr(Done, "returncode", 0)
    only(monkeypatch, first, second)
    call(monkeypatch, capsys, *arguments)
    assert [asked["kind"] for asked, _ in taken[3:]] == ["oracle", "ratio"]
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"name": "resume TF32", "part"')  # a kill
    only(monkeypatch, first, second, third)
    out = call(monkeypatch, capsys, *arguments)
    assert [asked["kind"] for asked, _ in taken[5:]] == ["resume"]
    assert taken[-1][1]["XLA_FLAGS"].endswith("--xla_gpu_deterministic_ops=true")
    assert taken[-1][1]["JAX_DEFAULT_MATMUL_PRECISION"] == "tensorfloat32"
    assert out.count("passed") == 3
    assert out.endswith(call(monkeypatch, capsys, f"out={tmp_path}"))  # the table alone


@pytest.mark.slow
def test_training_stops_with_the_time_and_goes_on(tmp_path, monkeypatch, capfd):
    def train(minutes):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "part=4", f"out={tmp_path}", "tiny=1", minutes])
        gpu.main()
        return capfd.readouterr().out

    class OutOfTimeOnceItTrains(subprocess.Popen):
        def wait(self, timeout=None):
            while timeout and self.poll() is None:
                if any(path.stat().st_size for path in tmp_path.rglob("0_metrics.jsonl")):
                    raise subprocess.TimeoutExpired(self.args, timeout)
                time.sleep(0.1)
            return super().wait()

    monkeypatch.setitem(gpu.TINY, "TOTAL_TIMESTEPS", 10_000_000)
    monkeypatch.setattr(gpu.subprocess, "Popen", OutOfTimeOnceItTrains)
    assert "| env_steps | return | steps/s |" in train("minutes=8")
    (folder,) = (tmp_path / "craftax").iterdir()
    lines = len((folder / "0_metrics.jsonl").read_text().splitlines())
    parts = [*folder.glob("learner/*/part_*")]
    assert parts
    assert all(part.stat().st_size <= 15_000_000 for part in parts)

    class Process:
        def __init__(self, command):
            started.append(command)

        def wait(self, timeout=None):
            assert timeout

    started = []
    monkeypatch.setattr(gpu.subprocess, "Popen", Process)
    assert f"{lines * 128:,}" in train("minutes=1")
    assert started[0][2:] == [f"RESUME={folder}", "CHECKPOINT_KIND=learner"]


def test_a_profile_lists_kernels_and_what_stands_before_them():
    def kernel(name, start, duration, pid=1, **args):
        return {"ph": "X", "pid": pid, "name": name, "ts": start, "dur": duration, "args": args}

    of_gpu = {"hlo_op": "x"}
    events = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/host:CPU"}},
        kernel("a", 1000, 100, **of_gpu),
        kernel("b", 1150, 50, **of_gpu),
        kernel("a", 1200, 300, **of_gpu),
        kernel("c", 1250, 50, **of_gpu),
        kernel("b", 1600, 400, **of_gpu),
        kernel("host", 0, 5000, pid=2, hlo_op="y"),
        kernel("whole step", 1000, 1000),
    ]
    found = kernels_and_gaps(events)
    assert found["launches"] == 5
    assert found["span_ms"] == 1.0
    assert found["idle_share"] == pytest.approx(0.15)
    assert found["kernels_ms"] == {"b": [0.45, 2], "a": [0.4, 2], "c": [0.05, 1]}
    assert found["gaps_before_ms"] == {"b": 0.15}
    assert kernels_and_gaps(events[-2:])["launches"] == 1  # without a GPU


@pytest.mark.parametrize("argument", ["part=5", "parts=1", "1"])
def test_bad_arguments_are_one_line(argument, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^error: .*part"):
        call(monkeypatch, capsys, argument)
