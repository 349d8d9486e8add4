"""Writes two_corners.bz2, two rulesets: `python results_xminigrid/make_two_corners.py`.

An empty room of 5 x 5; one corner is the goal, or the one across, and nothing shows which.
"""

from pathlib import Path

import jax.numpy as jnp
from xminigrid.benchmarks import save_bz2_pickle
from xminigrid.core.constants import TILES_REGISTRY, Colors, Tiles
from xminigrid.core.goals import AgentOnPositionGoal
from xminigrid.core.rules import EmptyRule

corners = jnp.array([(1, 1), (5, 5)])
rulesets = len(corners)
nothing = TILES_REGISTRY[Tiles.EMPTY, Colors.EMPTY]
content = {
    "goals": jnp.stack([AgentOnPositionGoal(position=corner).encode() for corner in corners]),
    "rules": jnp.tile(EmptyRule().encode()[None, None], (rulesets, 1, 1)),
    "init_tiles": jnp.tile(nothing[None, None], (rulesets, 1, 1)),
    "num_rules": jnp.zeros(rulesets, jnp.uint8),
}
save_bz2_pickle(content, str(Path(__file__).with_name("two_corners.bz2")))
