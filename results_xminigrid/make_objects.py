"""Writes rulesets whose goal is to stand beside one of the four objects in the room.

`python -m results_xminigrid.make_objects` writes 20,000 of them to objects.bz2, beside itself:
those of the kind `trivial` (`environments/rulesets.py`) whose goal is AgentNear, one eleventh of
it, no two with the same goal and the same objects. Which of the four is the goal shows in the
reward alone.
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
