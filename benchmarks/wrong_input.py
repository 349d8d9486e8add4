"""What `fuzz.py` tries: settings, arguments of environments, classes and files, most of them wrong.

A case is made by a generator of random numbers alone.
"""

import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from trxl.environments import suites  # noqa: E402
from trxl.runs.run import main  # noqa: E402

import evaluate_PPO_trXL as evaluate  # noqa: E402
from trainer_PPO_trXL import PPO  # noqa: E402

SMALL = {
    "ENV_NAME": "MemoryChain-bsuite",
    "NUM_ENVS": 4,
    "NUM_STEPS": 16,
    "NUM_MINIBATCHES": 2,
    "UPDATE_EPOCHS": 2,
    "TOTAL_TIMESTEPS": 256,
    "EMBED_SIZE": 16,
    "qkv_features": 16,
    "num_heads": 2,
    "num_layers": 1,
    "hidden_layers": 16,
    "WINDOW_MEM": 8,
    "WINDOW_GRAD": 4,
    "CHECKPOINT_EVERY": 2,
}


class Case(NamedTuple):
    """A command, in a folder that `prepare` has filled."""

    kind: str
    arguments: list[str]
    prepare: Callable[[Path], None] = lambda folder: None
    script: Callable[[], None] = lambda: main(dict(SMALL), PPO)


NUMBERS = ["0", "1", "-1", "2", "3", "7", "16", "1e3", "5e5", "1e6", "1e9", "1e18", "1e30", "1e400"]
NUMBERS += ["-1e400", "nan", "0.5", "-0.5", "1e-30", "2147483648", "4294967296", "9" * 400]
TEXTS = [
    "",
    "None",
    "none",
    "True",
    "False",
    "true",
    "x" * 300,
    "relu",
    "Ω≠é",
    "a b",
    "'",
    '"',
    "[",
    "{",
]
TEXTS += [
    "@",
    "@x",
    "../..",
    "/dev/null",
    "/",
    ".",
    "a/b/c",
    "-h",
    "=",
    "a=b",
    "\\",
    "%s",
    "{0}",
    "\n",
]
THINGS = [
    "[1,2]",
    "(1,2)",
    "{'a': 1}",
    "{1,2}",
    "b'x'",
    "1j",
    "lambda: 1",
    "__import__('os')",
    "[[[]]]",
]
THINGS += ["{'memory_length': 3}", "{'memory_length': '3'}", "{'memory_length': None}", "{(1,): 2}"]
WORDS = [*NUMBERS, *TEXTS, *THINGS]


def of_settings(rng: random.Random) -> Case:
    """Keys with values of another kind or size, misspelt keys, arguments of no form."""
    arguments = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        key, word = rng.choice([*PPO.keys]), rng.choice(WORDS)
        if rng.random() < 0.1:
            key = misspelt(rng, key)
        arguments.append(f"{key}={word}" if rng.random() < 0.95 else word)
    return Case("settings", arguments)


def misspelt(rng: random.Random, word: str) -> str:
    """A word with one letter changed, doubled or left out."""
    place = rng.randrange(len(word))
    letter = rng.choice(["", word[place] * 2, rng.choice("abcXYZ_0Ω ")])
    return word[:place] + letter + word[place + 1 :]


VALUES = [0, 1, -1, 3, 10**6, 10**12, 0.5, -2.5, 1e300, float("inf"), True, None, "x", "", [], [1]]
VALUES += [[-3, 4], [0, 0], [1, 2, 3], {}, {"a": 1}, (1, 2), "high", 2**31, 2**63, 10**400]
OF_ENVIRONMENTS = {
    "MemoryChain-bsuite": ["memory_length", "num_bits", "max_steps_in_episode"],
    "CartPole-v1": ["gravity", "length", "max_steps_in_episode", "tau"],
    "DeepSea-bsuite": ["size", "deterministic", "unscaled_move_cost"],
    "Catch-bsuite": ["rows", "columns", "max_steps_in_episode"],
    "Pendulum-v1": ["max_speed", "max_torque", "dt"],
    "Breakout-MinAtar": ["use_minimal_action_set", "max_steps_in_episode"],
    "MetaMaze-misc": ["maze_type", "max_steps_in_episode", "punishment"],
    "FourRooms-misc": ["use_visual_obs", "fail_prob"],
    "UmbrellaChain-bsuite": ["n_distractor", "chain_length"],
}


def of_environments(rng: random.Random) -> Case:
    """Arguments of Gymnax's environments, names that are none."""
    name = rng.choice([*OF_ENVIRONMENTS])
    keys = [rng.choice([*OF_ENVIRONMENTS[name], rng.choice(["size", "seed", "x", ""])])]
    kwargs = {key: rng.choice(VALUES) for key in keys}
    if rng.random() < 0.15:
        name = misspelt(rng, name)
    if rng.random() < 0.1:
        name = f"{rng.choice([*suites(), 'nowhere', ''])}/{name}"
    return Case(
        "environments", [f"ENV_NAME={name}", f"ENV_KWARGS={kwargs!r}".replace("inf", "1e999")]
    )


OWN = """
import jax
import jax.numpy as jnp
from trxl.environments import Box, Discrete, MultiDiscrete, SingleEnvironment

class Own(SingleEnvironment):
    {attributes}

    def reset(self, key):
        return {reset}

    def step(self, key, state, action):
        return {step}
"""
ATTRIBUTES = {
    "action_space": [
        *("Discrete(2)", "Discrete(0)", "Discrete(-1)", "Discrete('2')", "Discrete(10**12)"),
        *("Discrete(2, masked=True)", "Discrete", "2", "None", "MultiDiscrete((2, 3))"),
        *("MultiDiscrete((2, 0))", "MultiDiscrete([2])", "Box((0.,), (1.,))"),
        *("Box((1.,), (0.,))", "Box(0., 1.)"),
    ],
    "obs_size": ["3", "0", "-3", "3.0", "'3'", "None", "4", "10**12", "True", "jnp.int32(3)"],
    "num_binary": ["0", "3", "4", "-1", "None", "'0'"],
    "grid": ["None", "3", "(1, 2)", "'grid'"],
    "can_truncate": ["True", "False", "None"],
    "episode_metrics": ["()", "('won',)", "'won'", "[1]", "None"],
    "num_agents": ["None", "1", "2", "0", "'1'"],
    "episodes_per_trial": ["1", "0", "2", "None"],
    "default_reset_strategy": ["'auto'", "'pool'", "'none'", "3"],
}
RIGHT = {"action_space": "Discrete(2)", "obs_size": "3"}
RESETS = [
    "(jnp.zeros(3), jnp.int32(0))",
    "jnp.zeros(3)",
    "None",
    "(jnp.zeros(3, int), 0)",
    "[1, 2]",
]
RESETS += [
    "(jnp.zeros((3, 1)), jnp.int32(0))",
    "1 / 0",
    "undefined",
    "(jnp.zeros(3), None)",
    "exit()",
]
RESULTS = [
    [
        "jnp.zeros(3)",
        "jnp.zeros(4)",
        "0",
        "None",
        "jnp.ones(3) * action",
        "'obs'",
        "jnp.zeros(3, bool)",
    ],
    ["state + 1", "state", "None", "state * 1.5", "(state, state)", "state[None]", "'state'"],
    ["1.0", "jnp.float32(1)", "jnp.zeros(1)", "None", "'1'", "action", "1j", "True"],
    ["state == 3", "False", "1", "0.5", "None", "jnp.zeros(2, bool)", "action > 0"],
    ["jnp.bool_(False)", "False", "None", "'no'"],
    ["{}", "None", "{'won': 1.0}", "{'memory_boundary': 1.0}", "{'x': 'y'}", "[]"],
]


def of_classes(rng: random.Random) -> Case:
    """Classes of one's own in which a thing or two is not as it should be."""
    attributes = dict(RIGHT)
    for name in rng.sample([*ATTRIBUTES], rng.choice([0, 0, 1, 2])):
        attributes[name] = rng.choice(ATTRIBUTES[name])
    if rng.random() < 0.05:
        del attributes[rng.choice([*RIGHT])]
    results = [options[0] for options in RESULTS]
    for index in rng.sample(range(6), rng.choice([0, 1, 1, 2])):
        results[index] = rng.choice(RESULTS[index])
    if rng.random() < 0.1:
        results.pop()
    text = OWN.format(
        attributes="\n    ".join(f"{name} = {value}" for name, value in attributes.items())
        or "pass",
        reset=rng.choice(RESETS) if rng.random() < 0.2 else RESETS[0],
        step=f"({', '.join(results)})" if rng.random() < 0.95 else rng.choice(RESETS),
    )
    if rng.random() < 0.05:
        text = rng.choice(
            ["", "import nowhere", "raise SystemExit", "def", "class Own: pass", "\0"]
        )
    arguments = [f"ENV_NAME=own.py:{rng.choice(['Own'] * 9 + ['Other', '', ' '])}"]
    return Case("classes", arguments, lambda folder: write(folder / "own.py", text))


def write(path: Path, text: str) -> None:
    path.write_text(text)


def of_files(rng: random.Random, finished: Path) -> Case:
    """A finished run one of whose files is spoilt, resumed, evaluated or started from."""
    spoil, seed = rng.choice([cut, flip, replace, empty, remove, into_folder]), rng.random()

    def prepare(folder: Path) -> None:
        copy = shutil.copytree(finished, folder / "run")
        chosen = random.Random(seed)
        paths = [path for path in sorted(copy.rglob("*")) if path.is_file()]
        near = [path for path in paths if path.parent == copy]
        spoil(chosen, chosen.choice(near if chosen.random() < 0.7 else paths))

    how = rng.choice(["RESUME", "RESUME", "PARAMS", "evaluate"])
    if how == "evaluate":
        return Case("files", ["run", "EPISODES=4"], prepare, evaluate.main)
    return Case("files", [f"{how}=run", "TOTAL_TIMESTEPS=512"], prepare)


def cut(rng: random.Random, path: Path) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(1 + path.stat().st_size)])


def flip(rng: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes() or b"x")
    for _ in range(rng.choice([1, 10, 1000])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


def replace(rng: random.Random, path: Path) -> None:
    texts = [
        "null",
        "[]",
        "{}",
        "3",
        "\xff",
        '{"ENV_NAME": 3}',
        "PK\x03\x04",
        "[" * 10**5,
        "\n" * 9,
    ]
    path.write_bytes(rng.choice(texts).encode("latin1"))


def empty(rng: random.Random, path: Path) -> None:
    del rng
    path.write_bytes(b"")


def remove(rng: random.Random, path: Path) -> None:
    del rng
    path.unlink()


def into_folder(rng: random.Random, path: Path) -> None:
    del rng
    path.unlink()
    path.mkdir()


def cases(finished: Path, first_seed: int) -> Iterator[tuple[int, Case]]:
    """Endless, each from its own seed."""
    seed = first_seed
    while True:
        rng = random.Random(seed)
        make = rng.choice([of_settings, of_settings, of_environments, of_classes, of_files])
        yield seed, make(rng, finished) if make is of_files else make(rng)
        seed += 1
