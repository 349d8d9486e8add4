"""Writes two_goals.bz2, two rulesets: `python results_xminigrid/make_two_goals.py`.

Both have the same two objects; they differ in which of them the agent is to stand beside.
"""

from pathlib import Path

import jax.numpy as jnp
from xminigrid.benchmarks import save_bz2_pickle
from xminigrid.core.constants import TILES_REGISTRY, Colors, Tiles
from xminigrid.core.goals import AgentNearGoal
from xminigrid.core.rules import EmptyRule

objects = jnp.stack(
    [
        TILES_REGISTRY[Tiles.BALL, Colors.RED],
        TILES_REGISTRY[Tiles.SQUARE, Colors.BLUE],
    ]
)
rulesets = len(objects)
content = {
    "goals": jnp.stack([AgentNearGoal(tile=tile).encode() for tile in objects]),
    "rules": jnp.tile(EmptyRule().encode()[None, None], (rulesets, 1, 1)),
    "init_tiles": jnp.tile(objects[None], (rulesets, 1, 1)),
    "num_rules": jnp.zeros(rulesets, jnp.uint8),
}
save_bz2_pickle(content, str(Path(__file__).with_name("two_goals.bz2")))
