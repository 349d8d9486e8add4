"""Feeds random wrong input to the scripts: `python tests/fuzz.py [how many] [first seed]`.

A case is a command line and files on disk, made from its seed alone: settings, arguments of
environments, files of a run, custom classes, most of them wrong. A case that is refused must exit
with one line that says what to change, and leave the disk as it was. A case that is accepted must
have an update that can be traced. All other cases are printed.
"""

import contextlib
import io
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
from support import QUICK
from tqdm import tqdm

from trxl.environments import suites
from trxl.runs import memory_check
from trxl.runs.compiled import Program
from trxl.runs.run import main, run

import evaluate_PPO_trXL as evaluate
from trainer_PPO_trXL import PPO

SMALL = {**QUICK, "ENV_NAME": "MemoryChain-bsuite", "CHECKPOINT_EVERY": 2}

MEMORY = 2 * 10**8
"""Bytes of the pretended device, few so that no case takes long."""

LONGEST = 500
"""Characters of the longest readable line."""


class Case(NamedTuple):
    """Command in a folder that `prepare` fills."""

    kind: str
    arguments: list[str]
    prepare: Callable[[Path], None] = lambda folder: None
    script: Callable[[], None] = lambda: main(dict(SMALL), PPO)


# ------------------------------------------------------------------ cases

NUMBERS = ["0", "1", "-1", "2", "3", "7", "16", "1e3", "5e5", "1e6", "1e9", "1e18", "1e30"]
NUMBERS += ["1e400", "-1e400", "nan", "0.5", "-0.5", "1e-30"]
NUMBERS += ["2147483648", "4294967296", "9" * 400]
TEXTS = ["", *["None", "none", "True", "False", "true"], "x" * 300, "relu", "Ω≠é", "a b", *"'\"[{"]
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
THINGS = ["[1,2]", "(1,2)", "{'a': 1}", "{1,2}", "b'x'", "1j", "lambda: 1", "__import__('os')"]
THINGS += ["[[[]]]", "{'memory_length': 3}", "{'memory_length': '3'}", "{'memory_length': None}"]
WORDS = [*NUMBERS, *TEXTS, *THINGS, "{(1,): 2}"]


def of_settings(rng: random.Random) -> Case:
    """Makes wrong values, misspelt keys and arguments without a key."""
    arguments = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        key, word = rng.choice([*PPO.keys]), rng.choice(WORDS)
        if rng.random() < 0.1:
            key = misspelt(rng, key)
        arguments.append(f"{key}={word}" if rng.random() < 0.95 else word)
    return Case("settings", arguments)


def misspelt(rng: random.Random, word: str) -> str:
    """Returns a word with one letter changed, doubled or left out."""
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
    """Makes wrong arguments and names of environments."""
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
SPACES = """Discrete(2) | Discrete(0) | Discrete(-1) | Discrete('2') | Discrete(10**12)
 | Discrete(2, masked=True) | Discrete | 2 | None | MultiDiscrete((2, 3)) | MultiDiscrete((2, 0))
 | MultiDiscrete([2]) | Box((0.,), (1.,)) | Box((1.,), (0.,)) | Box(0., 1.)"""
ATTRIBUTES = {
    "action_space": SPACES.replace("\n", "").split(" | "),
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
RESETS = "(jnp.zeros(3), jnp.int32(0)) | jnp.zeros(3) | None | (jnp.zeros(3, int), 0) | [1, 2]"
RESETS += " | (jnp.zeros((3, 1)), jnp.int32(0)) | 1 / 0 | undefined | (jnp.zeros(3), None) | exit()"
RESULTS = """
jnp.zeros(3) | jnp.zeros(4) | 0 | None | jnp.ones(3) * action | 'obs' | jnp.zeros(3, bool)
state + 1 | state | None | state * 1.5 | (state, state) | state[None] | 'state'
1.0 | jnp.float32(1) | jnp.zeros(1) | None | '1' | action | 1j | True
state == 3 | False | 1 | 0.5 | None | jnp.zeros(2, bool) | action > 0
jnp.bool_(False) | False | None | 'no'
{} | None | {'won': 1.0} | {'memory_boundary': 1.0} | {'x': 'y'} | []
"""
"""Lines of options for each result of `step`, the right one first."""


def of_classes(rng: random.Random) -> Case:
    """Makes a custom environment class with a few faults."""
    attributes, resets = dict(RIGHT), RESETS.split(" | ")
    for name in rng.sample([*ATTRIBUTES], rng.choice([0, 0, 1, 2])):
        attributes[name] = rng.choice(ATTRIBUTES[name])
    if rng.random() < 0.05:
        del attributes[rng.choice([*RIGHT])]
    options = [line.split(" | ") for line in RESULTS.strip().splitlines()]
    results = [first for first, *_ in options]
    for index in rng.sample(range(6), rng.choice([0, 1, 1, 2])):
        results[index] = rng.choice(options[index])
    if rng.random() < 0.1:
        results.pop()
    text = OWN.format(
        attributes="\n    ".join(f"{name} = {value}" for name, value in attributes.items())
        or "pass",
        reset=rng.choice(resets) if rng.random() < 0.2 else resets[0],
        step=f"({', '.join(results)})" if rng.random() < 0.95 else rng.choice(resets),
    )
    if rng.random() < 0.05:
        texts = "", "import nowhere", "raise SystemExit", "def", "class Own: pass", "\0"
        text = rng.choice(texts)
    arguments = [f"ENV_NAME=own.py:{rng.choice(['Own'] * 9 + ['Other', '', ' '])}"]
    return Case("classes", arguments, lambda folder: write(folder / "own.py", text))


def write(path: Path, text: str) -> None:
    path.write_text(text)


def of_files(rng: random.Random, finished: Path) -> Case:
    """Makes a finished run with a spoilt file, to resume, evaluate or start from."""
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
    """Yields cases without end, each made from its own seed."""
    seed = first_seed
    while True:
        rng = random.Random(seed)
        make = rng.choice([of_settings, of_settings, of_environments, of_classes, of_files])
        yield seed, make(rng, finished) if make is of_files else make(rng)
        seed += 1


# ------------------------------------------------------------------ verdicts


class AcceptedError(BaseException):
    """Stand-in for the start of training; nothing catches it."""


def attempt(case: Case, folder: Path) -> str:
    """Runs a case and returns "accepted", "one line", or the fault."""
    case.prepare(folder)
    before = files_of(folder)
    output = io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        mock.patch.object(sys, "argv", ["script.py", *case.arguments]),
        mock.patch.object(memory_check, "device_memory", return_value=MEMORY),
        mock.patch.object(Program, "init", traced_init),
        mock.patch.object(Program, "compile", trace_and_accept),
        mock.patch.object(evaluate, "play", accept),
    ):
        try:
            case.script()
            verdict = "accepted"  # such as --help
        except AcceptedError:
            return "accepted"
        except SystemExit as error:
            verdict = judge(error.code)
        except BaseException as error:  # any other exception is a fault
            verdict = f"raises {type(error).__name__}: {str(error)[:200]}"
    if verdict == "one line" and "Traceback" in output.getvalue():
        return f"prints a traceback: {output.getvalue()[-300:]}"
    changed = {path for path, content in files_of(folder).items() if before.get(path) != content}
    gone = before.keys() - files_of(folder).keys()
    return f"changes {changed | gone}" if changed | gone else verdict


def judge(code: Any) -> str:
    """Returns the verdict on an exit code."""
    if not isinstance(code, str):
        return f"exits with {code!r}" if code else "accepted"
    if "the traceback is in" in code:
        return f"did not foresee: {code[:300]}"
    if len(code.splitlines()) > 1 or not code.startswith(("error: ", "usage: ")):
        return f"no line: {code[:300]!r}"
    return "one line" if len(code) <= LONGEST else f"too long: {code[:100]} ..."


def files_of(folder: Path) -> dict[Path, bytes]:
    """Returns every file and folder with its content, without locks and bytecode."""
    return {
        path: path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if path.name not in ("lock", "__pycache__") and path.suffix != ".pyc"
    }


def traced_init(self: Program, stream: int = 0) -> Any:
    del stream
    return self.shapes()


def trace_and_accept(self: Program, state: Any) -> None:
    jax.eval_shape(self._update, state)
    accept()


def accept(*_: Any) -> None:
    raise AcceptedError


def fuzz(count: int, first_seed: int) -> tuple[Counter, list[str]]:
    """Tries this many cases.

    Returns:
      The number of cases by (kind, verdict), where "bad" is any fault; and a line on each bad case.
    """
    counts: Counter = Counter()
    bad = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run({**SMALL, "RESULTS_DIR": str(root / "finished")}, PPO)
        generator = cases(root / "finished" / SMALL["ENV_NAME"], first_seed)
        for _, (seed, case) in zip(tqdm(range(count), mininterval=5), generator, strict=False):
            folder = root / "case"
            folder.mkdir()
            verdict = attempt(case, folder)
            shutil.rmtree(folder)
            good = verdict in ("accepted", "one line")
            counts[case.kind, verdict if good else "bad"] += 1
            if not good:
                bad.append(f"seed {seed}, {case.kind}, {case.arguments}: {verdict}")
    return counts, bad


if __name__ == "__main__":
    how_many = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    first = int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time())
    counts, bad = fuzz(how_many, first)
    print("\n".join(bad))
    print("| kind | one line | accepted | bad |\n| --- | --- | --- | --- |")
    for kind in sorted({kind for kind, _ in counts}):
        row = [str(counts[kind, verdict]) for verdict in ("one line", "accepted", "bad")]
        print(f"| {kind} | {' | '.join(row)} |")
    sys.exit(bool(bad))
