"""A run from outside: files, messages, signals, devices."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from support import QUICK, main, run

from trxl.errors import RunError
from trxl.runs import run as runs
from trxl.runs.compiled import Program

REPOSITORY = Path(__file__).resolve().parents[1]
CHAIN = {**QUICK, "ENV_KWARGS": {"memory_length": 3}, "TOTAL_TIMESTEPS": 192}  # 3 updates


def contents(folder):
    """Returns a run's files without its checkpoints."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def load(path):
    return np.load(path, allow_pickle=True).item()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Trains seed 5 alone, then seeds 5 and 6 at once, with the same config."""
    root = tmp_path_factory.mktemp("results")
    run({**CHAIN, "seed": 5, "RESULTS_DIR": str(root)})
    first = contents(root / "MemoryChain-bsuite")
    run({**CHAIN, "seed": 5, "NUM_SEEDS": 2, "RESULTS_DIR": str(root)})
    return root, first


def test_a_run_writes_its_files_and_nothing_else(results):
    root, first = results
    kinds = ("config.npy", "metrics.jsonl", "metrics.npy", "params.npy")
    assert sorted(first) == [*(f"5_{kind}" for kind in kinds), "return_5.png", "run.json"]
    assert first["return_5.png"].startswith(b"\x89PNG")
    folder = root / "MemoryChain-bsuite"
    config = load(folder / "5_config.npy")
    assert config["seed"] == 5
    assert config["ENV_KWARGS"] == {"memory_length": 3}
    metrics = load(folder / "5_metrics.npy")
    assert {
        *("returned_episode_returns", "returned_episode_lengths", "num_episodes", "total_loss"),
        *("actor_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "grad_norm"),
        *("explained_variance", "learning_rate", "steps_per_second", "env_steps", "param_norm"),
        *("mean_reward", "mean_observation"),
    } == set(metrics)
    assert all(values.shape == (3,) for values in metrics.values())
    np.testing.assert_array_equal(metrics["env_steps"], [64, 128, 192])


def test_the_files_open_without_jax(results):
    root, _ = results
    code = (
        "import sys, numpy as np\n"
        "for name in ('config', 'metrics', 'params'):\n"
        "    print(np.load(f'5_{name}.npy', allow_pickle=True).item().keys())\n"
        "assert not any(name.startswith(('jax', 'flax')) for name in sys.modules)"
    )
    folder = root / "MemoryChain-bsuite"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


def test_a_second_run_takes_a_fresh_folder_and_leaves_the_first_alone(results):
    root, first = results
    assert sorted(path.name for path in root.iterdir()) == [
        "MemoryChain-bsuite",
        "MemoryChain-bsuite_2",
    ]
    assert contents(root / "MemoryChain-bsuite") == first


def test_each_of_several_seeds_has_the_files_of_a_run_of_its_own(results):
    root, _ = results
    alone, together = root / "MemoryChain-bsuite", root / "MemoryChain-bsuite_2"
    kinds = ("config.npy", "metrics.jsonl", "metrics.npy", "params.npy")
    expected = {f"{seed}_{kind}" for seed in (5, 6) for kind in kinds}
    expected |= {"return_5.png", "return_6.png", "return_5_to_6.png", "run.json"}
    assert set(contents(together)) == expected
    assert load(together / "6_config.npy")["seed"] == 6
    for name in ("metrics", "params"):
        for a, b in zip(
            jax.tree.leaves(clockless(load(alone / f"5_{name}.npy"))),
            jax.tree.leaves(clockless(load(together / f"5_{name}.npy"))),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4)


def clockless(tree):
    return {key: value for key, value in tree.items() if key != "steps_per_second"}


@pytest.fixture
def never_compile(monkeypatch):
    def compile(self, state):
        raise AssertionError("compiled")

    monkeypatch.setattr(Program, "compile", compile)


WRONG = {
    "NUM_ENV=4": "error: unknown config key 'NUM_ENV'; did you mean NUM_ENVS",
    "NUM_ENVS=four": "error: NUM_ENVS=four is not a whole number",
    "ENV_NAME=CartPole": "error: unknown environment 'CartPole'; did you mean CartPole-v1",
    "ENV_NAME=Craftax-Pixels-v1": "error: Craftax-Pixels-v1 observes pixels",
    "ENV_KWARGS={'memory': 3}": "error: MemoryChain-bsuite has no 'memory'",
    "@craftax-1": "error: no settings '@craftax-1' in settings/; did you mean craftax",
    "@../README": "error: no settings '@../README' in settings/; there are",
    "num_heads=3": "error: num_heads must divide qkv_features",
    "RESULTS_DIR=/dev/null/results": "error: can't write the results to /dev/null/results",
}


@pytest.mark.parametrize("argument", WRONG)
def test_bad_input_is_one_line_before_anything_compiles(
    argument, never_compile, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_PPO_trXL.py", argument])
    with pytest.raises(SystemExit) as exit:
        main({**CHAIN})
    assert str(exit.value.code).startswith(WRONG[argument])
    assert "\n" not in exit.value.code
    assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"NUM_SEEDS": 2, "NUM_ENVS": 8, "NUM_MINIBATCHES": 1},
            "NUM_SEEDS = 2 needs train_PPO_trXL.py",
        ),
        ({"NUM_ENVS": 6}, "the number of devices must divide NUM_ENVS: 8 does not divide 6"),
        ({"NUM_ENVS": 8}, "NUM_MINIBATCHES must divide NUM_ENVS / 8 devices"),
    ],
)
def test_bad_input_of_the_pmap_script(changes, message, never_compile, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_PPO_trXL_pmap.py"])
    with pytest.raises(SystemExit) as exit:
        main({**CHAIN, **changes}, all_devices=True)
    assert f"error: {message}" in exit.value.code


def test_the_scripts_exit_with_one_line_and_status_one(tmp_path):
    script = REPOSITORY / "train_PPO_trXL.py"
    result = subprocess.run(
        [sys.executable, script, "NUM_STEPS=0"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr == "error: NUM_STEPS must be at least 1, not 0\n"


@pytest.mark.parametrize("all_devices", [False, True])
def test_only_the_script_of_all_devices_joins_the_tasks_of_a_slurm_step(
    all_devices, monkeypatch, tmp_path
):
    """Tasks of `srun -n 8 python train_PPO_trXL.py seed=$SLURM_PROCID` stay separate runs."""
    variables = {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "8", "SLURM_PROCID": "3"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    class JoinedError(BaseException):  # no `except Exception` catches it
        pass

    def join(**_):
        raise JoinedError

    monkeypatch.setattr(jax.distributed, "initialize", join)
    settings = ["seed=3", f"RESULTS_DIR={tmp_path}", "TOTAL_TIMESTEPS=64"]
    monkeypatch.setattr(sys, "argv", ["train_PPO_trXL.py", *settings])
    if all_devices:
        with pytest.raises(JoinedError):
            main({**CHAIN}, all_devices)
    else:
        main({**CHAIN})
        assert (tmp_path / "MemoryChain-bsuite" / "3_params.npy").exists()


def test_what_fails_before_the_first_update_leaves_no_folder(monkeypatch, tmp_path):
    def out_of_memory(self, state):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(Program, "compile", out_of_memory)
    with pytest.raises(RunError, match="the device's memory is full; lower NUM_ENVS"):
        run({**CHAIN, "RESULTS_DIR": str(tmp_path / "runs")})
    assert not list(tmp_path.iterdir())


STOPPED_IN_ITS_MAKING = """
import os, signal, sys
from trxl.runs import run_folder
from trxl.runs.run import run
from trxl.runs.tracking import NoTracker
from trainer_PPO_trXL import PPO

number, moment, root = int(sys.argv[1]), sys.argv[2], sys.argv[3]

class Tracker(NoTracker):
    def __init__(self):
        if moment == "tracker":
            os.kill(os.getpid(), number)

    def close(self):
        print("closed", flush=True)

def check_shared(folder):
    if moment == "folder":
        os.kill(os.getpid(), number)

run_folder.make_tracker = lambda *_: Tracker()
run_folder.check_shared = check_shared
run({"RESULTS_DIR": root}, PPO)
print("went on", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number"), [("folder", signal.SIGTERM), ("tracker", signal.SIGINT)]
)
def test_a_signal_while_the_folder_is_made_leaves_none_and_closes_the_tracker(
    moment, number, tmp_path
):
    command = [sys.executable, "-c", STOPPED_IN_ITS_MAKING, str(number.value), moment, tmp_path]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert result.returncode == 128 + number, result.stderr
    assert result.stdout == "closed\n"
    assert result.stderr.endswith("stopped at once\n")
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


class TestSignals:
    """Signals to a real process in the middle of a long run."""

    @pytest.fixture
    def start(self, tmp_path):
        """Starts the script and waits for a line of its output."""
        processes = []

        def start(*arguments, until="compiled"):
            command = [sys.executable, str(REPOSITORY / "train_PPO_trXL.py")]
            settings = [f"{key}={value}" for key, value in CHAIN.items()]
            settings += [f"RESULTS_DIR={tmp_path}", "TOTAL_TIMESTEPS=1e9", *arguments]
            process = subprocess.Popen(
                command + settings,
                stderr=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                text=True,
            )
            processes.append(process)
            for line in process.stdout:
                if line.startswith(until):
                    return process
            raise AssertionError(process.stderr.read())

        yield start
        for process in processes:
            process.kill()
            process.communicate()

    @pytest.mark.slow
    def test_the_first_saves_what_was_learnt_and_says_where(self, start, tmp_path):
        """The first Ctrl-C saves the run. Other tests send SIGHUP and SIGTERM."""
        process = start()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 128 + signal.SIGINT, stderr
        assert "stopping after this update" in stderr
        folder = tmp_path / "MemoryChain-bsuite"
        assert f"saved to {folder}" in stdout
        updates = len(load(folder / "0_metrics.npy")["total_loss"])
        assert f"stopped after {updates} of" in stdout
        assert load(folder / "0_params.npy")["params"]

    @pytest.mark.slow
    def test_the_second_quits_at_once(self, start, tmp_path):
        process = start("NUM_ENVS=4096", "NUM_STEPS=512")  # an update of many seconds
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        began = time.perf_counter()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=300)
        assert time.perf_counter() - began < 3
        assert process.returncode == 128 + signal.SIGINT
        assert not list(tmp_path.rglob("*.npy"))

    @pytest.mark.slow
    def test_one_while_it_compiles_quits_at_once(self, start, tmp_path):
        process = start(until="compiling")
        began = time.perf_counter()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=300)
        assert time.perf_counter() - began < 3
        assert process.returncode == 128 + signal.SIGINT
        assert not list(tmp_path.iterdir())


def test_the_compilation_cache_is_on_and_the_users_own_folder_wins(monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        runs.enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(REPOSITORY / ".jax_cache")
        jax.config.update("jax_compilation_cache_dir", "elsewhere")
        runs.enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == "elsewhere"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
