"""Trials in which exploring costs in the first episodes and pays in the later ones.

`ENV_NAME=results_xminigrid/bandit_of_rooms.py:BanditOfRooms`.
"""

import jax
import jax.numpy as jnp

from trxl.environments import Discrete, SingleEnvironment


class BanditOfRooms(SingleEnvironment):
    """Hall with doors to several rooms, some steps away; an episode ends in a room.

    The first room always pays `sure`. One of the others, the same in all episodes of a trial, pays
    1, the rest pay 0. Within one episode, trying another door is worth 1 / (rooms - 1), less than
    `sure`. An agent that maximizes the return of a trial tries the doors in turn and goes back to
    the 1.

    In the hall, the action is a door; later it has no effect. The observation is the agent's place.

    Args:
      rooms: number of rooms.
      sure: reward of the first room, more than 1 / (rooms - 1).
      steps: number of steps from the hall to a room.
      episodes_per_trial: number of episodes with the 1 in the same room.
    """

    previous_action_reward = True

    def __init__(self, rooms=5, sure=0.3, steps=2, episodes_per_trial=6):
        self.rooms, self.sure, self.steps = rooms, sure, steps
        self.episodes_per_trial = episodes_per_trial
        self.action_space = Discrete(rooms)
        self.obs_size = 1 + rooms * steps
        names = (f"trial_return/episode_{i + 1}" for i in range(episodes_per_trial))
        self.episode_metrics = ("tries_unsure", *names)

    def reset(self, key):
        return self._start(jax.random.randint(key, (), 1, self.rooms), jnp.int32(0))

    def next_episode(self, key, state):
        """Starts the next episode of the trial, or the first of the next trial."""
        episode = (state["episode"] + 1) % self.episodes_per_trial
        fresh = jax.random.randint(key, (), 1, self.rooms)
        return self._start(jnp.where(episode, state["point"], fresh), episode)

    def step(self, key, state, action):
        door = jnp.where(state["walked"] == 0, action, state["door"])
        state = {**state, "door": door, "walked": state["walked"] + 1}
        there = state["walked"] > self.steps
        worth = jnp.where(door == 0, self.sure, (door == state["point"]).astype(jnp.float32))
        reward = jnp.where(there, worth, 0.0)
        last = state["episode"] == self.episodes_per_trial - 1
        info = {
            f"trial_return/episode_{i + 1}": jnp.where(state["episode"] == i, reward, jnp.nan)
            for i in range(self.episodes_per_trial)
        }
        info["tries_unsure"] = (door != 0).astype(jnp.float32)
        info["memory_boundary"] = there & last
        return self._observe(state), state, reward, there, jnp.bool_(False), info

    def _start(self, point, episode):
        state = {"point": point, "episode": episode, "door": jnp.int32(0), "walked": jnp.int32(0)}
        return self._observe(state), state

    def _observe(self, state):
        behind = 1 + state["door"] * self.steps + state["walked"] - 1
        place = jnp.where(state["walked"] == 0, 0, jnp.minimum(behind, self.obs_size - 1))
        return jax.nn.one_hot(place, self.obs_size)
