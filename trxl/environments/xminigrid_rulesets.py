"""Rulesets for XLand-MiniGrid: `python -m environments.rulesets KIND NUMBER FILE [SEED]`.

The procedure is that of XLand-MiniGrid's own benchmarks (Nikulin et al. 2024, arXiv 2312.12044,
section 3, after AdA, arXiv 2301.07608, appendix A.2), KIND is one of theirs, `trivial`, `small`,
`medium` or `high`, and so is the format of FILE, which `ENV_KWARGS={'benchmark': FILE}` and
`xminigrid.benchmarks.load_benchmark_from_path` read.

A ruleset is a tree of productions. Its root is the goal, which asks for one or two objects. Level
by level each open object is either there when an episode begins, or made by a rule of one or two
other objects, which are open on the next level. What is open at the end is there too. Objects that
nothing needs, and rules that make nothing needed, are added to distract.
"""

import bz2
import pickle
import random
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from trxl.errors import ConfigError, shortened

Tile = tuple[int, int]
"""An object: its kind and its colour, by XLand-MiniGrid's numbers."""

COLOURS = (1, 2, 3, 4, 5, 6, 9, 10, 11, 8)
"""Red, green, blue, purple, yellow, grey, white, brown, pink, orange."""

PICKABLE = tuple(product((3, 4, 5, 7, 12, 11), COLOURS))
"""Ball, square, pyramid, key, star and hex, of each colour: what the agent can carry."""

ANY = PICKABLE + tuple(product((6,), COLOURS))
"""These, and goal tiles, which lie where they are."""

NOTHING = (1, 7)
"""The floor: as a product, what a rule's objects vanish into."""

HOLD, NEAR, BESIDE = range(3)
"""What a goal or a rule looks at: an object held, one beside the agent, one beside another."""

GOALS = {HOLD: (1,), NEAR: (3, 11, 13, 14, 12), BESIDE: (4, 7, 9, 10, 8)}
RULES = {HOLD: (1,), NEAR: (2, 8, 10, 11, 9), BESIDE: (3, 4, 6, 7, 5)}
"""XLand-MiniGrid's numbers of them: anywhere beside, above, below, to the left, to the right."""

GOAL_LENGTH, RULE_LENGTH = 5, 7
"""How many numbers encode one."""


class Kind(NamedTuple):
    """The distribution of a benchmark's rulesets."""

    depth: int  # levels of productions
    keep: float  # probability that an open object is there rather than made
    distractor_rules: int  # at most
    distractor_objects: int


KINDS = {
    "trivial": Kind(0, 0.0, 0, 3),
    "small": Kind(1, 0.3, 2, 2),
    "medium": Kind(2, 0.1, 3, 2),
    "high": Kind(3, 0.1, 4, 1),
}
"""The published benchmarks' (`scripts/generate_benchmarks.sh` of their repository)."""


class Ruleset(NamedTuple):
    """A goal, the rules, and the objects that are there when an episode begins."""

    goal: tuple[int, ...]
    rules: tuple[tuple[int, ...], ...]
    objects: tuple[Tile, ...]


def draw_objects(rng: random.Random, what: int, used: set[Tile], near: tuple[Tile, ...]):
    """The objects that a goal or a rule looks at, none of them used yet.

    Args:
      near: which may be beside the agent; of two beside each other, one can be carried.
    """
    choices = {HOLD: (PICKABLE,), NEAR: (near,), BESIDE: (ANY, PICKABLE)}[what]
    return tuple(rng.choice([tile for tile in tiles if tile not in used]) for tiles in choices)


def draw_ruleset(rng: random.Random, kind: Kind) -> Ruleset:
    """Draws a ruleset."""
    number, what = draw_number(rng, GOALS)
    needed = draw_objects(rng, what, set(), ANY)
    goal = encode(number, needed, GOAL_LENGTH)
    used, there, rules = set(needed), [], []
    open_objects = list(needed)
    for _ in range(kind.depth):
        made_of: list[Tile] = []
        for product_tile in open_objects:
            if rng.random() < kind.keep:
                there.append(product_tile)
                continue
            rule, inputs = draw_rule(rng, product_tile, used)
            used.update(inputs)
            rules.append(rule)
            made_of += inputs
        open_objects = made_of
    there += open_objects
    unused = [tile for tile in ANY if tile not in used]
    there += rng.choices(unused, k=kind.distractor_objects)
    for _ in range(rng.randint(0, kind.distractor_rules)):
        useless = [tile for tile in (*PICKABLE, NOTHING) if tile not in used]
        # Of any objects: one that is needed may be lost to it.
        rule, inputs = draw_rule(rng, rng.choice(useless), set())
        rules.append(rule)
        there += inputs
    return Ruleset(goal, tuple(rules), tuple(there))


def draw_rule(rng: random.Random, made: Tile, used: set[Tile]):
    """A rule that makes an object, encoded, and the objects that it takes."""
    number, what = draw_number(rng, RULES)
    inputs = draw_objects(rng, what, used, PICKABLE)
    return encode(number, (*inputs, made), RULE_LENGTH), inputs


def draw_number(rng: random.Random, numbers: dict[int, tuple[int, ...]]) -> tuple[int, int]:
    """Draws one of the goals or rules, all equally likely, and its tiles."""
    return rng.choice([(number, what) for what, several in numbers.items() for number in several])


def encode(number: int, tiles: tuple[Tile, ...], length: int) -> tuple[int, ...]:
    """Returns a goal's or rule's number and tiles, padded with zeros."""
    numbers = (number, *(x for tile in tiles for x in tile))
    return numbers + (0,) * (length - len(numbers))


def draw_rulesets(kind: str, number: int, seed: int = 0) -> list[Ruleset]:
    """Draws rulesets of a kind, no two with the same goal and rules.

    Raises:
      ConfigError: there is no such kind, or there are not so many different ones.
    """
    if kind not in KINDS:
        raise ConfigError(f"no rulesets {shortened(kind)}; there are {', '.join(KINDS)}")
    most = goals_of_all() if kind == "trivial" else number
    if not 1 <= number <= most:
        raise ConfigError(f"there are from 1 to {most} different rulesets {kind}, not {number}")
    rng = random.Random(seed)
    drawn: dict[tuple, Ruleset] = {}
    with tqdm(total=number, unit="ruleset") as bar:
        while len(drawn) < number:
            ruleset = draw_ruleset(rng, KINDS[kind])
            if ruleset[:2] not in drawn:
                drawn[ruleset[:2]] = ruleset
                bar.update()
    return list(drawn.values())


def goals_of_all() -> int:
    """Returns the number of goals, and so of rulesets that are a goal alone."""
    beside = len(ANY) * len(PICKABLE)
    sizes = {HOLD: len(PICKABLE), NEAR: len(ANY), BESIDE: beside}
    return sum(len(GOALS[what]) * size for what, size in sizes.items())


def as_arrays(rulesets: list[Ruleset]) -> dict[str, np.ndarray]:
    """A benchmark's arrays, of N rulesets.

    Returns:
      goals (N, 5), rules (N, most rules, 7), init_tiles (N, most objects, 2), num_rules (N, 1), all
      of them uint8, padded with zeros.
    """
    most_rules = max(1, *(len(ruleset.rules) for ruleset in rulesets))
    most_objects = max(len(ruleset.objects) for ruleset in rulesets)
    arrays = {
        "goals": np.zeros((len(rulesets), GOAL_LENGTH), np.uint8),
        "rules": np.zeros((len(rulesets), most_rules, RULE_LENGTH), np.uint8),
        "init_tiles": np.zeros((len(rulesets), most_objects, 2), np.uint8),
        "num_rules": np.array([[len(ruleset.rules)] for ruleset in rulesets], np.uint8),
    }
    for i, (goal, rules, objects) in enumerate(rulesets):
        arrays["goals"][i] = goal
        arrays["rules"][i, : len(rules)] = rules or arrays["rules"][i, :0]
        arrays["init_tiles"][i, : len(objects)] = objects
    return arrays


def save(rulesets: list[Ruleset], file: Path) -> None:
    """Writes rulesets in XLand-MiniGrid's format."""
    content = as_arrays(rulesets)
    with bz2.open(file, "wb") as stream:
        pickle.dump(content, stream)


def main() -> None:
    """Writes what the command line asks for, and says what is in it."""
    try:
        kind, number, file, *rest = sys.argv[1:]
        (seed,) = rest or ["0"]
        asked = int(float(number)), int(seed)
    except (ValueError, TypeError, OverflowError):
        sys.exit("usage: python -m environments.rulesets KIND NUMBER FILE [SEED]")
    try:
        rulesets = draw_rulesets(kind, *asked)
        save(rulesets, Path(file))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: can't write to {file}: {error.strerror}")
    print(f"{len(rulesets)} rulesets in {file}: {statistics(rulesets)}")


def statistics(rulesets: list[Ruleset]) -> str:
    """Summarises how many rules and objects rulesets have."""
    counts = {
        "rules": [len(ruleset.rules) for ruleset in rulesets],
        "objects": [len(ruleset.objects) for ruleset in rulesets],
    }
    return "; ".join(
        f"{min(numbers)} to {max(numbers)} {what}, {np.mean(numbers):.2f} in the mean"
        for what, numbers in counts.items()
    )


if __name__ == "__main__":
    main()
