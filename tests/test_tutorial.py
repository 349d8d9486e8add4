"""`tutorial.ipynb` runs from its first cell to its last, and shows what its text claims."""

import ast
import json
import re
from pathlib import Path

import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

pytestmark = pytest.mark.slow

TUTORIAL = Path(__file__).resolve().parents[1] / "tutorial.ipynb"
CELLS = [cell for cell in json.loads(TUTORIAL.read_text())["cells"] if cell["cell_type"] == "code"]

SMALL = {
    "ENV_KWARGS": {"memory_length": 5},
    "TOTAL_TIMESTEPS": 640,
    "NUM_ENVS": 4,
    "NUM_STEPS": 16,
    "NUM_MINIBATCHES": 2,
    "EMBED_SIZE": 16,
    "qkv_features": 16,
    "hidden_layers": 16,
    "WINDOW_MEM": 8,
}


def python_of(cell):
    """Returns the Python of a cell, which fails where the cell would install."""
    source = "".join(cell["source"])
    if source.startswith("%%writefile "):
        first, text = source.split("\n", 1)
        return f"open({first.split()[1]!r}, 'w').write({text!r})"
    return source.replace("%pip install", "raise AssertionError #")


def run(code, namespace):
    """Runs a cell's code and returns the value of its last line, which a notebook displays."""
    *body, last = ast.parse(code).body
    if not isinstance(last, ast.Expr):
        body, last = [*body, last], None
    exec(compile(ast.Module(body, []), "cell", "exec"), namespace)
    if last is not None:
        return eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)
    return None


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs all cells in an empty folder; returns their variables and the figures they show."""
    backend = matplotlib.get_backend()
    plt.switch_backend("agg")
    monkeypatch.chdir(tmp_path)

    def execute(**changes):
        namespace, shown = {}, []
        monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
        for cell in CELLS:
            value = run(python_of(cell), namespace)
            shown += [value] * isinstance(value, Figure)
            if cell["id"] == "config":
                namespace["config"] |= changes
        return namespace, shown

    yield execute
    plt.close("all")
    plt.switch_backend(backend)


def labelled(figure):
    """Returns the values of a figure's lines by label."""
    return {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}


def test_its_cells_run(execute):
    names, shown = execute(**SMALL)
    curves, attention, own_curve, own_attention = shown

    assert names["returns"].shape == names["control_returns"].shape == (4, 10)
    for label, returns in (("with", names["returns"]), ("without", names["control_returns"])):
        assert np.all(np.abs(returns) <= 1)  # NaN is not
        np.testing.assert_array_equal(labelled(curves)[f"{label} memory"], returns[0])
    assert len(curves.axes[0].lines) == 8
    losses = [names[name]["metrics"]["total_loss"] for name in ("out", "control")]
    assert not np.allclose(*losses)
    np.testing.assert_array_equal(labelled(own_curve)["Recall"], names["own_returns"][0])
    assert np.all((names["own_returns"] >= 0) & (names["own_returns"] <= 1))

    for figure, name, steps in ((attention, "episode", 6), (own_attention, "own_episode", 16)):
        weights = names[name].attention
        assert weights.shape == (1, steps, steps)
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
        np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), weights[0])


@pytest.mark.weekly
def test_its_agents_learn_what_the_text_claims(execute):
    optimizations = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        names, _ = execute()
    finally:
        jax.config.update("jax_disable_most_optimizations", optimizations)
    last_tenth = names["last_tenth"]
    assert np.all(last_tenth(names["returns"]) > 0.95)
    assert np.all(np.abs(last_tenth(names["control_returns"])) < 0.2)
    assert np.all(last_tenth(names["own_returns"]) > 0.95)
    earlier = names["episode"].attention[0, -1, :-1]
    assert earlier[:2].sum() > 0.5 * earlier.sum()
    most = names["own_episode"].attention[0, 8:].argmax(axis=1)
    assert np.all(np.abs(most - np.arange(8)) <= 1)


def printed(name):
    """Returns the numbers in brackets of each line that a cell printed in the committed file."""
    (cell,) = [cell for cell in CELLS if cell["id"] == name]
    text = "".join(
        "".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream"
    )
    return [
        [float(x) for x in re.findall(r"-?\d+\.?\d*", line.partition("[")[2])]
        for line in text.splitlines()
    ]


def test_its_committed_outputs_show_what_the_text_claims():
    assert TUTORIAL.stat().st_size < 1e6
    assert [cell["execution_count"] for cell in CELLS] == [*range(1, len(CELLS) + 1)]
    outputs = [out for cell in CELLS for out in cell["outputs"]]
    assert all(out.get("name") != "stderr" and out["output_type"] != "error" for out in outputs)
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 4

    memory, control = printed("curves")
    assert len(memory) == len(control) == 4
    assert min(memory) > 0.95
    assert max(map(abs, control)) < 0.2
    assert sum(printed("attention")[0][:2]) > 0.5
    assert printed("recall")[0][0] > 0.95
    assert sum(abs(step - i) <= 1 for i, step in enumerate(printed("recall-attention")[0])) == 8
    (minutes,) = re.findall(r"took ([\d.]+) minutes", json.dumps(CELLS[-1]["outputs"]))
    assert float(minutes) < 10
