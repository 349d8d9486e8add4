"""Studies: the runs that they list, and that a restarted one skips what is finished."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from functools import partial

import jax
import numpy as np
import pytest
from support import QUICK

from experiments import study, sweep
from trxl.results import load_results

TEXT = """
common LR=1e-3   # of both
seeds 3 4
plain
quoted "ENV_KWARGS={'memory_length': 2}" LR=1e-2
common
script train_Muesli_trXL.py
seeds 0
alone
"""

TRAINING = """
import pathlib, sys
import numpy as np
folder = pathlib.Path(sys.argv[1]) / "Task"
folder.mkdir(exist_ok=True)
(folder / "run.json").write_text("{}")
if sys.argv[3] == "fail":
    sys.exit(3)
returns = np.array([np.nan, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
for seed in sys.argv[2].split(","):
    metrics = {"returned_episode_returns": returns, "num_episodes": np.arange(10)}
    metrics["env_steps"] = 32_768 * (1 + np.arange(10))
    np.save(folder / f"{seed}_metrics.npy", metrics)
    config = {"TOTAL_TIMESTEPS": 327_680, "NUM_ENVS": 256, "NUM_STEPS": 128, "seed": int(seed)}
    np.save(folder / f"{seed}_config.npy", config)
    if sys.argv[3] != "diverge" or seed == "5":
        np.save(folder / f"{seed}_params.npy", {})
sys.exit(sys.argv[3] == "diverge")
"""


def test_a_line_is_a_run_for_each_seed_with_what_is_common():
    ppo, muesli = "train_PPO_trXL.py", "train_Muesli_trXL.py"
    assert [*study.read_study(TEXT)] == [
        ("plain", 3, ("LR=1e-3",), ppo),
        ("plain", 4, ("LR=1e-3",), ppo),
        ("quoted", 3, ("LR=1e-3", "ENV_KWARGS={'memory_length': 2}", "LR=1e-2"), ppo),
        ("quoted", 4, ("LR=1e-3", "ENV_KWARGS={'memory_length': 2}", "LR=1e-2"), ppo),
        ("alone", 0, (), muesli),
    ]


@pytest.fixture
def trained(monkeypatch):
    """Returns the runs that were started; seed 4 fails while `failing` is not empty."""
    runs, failing = [], ["fail"]

    def command(run, out):
        runs.append(run[:2])
        how = "fail" if run.seed == 4 and failing else "train"
        how = "diverge" if run.name == "breaks" else how
        seeds = "5,6" if "NUM_SEEDS=2" in run.overrides else str(run.seed)
        return [sys.executable, "-c", TRAINING, str(run.folder(out)), seeds, how]

    monkeypatch.setattr(study, "command", command)
    return runs, failing


def test_what_failed_is_run_again_and_what_ended_is_not(trained, tmp_path):
    runs, failing = trained
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text("seeds 3 4\nplain\n")
    study.main(text, out, 2)
    assert sorted(runs) == [("plain", 3), ("plain", 4)]
    failing.clear()
    runs.clear()
    study.main(text, out, 2)
    assert runs == [("plain", 4)]
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert sorted((line["seed"], line["status"]) for line in lines) == [(3, 0), (4, 0), (4, 3)]
    for line in lines:
        if line["status"] == 0:
            assert line["final_return"] == 9.0
            assert line["curve"] == [None, *map(float, range(1, 10))]
            # Two updates make 65,536 steps; in the last two 8 and 9 episodes end.
            assert line["mmer"] == round((8 * 8.0 + 9 * 9.0) / 17, 4)


@pytest.mark.parametrize(("name", "statuses"), [("both", [0, 0]), ("breaks", [0, 1])])
def test_seeds_of_one_program_have_a_line_each_and_one_that_diverged_fails_alone(
    name, statuses, trained, tmp_path
):
    runs, _ = trained
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text(f"seeds 5\n{name} NUM_SEEDS=2\n")
    study.main(text, out, 1)
    study.main(text, out, 1)
    assert runs == [(name, 5)]
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [5, 6]
    assert [line["status"] for line in lines] == statuses
    assert [line["final_return"] for line in lines] == [9.0, 9.0]


def test_a_run_that_was_begun_is_resumed(tmp_path):
    run = study.Run("plain", 3, ("LR=1e-3",), "train_PPO_trXL.py")
    folder = run.folder(tmp_path)
    assert study.command(run, tmp_path)[2:] == ["LR=1e-3", "seed=3", f"RESULTS_DIR={folder}"]
    (folder / "Task").mkdir(parents=True)
    (folder / "Task" / "run.json").touch()  # stopped before its first checkpoint
    assert study.command(run, tmp_path)[2:] == ["LR=1e-3", "seed=3", f"RESULTS_DIR={folder}"]
    (folder / "Task" / "checkpoints" / "50").mkdir(parents=True)
    assert study.command(run, tmp_path)[2:] == [f"RESUME={folder / 'Task'}"]


@pytest.mark.slow
@pytest.mark.parametrize("group", [True, False])
def test_when_it_is_stopped_no_run_is_started_any_more(group, tmp_path):
    """SIGTERM to the study lets its run end; SIGTERM to the group stops the run too."""
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text("seeds 0 1\nruns\n")
    sleeper = "import time; print('here', flush=True); time.sleep(3)"
    script = f"""
import runpy, signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.argv = ["study.py", {str(text)!r}, {str(out)!r}, "1"]
sys.path.insert(0, {str(study.REPOSITORY)!r})
import subprocess
run = subprocess.run
subprocess.run = lambda command, **how: run([sys.executable, "-c", {sleeper!r}], **how)
runpy.run_path({study.__file__!r}, run_name="__main__")
"""
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    output, deadline = out / "runs" / "0" / "output.txt", time.monotonic() + 300
    while not (output.exists() and output.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (os.killpg if group else os.kill)(process.pid, signal.SIGTERM)
    assert process.wait(300) == 0
    (line,) = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    assert (line["seed"], line["status"]) == (0, -signal.SIGTERM if group else 0)


def test_a_training_in_which_no_episode_ends_has_no_returns():
    metrics = {"returned_episode_returns": np.full(4, np.nan), "num_episodes": np.zeros(4)}
    found = study.summary(metrics | {"env_steps": np.arange(1, 5)})
    assert (found["mmer"], found["final_return"], found["curve"]) == (None, None, [None] * 4)


def test_a_run_goes_on_in_the_environment_of_ones_own_that_it_had(tmp_path):
    words = ("ENV_NAME=other.py:Other", "ENV_NAME=own.py:Own", "LR=1e-3")
    own = study.Run("own", 0, words, "train_PPO_trXL.py")
    suites = own._replace(overrides=("ENV_NAME=CartPole-v1",))
    (own.folder(tmp_path) / "Own" / "checkpoints" / "3").mkdir(parents=True)
    resume = f"RESUME={own.folder(tmp_path) / 'Own'}"
    assert study.command(own, tmp_path)[2:] == [resume, "ENV_NAME=own.py:Own"]
    assert study.command(suites, tmp_path)[2:] == [resume]


@pytest.mark.weekly
def test_a_row_of_a_sweep_that_diverged_failed(tmp_path):
    sizes = " ".join(f"{key}={value}" for key, value in QUICK.items())
    (tmp_path / "list").write_text(f"common {sizes}\nwhole\nbad LR=1e38")
    sweep.main(tmp_path / "list", tmp_path / "out", [0])
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["status"] for line in lines] == [0, 1]
    assert (tmp_path / "out" / "whole").exists()
    assert not (tmp_path / "out" / "bad").exists()


@pytest.mark.weekly
def test_a_sweep_gives_what_the_runs_alone_give(tmp_path, monkeypatch):
    common = "common NUM_ENVS=8 NUM_STEPS=16 WINDOW_GRAD=16 WINDOW_MEM=8 TOTAL_TIMESTEPS=640"
    sizes = "num_layers=1 EMBED_SIZE=16 qkv_features=16 num_heads=2 hidden_layers=16"
    lines = "seeds 3 4\nplain\nseeds 3\nfast LR=1e-2 GAMMA=0.9\nwide EMBED_SIZE=32 NUM_SEEDS=2"
    text = f"{common} {sizes}\n{lines}"
    (tmp_path / "list").write_text(text)
    assert [len(rows) for *_, rows in sweep.programs_of([*study.read_study(text)])] == [3, 2]
    sweep.main(tmp_path / "list", tmp_path / "swept", [4])
    lines = map(json.loads, (tmp_path / "swept" / "results.jsonl").read_text().splitlines())
    swept = {(line["name"], line["seed"]): line for line in lines}

    def run_here(command, **_):
        monkeypatch.setattr(sys, "argv", command[4:])  # behind nice and Python
        runpy.run_path(sys.argv[0], run_name="__main__")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run_here)
    lines = [
        line for run in study.read_study(text) for line in study.train(run, tmp_path / "alone")
    ]
    alone = {(line["name"], line["seed"]): line for line in lines}
    assert swept.keys() == alone.keys()
    for run, line in swept.items():
        assert line["overrides"] == [*alone[run]["overrides"]]
        assert line["updates"] == 5
        assert line["steps"] == alone[run]["steps"]
        np.testing.assert_allclose(line["curve"], alone[run]["curve"], atol=1e-3)
    kept, own = tmp_path / "swept" / "plain", tmp_path / "alone" / "plain" / "4"
    names = {"4_config.npy", "4_metrics.npy", "4_params.npy"}
    assert {path.name for path in kept.iterdir()} == names
    (own,) = own.glob("MemoryChain*")
    config, metrics, params = (
        [load_results(folder / name) for folder in (kept, own)] for name in sorted(names)
    )
    assert {**config[0], "RESULTS_DIR": config[1]["RESULTS_DIR"]} == config[1]
    assert metrics[0].keys() == metrics[1].keys() - {"steps_per_second"}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), *params)
    monkeypatch.setattr(sweep, "train", None)
    sweep.main(tmp_path / "list", tmp_path / "swept")  # nothing is left


@pytest.mark.weekly
def test_a_sweep_whose_time_is_up_says_how_far_it_came(tmp_path, monkeypatch):
    sizes = "num_layers=1 EMBED_SIZE=16 qkv_features=16 num_heads=2 hidden_layers=16"
    shape = "NUM_ENVS=8 NUM_STEPS=16 WINDOW_GRAD=16 WINDOW_MEM=8 TOTAL_TIMESTEPS=640"
    lines = "seeds 3 4\nplain\nnever EMBED_SIZE=32"
    (tmp_path / "list").write_text(f"common {shape} {sizes}\n{lines}")
    signals = []

    def stopped_in_the_second(updates, **_):
        for update in updates:
            signals.extend([signal.SIGTERM] * update)
            yield update

    monkeypatch.setattr(sweep, "SIGNALS", signals)
    monkeypatch.setattr(sweep, "tqdm", stopped_in_the_second)
    sweep.main(tmp_path / "list", tmp_path, [4])
    lines = [*map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())]
    assert [(line["name"], line["seed"]) for line in lines] == [("plain", 3), ("plain", 4)]
    assert all(line["status"] == -signal.SIGTERM and line["updates"] == 2 for line in lines)
    assert len(load_results(tmp_path / "plain" / "4_metrics.npy")["env_steps"]) == 2
    assert not study.taken_of(tmp_path / "results.jsonl")
