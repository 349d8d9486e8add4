"""MiniGrid's memory task in a corridor that gets longer as the agent succeeds.

`ENV_NAME=results_xminigrid/growing_corridor.py:GrowingCorridor`.
"""

import jax
import jax.numpy as jnp
from xminigrid.core.constants import Tiles

from trxl.environments.xminigrid import Task


class GrowingCorridor(Task):
    """MiniGrid-MemoryS<width>, of a width that grows with success.

    Each environment starts at the first width. After `streak` successes in a row it moves to the
    next width. An agent without memory succeeds in half of the episodes, so it never gets there.

    Logs `success`, `width`, and `success_S<width>`, the success of the episodes of one width.

    Args:
      widths: widths of the room, in the order of training.
      streak: number of successes in a row until the next width.
    """

    def __init__(self, widths=(8, 16, 32), streak=30):
        self.tasks = [Task(f"MiniGrid-MemoryS{width}", {}) for width in widths]
        self.widest = max(widths)
        self.widths, self.streak = jnp.array(widths), streak
        self.max_steps = jnp.array([task._params.max_steps for task in self.tasks])
        self.success_names = [f"success_S{width}" for width in widths]
        super().__init__(f"MiniGrid-MemoryS{self.widest}", {})
        self.episode_metrics = ("success", "width", *self.success_names)

    def reset(self, key):
        return self.start(key, jnp.int32(0), jnp.int32(0))

    def next_episode(self, key, state):
        """Starts the next episode, in another width after a streak."""
        level, streak, timestep = state
        streak = jnp.where(timestep.reward > 0, streak + 1, 0)
        moves = streak >= self.streak
        level = jnp.minimum(level + moves, len(self.tasks) - 1)
        return self.start(key, level, jnp.where(moves, 0, streak))

    def step(self, key, state, action):
        level, streak, timestep = state
        params = self._params.replace(max_steps=self.max_steps[level])
        obs, timestep, reward, terminated, truncated, info = self._step(params, timestep, action)
        info["width"] = self.widths[level].astype(jnp.float32)
        for i, name in enumerate(self.success_names):
            info[name] = jnp.where(level == i, info["success"], jnp.nan)
        return obs, (level, streak, timestep), reward, terminated, truncated, info

    def renderer(self):
        """Returns xminigrid's renderer."""
        render = super().renderer()
        return lambda state: render(state[2])

    def start(self, key, level, streak):
        """Starts an episode of the width of a level."""
        timesteps = [self._widened(task.reset(key)[1]) for task in self.tasks]
        timestep = jax.tree.map(lambda *x: jax.lax.select_n(level, *x), *timesteps)
        return self._observe(timestep), (level, streak, timestep)

    def _widened(self, timestep):
        """Pads a grid (height, width, 2) to the widest, with the tile outside of any grid."""
        grid = timestep.state.grid
        missing = self.widest - grid.shape[1]
        grid = jnp.pad(grid, ((0, 0), (0, missing), (0, 0)), constant_values=Tiles.EMPTY)
        return timestep.replace(state=timestep.state.replace(grid=grid))
