"""Runs under JAX_ENABLE_X64 and JAX_DEBUG_NANS."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import QUICK, resumed_config, run, save_untrained

from trxl.environments.adapters import import_suite
from trxl.errors import RunError
from trxl.results import load_results
from trxl.rollout import Transition
from trxl.runs.evaluation import play
from trxl.search.evosax_strategies import Evosax
from trxl.search.population import Programs, Row
from trxl.training import episode_metrics, make_init_and_update, with_nan

from evaluate_PPO_trXL import load_agent
from trainer_Muesli_trXL import MUESLI
from trainer_PPO_trXL import PPO

REPOSITORY = Path(__file__).resolve().parents[1]
TOYS = Path(__file__).with_name("toys.py")
STEPS = QUICK["NUM_ENVS"] * QUICK["NUM_STEPS"]
DOUBLES = f"{TOYS}:Doubles"


@pytest.fixture
def setting():
    """Yields a function (name, value) that sets a JAX setting until the test's end."""
    import_suite("gymnax")  # first, as all tests share its constants
    before = {}

    def set_(name, value):
        before.setdefault(name, getattr(jax.config, name))
        jax.config.update(name, value)

    yield set_
    for name, value in before.items():
        jax.config.update(name, value)


# ---------------------------------------------------------------- JAX_ENABLE_X64


def dtypes(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): str(x.dtype) for path, x in leaves}


def states_and_metrics(algorithm, changes, **traced):
    """Returns the shapes of a state before and after an update, and of its metrics."""

    def run(traced):
        config = algorithm.check({**QUICK, **changes, **traced})
        init, update = make_init_and_update(config, algorithm)
        before = init(jax.random.key(0))
        return before, *update(before)

    return jax.eval_shape(run, traced)


CASES = {
    "chain": (PPO, {"ANNEAL_LR": True}),
    "normalized": (
        PPO,
        {"ENV_NAME": "CartPole-v1", "NORMALIZE_OBS": True, "NORMALIZE_REWARD": True},
    ),
    "box": (PPO, {"ENV_NAME": "Pendulum-v1", "MEMORY": "gru", "PREV_ACTION_REWARD": True}),
    "grid": (PPO, {"ENV_NAME": "Breakout-MinAtar", "NETWORK": "wide"}),
    "craftax": (PPO, {"ENV_NAME": "Craftax-Classic-Symbolic-v1"}),
    "popgym": (PPO, {"ENV_NAME": "popgym/BattleshipEasy"}),
    "own": (PPO, {"ENV_NAME": DOUBLES}),
    "team": (PPO, {"ENV_NAME": f"{TOYS}:Team"}),
    "trials": (PPO, {"ENV_NAME": f"{TOYS}:Quest", "EPISODE_END": "step"}),
    "muesli": (MUESLI, {"ENV_NAME": DOUBLES, "RESET_STRATEGY": "pool", "RESET_RATIO": 2}),
    "muesli-box": (MUESLI, {"ENV_NAME": "Pendulum-v1"}),
}


def dtypes_of_case(name):
    """Returns the dtypes of a state before and after an update, and of its metrics."""
    return [dtypes(tree) for tree in states_and_metrics(*CASES[name])]


def but_for_environments(found):
    """Removes the environments' states, whose dtypes are the suite's."""
    return {name: dtype for name, dtype in found.items() if ".env_state" not in name}


@pytest.fixture(scope="module")
def with_64_bits():
    """Returns `dtypes_of_case` by name from a new process, as suites make constants on import."""
    code = "import json, test_jax_settings as t\n"
    code += "print(json.dumps({name: t.dtypes_of_case(name) for name in t.CASES}))"
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    environ = {**os.environ, "JAX_ENABLE_X64": "1", "PYTHONPATH": path}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.weekly
@pytest.mark.parametrize("name", CASES)
def test_a_state_has_the_same_dtypes_with_64_bits_as_without(name, with_64_bits):
    before, after, metrics = with_64_bits[name]
    assert before == after
    _, expected, expected_metrics = dtypes_of_case(name)
    assert but_for_environments(after) == but_for_environments(expected)
    assert metrics == expected_metrics


@pytest.mark.weekly
def test_a_run_with_64_bits_resumes_and_its_files_open_without(setting, tmp_path):
    """The environment's own state, in the checkpoint too, is float64 under JAX_ENABLE_X64."""
    folder = tmp_path / "Doubles"

    def resume(steps):
        config = resumed_config(folder, {"ENV_NAME": DOUBLES, "TOTAL_TIMESTEPS": steps})
        run({**config, "RESUME": str(folder)})

    def evaluate():
        agent = load_agent(folder, environment=DOUBLES)
        return play(agent, 8, jax.random.key(0))["returned_episode_lengths"]

    setting("jax_enable_x64", True)
    config = {**QUICK, "ENV_NAME": DOUBLES, "RESULTS_DIR": str(tmp_path)}
    run({**config, "TOTAL_TIMESTEPS": 2 * STEPS})
    resume(4 * STEPS)
    assert set(evaluate()) <= {4, 5}
    setting("jax_enable_x64", False)
    resume(6 * STEPS)
    assert set(evaluate()) <= {4, 5}
    params = jax.tree.leaves(load_results(folder / "0_params.npy"))
    assert {x.dtype for x in params} == {np.dtype(np.float32)}
    assert len(load_results(folder / "0_metrics.npy")["env_steps"]) == 6


def test_a_traced_value_may_be_float64(setting):
    setting("jax_enable_x64", True)
    number = jax.ShapeDtypeStruct((), jnp.float64)
    before, after, _ = states_and_metrics(PPO, {}, LR=number, GAMMA=number, CLIP_EPS=number)
    assert dtypes(before) == dtypes(after)


def test_a_search_with_64_bits_has_the_same_dtypes(setting):
    setting("jax_enable_x64", True)
    programs = Programs(PPO.check(QUICK), PPO, 2, 1)
    rows = [Row({"LR": 1e-3}, seed) for seed in range(2)]
    before = programs.shapes(rows)
    traced = {"LR": jax.ShapeDtypeStruct((2,), jnp.float32)}
    after, _, result = jax.eval_shape(programs.update, traced, before)
    assert dtypes(before) == dtypes(after)
    assert {x.dtype.itemsize for x in result} <= {1, 4}


@pytest.mark.parametrize("name", ["Open_ES", "Sep_CMA_ES", "SimpleGA"])
def test_evosax_works_in_float32_and_may_start_with_nan(name, setting):
    setting("jax_enable_x64", True)
    setting("jax_debug_nans", True)
    start = jnp.zeros(3, jnp.float32)
    algorithm = Evosax(name, 4, start, 0.1, 0.1, jax.random.key(0))
    for number in range(2):
        asked = algorithm.ask(jax.random.key(number))
        algorithm.tell(jax.random.key(number), [1.0, 2.0, 3.0, np.nan])
    assert asked.dtype == algorithm.solution().dtype == jnp.float32
    assert {x.dtype.itemsize for x in jax.tree.leaves(algorithm.state)} == {4}


# ---------------------------------------------------------------- JAX_DEBUG_NANS


@pytest.mark.slow
def test_a_run_in_which_no_episode_ends_goes_on(setting, tmp_path):
    setting("jax_debug_nans", True)
    config = {**QUICK, "ENV_NAME": "MountainCar-v0", "RESULTS_DIR": str(tmp_path)}
    run({**config, "TOTAL_TIMESTEPS": 2 * STEPS})
    metrics = load_results(tmp_path / "MountainCar-v0" / "0_metrics.npy")
    assert metrics["num_episodes"].tolist() == [0, 0]
    assert metrics["num_episodes"].dtype == np.int64
    assert np.all(np.isnan(metrics["returned_episode_returns"]))
    assert np.all(np.isfinite(metrics["total_loss"]))


def test_a_run_whose_loss_is_nan_names_the_operation(setting, tmp_path):
    setting("jax_debug_nans", True)
    config = {**QUICK, "RESULTS_DIR": str(tmp_path), "ENV_NAME": f"{TOYS}:Broken"}
    with pytest.raises(RunError, match=r"FloatingPointError: invalid value \(nan\) encountered in"):
        run(config)


@pytest.mark.parametrize("debug", [False, True])
def test_a_metric_that_no_episode_had_is_nan_on_the_host(debug, setting):
    setting("jax_debug_nans", debug)
    values = np.float32([[[1.0, np.nan], [3.0, np.nan]]])  # (T, B, K)
    ended = Transition(*[None] * len(Transition._fields))
    ended = ended._replace(returned_episode=np.ones((1, 2), bool), episode_metrics=values)
    metrics = jax.jit(lambda: episode_metrics(("a", "b"), ended, None))()
    metrics = with_nan(jax.device_get(metrics))
    assert metrics["a"] == 2.0
    assert np.isnan(metrics["b"])
    assert metrics["num_episodes"] == 2


def test_evaluation_leaves_the_nan_of_a_metric(setting, tmp_path):
    save_untrained(tmp_path, ENV_NAME=DOUBLES)
    setting("jax_debug_nans", True)
    results = play(load_agent(tmp_path, environment=DOUBLES), 16, jax.random.key(0))
    shorter = results["returned_episode_lengths"] == 4
    assert 0 < shorter.sum() < 16
    np.testing.assert_array_equal(results["luck"], np.where(shorter, np.nan, 2.0))
