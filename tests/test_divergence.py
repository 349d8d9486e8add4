"""A seed that diverges is marked, and the others train to the end."""

import json
import shutil
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import QUICK, main, resumed_config, run, whole_checkpoints

from experiments import study
from trxl.errors import ConfigError
from trxl.results import load_results
from trxl.runs import progress
from trxl.runs import run as runs
from trxl.runs.compiled import Program
from trxl.runs.divergence import NotFiniteError

pytestmark = pytest.mark.slow

STEPS_PER_UPDATE = QUICK["NUM_ENVS"] * QUICK["NUM_STEPS"]
CONFIG = {
    **QUICK,
    "ENV_KWARGS": {"memory_length": 3},
    "ANNEAL_LR": False,
    "NUM_SEEDS": 2,
    "CHECKPOINT_EVERY": 2,
    "KEEP_CHECKPOINTS": 1,
    "TOTAL_TIMESTEPS": 6 * STEPS_PER_UPDATE,
}


@pytest.fixture
def breaks(monkeypatch):
    """Returns a function that makes seed i's parameters NaN before its update u, for {i: u}."""
    compile_update = Program.compile

    def breaks(at):
        def compile_broken(self, state):
            update = compile_update(self, state)

            def broken_update(state):
                train_state = state.train_state
                for i in range(2):
                    if int(train_state.updates[i]) + 1 == at.get(i):
                        params = jax.tree.map(
                            lambda x, i=i: x.at[i].set(jnp.nan), train_state.params
                        )
                        train_state = train_state._replace(params=params)
                return update(state._replace(train_state=train_state))

            return broken_update

        monkeypatch.setattr(Program, "compile", compile_broken)

    return breaks


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Trains a run in which no seed diverges and returns its folder."""
    root = tmp_path_factory.mktemp("whole")
    run({**CONFIG, "RESULTS_DIR": str(root)})
    return root / "MemoryChain-bsuite"


def load(folder, seed, kind):
    content = load_results(folder / f"{seed}_{kind}.npy")
    content.pop("steps_per_second", None)
    return content


def assert_same_seed(a, b, seed):
    for kind in ("metrics", "params"):
        jax.tree.map(np.testing.assert_array_equal, load(a, seed, kind), load(b, seed, kind))


def resume(folder, updates):
    run(
        resumed_config(
            folder, {"TOTAL_TIMESTEPS": updates * STEPS_PER_UPDATE, "RESUME": str(folder)}
        )
    )


def statuses_in_a_study(folder, status):
    """Returns a study's statuses of seeds 0 and 1 of a process with this exit status."""
    return [study.of_seed(folder / f"{seed}_metrics.npy", status)["status"] for seed in range(2)]


def test_the_others_end_as_if_none_had_diverged(whole, tmp_path, breaks, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(progress.tqdm, "set_postfix_str", lambda _, text, **__: shown.append(text))
    breaks({1: 3})
    with pytest.raises(NotFiniteError) as error:
        run({**CONFIG, "RESULTS_DIR": str(tmp_path)})
    folder = tmp_path / "MemoryChain-bsuite"
    line = "seed 1: total_loss is nan after update 3"
    assert str(error.value) == line

    assert_same_seed(whole, folder, 0)
    assert load(folder, 1, "config")["seed"] == 1
    curve, expected = load(folder, 1, "metrics"), load(whole, 1, "metrics")
    np.testing.assert_array_equal(curve["total_loss"][:2], expected["total_loss"][:2])
    assert np.isnan(curve["total_loss"][2:]).all()
    assert len(curve["total_loss"]) == 6
    assert not (folder / "1_params.npy").exists()
    mark = {"what": "total_loss is nan", "update": 3}
    assert json.loads((folder / "diverged.json").read_text()) == {"1": mark}
    assert statuses_in_a_study(folder, 1) == [0, 1]

    output = capsys.readouterr()
    assert f"{line}; the other seeds go on" in output.err
    last = float(load(folder, 0, "metrics")["returned_episode_returns"][-1])
    assert shown[-1].endswith(f"return {last:.2f}")
    assert f"mean return over the last 1: {last:.4f}; 1 of 2 seeds diverged" in output.out


def test_a_mark_survives_resume_and_goes_with_the_updates_that_it_is_of(tmp_path, breaks):
    breaks({1: 3})
    with pytest.raises(NotFiniteError):
        run({**CONFIG, "KEEP_CHECKPOINTS": 4, "RESULTS_DIR": str(tmp_path)})
    folder = tmp_path / "MemoryChain-bsuite"
    with pytest.raises(NotFiniteError, match=r"^seed 1: total_loss is nan after update 3$"):
        resume(folder, 8)
    assert len(load(folder, 1, "metrics")["total_loss"]) == 8
    assert not (folder / "1_params.npy").exists()
    with pytest.raises(ConfigError, match="has done its 8 updates"):
        resume(folder, 8)

    for later in (4, 6, 8):
        shutil.rmtree(folder / "checkpoints" / str(later))
    breaks({})
    resume(folder, 4)
    assert not (folder / "diverged.json").exists()
    assert load(folder, 1, "params")


def test_when_all_have_diverged_the_run_ends_there(tmp_path, breaks, monkeypatch):
    breaks({0: 3, 1: 5})
    settings = [f"{key}={value}" for key, value in CONFIG.items()]
    monkeypatch.setattr(sys, "argv", ["train_PPO_trXL.py", *settings, f"RESULTS_DIR={tmp_path}"])
    with pytest.raises(SystemExit) as exit:
        main({})
    folder = tmp_path / "MemoryChain-bsuite"
    assert exit.value.code.splitlines() == [
        "error: seed 0: total_loss is nan after update 3",
        "error: seed 1: total_loss is nan after update 5; the checkpoint of update 4 is kept in"
        f" {folder}",
    ]
    assert whole_checkpoints(folder) == {4}
    assert not list(folder.glob("*.npy"))
    # At the resumed checkpoint seed 1 had not diverged.
    breaks({})
    with pytest.raises(NotFiniteError, match=r"^seed 0: total_loss is nan after update 3$"):
        resume(folder, 6)
    assert load(folder, 1, "params")


def test_one_that_diverges_before_any_checkpoint_is_said_to_have_none(tmp_path, breaks):
    breaks({0: 1, 1: 1})
    with pytest.raises(NotFiniteError) as error:
        run({**CONFIG, "TOTAL_TIMESTEPS": 2 * STEPS_PER_UPDATE, "RESULTS_DIR": str(tmp_path)})
    folder = tmp_path / "MemoryChain-bsuite"
    assert str(error.value).endswith(f"after update 1; no checkpoint yet in {folder}")


def test_a_stopped_run_in_which_one_diverged_ends_with_the_signals_status(
    tmp_path, breaks, monkeypatch
):
    breaks({1: 3})
    original = runs.RunFolder.append

    def append(self, metrics):
        original(self, metrics)
        if self.updates == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(runs.RunFolder, "append", append)
    assert run({**CONFIG, "RESULTS_DIR": str(tmp_path)}) == signal.SIGTERM
    assert statuses_in_a_study(tmp_path / "MemoryChain-bsuite", 143) == [143, 143]
