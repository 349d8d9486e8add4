"""Names import only their own suite; custom environments load from files."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import QUICK, run

from trxl import environments
from trxl.environments import Box, brax, make_own, navix, resolve_name
from trxl.errors import ConfigError
from trxl.results import load_results

from trainer_PPO_trXL import PPO
from wrappers import make_env

REPOSITORY = Path(__file__).resolve().parents[1]
WALK, CORRIDOR, *_ = re.findall(
    r"```python\n(.*?)```", (REPOSITORY / "docs/your_environment.md").read_text(), re.DOTALL
)


@pytest.mark.parametrize(
    ("name", "resolved"),
    [
        ("CartPole-v1", ("gymnax", "CartPole-v1")),
        ("gymnax/CartPole-v1", ("gymnax", "CartPole-v1")),
        ("brax/ant", ("brax", "ant")),
        ("ant", ("brax", "ant")),
        ("MiniGrid-MemoryS8", ("xminigrid", "MiniGrid-MemoryS8")),
        ("jaxmarl/humanoid_9|8", ("jaxmarl", "humanoid_9|8")),
        ("Snake-v1", ("jumanji", "Snake-v1")),
        ("Navix-FourRooms-v0", ("navix", "Navix-FourRooms-v0")),
        ("craftax/craftax", ("craftax", "Craftax-Symbolic-v1")),
        ("craftax-classic-symbolic-v1", ("craftax", "Craftax-Classic-Symbolic-v1")),
        ("somewhere/corridor.py:Corridor", ("corridor", "Corridor")),
        (r"C:\corridor.py:Corridor", (r"C:\corridor", "Corridor")),
    ],
)
def test_a_name_has_one_suite(name, resolved):
    assert resolve_name(name) == resolved


def test_no_suite_is_imported_for_a_bare_name():
    code = (
        "import sys; from trxl.environments import resolve_name; resolve_name('ant'); "
        "print([s for s in ('gymnax', 'craftax', 'brax', 'jumanji', 'jaxmarl', 'navix',"
        " 'xminigrid') if s in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    assert out.stdout.decode().strip() == "[]", out.stderr


def test_an_ambiguous_name_lists_its_candidates(monkeypatch):
    monkeypatch.setattr(navix, "NAMES", ["ant"])
    with pytest.raises(ConfigError, match=r"several suites have 'ant'; say brax/ant or navix/ant"):
        resolve_name("ant")
    assert resolve_name("navix/ant") == ("navix", "ant")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("antt", r"unknown environment 'antt'; did you mean .*ant"),
        ("gymnax/CartPole", r"unknown environment 'gymnax/CartPole'; did you mean CartPole-v1"),
        ("atari/Pong", r"unknown suite 'atari' .*; the suites are brax, craftax, gymnax"),
        ("2s3z", r"'2s3z'; the suites are brax, .*; <file.py>:<class> is one of your own$"),
        ("brax", r"ENV_NAME=brax is a suite; choose one of its environments: ant, .*walker2d"),
        ("brax/", r"ENV_NAME=brax/ is a suite; choose one of its environments: ant, "),
        ("craftax/CartPole-v1", r"^craftax has no 'CartPole-v1'; say gymnax/CartPole-v1$"),
    ],
)
def test_an_unknown_name_is_one_line_with_candidates(name, message):
    with pytest.raises(ConfigError, match=message) as error:
        resolve_name(name)
    assert "\n" not in str(error.value)


def test_a_suite_that_is_not_installed_is_one_line_with_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "brax", None)
    monkeypatch.setitem(sys.modules, "brax.envs", None)
    message = r"brax is not installed .*pip install brax.*requirements-envs.txt"
    for name in ("ant", "brax/ant", "brax/newer"):
        with pytest.raises(ConfigError, match=message) as error:
            make_env(PPO.check({"ENV_NAME": name}), 512)
        assert "\n" not in str(error.value)


def test_a_name_that_was_registered_by_hand_is_found_in_its_suite(monkeypatch):
    monkeypatch.setattr(brax, "registered", lambda: ["my_robot"])
    assert resolve_name("brax/my_robot") == ("brax", "my_robot")


A_SUITE = """
from trxl.spaces import Discrete
from wrappers import SingleEnvironment
import jax.numpy as jnp

NAMES = ["Coin-v0"]


def registered():
    return [*NAMES, "Coin-v1"]


def make(name, env_kwargs):
    return Coin(**env_kwargs)


class Coin(SingleEnvironment):
    action_space = Discrete(2)
    obs_size = 1

    def __init__(self, sides=2):
        self.action_space = Discrete(sides)

    def reset(self, key):
        return jnp.zeros(1), jnp.int32(0)

    def step(self, key, state, action):
        return jnp.zeros(1), state, action * 1.0, jnp.bool_(True), jnp.bool_(False), {}
"""


@pytest.fixture
def toy_suite(tmp_path, monkeypatch):
    """Adds a suite `coins.py` to the package."""
    (tmp_path / "coins.py").write_text(A_SUITE)
    monkeypatch.setattr(environments, "__path__", [*environments.__path__, str(tmp_path)])
    yield
    sys.modules.pop("trxl.environments.coins", None)
    vars(environments).pop("coins", None)


def test_a_suite_is_one_file_more(toy_suite):
    for name in ("Coin-v0", "coins/Coin-v0"):
        assert resolve_name(name) == ("coins", "Coin-v0")
    assert resolve_name("coins/Coin-v1") == ("coins", "Coin-v1")
    assert resolve_name("ant") == ("brax", "ant")
    for message, name in {"did you mean Coin-v0": "Coin-v2", "brax, coins, craftax": "x/y"}.items():
        with pytest.raises(ConfigError, match=message):
            resolve_name(name)
    env = make_env(PPO.check({"ENV_NAME": "Coin-v0", "ENV_KWARGS": {"sides": 3}}), 2)
    assert env.action_space.n == 3


def test_a_suites_file_and_the_suite_itself_are_two_modules():
    for name, module in environments.suites().items():
        assert module.__name__ == f"trxl.environments.{name}"
        assert Path(module.__file__).parent == REPOSITORY / "trxl" / "environments"
        suite = importlib.util.find_spec(name)
        assert suite is None or suite.origin != module.__file__


@pytest.mark.slow
def test_the_pages_own_environment_trains_and_writes_to_a_folder_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "corridor.py").write_text(CORRIDOR)
    assert len([line for line in CORRIDOR.splitlines() if line.strip()]) <= 25
    monkeypatch.chdir(tmp_path)
    run(
        {
            **QUICK,
            "ENV_NAME": "corridor.py:Corridor",
            "ENV_KWARGS": {"length": 4},
            "TOTAL_TIMESTEPS": 128,
        }
    )
    metrics = load_results(tmp_path / "runs/corridor/Corridor/0_metrics.npy")
    np.testing.assert_array_equal(metrics["returned_episode_lengths"], 4)
    np.testing.assert_array_equal(metrics["num_episodes"], 16)
    assert np.isfinite(metrics["total_loss"]).all()


@pytest.mark.slow
def test_a_class_written_for_gymnax_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "walk.py").write_text(WALK)
    monkeypatch.chdir(tmp_path)
    run({**QUICK, "ENV_NAME": "walk.py:Walk", "ENV_KWARGS": {"max_steps_in_episode": 4, "goal": 3}})
    metrics = load_results(tmp_path / "runs/walk/Walk/0_metrics.npy")
    lengths = metrics["returned_episode_lengths"]
    assert 3 <= lengths.min() <= lengths.max() <= 4
    assert -4 <= metrics["place"].min() <= metrics["place"].max() <= 3


def test_arguments_of_a_gymnax_class_go_to_its_constructor_or_parameters(tmp_path, monkeypatch):
    wide = """

class Wide(Walk):
    def __init__(self, width):
        self.width = width

    def reset_env(self, key, params):
        obs, state = super().reset_env(key, params)
        return {"a": jnp.zeros((self.width, 2), bool), "b": obs}, state

    def step_env(self, key, state, action, params):
        _, *rest = super().step_env(key, state, action[0, 0] > 0, params)
        return self.reset_env(key, params)[0], *rest

    def action_space(self, params):
        return spaces.Box(-params.goal, params.goal, (1, 2))
"""
    (tmp_path / "walk.py").write_text(WALK + wide)
    monkeypatch.chdir(tmp_path)
    config = {"ENV_NAME": "walk.py:Wide", "ENV_KWARGS": {"width": 3, "goal": 5}}
    env = make_env(PPO.check(config), 2)
    assert (env.obs_size, env.num_binary) == (7, 0)
    assert env.action_space == Box((-5.0, -5.0), (5.0, 5.0))


def test_a_file_imports_those_beside_it(tmp_path, monkeypatch):
    for folder in ("one", "two"):  # same module names
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "near.py").write_text(f"{CORRIDOR}\nFOLDER = {folder!r}\n")
        text = "from .near import FOLDER, Corridor as Near\n\n\nclass Corridor(Near):\n"
        (tmp_path / folder / "own.py").write_text(f"{text}    folder = FOLDER\n")
        monkeypatch.syspath_prepend(tmp_path)  # undoes the import's own change
        own = make_own(f"{tmp_path}/{folder}/own.py:Corridor", {})
        assert type(own.env).folder == folder


@pytest.mark.parametrize(
    ("name", "env_kwargs", "message"),
    [
        ("nowhere.py:Corridor", {}, "there is no file nowhere.py"),
        ("corridor.py", {}, "corridor.py has no environment; say corridor.py:Corridor$"),
        ("corridor.py:", {}, "corridor.py has no environment; say corridor.py:Corridor$"),
        ("corridor.py:Corridr", {}, "has no environment Corridr; say corridor.py:Corridor$"),
        ("corridor.py:jax", {}, "has no environment jax; say corridor.py:Corridor$"),
        ("none.py", {}, "none.py has no environment, a subclass of SingleEnvironment or of Gymnax"),
        ("nowhere.py", {}, "there is no file nowhere.py"),
        ("doubles.py:Corridor", {}, "doubles.py sets jax_enable_x64; remove that line"),
        ("far.py:Corridor", {}, "far.py can't be imported: ImportError: .*beyond top-level pack"),
        ("walk.py:Walk", {"size": 3}, "has no 'size' for ENV_KWARGS to set; it has: .*goal"),
        ("walk.py:Walk", {"goal": "far"}, "goal is 'far', but must be like 3"),
        ("partial.py:Half", {}, "partial.py:Half can't be made: NotImplementedError: action_space"),
        ("walk.py:Seen", {}, r"an image, uint8 of shape \(8, 8, 3\), .*; return obs / 255"),
        ("corridor.py:Corridor", {"size": 3}, "can't be made with {'size': 3}: .*'size'"),
        ("broken.py:Corridor", {}, "broken.py can't be imported: ZeroDivisionError"),
    ],
)
def test_an_own_environment_that_is_not_there_is_one_line(
    name, env_kwargs, message, tmp_path, monkeypatch
):
    (tmp_path / "corridor.py").write_text(CORRIDOR)
    seen = """
class Seen(Walk):
    def reset_env(self, key, params):
        return jnp.zeros((8, 8, 3), jnp.uint8), State(time=0, place=0)
"""
    (tmp_path / "walk.py").write_text(WALK + seen)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "none.py").write_text("import jax\n")
    x64 = "jax.config.update('jax_enable_x64', True)\n"
    (tmp_path / "doubles.py").write_text(f"{CORRIDOR}\n\n{x64}")
    (tmp_path / "far.py").write_text("from ..near import Corridor\n")
    half = "class Half(environment.Environment):\n    pass\n"
    (tmp_path / "partial.py").write_text(f"from gymnax.environments import environment\n{half}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message) as error:
        make_env(PPO.check({"ENV_NAME": name, "ENV_KWARGS": env_kwargs}), 512)
    assert "\n" not in str(error.value)
