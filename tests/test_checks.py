"""Mistakes found before anything compiles: custom environments, sizes, numbers."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import QUICK, run

from trxl.config import read_overrides
from trxl.environments import Box, Discrete, MultiDiscrete, SingleEnvironment, make_own
from trxl.environments.custom import OwnEnvironment
from trxl.environments.validation import check_environment, check_values
from trxl.errors import ConfigError, explained, one_line, shortened
from trxl.runs import memory_check
from trxl.runs.compiled import Program
from trxl.runs.divergence import NotFiniteError
from trxl.runs.memory_check import compare, device_memory, in_units, least_bytes
from trxl.spaces import Grid

from trainer_Muesli_trXL import MUESLI
from trainer_PPO_trXL import PPO
from wrappers import make_env


class Right(SingleEnvironment):
    """Environment of three-step episodes; each wrong one below changes one thing."""

    action_space = Discrete(2)
    obs_size = 3
    change = ()

    def reset(self, key):
        return jnp.zeros(3), {"t": jnp.int32(0)}

    def step(self, key, state, action):
        t = state["t"] + 1
        results = [jnp.zeros(3), {"t": t}, action * 1.0, t == 3, jnp.bool_(False), {}]
        for index, value in self.change:
            results[index] = value
        return tuple(results)


def test_an_environment_that_is_right_is_let_through():
    check_environment("Right", Right())


ATTRIBUTES = [
    ({"obs_size": "3"}, "obs_size must be a whole number of at least 1, not '3'"),
    ({"obs_size": None}, "obs_size must be a whole number of at least 1, not None"),
    ({"action_space": Discrete(0)}, "action_space.n must be a whole number from 1 to 2**31 - 1"),
    ({"action_space": Discrete(2.5)}, "action_space.n must be a whole number from 1 to 2**31"),
    ({"action_space": Discrete(2**31)}, "action_space.n must be a whole number from 1 to 2**31"),
    ({"action_space": Discrete}, "action_space must be a Discrete, MultiDiscrete or Box"),
    ({"action_space": MultiDiscrete(())}, "action_space.sizes must be a tuple"),
    ({"action_space": MultiDiscrete((2, 0))}, "action_space.sizes must be a tuple"),
    ({"action_space": Box((1.0,), (0.0,))}, "action_space.low must be below .high"),
    ({"action_space": Box((0.0,), (float("nan"),))}, "action_space.low must be below .high"),
    ({"action_space": Box((0.0, 0.0), (1.0,))}, "tuples of the same length"),
    ({"action_space": Box((), ())}, "tuples of the same length"),
    ({"action_space": Box(-1.0, 1.0)}, "same length, not Box(low=-1.0, high=1.0, masked=False)"),
    (
        {"action_space": Discrete(5, masked=True)},
        "a whole number of at least 5, as the action mask",
    ),
    ({"action_space": Discrete(2, masked=True)}, "num_binary must be a whole number from 2 to ob"),
    ({"num_binary": 7}, "num_binary must be a whole number from 0 to obs_size = 3, not 7"),
    ({"episode_metrics": "won"}, "episode_metrics must be a tuple of texts, not 'won'"),
    ({"num_agents": 0}, "num_agents must be None or a whole number from 1 to 2**31 - 1, not 0"),
    ({"episodes_per_trial": 0}, "episodes_per_trial must be a whole number from 1 to"),
    ({"grid": (0, 1)}, "grid must be a Grid, not (0, 1)"),
    (
        {"default_reset_strategy": "pol"},
        "default_reset_strategy must be one of auto, optimistic, pool, not 'pol'",
    ),
]


@pytest.mark.parametrize(("attributes", "message"), ATTRIBUTES)
def test_an_attribute_that_makes_no_sense_is_named(attributes, message):
    wrong = type("Wrong", (Right,), attributes)
    with pytest.raises(ConfigError, match=f"^wrong.py: .*{re.escape(message)}"):
        check_environment("wrong.py", wrong())


STEPS = [
    ((0, jnp.zeros(4)), "step: obs must be float32 of shape (3,), not float32 of shape (4,)"),
    ((0, jnp.zeros(3, complex)), "step: obs must be float32 of shape (3,), not complex64 of shape"),
    (
        (0, jnp.zeros((8, 8, 3), jnp.uint8)),
        "step: obs is an image, uint8 of shape (8, 8, 3), but the network reads vectors; return"
        " obs.ravel() / 255 and set obs_size = 192",
    ),
    ((1, {"t": 1.0}), "step: state['t'] must be int32 of shape () as reset's, not float32"),
    ((1, {"s": 1}), "step: state must have the structure of reset's"),
    ((1, None), "step: state must have the structure of reset's"),
    ((2, jnp.zeros(1)), "step: reward must be float32 of shape (), not float32 of shape (1,)"),
    ((2, "much"), "step must return arrays and numbers, in dicts, NamedTuples or dataclasses of"),
    ((3, jnp.zeros(())), "step: terminated must be bool of shape (), not float32 of shape ()"),
    ((4, jnp.zeros(2, bool)), "step: truncated must be bool of shape (), not bool of shape (2,)"),
    ((5, None), "step: info must be a dict, not None"),
    ((5, {"memory_boundary": 1.0}), "step: memory_boundary must be bool of shape ()"),
]


@pytest.mark.parametrize(("change", "message"), STEPS)
def test_a_wrong_result_of_step_is_named(change, message):
    wrong = type("Wrong", (Right,), {"change": [change]})
    with pytest.raises(ConfigError) as error:
        check_environment("wrong.py", wrong())
    assert str(error.value).startswith(f"wrong.py.{message}")
    assert "\n" not in str(error.value)


def returns(value):
    return lambda self, *_: value


TEAM = {
    "num_agents": 2,
    "reset": returns((jnp.zeros((2, 3)), 0)),
    "step": returns((jnp.zeros((2, 3)), 0, jnp.zeros(2), False, False, {})),
}

METHODS = [
    ({"reset": returns(None)}, "wrong.reset: must return (obs, state), not None"),
    ({"reset": returns(jnp.zeros(3))}, "wrong.reset: must return (obs, state), not float32"),
    (
        {"reset": returns((jnp.zeros((3, 1)), 0))},
        "wrong.reset: obs is an array, float32 of shape (3, 1), but the network reads vectors;"
        " return obs.ravel() and set obs_size = 3",
    ),
    ({"reset": 3}, "wrong.reset raises TypeError: 'int' object is not callable"),
    ({"reset": SingleEnvironment.reset}, "wrong.reset raises NotImplementedError"),
    (
        {"step": returns((1, 2, 3, 4, 5))},
        "wrong.step: must return (obs, state, reward, term",
    ),
    ({"step": lambda self, state, action: None}, "wrong.step raises TypeError: "),
    ({"next_episode": returns((jnp.zeros(2), 0))}, "wrong.next_episode: obs must be float32"),
    ({"episode_metrics": ("won",)}, "wrong.step: info must have 'won' of episode_metrics, not []"),
    ({"num_agents": 2}, "wrong.reset: obs must be float32 of shape (2, 3)"),
    (
        {**TEAM, "agents_done": lambda self, state: jnp.zeros(3)},
        "wrong.agents_done: what it returns must be bool",
    ),
    (
        {**TEAM, "agents_done": 3},
        "wrong.agents_done raises TypeError: 'int' object is not callable",
    ),
]


@pytest.mark.parametrize(("attributes", "message"), METHODS)
def test_a_method_that_is_none_is_named(attributes, message):
    wrong = type("Wrong", (Right,), attributes)
    with pytest.raises(ConfigError) as error:
        check_environment("wrong", wrong())
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_observations_of_other_types_are_cast():
    for dtype in (bool, jnp.uint8, int, jnp.float16):
        own = type("Own", (Right,), {"reset": returns((jnp.ones(3, dtype), {"t": jnp.int32(0)}))})
        env = OwnEnvironment(own(), check_environment("own", own()))
        obs, state = env.next_episode(jax.random.key(0), None)
        np.testing.assert_array_equal(obs, jnp.ones(3, jnp.float32), strict=True)
        assert env.step(jax.random.key(0), state, jnp.int32(0))[0].dtype == jnp.float32


def test_every_number_of_info_is_a_metric():
    info = {"won": True, "of": {"fuel": 3}, "path": jnp.zeros(2), "memory_boundary": False}
    info |= {"returned_episode": jnp.zeros(5), "discount": 1.0, "final_observation": 1.0}
    own = type("Own", (Right,), {"change": [(5, info)]})
    numbers = {"won": 1, "of/fuel": 3}
    for names in ((), ("won",), ("of/fuel",)):
        declared, expected = names, {name: numbers[name] for name in names or numbers}
        own.episode_metrics = declared
        env = OwnEnvironment(own(), check_environment("own", own()))
        assert set(env.episode_metrics) == set(expected)
        key = jax.random.key(0)
        *_, kept = env.step(key, env.reset(key)[1], jnp.int32(0))
        assert kept == {**expected, "memory_boundary": False}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["total_loss", "mean_reward", "num_episodes", "env_steps", "returned_episode_returns"]
)
def test_a_metric_named_like_one_of_the_run_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    info = "{" + f"'{name}': 1.0" + "}"
    Path("own.py").write_text(OWN.replace("jnp.bool_(False), {}", f"jnp.bool_(False), {info}"))
    with pytest.raises(ConfigError, match=rf"^info\['{name}'\] of the environment has the name"):
        run({**QUICK, "ENV_NAME": "own.py:Own"})
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["own.py"]


def writing(method, write):
    """Returns a `Right` of which one method first writes to the object."""

    def writes(self, *arguments):
        write(self, arguments[0])
        return getattr(Right, method)(self, *arguments)

    return type("Own", (Right,), {"seen": 0, "log": None, "keys": [], method: writes})()


def count(self, key):
    self.seen += 1


def keep(self, key):
    self.log = jax.random.normal(key)


def append(self, key):
    self.log = self.log or []
    self.log.append(jax.random.normal(key))


def gather(self, key):
    self.keys.append(key)


def remember(self, key):
    if self.log is None:
        self.log = jnp.arange(3)


@pytest.mark.parametrize("method", ["reset", "step", "next_episode"])
@pytest.mark.parametrize(
    ("write", "what"),
    [
        (count, "self.seen"),
        (keep, "self.log"),
        (append, "self.log[0]"),
        (gather, "self.keys[0]"),
        (remember, "self.log"),
    ],
)
def test_what_a_method_writes_to_the_object_is_named(method, write, what):
    own = writing(method, write)
    with pytest.raises(ConfigError) as error:
        check_environment("own", own, own=own)
    assert str(error.value).startswith(f"own.{method} writes {what}, but is called once for all")


def test_a_constant_may_be_made_in_the_first_call():
    def table(self, key):
        if self.log is None:
            self.log = [np.arange(3)]
        self.seen = 2.5

    own = writing("step", table)
    check_environment("own", own, own=own)


def observing(**attributes):
    """Returns an environment of nine given observations in turn, `obs[0]` at reset."""

    class Observing(SingleEnvironment):
        obs_size = attributes["obs"].shape[-1]

        def reset(self, key):
            return self.obs[0], jnp.int32(0)

        def step(self, key, state, action):
            state = state + 1
            reward = jnp.ones(self.obs.shape[1:-1])
            return self.obs[state], state, reward, state == len(self.obs) - 1, False, {}

        def agents_done(self, state):
            return jnp.array([False, True])

    return type("Observing", (Observing,), {"action_space": Discrete(2), **attributes})()


ONES = jnp.ones((9, 8))
GRID = {"grid": Grid(1, 2, 1, ((2,), (1,))), "num_binary": 8}
CELLS = jnp.zeros((9, 8))
MASKED = {"action_space": Discrete(2, masked=True), "num_binary": 2}
CHOICES = {"action_space": MultiDiscrete((2, 3), masked=True), "num_binary": 6}
THIRD = jnp.zeros((9, 8)).at[:, 2].set(1)  # the first choice has no third option


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"num_binary": 4, "obs": ONES.at[5, 3].set(0.2)}, "entry 3 of an observation is 0.2, but"),
        ({"num_binary": 4, "obs": ONES.at[0, 0].set(jnp.nan)}, "entry 0 of an observation is nan"),
        ({**MASKED, "obs": ONES.at[2, 1].set(2)}, "entry 1, of the action mask, of an observation"),
        ({**GRID, "obs": CELLS.at[8, 4].set(-1)}, "row 1, column 0, channel 1 of the grid of an"),
        ({**GRID, "obs": CELLS.at[4, 6].set(7)}, "row 1, column 0, channel 2 of the grid of an"),
        ({**GRID, "obs": CELLS.at[4, 3:5].set(1)}, "is not as the Grid says: at most one channel"),
        ({**MASKED, "obs": ONES.at[3, :2].set(0)}, "has no legal action after 3 steps of random"),
        ({**CHOICES, "obs": THIRD}, "the action mask has no legal action after 0 steps"),
        (
            {**MASKED, "num_agents": 2, "obs": jnp.ones((9, 2, 8)).at[3, 0, :2].set(0)},
            "the action mask has no legal action after 3 steps",
        ),
    ],
)
def test_values_that_are_not_as_declared_are_named(attributes, message):
    own = observing(**attributes)
    check_environment("own", own)
    with pytest.raises(ConfigError, match=f"^own: .*{re.escape(message)}") as error:
        check_values("own", own)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "attributes",
    [
        {"obs": ONES / 2},
        {"num_binary": 4, "obs": ONES.at[:, 4:].set(0.2)},
        {**GRID, "obs": CELLS.at[:, 1:3].set(jnp.eye(2)[jnp.arange(9) % 2])},
        {**MASKED, "obs": ONES.at[8, :2].set(0)},  # at the episode's end
        {**MASKED, "num_agents": 2, "obs": jnp.ones((9, 2, 8)).at[3, 1, :2].set(0)},  # inactive
        {**CHOICES, "obs": ONES},
        {"action_space": Box((0.0,), (1.0,), masked=True), "num_binary": 1, "obs": CELLS},
    ],
)
def test_values_that_are_as_declared_are_let_through(attributes):
    own = observing(**attributes)
    check_environment("own", own)
    check_values("own", own)


OWN = """
import sys
import jax, jax.numpy as jnp
from trxl.environments import Discrete, SingleEnvironment

class Own(SingleEnvironment):
    action_space = Discrete(2)
    obs_size = 1

    def __init__(self, where="nowhere"):
        self.where = where
        self.leave("init")

    def leave(self, where):
        if where == self.where:
            sys.exit()

    def reset(self, key):
        self.leave("reset")
        return jnp.zeros(1), jnp.int32(0)

    def step(self, key, state, action):
        if self.where == "line":
            raise ValueError("of two\\nlines")
        if self.where == "vmap":
            jax.pure_callback(lambda x: x, state, state)
        if self.where == "if" and state > 3:
            pass
        return jnp.zeros(1), state + 1, jnp.log(1.0 - state), state == 3, jnp.bool_(False), {}
"""


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "if",
            "own.py, Own.step raises TracerBoolConversionError: Python branches on a value that JAX"
            " traces; use jnp.where or jax.lax.cond in line 27 of own.py",
        ),
        (
            "init",
            "own.py:Own can't be made with {'where': 'init'}: SystemExit in line 16 of own.py",
        ),
        ("reset", "own.py, Own.reset raises SystemExit in line 16 of own.py"),
        ("line", "own.py, Own.step raises ValueError: of two lines in line 24 of own.py"),
    ],
)
def test_a_class_that_raises_or_leaves_is_one_line_that_says_where(
    where, message, tmp_path, monkeypatch
):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        make_own("own.py:Own", {"where": where})
    assert str(error.value) == message


def test_parameters_that_are_a_method_are_one_line(tmp_path):
    head = "from gymnax.environments.classic_control.cartpole import CartPole\n"
    own = "class Own(CartPole):\n    def default_params(self):\n        return None\n"
    (tmp_path / "own.py").write_text(head + own)
    with pytest.raises(ConfigError, match=r"default_params is a method; make it a property"):
        make_own(f"{tmp_path}/own.py:Own", {})


def test_an_error_in_a_batch_alone_names_the_line(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    own = {"ENV_NAME": f"{tmp_path}/own.py:Own", "ENV_KWARGS": {"where": "vmap"}}
    with pytest.raises(NotImplementedError) as error:
        Program(PPO.check({**QUICK, **own}), PPO, None).trace_update()
    assert " in line 26 of own.py; the traceback is in " in explained(error.value)


def test_a_file_that_leaves_while_it_is_imported_is_one_line(tmp_path):
    (tmp_path / "near.py").write_text("import sys\nsys.exit()")
    (tmp_path / "own.py").write_text("from . import near")
    with pytest.raises(ConfigError, match=r"be imported: SystemExit in line 2 of near.py$"):
        make_own(f"{tmp_path}/own.py:Own", {})


def test_a_file_may_have_a_dataclass_whose_annotations_are_texts(tmp_path):
    head = "from __future__ import annotations\nfrom flax import struct\n"
    state = "\n@struct.dataclass\nclass State:\n    t: int\n"
    (tmp_path / "own.py").write_text(head + OWN + state)
    assert make_own(f"{tmp_path}/own.py:Own", {}).obs_size == 1


@pytest.mark.slow
def test_a_reward_that_is_not_finite_is_said_to_be_that(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    config = {**QUICK, "ENV_NAME": f"{tmp_path}/own.py:Own", "RESULTS_DIR": str(tmp_path)}
    with pytest.raises(NotFiniteError, match=r"^a reward of the environment is nan after upd"):
        run(config)


KEEPING = """
import jax.numpy as jnp
from trxl.environments import Discrete, SingleEnvironment

SEEN = []

class Counter:
    count = jnp.int32(0)

class Own(SingleEnvironment):
    action_space = Discrete(2)
    obs_size = 1
    counter = Counter()

    def __init__(self, where):
        self.where = where

    def reset(self, key):
        return jnp.zeros(1), jnp.int32(0)

    def step(self, key, state, action):
        if self.where == "global":
            SEEN.append(state)
        else:
            self.counter.count += 1
        return jnp.zeros(1), state + 1, 1.0, state == 3, False, {}
"""


@pytest.mark.parametrize(
    ("where", "what"), [("global", "SEEN[0]"), ("object", "self.counter.count")]
)
def test_what_a_method_writes_elsewhere_in_its_file_is_named(where, what, tmp_path):
    (tmp_path / "own.py").write_text(KEEPING)
    with pytest.raises(ConfigError, match=rf"step writes {re.escape(what)}, but is called once"):
        make_own(f"{tmp_path}/own.py:Own", {"where": where})


@pytest.mark.parametrize(
    ("name", "env_kwargs", "message"),
    [
        ("MemoryChain-bsuite", {"memory_length": -5}, "length is -5, but must be from 0 to"),
        ("MemoryChain-bsuite", {"num_bits": 0}, "with {'num_bits': 0}.step raises IndexError"),
        ("MemoryChain-bsuite", {"memory_length": 10**12}, "must be from 0 to 2**31"),
        ("MemoryChain-bsuite", {"memory_length": np.arange(3)}, "but must be like 5"),
        ("DeepSea-bsuite", {"size": 2**31}, "size is 2147483648, but must be"),
        ("CartPole-v1", {"max_steps_in_episode": 0}, "is 0, but must be from 1"),
        ("Pendulum-v1", {"dt": 10**400}, "can't be made with"),
        ("CartPole-v1", {"gravity": float("inf")}, "gravity is inf, which is not finite"),
        ("DeepSea-bsuite", {"size": 0}, "can't be made with {'size': 0}: ZeroDivisionError"),
        ("Craftax-Classic-Symbolic-v1", {"map_size": [-3, 4]}, "must be from 0"),
    ],
)
def test_parameters_beyond_a_suites_own_sense_are_one_line(name, env_kwargs, message):
    config = PPO.check({"ENV_NAME": name, "ENV_KWARGS": env_kwargs, "NUM_ENVS": 8})
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        make_env(config, 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"NUM_ENVS": 10**9, "TOTAL_TIMESTEPS": 10**15}, "WINDOW_MEM steps; lower NUM_ENVS"),
        ({"NUM_STEPS": 10**9, "TOTAL_TIMESTEPS": 10**15}, "rollout .*; lower .* NUM_STEPS"),
        ({"WINDOW_MEM": 10**9}, "of it for the memory of the last WINDOW_MEM steps; lower"),
        ({"NUM_SEEDS": 10**9}, "WINDOW_MEM steps; lower .* NUM_SEEDS"),
        ({"num_layers": 1000, "WINDOW_MEM": 10**6}, "WINDOW_MEM steps; lower .* num_layers"),
        ({"EMBED_SIZE": 10**6}, "of it for parameters and optimiser; lower EMBED_SIZE"),
        ({"hidden_layers": 10**6}, "of it for parameters and optimiser; lower EMBED_SIZE"),
        ({"UPDATE_EPOCHS": 10**9}, "and the passes over it; lower .* UPDATE_EPOCHS"),
    ],
)
def test_what_no_device_holds_is_told_before_anything_is_made(
    changes, words, tmp_path, monkeypatch
):
    monkeypatch.setattr(memory_check, "device_memory", lambda: 25 * 10**9)
    monkeypatch.setattr(Program, "compile", None)
    with pytest.raises(ConfigError, match=words) as error:
        run({**QUICK, "WINDOW_MEM": 64, "RESULTS_DIR": str(tmp_path), **changes})
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_run_that_just_fits_is_let_through(monkeypatch):
    needs = {"for one thing": 3, memory_check.ENVIRONMENTS: 5}
    monkeypatch.setattr(memory_check, "device_memory", lambda: 8)
    compare(needs)
    monkeypatch.setattr(memory_check, "device_memory", lambda: 7)
    with pytest.raises(ConfigError, match="5 bytes of it for the states of the environments; "):
        compare(needs)


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [(PPO, {"NUM_SEEDS": 2}), (PPO, {"RESET_STRATEGY": "pool"}), (MUESLI, {})],
    ids=["two seeds", "a pool", "Muesli"],
)
def test_the_bytes_of_a_state_and_of_a_rollout_are_counted(algorithm, changes):
    program = Program(algorithm.check({**QUICK, **changes}), algorithm, None)
    *state, rollout = least_bytes(program).values()
    shapes = program.shapes()
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    assert 0 < total - sum(state) < 20  # the key of the permutations
    obs = shapes.rollout_state.obs
    layer_inputs = QUICK["num_layers"] * QUICK["EMBED_SIZE"] * obs.size // obs.shape[-1]
    stored = min(obs.size // 32, 10**3)  # binary entries are stored as bits
    assert QUICK["NUM_STEPS"] * 4 * (layer_inputs + stored) < rollout < 10**7


def test_each_device_holds_its_share_of_the_environments():
    whole, part = (
        least_bytes(Program(PPO.check({**QUICK, "NUM_ENVS": 16}, n or 1), PPO, n))
        for n in (None, 8)
    )
    assert part.pop(memory_check.STATE) == whole.pop(memory_check.STATE)
    assert {what: 8 * size for what, size in part.items()} == whole


def test_an_allocation_that_fails_says_how_much_it_was():
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5000000000 bytes.")
    line = explained(error)
    assert line.startswith("no 5.0 GB more: the device's memory is full; lower NUM_ENVS")


@pytest.mark.parametrize("end", ["", "\nAt:\n  own.py(3): look", "\n\nThe above\n"])
def test_of_an_error_in_a_callback_the_cause_is_told(end):
    trace = 'Traceback (most recent call last):\n  File "own.py", line 3\n    look()\n    ^^^^^^\n'
    before = f"INTERNAL: CpuCallback error calling callback: {trace}OSError: 5\n\nDuring it:\n\n"
    text = f"{before}{trace}\nValueError: no such card: 53{end}"
    assert explained(RuntimeError(text)).startswith("RuntimeError: ValueError: no such card: 53; ")
    assert one_line(RuntimeError(text)) == "RuntimeError: ValueError: no such card: 53"


def test_the_machines_memory_is_found():
    assert 2**30 < device_memory() < 2**50
    assert [in_units(n) for n in (9, 25_000_000_000, 10**25)] == ["9 bytes", "25 GB", "10 YB"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("NUM_ENVS=1e30", "NUM_ENVS must be from 1 to 2147483647, not 1e+30"),
        ("num_layers=1e7", "num_layers must be from 0 to 1000, not 10000000.0"),
        ("hidden_layers=1e12", "hidden_layers must be from 1 to 1000000, not 1000000000000.0"),
        ("CHECKPOINT_EVERY=1e12", "CHECKPOINT_EVERY must be from 1 to 2147483647"),
        (f"LR={'9' * 400}", "LR must be a number, not 9999"),
        (f"LR={'9' * 5000}", "LR=9999"),
        ("LR=1e999", "LR must be a number, not inf"),
        (f"TOTAL_TIMESTEPS={10**18}", "updates are more than 2**31 - 1; lower TOTAL_TIMESTEPS"),
        ("RESUME=", "RESUME is empty; give a text or None"),
        (f"ACTIVATION={'x' * 500}", "ACTIVATION must be one of relu, tanh, not 'xxx"),
        (f"ENV_KWARGS={{'a': {'1' * 500}", "ENV_KWARGS={'a': 111"),
    ],
)
def test_numbers_and_texts_beyond_all_use_are_one_line_of_bearable_length(argument, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        PPO.check(read_overrides([argument], PPO.keys))
    assert len(str(error.value)) < 200


def test_a_long_message_ends_with_a_sentence_or_a_word():
    assert one_line(ValueError(f"Of one line.\nAnd {'more ' * 60}.")) == "ValueError: Of one line"
    assert one_line(ValueError("word " * 60)).endswith("word word ...")
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_a_value_is_shown_in_80_characters_at_most():
    assert shortened("x" * 100) == "'" + "x" * 75 + " ..."
    assert shortened(10**5000) == "a number of thousands of digits"
    assert shortened({"a": "b\n"}) == r"{'a': 'b\n'}"
