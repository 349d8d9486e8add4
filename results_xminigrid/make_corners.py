"""Writes rulesets of a 5 x 5 room with a corner as the goal.

Run `python results_xminigrid/make_corners.py`. In two_corners.bz2, of two rulesets, an object in
the room shows the corner: a ball or a square. In four_corners.bz2, of four rulesets, only the
reward shows it. Both files are written beside this script.
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
    """Writes a file of rulesets, each with the goal's (row, column) and an object."""
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
