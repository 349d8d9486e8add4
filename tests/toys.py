"""Environments for the tests; `toys.py:Team` is also loaded as a custom one."""

import jax
import jax.numpy as jnp

from trxl.environments import Discrete, SingleEnvironment
from trxl.spaces import Grid


class Team(SingleEnvironment):
    """Environment of five steps and three agents, of which agent i is out after step 2 + i."""

    num_agents = 3
    action_space = Discrete(4)
    can_truncate = False
    obs_size = 2

    def reset(self, key):
        return self._observe(jnp.int32(0)), jnp.int32(0)

    def step(self, key, state, action):
        state = state + 1
        return self._observe(state), state, action * 1.0, state == 5, jnp.bool_(False), {}

    def agents_done(self, state):
        return state >= 2 + jnp.arange(3)

    def _observe(self, state):
        return jnp.stack([jnp.arange(3), jnp.full(3, state)], axis=-1).astype(jnp.float32)


class Gridded(SingleEnvironment):
    """Environment of four steps; a cell holds one of three things or none, and may be lit."""

    action_space = Discrete(2)
    grid = Grid(0, 2, 3, ((3,), (1,)))
    num_binary = grid.size
    obs_size = num_binary + 2
    can_truncate = False

    def reset(self, key):
        return self._observe(key, jnp.int32(0)), jnp.int32(0)

    def step(self, key, state, action):
        return self._observe(key, state + 1), state + 1, action * 5.0, state == 3, False, {}

    def _observe(self, key, state):
        things, lights = jax.random.split(key)
        things = jax.random.randint(things, (2, 3), 0, 4)
        lights = jax.random.bernoulli(lights, shape=(6,)) * 1.0
        rest = jnp.stack([state / 4, 0.1])
        return jnp.concatenate([jax.nn.one_hot(things - 1, 3).ravel(), lights, rest])


class Errand(SingleEnvironment):
    """Environment truncated after a drawn number of steps, at most `longest`; rewards: 0 or 1."""

    action_space = Discrete(2)
    obs_size = 2

    def __init__(self, longest=40):
        self._longest = longest

    def reset(self, key):
        left = jax.random.randint(key, (), 1, self._longest + 1)
        return self._observe(left), left

    def step(self, key, state, action):
        reward = jax.random.bernoulli(key, 0.1 + 0.8 * action)
        return self._observe(state - 1), state - 1, reward, jnp.bool_(False), state == 1, {}

    def _observe(self, left):
        return jnp.stack([left / self._longest, 1.0])


class Quest(SingleEnvironment):
    """Trials of three episodes, each terminated or truncated after a drawn number of steps.

    Observation: the episode's number, the steps left, whether a time limit ends it.
    """

    action_space = Discrete(2)
    obs_size = 3
    episodes_per_trial = 3

    def reset(self, key):
        return self._start(key, jnp.int32(0))

    def next_episode(self, key, state):
        return self._start(key, (state["episode"] + 1) % 3)

    def step(self, key, state, action):
        state = {**state, "left": state["left"] - 1}
        over = state["left"] == 0
        info = {"memory_boundary": over & (state["episode"] == 2)}
        reward = jax.random.normal(key) + action
        limit = state["limit"]
        return self._observe(state), state, reward, over & ~limit, over & limit, info

    def _start(self, key, episode):
        left, limit = jax.random.split(key)
        state = {
            "episode": episode,
            "left": jax.random.randint(left, (), 1, 4),
            "limit": jax.random.bernoulli(limit),
        }
        return self._observe(state), state

    def _observe(self, state):
        return jnp.stack([state["episode"], state["left"], state["limit"]]).astype(jnp.float32)


class QuestOfTwo(Quest):
    """`Quest` for two agents with the same observation."""

    num_agents = 2

    def step(self, key, state, action):
        obs, state, reward, *rest = super().step(key, state, action[0])
        return obs, state, jnp.stack([reward, -reward]), *rest

    def agents_done(self, state):
        return jnp.zeros(2, bool)

    def _observe(self, state):
        return jnp.tile(super()._observe(state), (2, 1))


class TwoStates(SingleEnvironment):
    """Environment of two states, in which action 0 leads to state 0 and action 1 to state 1.

    Action 0 gives 0.2 in state 0 and 1 in state 1. Episodes are truncated after 8 steps.
    """

    action_space = Discrete(2)
    obs_size = num_binary = 2

    def reset(self, key):
        state = {"place": jax.random.randint(key, (), 0, 2), "steps": jnp.int32(0)}
        return jax.nn.one_hot(state["place"], 2), state

    def step(self, key, state, action):
        place = state["place"]
        reward = jnp.where(action == 0, jnp.where(place == 0, 0.2, 1.0), 0.0)
        state = {"place": jnp.where(action == 0, 0, 1), "steps": state["steps"] + 1}
        obs = jax.nn.one_hot(state["place"], 2)
        return obs, state, reward, jnp.bool_(False), state["steps"] == 8, {}


class TwoStatesInThousands(TwoStates):
    """`TwoStates` with a thousand times the reward."""

    def step(self, key, state, action):
        obs, state, reward, *rest = super().step(key, state, action)
        return obs, state, 1000 * reward, *rest


class Endless(SingleEnvironment):
    """Environment with a reward of 1 in every step and no end."""

    action_space = Discrete(2)
    obs_size = 1

    def reset(self, key):
        return jnp.zeros(1), jnp.int32(0)

    def step(self, key, state, action):
        return jnp.zeros(1), state + 1, 1.0, jnp.bool_(False), jnp.bool_(False), {}


class Doubles(SingleEnvironment):
    """Environment without dtypes: under JAX_ENABLE_X64 it returns float64 and int64.

    Episodes have four or five steps; the metric `luck` is NaN in those of four.
    """

    action_space = Discrete(2)
    obs_size = 2
    episode_metrics = ("luck",)

    def reset(self, key):
        longer = jax.random.randint(key, (), 0, 2)
        return jnp.zeros(2), {"place": jnp.zeros(2), "longer": longer, "steps": jnp.zeros((), int)}

    def step(self, key, state, action):
        place, steps = state["place"] + jax.random.normal(key, (2,)), state["steps"] + 1
        over = steps == 4 + state["longer"]
        info = {"luck": jnp.where(state["longer"], 2.0, jnp.nan)}
        state = {**state, "place": place, "steps": steps}
        return place, state, jnp.sum(place), over, jnp.bool_(False), info


class Broken(Endless):
    """Environment whose reward is 0 / 0."""

    def step(self, key, state, action):
        obs, state, _, *rest = super().step(key, state, action)
        return obs, state, jnp.float32(0) / (state - 1), *rest
