"""Checkpoints and resuming, with processes that are really killed.

`KILLS=10 python -m pytest tests/test_resume.py` kills ten times instead of twice.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
import pytest
from support import OWN_ENVIRONMENT, QUICK, main, resumed_config, run, whole_checkpoints

from trxl.errors import ConfigError
from trxl.runs import saved_config
from trxl.runs.checkpoints import Checkpoints
from trxl.runs.divergence import NotFiniteError
from trxl.runs.run_folder import RunFolder
from trxl.training import make_init_and_update

from trainer_Muesli_trXL import MUESLI
from trainer_PPO_trXL import PPO

REPOSITORY = Path(__file__).resolve().parents[1]
CHAIN = {
    **QUICK,
    "ENV_NAME": "MemoryChain-bsuite",
    **{"ENV_KWARGS": {"memory_length": 3}, "CHECKPOINT_EVERY": 2, "NORMALIZE_VALUE": False},
}
# A packed grid, a pool of worlds, rescaled values, no memory.
GRIDDED_POOL = {
    "ENV_NAME": f"{Path(__file__).with_name('toys.py')}:Gridded",
    "ENV_KWARGS": {},
    **{"RESET_STRATEGY": "pool", "RESET_RATIO": 2, "NUM_SEEDS": 2, "WINDOW_MEM": 0},
    **{"NETWORK": "wide", "encoder_features": 16, "NORMALIZE_VALUE": True},
}
STEPS_PER_UPDATE = QUICK["NUM_ENVS"] * QUICK["NUM_STEPS"]
KILLS = int(os.environ.get("KILLS", 2))


def load(folder, seed=0):
    """Returns a seed's metrics, without the clock, and its parameters."""
    metrics, params = (
        np.load(folder / f"{seed}_{name}.npy", allow_pickle=True).item()
        for name in ("metrics", "params")
    )
    del metrics["steps_per_second"]
    return metrics, params


def assert_bitwise_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


class Process:
    """Process of the training script that can be killed."""

    def __init__(self, *settings):
        command = [sys.executable, str(REPOSITORY / "train_PPO_trXL.py"), *settings]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def wait_for(self, condition, pause=0.01):
        while not condition():
            assert self._process.poll() is None, self._process.stdout.read()
            time.sleep(pause)

    def stands_still_while(self, condition):
        """Stops the process and returns True if the condition still holds, else lets it run."""
        if condition():
            self._process.send_signal(signal.SIGSTOP)
            os.waitpid(self._process.pid, os.WUNTRACED)
            if condition():
                return True
            self._process.send_signal(signal.SIGCONT)
        return False

    def kill(self, number):
        """Sends the signal and returns the exit status and the output."""
        self._process.send_signal(number)
        output, _ = self._process.communicate(timeout=300)
        return self._process.returncode, output

    def finish(self):
        output, _ = self._process.communicate(timeout=300)
        assert self._process.returncode == 0, output
        return output


def being_written(folder):
    return list(folder.glob("checkpoints/*tmp*"))


MOMENTS = ("while a checkpoint is written", "by SIGHUP", "in an update", "by SIGTERM")
LEARNS = {
    "ENV_KWARGS": {"memory_length": 5},
    **{"LR": 2e-3, "NUM_ENVS": 64, "NUM_MINIBATCHES": 4, "UPDATE_EPOCHS": 4, "CHECKPOINT_EVERY": 2},
    **{"EMBED_SIZE": 32, "qkv_features": 32, "hidden_layers": 32, "WINDOW_GRAD": 8},
}


@pytest.mark.slow
def test_a_run_that_was_killed_again_and_again_ends_as_one_that_never_was(tmp_path, monkeypatch):
    """Trains with XLA's optimisations, which other tests switch off, and learns."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    monkeypatch.setenv("XLA_FLAGS", "")
    updates = 60 + 12 * KILLS
    config = {**CHAIN, **LEARNS, "ANNEAL_LR": True}
    config["TOTAL_TIMESTEPS"] = updates * config["NUM_ENVS"] * config["NUM_STEPS"]
    settings = [f"{key}={value}" for key, value in config.items()]
    Process(*settings, f"RESULTS_DIR={tmp_path / 'whole'}").finish()

    folder = tmp_path / "killed" / "MemoryChain-bsuite"
    process = Process(*settings, f"RESULTS_DIR={tmp_path / 'killed'}")
    for kill in range(KILLS):
        moment = MOMENTS[kill % len(MOMENTS)]
        before = whole_checkpoints(folder)
        process.wait_for(lambda before=before: whole_checkpoints(folder) - before)
        if moment.startswith("by "):
            number = signal.Signals[moment.removeprefix("by ")]
            status, output = process.kill(number)
            assert status == 128 + number, output
            assert "stopping after this update" in output
            assert f"saved to {folder}" in output
            reached = len(load(folder)[0]["total_loss"])
            assert f"stopped after {reached} of {updates}" in output
        else:
            if moment == "in an update":
                time.sleep(random.uniform(0, 0.5))
            else:
                writing = partial(process.stands_still_while, lambda: being_written(folder))
                process.wait_for(writing, pause=0.0005)
            assert process.kill(signal.SIGKILL)[0] == -signal.SIGKILL
        process = Process(f"RESUME={folder}")
    assert "going on after update" in process.finish()

    whole = load(tmp_path / "whole" / "MemoryChain-bsuite")
    killed = load(folder)
    assert len(killed[0]["total_loss"]) == updates
    assert_bitwise_equal(whole, killed)
    returns = killed[0]["returned_episode_returns"]
    assert abs(returns[:3].mean()) < 0.3
    assert returns[-5:].mean() > 0.95


@pytest.mark.parametrize(
    ("changes", "all_devices"),
    [
        pytest.param(
            {"NUM_ENVS": 16, "NORMALIZE_OBS": True, "NORMALIZE_REWARD": True},
            True,
            id="eight devices",
            marks=pytest.mark.slow,
        ),
        pytest.param(GRIDDED_POOL, False, id="two seeds", marks=pytest.mark.weekly),
        pytest.param(
            {"AUX_EPOCHS": 1, "REPLAY_ROLLOUTS": 3},
            False,
            id="a phase that reads rollouts of before",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_resumed_run_is_bit_for_bit_one_that_never_stopped(changes, all_devices, tmp_path):
    updates = QUICK["NUM_STEPS"] * changes.get("NUM_ENVS", QUICK["NUM_ENVS"])
    config = {**CHAIN, **changes, "TOTAL_TIMESTEPS": 4 * updates}
    run({**config, "RESULTS_DIR": str(tmp_path / "a")}, all_devices)
    (whole,) = (tmp_path / "a").iterdir()
    stopped = tmp_path / "b"
    # The folder after a kill between the two checkpoints.
    shutil.copytree(whole, stopped, ignore=shutil.ignore_patterns("*.npy", "*.png"))
    shutil.rmtree(stopped / "checkpoints" / "4")
    resumed = resumed_config(stopped, {"ENV_NAME": config["ENV_NAME"]})
    run({**resumed, "RESUME": str(stopped)}, all_devices)
    for seed in range(config.get("NUM_SEEDS", 1)):
        assert_bitwise_equal(load(whole, seed), load(stopped, seed))
    assert np.all(load(whole)[0]["num_episodes"] > 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Trains four updates with an annealed learning rate; copy the folder to resume it."""
    root = tmp_path_factory.mktemp("finished")
    run({**CHAIN, "LR": 0.004, "ANNEAL_LR": True, "RESULTS_DIR": str(root)})
    return root / "MemoryChain-bsuite"


@pytest.mark.slow
def test_the_learning_rate_follows_the_new_total(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    config = resumed_config(folder, {"TOTAL_TIMESTEPS": 8 * STEPS_PER_UPDATE})
    run({**config, "RESUME": str(folder)})
    rates = load(folder)[0]["learning_rate"]
    np.testing.assert_allclose(rates, [4e-3, 3e-3, 2e-3, 1e-3, 2e-3, 1.5e-3, 1e-3, 5e-4], rtol=1e-6)


def test_a_run_that_breaks_says_where_and_keeps_its_last_checkpoint(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    config = resumed_config(folder, {"TOTAL_TIMESTEPS": 8 * STEPS_PER_UPDATE, "LR": 1e30})
    newest = max(whole_checkpoints(folder))
    with pytest.raises(NotFiniteError) as error:
        run({**config, "RESUME": str(folder)})
    assert f"after update {newest + 1}; the checkpoint of update {newest} is kept" in str(
        error.value
    )
    assert max(whole_checkpoints(folder)) == newest


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"NUM_ENVS": 8}, "RESUME: NUM_ENVS can't change; the run has NUM_ENVS = 4"),
        ({"ENV_NAME": "CartPole-v1"}, "RESUME: ENV_NAME can't change"),
        ({"num_layers": 3, "seed": 1}, "RESUME: num_layers, seed can't change"),
    ],
)
def test_what_would_change_the_states_meaning_is_refused_by_name(finished, override, message):
    with pytest.raises(ConfigError) as error:
        resumed_config(finished, override)
    assert message in str(error.value)


@pytest.mark.slow
def test_a_file_that_only_the_resumed_run_names_is_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("corridor.py").write_text(OWN_ENVIRONMENT)
    name = "corridor.py:Corridor"
    run({**QUICK, "ENV_NAME": name, "RESULTS_DIR": "runs", "TOTAL_TIMESTEPS": 64})
    Path("ran").unlink()
    resume = ["train_PPO_trXL.py", "RESUME=runs/Corridor", "TOTAL_TIMESTEPS=128"]
    monkeypatch.setattr(sys, "argv", resume)
    with pytest.raises(SystemExit) as exit:
        main({"ENV_NAME": "MemoryChain-bsuite"})
    where = Path("corridor.py").resolve()
    assert exit.value.code.startswith(f"error: RESUME: the environment is {where}:Corridor")
    assert exit.value.code.endswith(f"add ENV_NAME={where}:Corridor")
    monkeypatch.setattr(sys, "argv", [*resume, "ENV_NAME=corridor.py:Other"])
    with pytest.raises(SystemExit, match="RESUME: ENV_NAME can't change; the run has ENV_NAME = "):
        main({})
    Path("elsewhere").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir("elsewhere")
        patch.setattr(sys, "argv", [resume[0], "RESUME=../runs/Corridor", f"ENV_NAME={name}"])
        with pytest.raises(SystemExit) as exit:
            main({})
    assert exit.value.code.endswith(f"the run's was {where}: add ENV_NAME={where}:Corridor")
    assert not Path("ran").exists()

    Path("moved").mkdir()
    Path("corridor.py").rename("moved/corridor.py")
    name = f"moved/{name}"
    monkeypatch.setattr(sys, "argv", [*resume, f"ENV_NAME={name}"])
    main({})
    monkeypatch.setattr(sys, "argv", [*resume[:2], "TOTAL_TIMESTEPS=192"])
    main({"ENV_NAME": name})  # as in a user's script
    assert Path("moved/ran").exists()
    assert len(load(Path("runs/Corridor"))[0]["total_loss"]) == 3


def test_a_tuple_or_numpys_number_in_env_kwargs_is_the_one_that_was_saved(finished, tmp_path):
    kwargs = {"size": (3, np.int64(4)), "weights": np.float32([0.5, 2])}
    saved_config.save_run_config(tmp_path, PPO.check({**CHAIN, "ENV_KWARGS": kwargs}))
    assert resumed_config(tmp_path, {"ENV_KWARGS": kwargs})["ENV_KWARGS"] is kwargs
    as_read = {"size": [3, 4], "weights": [0.5, 2.0]}
    assert resumed_config(tmp_path, {})["ENV_KWARGS"] == as_read
    with pytest.raises(ConfigError, match="ENV_KWARGS can't change"):
        resumed_config(tmp_path, {"ENV_KWARGS": {**kwargs, "size": (3, 5)}})


def test_a_config_that_cannot_be_saved_is_one_line_before_a_folder_is_made(tmp_path):
    config = {**CHAIN, "ENV_KWARGS": {"memory_length": len}, "RESULTS_DIR": str(tmp_path / "runs")}
    with pytest.raises(ConfigError, match="built-in function len> can't be saved with the run"):
        RunFolder(PPO.check(config), PPO, [0])
    assert not (tmp_path / "runs").exists()


def test_other_keys_may_change(finished):
    changes = {"TOTAL_TIMESTEPS": 10**6, "LR": 1e-5, "CHECKPOINT_EVERY": 7, "KEEP_CHECKPOINTS": 1}
    config = resumed_config(finished, changes)
    assert changes.items() <= config.items()
    assert config["NUM_ENVS"] == CHAIN["NUM_ENVS"]


@pytest.mark.parametrize(
    ("algorithm", "changes"), [(PPO, {"AUX_EPOCHS": 1}), (MUESLI, {})], ids=["PPO", "Muesli"]
)
def test_keys_that_may_change_leave_the_checkpoint_as_it_is(algorithm, changes):
    """A state has the same arrays with the least value, or the other choice, of all these keys."""
    config = algorithm.check({**QUICK, **changes})
    other = dict(config)
    for name, key in algorithm.keys.items():
        if key.resumable and isinstance(config[name], bool):
            other[name] = not config[name]
        elif key.resumable and isinstance(config[name], (int, float)):
            other[name] = key.low
        elif key.resumable and key.choices:
            other[name] = next(choice for choice in key.choices if choice != config[name])
    other["TOTAL_TIMESTEPS"] = STEPS_PER_UPDATE

    def arrays_of(config):
        init, _ = make_init_and_update(algorithm.check(config), algorithm)
        state = jax.eval_shape(init, jax.random.key(0))
        return jax.tree.map(lambda x: (x.shape, x.dtype), state)

    assert arrays_of(other) == arrays_of(config)


def test_a_folder_with_nothing_to_resume_is_one_line(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_PPO_trXL.py", f"RESUME={tmp_path / 'nowhere'}"])
    with pytest.raises(SystemExit) as exit:
        main({})
    assert exit.value.code.startswith("error: RESUME: no run in")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run.json is broken"):
        resumed_config(tmp_path, {})
    (tmp_path / "run.json").write_text((finished / "run.json").read_text())
    with pytest.raises(ConfigError, match="has no whole checkpoint to go on from"):
        RunFolder(PPO.check({**CHAIN, "RESUME": str(tmp_path)}), PPO, [0])


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """Returns (CHECKPOINT_KIND, EMBED_SIZE) -> folder of a run of four updates, made once."""

    @cache
    def make(kind, size):
        root = tmp_path_factory.mktemp(f"{kind}_{size}")
        sizes = {"EMBED_SIZE": size, "CHECKPOINT_KIND": kind}
        run({**CHAIN, **sizes, "RESULTS_DIR": str(root)})
        return root / "MemoryChain-bsuite"

    return make


def cut_off(folder, of_another):
    """Halves every file of arrays: a single one may hold nothing that is read."""
    for path in folder.rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_by_another(folder, of_another):
    """Replaces the checkpoint by that of a network of another size."""
    shutil.rmtree(folder)
    shutil.copytree(of_another, folder)


@pytest.mark.slow
@pytest.mark.parametrize(("breaks", "kind"), [(cut_off, "full"), (replace_by_another, "learner")])
def test_a_broken_or_foreign_checkpoint_is_one_line_and_nothing_is_overwritten(
    kind, breaks, make_run, tmp_path, monkeypatch
):
    folder = shutil.copytree(make_run(kind, 16), tmp_path / "run")
    checkpoint = Path("checkpoints", "4")
    newest = folder / checkpoint
    breaks(newest, make_run(kind, 8) / checkpoint)
    before = files_of(folder)
    settings = [f"RESUME={folder}", f"TOTAL_TIMESTEPS={6 * STEPS_PER_UPDATE}", "CHECKPOINT_EVERY=3"]
    monkeypatch.setattr(sys, "argv", ["train_PPO_trXL.py", *settings])
    with pytest.raises(SystemExit) as exit:
        main({})
    assert exit.value.code.startswith(
        f"error: RESUME: {newest} is broken, or of another run, environment or version ("
    )
    assert "\n" not in exit.value.code
    assert files_of(folder) == before

    if breaks == cut_off:
        shutil.rmtree(newest)  # as the message advises
        main({})
        assert len(load(folder)[0]["total_loss"]) == 6


@pytest.mark.weekly
def test_a_run_goes_on_with_another_number_of_devices(tmp_path):
    config = {**CHAIN, "NUM_ENVS": 8, "TOTAL_TIMESTEPS": 256, "NUM_MINIBATCHES": 1}
    curves, started = {}, {}
    for first in (False, True):
        run({**config, "RESULTS_DIR": str(tmp_path / str(first))}, all_devices=first)
        started[first] = tmp_path / str(first) / "MemoryChain-bsuite"
    for first, second in [(False, False), (False, True), (True, False)]:
        name = f"{first}_{second}"
        folder = shutil.copytree(started[first], tmp_path / name)
        resumed = resumed_config(folder, {"TOTAL_TIMESTEPS": 512})
        run({**resumed, "RESUME": str(folder)}, all_devices=second)
        curves[name] = load(folder)[0]
    for name in ("False_True", "True_False"):
        for metric in ("returned_episode_returns", "num_episodes", "total_loss", "grad_norm"):
            np.testing.assert_allclose(
                curves[name][metric], curves["False_False"][metric], rtol=1e-3, atol=1e-5
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "all_devices"),
    [
        ("learner", False),
        ("params", False),
        pytest.param("learner", True, marks=pytest.mark.weekly),
    ],
)
def test_a_learner_only_checkpoint_goes_on_with_fresh_episodes(kind, all_devices, tmp_path, capsys):
    config = {**CHAIN, "NUM_ENVS": 16, "CHECKPOINT_KIND": kind, "RESULTS_DIR": str(tmp_path)}
    run({**config, "TOTAL_TIMESTEPS": 512}, all_devices)
    folder = tmp_path / "MemoryChain-bsuite"
    saved = load(folder)[1]
    arrays = Checkpoints(folder, 2).saved_names(2)
    assert arrays.keys() == {"train_state"}
    assert (arrays["train_state"]["opt_state"] is None) == (kind == "params")

    resumed = resumed_config(folder, {"TOTAL_TIMESTEPS": 1024, "LR": 0.0})
    run({**resumed, "RESUME": str(folder)}, all_devices)
    printed = capsys.readouterr().out
    assert "every environment starts a fresh episode" in printed
    assert ("the optimiser starts afresh" in printed) == (kind == "params")
    metrics, params = load(folder)
    np.testing.assert_array_equal(metrics["env_steps"], [256, 512, 768, 1024])
    assert_bitwise_equal(params, saved)  # LR is 0


@pytest.mark.slow
def test_a_run_that_started_from_parameters_goes_on_without_them(finished, tmp_path):
    """A resumed run keeps what it learnt and does not read PARAMS again."""
    shutil.copy(finished / "0_params.npy", tmp_path)
    config = {**CHAIN, "PARAMS": str(tmp_path), "TOTAL_TIMESTEPS": STEPS_PER_UPDATE}
    run({**config, "RESULTS_DIR": str(tmp_path / "runs")})
    (tmp_path / "0_params.npy").unlink()
    folder = tmp_path / "runs" / "MemoryChain-bsuite"
    longer = {"TOTAL_TIMESTEPS": 2 * STEPS_PER_UPDATE}
    run({**resumed_config(folder, longer), "RESUME": str(folder)})
    assert len(load(folder)[0]["total_loss"]) == 2
    with pytest.raises(ConfigError, match=r"^RESUME: the run goes on from its own parameters"):
        resumed_config(folder, {**longer, "PARAMS": str(finished)})


@pytest.mark.slow
def test_a_new_run_starts_from_the_parameters_of_another(finished, tmp_path):
    fresh = {**CHAIN, "LR": 0.0, "PARAMS": str(finished), "TOTAL_TIMESTEPS": STEPS_PER_UPDATE}
    run({**fresh, "seed": 7, "RESULTS_DIR": str(tmp_path / "one")})  # of seed 0
    run({**fresh, "NUM_SEEDS": 2, "RESULTS_DIR": str(tmp_path / "two")})
    run(
        {**fresh, "NUM_ENVS": 16, "TOTAL_TIMESTEPS": 256, "RESULTS_DIR": str(tmp_path / "all")},
        True,
    )
    saved = load(finished)[1]
    for root, seed in [("one", 7), ("two", 0), ("two", 1), ("all", 0)]:
        assert_bitwise_equal(load(tmp_path / root / "MemoryChain-bsuite", seed)[1], saved)
    with pytest.raises(ConfigError, match="has no agent of seed 3, but of 0, 1"):
        run({**fresh, "seed": 3, "PARAMS": str(tmp_path / "two" / "MemoryChain-bsuite")})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"EMBED_SIZE": 8}, "are of another network"),
        ({"NORMALIZE_OBS": True}, "are of another network, environment or normalisation"),
        ({"PARAMS": "nowhere"}, "there is no <seed>_params.npy in nowhere"),
        ({"PARAMS": "9" * 400}, "there is no <seed>_params.npy in 9999"),
    ],
)
def test_parameters_that_do_not_fit_are_one_line(changes, message, finished, tmp_path):
    config = {**CHAIN, "PARAMS": str(finished), "RESULTS_DIR": str(tmp_path / "runs"), **changes}
    with pytest.raises(ConfigError, match=f"^PARAMS: .*{message}"):
        run(config)
    assert not list(tmp_path.iterdir())
