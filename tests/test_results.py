"""Runs are read from their files, and other files are refused."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from trxl.results import UnsafeFileError, load_results, with_new_names

from evaluate_PPO_trXL import load_agent

REPOSITORY = Path(__file__).resolve().parents[1]
COMMITTED = sorted(REPOSITORY.glob("results_*/**/*.npy"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_it_reads_what_numpy_reads(path):
    ours, numpys = load_results(path), np.load(path, allow_pickle=True).item()
    numpys = with_new_names(numpys)
    assert jax.tree.structure(ours) == jax.tree.structure(numpys)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(numpys), strict=True):
        np.testing.assert_array_equal(a, b)


def test_scalars_strings_and_containers_are_plain(tmp_path):
    content = {"a": np.float32(1.5), "b": [1, "x", None, (True, 2.0)], "c": {"d": np.arange(3)}}
    np.save(tmp_path / "plain.npy", content)
    loaded = load_results(tmp_path / "plain.npy")
    assert loaded["a"] == 1.5
    assert loaded["b"] == content["b"]
    np.testing.assert_array_equal(loaded["c"]["d"], [0, 1, 2])


def test_names_of_earlier_versions_are_today_s(tmp_path):
    config = {"RETURN_DECAY": 0.9, "TARGET_RATE": 0.5, "EPISODE_END": "beside", "LR": 1e-3}
    np.save(tmp_path / "0_config.npy", config)
    assert load_results(tmp_path / "0_config.npy") == {
        **{"POPART_DECAY": 0.9, "TARGET_EMA_RATE": 0.5, "EPISODE_END": "append", "LR": 1e-3}
    }
    old = REPOSITORY / "results_craftax/without_phase/Craftax-Classic-Symbolic-v1/0_metrics.npy"
    assert "episodes" in np.load(old, allow_pickle=True).item()
    assert load_results(old)["num_episodes"].min() > 0


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_a_malicious_file_is_refused_by_name_and_does_nothing(tmp_path):
    target = tmp_path / "it_ran"
    path = tmp_path / "0_params.npy"
    np.save(path, {"params": Malicious(target)})
    with pytest.raises(UnsafeFileError, match=r"refers to (posix|nt)\.system"):
        load_results(path)
    assert not target.exists()
    np.load(path, allow_pickle=True)
    assert target.exists()  # the attack itself works


@pytest.mark.parametrize("name", ["builtins.eval", "numpy.load", "functools.partial"])
def test_other_references_are_refused_by_name(name, tmp_path):
    module, _, attribute = name.partition(".")
    path = tmp_path / "0_config.npy"
    np.save(path, {"x": 0})
    header = path.read_bytes()[:128]
    path.write_bytes(header + f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(UnsafeFileError, match=name):
        load_results(path)


def test_a_file_that_is_cut_off_or_something_else_is_one_line(tmp_path):
    path = tmp_path / "0_config.npy"
    np.save(path, {"a": np.arange(1000)})
    data = path.read_bytes()
    for broken in (b"", data[:50], data[:200], data[:-10], b"hello" * 100):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="is cut off or not a run's file"):
            load_results(path)
    np.save(path, np.arange(3))
    with pytest.raises(ValueError, match="holds no dict"):
        load_results(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder",
    [
        "results_brax/inverted_pendulum",
        "results_craftax/Craftax-Classic-Symbolic-v1",
        "results_gymnax/CartPole-v1",
        "results_gymnax/MemoryChain-bsuite",
        "results_jaxmarl/MPE_simple_spread_v3",
        "results_jumanji/Knapsack-v1",
        "results_xminigrid/MiniGrid-MemoryS8",
        "results_xminigrid/XLand-MiniGrid-R1-9x9",
        "results_xminigrid/muesli/MiniGrid-MemoryS8",
    ],
)
def test_a_committed_run_of_every_suite_loads(folder):
    """Parameters of committed runs fit the network of their saved config, whatever its version."""
    suite = folder.split("/")[0].removeprefix("results_")
    pytest.importorskip(suite)
    agent = load_agent(REPOSITORY / folder)
    assert agent.initial_memory(1) is not None
