"""Writes rulesets with the goal of standing beside one of the four objects in the room.

`python -m results_xminigrid.make_objects` writes 20,000 of them to objects.bz2, beside this script.
They are the rulesets of kind `trivial` (`trxl/environments/xminigrid_rulesets.py`) with the goal
AgentNear, one eleventh of that kind, without duplicates. Only the reward shows which object is the
goal.
"""

import random
from pathlib import Path

from trxl.environments.xminigrid_rulesets import GOALS, KINDS, NEAR, draw_ruleset, save

NUMBER = 20_000

rng = random.Random(0)
rulesets = {}
while len(rulesets) < NUMBER:
    ruleset = draw_ruleset(rng, KINDS["trivial"])
    if ruleset.goal[0] == GOALS[NEAR][0]:
        rulesets[ruleset.goal, tuple(sorted(ruleset.objects))] = ruleset

save([*rulesets.values()], Path(__file__).with_name("objects.bz2"))
