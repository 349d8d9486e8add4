"""Writes two_corners.bz2, two rulesets: `python results_xminigrid/make_two_corners.py`.

A room of 5 x 5 in which one corner is the goal, or the one across. A ball lies somewhere in the
rooms of the one kind, a square in those of the other: who has come across it once in a trial knows.
"""

from pathlib import Path

import jax.numpy as jnp
from xminigrid.benchmarks import save_bz2_pickle
from xminigrid.core.constants import TILES_REGISTRY, Colors, Tiles
from xminigrid.core.goals import AgentOnPositionGoal
from xminigrid.core.rules import EmptyRule

corners = jnp.array([(1, 1), (5, 5)])
hints = jnp.stack(
    [TILES_REGISTRY[Tiles.BALL, Colors.RED], TILES_REGISTRY[Tiles.SQUARE, Colors.BLUE]]
)
rulesets = len(corners)
content = {
    "goals": jnp.stack([AgentOnPositionGoal(position=corner).encode() for corner in corners]),
    "rules": jnp.tile(EmptyRule().encode()[None, None], (rulesets, 1, 1)),
    "init_tiles": hints[:, None],
    "num_rules": jnp.zeros(rulesets, jnp.uint8),
}
save_bz2_pickle(content, str(Path(__file__).with_name("two_corners.bz2")))
