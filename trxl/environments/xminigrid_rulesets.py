"""Rulesets for XLand-MiniGrid.

python -m trxl.environments.xminigrid_rulesets KIND NUMBER FILE [SEED]

Procedure and kinds (`trivial`, `small`, `medium`, `high`) are those of XLand-MiniGrid's benchmarks
(Nikulin et al. 2024, arXiv 2312.12044, section 3, after AdA, arXiv 2301.07608, appendix A.2). FILE
is read by `ENV_KWARGS={'benchmark': FILE}` and `xminigrid.benchmarks.load_benchmark_from_path`.

A ruleset is a tree of productions. Its root is the goal, which needs one or two objects. A needed
object either exists at the start of an episode, or a rule makes it from one or two others. These
are needed on the next level of the tree. After the last level all needed objects exist at the
start. Distractors are objects and rules that the goal does not need.
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
"""Object, as kind and colour in XLand-MiniGrid's numbers."""

COLOURS = (1, 2, 3, 4, 5, 6, 9, 10, 11, 8)
"""Red, green, blue, purple, yellow, grey, white, brown, pink, orange."""

PICKABLE = tuple(product((3, 4, 5, 7, 12, 11), COLOURS))
"""Objects that the agent can carry: ball, square, pyramid, key, star and hex, of each colour."""

ANY = PICKABLE + tuple(product((6,), COLOURS))
"""Objects that can be carried, and goal tiles, which can't."""

NOTHING = (1, 7)
"""Floor, the product of a rule that removes its objects."""

HOLD, NEAR, BESIDE = range(3)
"""Conditions of goals and rules: object held, object near the agent, object beside another."""

GOALS = {HOLD: (1,), NEAR: (3, 11, 13, 14, 12), BESIDE: (4, 7, 9, 10, 8)}
RULES = {HOLD: (1,), NEAR: (2, 8, 10, 11, 9), BESIDE: (3, 4, 6, 7, 5)}
"""XLand-MiniGrid's numbers of goals and rules: in any direction, above, below, left, right."""

GOAL_LENGTH, RULE_LENGTH = 5, 7
"""Numbers per encoded goal and rule."""


class Kind(NamedTuple):
    """Distribution of a benchmark's rulesets."""

    depth: int  # levels of productions
    keep: float  # probability that a needed object exists at the start
    distractor_rules: int  # at most
    distractor_objects: int


KINDS = {
    "trivial": Kind(0, 0.0, 0, 3),
    "small": Kind(1, 0.3, 2, 2),
    "medium": Kind(2, 0.1, 3, 2),
    "high": Kind(3, 0.1, 4, 1),
}
"""Kinds of the published benchmarks (`scripts/generate_benchmarks.sh` of XLand-MiniGrid)."""


class Ruleset(NamedTuple):
    """Goal, rules, and the objects at the start of an episode."""

    goal: tuple[int, ...]
    rules: tuple[tuple[int, ...], ...]
    objects: tuple[Tile, ...]


def draw_objects(rng: random.Random, what: int, used: set[Tile], near: tuple[Tile, ...]):
    """Draws the unused objects of a goal's or rule's condition.

    Args:
      near: objects allowed with NEAR. With BESIDE, the second object is always pickable.
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
        # From any objects, so the rule may consume a needed one.
        rule, inputs = draw_rule(rng, rng.choice(useless), set())
        rules.append(rule)
        there += inputs
    return Ruleset(goal, tuple(rules), tuple(there))


def draw_rule(rng: random.Random, made: Tile, used: set[Tile]):
    """Draws a rule that makes an object; returns it encoded, and the objects that it consumes."""
    number, what = draw_number(rng, RULES)
    inputs = draw_objects(rng, what, used, PICKABLE)
    return encode(number, (*inputs, made), RULE_LENGTH), inputs


def draw_number(rng: random.Random, numbers: dict[int, tuple[int, ...]]) -> tuple[int, int]:
    """Draws a goal or rule uniformly; returns its number and its condition."""
    return rng.choice([(number, what) for what, several in numbers.items() for number in several])


def encode(number: int, tiles: tuple[Tile, ...], length: int) -> tuple[int, ...]:
    """Encodes a goal's or rule's number and tiles, padded with zeros."""
    numbers = (number, *(x for tile in tiles for x in tile))
    return numbers + (0,) * (length - len(numbers))


def draw_rulesets(kind: str, number: int, seed: int = 0) -> list[Ruleset]:
    """Draws rulesets of a kind, distinct in goal or rules.

    Raises:
      ConfigError: the kind is unknown, or has fewer rulesets than `number`.
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
    """Returns the number of goals, which is the number of rulesets without rules."""
    beside = len(ANY) * len(PICKABLE)
    sizes = {HOLD: len(PICKABLE), NEAR: len(ANY), BESIDE: beside}
    return sum(len(GOALS[what]) * size for what, size in sizes.items())


def as_arrays(rulesets: list[Ruleset]) -> dict[str, np.ndarray]:
    """Converts N rulesets to a benchmark's arrays, uint8, padded with zeros.

    Returns:
      goals (N, 5), rules (N, most rules, 7), init_tiles (N, most objects, 2), num_rules (N, 1).
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
    """Draws and saves the command line's rulesets, and prints their statistics."""
    try:
        kind, number, file, *rest = sys.argv[1:]
        (seed,) = rest or ["0"]
        asked = int(float(number)), int(seed)
    except (ValueError, TypeError, OverflowError):
        sys.exit("usage: python -m trxl.environments.xminigrid_rulesets KIND NUMBER FILE [SEED]")
    try:
        rulesets = draw_rulesets(kind, *asked)
        save(rulesets, Path(file))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: can't write to {file}: {error.strerror}")
    print(f"{len(rulesets)} rulesets in {file}: {statistics(rulesets)}")


def statistics(rulesets: list[Ruleset]) -> str:
    """Summarises the numbers of rules and objects of rulesets."""
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
