"""An algorithm in one file trains through the interface that all algorithms share."""

import sys

import jax
import numpy as np
import pytest
from support import QUICK
from toy_reinforce import REINFORCE

from trxl.errors import ConfigError
from trxl.results import load_results
from trxl.runs.run import main, run
from trxl.runs.saved_config import resumed_config
from trxl.training import make_train

from evaluate_PPO_trXL import ALGORITHMS, load_agent, play
from trainer_PPO_trXL import PPO

CHAIN = {
    **{key: value for key, value in QUICK.items() if key in REINFORCE.keys},
    "ENV_KWARGS": {"memory_length": 2},
    "NUM_ENVS": 64,
    "LR": 5e-3,
    "ANNEAL_LR": False,
    "TOTAL_TIMESTEPS": 40 * 64 * 16,
    "CHECKPOINT_EVERY": 10,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Trains the toy algorithm half way, resumes it, and returns the run's folder."""
    root = tmp_path_factory.mktemp("runs")
    half = {**CHAIN, "TOTAL_TIMESTEPS": 20 * 64 * 16, "RESULTS_DIR": str(root)}
    run(half, REINFORCE)
    folder = root / "MemoryChain-bsuite_REINFORCE"
    config = resumed_config(folder, {"TOTAL_TIMESTEPS": CHAIN["TOTAL_TIMESTEPS"]}, REINFORCE)
    run({**config, "RESUME": str(folder)}, REINFORCE)
    return folder


@pytest.mark.slow
def test_an_algorithm_of_ones_own_trains_checkpoints_resumes_and_is_evaluated(folder):
    metrics = load_results(folder / "0_metrics.npy")
    assert metrics["returned_episode_returns"][-5:].mean() > 0.9
    assert metrics["returned_episode_returns"][:2].mean() < 0.5
    assert {"policy_loss", "baseline_loss", "best_return", "grad_norm", "learning_rate"} <= set(
        metrics
    )
    assert load_results(folder / "0_config.npy")["ALGORITHM"] == "REINFORCE"
    agent = load_agent(folder, algorithm=REINFORCE, greedy=True)
    returns = play(agent, 64, jax.random.key(1))["returned_episode_returns"]
    assert returns.mean() > 0.9


@pytest.mark.slow
def test_its_resumed_run_is_that_of_make_train_which_never_stops(folder):
    out = jax.jit(make_train(CHAIN, REINFORCE))(jax.random.key(0))
    saved = load_results(folder / "0_params.npy")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        saved,
        jax.device_get(out["runner_state"].train_state.params),
    )


@pytest.mark.weekly
def test_it_trains_on_several_devices(tmp_path):
    run({**CHAIN, "TOTAL_TIMESTEPS": 2048, "RESULTS_DIR": str(tmp_path)}, REINFORCE, True)
    metrics = load_results(tmp_path / "MemoryChain-bsuite_REINFORCE" / "0_metrics.npy")
    assert np.isfinite(metrics["policy_loss"]).all()


def test_its_agent_needs_the_algorithm_as_an_argument(folder):
    with pytest.raises(ConfigError, match="REINFORCE, which is none of PPO, Muesli; give it"):
        load_agent(folder)
    with pytest.raises(ConfigError, match="was trained by REINFORCE, not by PPO"):
        load_agent(folder, algorithm=PPO)
    assert "REINFORCE" not in ALGORITHMS


def test_a_run_is_resumed_by_its_own_algorithm_alone(folder):
    with pytest.raises(ConfigError, match="was trained by REINFORCE, and this script trains PPO"):
        resumed_config(folder, {}, PPO)


def test_its_keys_are_its_own(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_toy.py", "CLIP_EPS=0.1"])
    with pytest.raises(SystemExit) as exit_:
        main(CHAIN, REINFORCE)
    assert "unknown config key 'CLIP_EPS'" in exit_.value.code
    monkeypatch.setattr(sys, "argv", ["train_toy.py", "--help"])
    main(CHAIN, REINFORCE)
    assert "BASELINE_COEF=0.5" in capsys.readouterr().out
