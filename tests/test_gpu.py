"""GPU measurements, on a CPU at small sizes."""

import sys
from pathlib import Path

import jax
import pytest
from support import QUICK

from benchmarks import gpu

PROGRAM = Path(__file__).with_name("compiled_program.txt").read_text()
STEPS = QUICK["NUM_ENVS"] * QUICK["NUM_STEPS"]
QUICKLY = ["train_PPO_trXL.py", *(f"{key}={value}" for key, value in QUICK.items())]


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    gpu.main()
    return capsys.readouterr().out


@pytest.mark.weekly
def test_an_error_beyond_its_tolerance_fails_the_check(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PRECISIONS", {"float32": gpu.PRECISIONS["float32"]})
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, capsys, "check")
    assert not exit.value.code
    assert capsys.readouterr().out.count("passed") == len(gpu.TESTS)
    monkeypatch.setattr(gpu, "TESTS", {"ratio": gpu.ratio_error, "none": lambda dtype: 0.0})
    monkeypatch.setitem(gpu.TOLERANCES, "float32", 0.0)
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, capsys, "check")
    assert exit.value.code
    assert capsys.readouterr().out.count("FAILED") == 1


def test_speed_is_of_each_part_size_and_precision(monkeypatch, capsys):
    asked, precisions = [], []

    def compile_update(config, _):
        asked.append((config["NUM_ENVS"], config["COMPUTE_DTYPE"]))
        precisions.append(jax.config.jax_default_matmul_precision)
        return dict, None

    seconds = iter([1.0, 2.0, 4.0] * 20)
    monkeypatch.setattr(gpu, "make_environment_run", lambda config: (None, None))
    monkeypatch.setattr(gpu, "make_rollout", lambda config: None)
    monkeypatch.setattr(gpu, "compile_update", compile_update)
    monkeypatch.setattr(gpu, "median_seconds", lambda function, carry: (next(seconds), carry))
    out = call(monkeypatch, capsys, "speed", *QUICKLY, "COMPUTE_DTYPE=bfloat16")
    assert f"| {QUICK['NUM_ENVS']} | environment |  | {STEPS:,.0f} |  |" in out
    assert f"| {QUICK['NUM_ENVS']} | rollout | bfloat16 | {STEPS / 2:,.0f} | 0.500 |" in out
    assert f"| {QUICK['NUM_ENVS']} | update | bfloat16 | {STEPS / 4:,.0f} | 0.250 |" in out
    assert asked == [(QUICK["NUM_ENVS"], "bfloat16")]
    asked.clear()
    call(monkeypatch, capsys, "speed", "train_PPO_trXL.py", "TOTAL_TIMESTEPS=1e5")
    dtypes = ("float32", "float32", "bfloat16")
    assert asked == [(size, dtype) for size in (1024, 4096, 8192) for dtype in dtypes]
    assert precisions[-3:] == ["highest", "tensorfloat32", None]


@pytest.mark.slow
def test_a_profile_is_of_a_whole_update(monkeypatch, capsys):
    out = call(monkeypatch, capsys, "profile", *QUICKLY)
    kernels = int(out.partition(" kernels per update")[0].split()[-1].replace(",", ""))
    # At least one kernel per rollout step and per gradient step.
    assert kernels > QUICK["NUM_STEPS"] + QUICK["UPDATE_EPOCHS"] * QUICK["NUM_MINIBATCHES"]
    assert out.count("\n| ") == 2 + gpu.TOP  # head and rule


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
    found = gpu.kernels_and_gaps(events)
    assert found.counts == {"a": 2, "b": 2, "c": 1}
    assert found.busy == {"b": 450, "a": 400, "c": 50}
    assert +found.gaps == {"b": 150}
    assert (found.span, found.idle_share) == (1000, 0.15)
    assert gpu.kernels_and_gaps(events[-2:]).counts == {"host": 1}  # without a GPU


def test_a_compiled_programs_kernels_are_counted_by_part():
    found = gpu.launches_by_part(PROGRAM)
    assert found == {
        "agent": 5,
        "storage": 5,
        "game": 5 * 3 * (2 + 1),  # three iterations and their condition
        "worlds": pytest.approx(5 * (2 + 1) / gpu.WORLDS_EVERY),
        "bootstrap": 5 * 2,  # the longer branch
        "else": 5,  # the condition
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: no mode is none of check, speed, profile, launches"),
        (["part=1"], "error: part=1 is none of check"),
        (["check", "NUM_ENVS=3"], "error: check takes no argument: NUM_ENVS=3"),
        (["speed", "NUM_ENV=3"], "error: unknown config key 'NUM_ENV'; did you mean NUM_ENVS"),
        (["speed", "train_Muesli_trXL.py"], "error: train_Muesli_trXL.py is not PPO's"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, capsys, *arguments)
    assert exit.value.code.startswith(message)
