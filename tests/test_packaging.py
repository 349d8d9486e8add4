"""pyproject.toml, the requirements and the hooks agree."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / ".ci"))
import check_imports  # noqa: E402

PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]


def required(file: str) -> set[str]:
    """Returns the packages of a requirements file, pins as lower bounds."""
    lines = (REPOSITORY / file).read_text().splitlines()
    return {line.replace("==", ">=") for line in lines if not line.startswith(("-r", "#"))}


def test_the_pins_are_the_lower_bounds():
    assert set(PROJECT["dependencies"]) == required("requirements.txt")
    assert set(EXTRAS["envs"]) == required("requirements-envs.txt")
    assert set(EXTRAS["test"]) == required("requirements-test.txt")
    (jax,) = (x for x in PROJECT["dependencies"] if x.startswith("jax>"))
    assert EXTRAS["gpu"] == [jax.replace("jax", "jax[cuda13]")]


def test_the_package_and_every_module_of_the_root_are_installed():
    installed = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    modules = [path.name for path in REPOSITORY.glob("*.py")]
    assert sorted(installed) == sorted(["trxl", *modules])
    assert len(modules) <= 10


USERS_SCRIPT = """
import jax
import config, keys, model, results
from trainer_PPO_trXL import make_train

sizes = {"NUM_ENVS": 4, "NUM_STEPS": 8, "WINDOW_GRAD": 8, "NUM_MINIBATCHES": 2, "num_layers": 1}
widths = {"EMBED_SIZE": 8, "qkv_features": 8, "num_heads": 2, "hidden_layers": 8, "WINDOW_MEM": 4}
out = jax.jit(make_train({**sizes, **widths, "TOTAL_TIMESTEPS": 32}))(jax.random.key(0))
print(out["metrics"]["total_loss"].shape, config.OF_THE_USER)
"""


@pytest.mark.slow
def test_a_users_files_of_common_names_hide_none_of_ours(tmp_path):
    for name in ("config", "model", "results", "keys"):
        (tmp_path / f"{name}.py").write_text("OF_THE_USER = True\n")
    (tmp_path / "train.py").write_text(USERS_SCRIPT)
    command = [sys.executable, "train.py"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "(1,) True\n", done.stderr


def test_the_hooks_are_commands_of_ci():
    hooks = (REPOSITORY / ".pre-commit-config.yaml").read_text()
    entries = re.findall(r"entry: (.+)", hooks)
    assert entries
    assert set(entries) <= set((REPOSITORY / ".ci/run").read_text().splitlines())


def test_the_workflow_runs_ci_on_every_python_and_can_free_jax():
    workflow = (REPOSITORY / ".github/workflows/ci.yml").read_text()
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert re.search(r"python: (\[.*\])", workflow)[1].startswith(f'["{oldest}"')
    assert "run: .ci/run" in workflow
    pattern = re.search(r"sed -i 's/(\^jax==)/", workflow)[1]
    assert re.search(pattern, (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("imports", "line"),
    [
        ("a: trxl.b, trxl.b: trxl.c, trxl.c:", None),
        ("a:, trxl.b: a", "trxl.b imports a, a module of the root"),
        ("trxl.b: trxl.c, trxl.c: trxl.b", "a circle: trxl.b -> trxl.c -> trxl.b"),
        ("a: b, b: c, c: a, d: a", "a circle: a -> b -> c -> a"),
    ],
)
def test_imports_that_run_up_or_round_are_seen(imports, line):
    pairs = (pair.split(":") for pair in imports.split(", "))
    graph = {module.strip(): set(others.split()) for module, others in pairs}
    assert check_imports.broken_rules(graph) == ([line] if line else [])


def test_imports_within_functions_count(tmp_path):
    (tmp_path / "file.py").write_text("def f():\n    from trxl.runs import run\n    import a.b\n")
    found = check_imports.imports_of(tmp_path / "file.py", {"trxl.runs.run", "trxl.runs", "a.b"})
    assert found == {"trxl.runs.run", "a.b"}
