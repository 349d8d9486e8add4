"""Figures of `results.ipynb` show the committed Craftax runs."""

import json
import shutil
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from trxl.results import load_results

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
CRAFTAX = REPOSITORY / "results_craftax"


@pytest.fixture(scope="module")
def figures():
    """Runs all code of the notebook once and yields its figures in order."""
    shown = []
    backend = matplotlib.get_backend()
    plt.switch_backend("agg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        patch.setattr(plt, "close", shown.append)  # its last call for each figure
        patch.setitem(plt.rcParams, "figure.max_open_warning", 0)
        namespace = {}
        for cell in json.loads((REPOSITORY / "results.ipynb").read_text())["cells"]:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), namespace)
    yield shown
    plt.close("all")
    plt.switch_backend(backend)


def test_it_is_small():
    assert (REPOSITORY / "results.ipynb").stat().st_size < 1e6


def test_what_cannot_be_read_is_named_and_left_out(tmp_path, capsys):
    name = "MemoryChain-bsuite"
    shutil.copytree(REPOSITORY / "results_gymnax" / name, tmp_path / "runs" / "gymnax" / name)
    broken = shutil.copytree(REPOSITORY / "results_gymnax" / name, tmp_path / "results_x" / name)
    (broken / "0_metrics.npy").write_bytes(b"something else")
    cells = json.loads((REPOSITORY / "results.ipynb").read_text())["cells"]
    (code,) = ["".join(c["source"]) for c in cells if "def load_runs" in "".join(c["source"])]
    namespace = {"Path": Path, "load_results": load_results}
    exec(code.partition("\n\n\nruns = ")[0], namespace)
    runs = namespace["load_runs"](tmp_path)
    assert [*runs] == [tmp_path / "runs" / "gymnax" / name]
    assert f"left out: {broken / '0_metrics.npy'} is cut off" in capsys.readouterr().out


def lines_of(figures, *labels):
    """Returns {label: line} of the only figure that has all these labels."""
    found = []
    for figure in figures:
        lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
        if set(labels) <= set(lines):
            found.append(lines)
    assert len(found) == 1
    return found[0]


def test_every_seed_stands_beside_the_published_returns(figures):
    """The figure has both networks' seeds on `Craftax-Symbolic-v1` and the published returns."""
    folders = {
        "ours": CRAFTAX / "Craftax-Symbolic-v1",
        "published network": CRAFTAX / "published_network" / "Craftax-Symbolic-v1",
    }
    files = {
        f"{label}, seed {path.name.split('_')[0]}": path
        for label, folder in folders.items()
        for path in folder.glob("*_metrics.npy")
    }
    assert len(files) > 3
    lines = lines_of(figures, *files, "PPO-RNN", "Simulus")
    for label, path in files.items():
        returns = load_results(path)["returned_episode_returns"]
        np.testing.assert_array_equal(lines[label].get_ydata(), returns[~np.isnan(returns)])
    for name, percent in {
        "PPO": 2.2,
        "PPO-RNN": 2.3,
        "Dedieu et al. 2025, no model": 4.63,
        "Efficient MBRL": 5.4,
        "Simulus": 6.6,
    }.items():
        np.testing.assert_allclose(lines[name].get_xydata(), [[1e6, percent / 100 * 226]])
    assert "PPO-TrXL" not in lines  # its points lie beyond the runs


@pytest.mark.parametrize("name", ["Craftax-Symbolic-v1", "Craftax-Classic-Symbolic-v1"])
def test_the_achievements_are_drawn_over_the_training(figures, name):
    drawn = [
        figure.axes[0] for figure in figures if figure.axes[0].get_ylabel().startswith("success")
    ]
    axes = next(axes for axes in drawn if axes.get_title() == f"craftax/{name}")
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert {"collect_wood", "place_table", "wake_up"} <= set(lines)
    seeds = [load_results(path) for path in sorted((CRAFTAX / name).glob("*_metrics.npy"))]
    last = np.nanmean([seed["Achievements/place_table"][-4:] for seed in seeds])
    np.testing.assert_allclose(lines["place_table"][-1], last, atol=0.5)


def test_the_lengths_of_the_memory_are_compared(figures):
    lines = lines_of(figures, "WINDOW_MEM=0", "WINDOW_MEM=16", "WINDOW_MEM=128")
    for length in (0, 16, 128):
        folder = CRAFTAX / f"memory_{length}" / "Craftax-Symbolic-v1"
        seeds = [load_results(folder / f"{seed}_metrics.npy") for seed in (0, 1)]
        assert all(load_results(folder / f"{s}_config.npy")["WINDOW_MEM"] == length for s in (0, 1))
        mean = np.mean([seed["returned_episode_returns"] for seed in seeds], axis=0)
        drawn = lines[f"WINDOW_MEM={length}"].get_ydata()
        np.testing.assert_allclose(drawn, mean[~np.isnan(mean)])
