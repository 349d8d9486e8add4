"""Writes rulesets of a room of 5 x 5 one of whose corners is the goal.

`python results_xminigrid/make_corners.py` writes, beside itself, two_corners.bz2, two rulesets in
which the corner is given away (a ball lies somewhere in the rooms of the one kind, a square in
those of the other, whose goal is the corner across: who has come across it once in a trial knows),
and four_corners.bz2, four rulesets in which only the reward tells.
"""

from pathlib import Path

import jax.numpy as jnp
from xminigrid.benchmarks import save_bz2_pickle
from xminigrid.core.constants import TILES_REGISTRY, Colors, Tiles
from xminigrid.core.goals import AgentOnPositionGoal
from xminigrid.core.rules import EmptyRule

BALL = TILES_REGISTRY[Tiles.BALL, Colors.RED]
SQUARE = TILES_REGISTRY[Tiles.SQUARE, Colors.BLUE]
NOTHING = TILES_REGISTRY[Tiles.EMPTY, Colors.EMPTY]


def write(name, corners, objects):
    """A file of rulesets: its goal's (row, column) and an object for each."""
    rulesets = len(corners)
    goals = [AgentOnPositionGoal(position=jnp.array(corner)).encode() for corner in corners]
    content = {
        "goals": jnp.stack(goals),
        "rules": jnp.tile(EmptyRule().encode()[None, None], (rulesets, 1, 1)),
        "init_tiles": jnp.stack(objects)[:, None],
        "num_rules": jnp.zeros(rulesets, jnp.uint8),
    }
    save_bz2_pickle(content, str(Path(__file__).with_name(name)))


write("two_corners.bz2", [(1, 1), (5, 5)], [BALL, SQUARE])
write("four_corners.bz2", [(1, 1), (1, 5), (5, 1), (5, 5)], [NOTHING] * 4)
