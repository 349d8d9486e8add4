"""Episode ends within a trial as the agent observes them, by `EPISODE_END`."""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import SMALL

from trxl.distributions import sample_uniformly

from trainer_PPO_trXL import PPO
from wrappers import make_env

QUEST = f"{Path(__file__).with_name('toys.py')}:Quest"
QUEST_OF_TWO = f"{QUEST}OfTwo"
STEPS, ENVS = 60, 8


@cache
def play(episode_end, **changes):
    """Plays STEPS of the toy's trials with random actions; returns arrays (STEPS, rows, ...)."""
    config = {**SMALL, "ENV_NAME": QUEST, "EPISODE_END": episode_end, **changes}
    env = make_env(PPO.check(config), ENVS)
    agents = env.num_agents or 1

    def step(carry, key):
        obs, state = carry
        keys = jnp.repeat(jax.random.split(key, ENVS), agents)
        action = sample_uniformly(env.action_space, obs, keys)
        next_obs, state, reward, done, info = env.step(keys, state, action)
        seen = {"obs": obs, "next": next_obs, "reward": reward, "done": done}
        return (next_obs, state), seen | info

    keys = jax.random.split(jax.random.key(0), STEPS + 1)
    start = jax.jit(env.reset)(jnp.repeat(jax.random.split(keys[0], ENVS), agents))
    assert start[0].shape == (ENVS * agents, env.obs_size)
    return jax.device_get(jax.jit(lambda: jax.lax.scan(step, start, keys[1:])[1])())


@pytest.mark.parametrize("bootstrap", [True, False])
@pytest.mark.parametrize("episode_end", ["none", "append", "step"])
def test_of_several_agents_each_sees_what_one_would(episode_end, bootstrap):
    one = play(episode_end, BOOTSTRAP_TRUNCATED=bootstrap)
    two = play(episode_end, BOOTSTRAP_TRUNCATED=bootstrap, ENV_NAME=QUEST_OF_TWO)
    for name in ("obs", "next", "done", "memory_boundary", "terminated"):
        np.testing.assert_array_equal(two[name], np.repeat(one[name], 2, axis=1))


@pytest.mark.parametrize("bootstrap", [True, False])
def test_beside_has_the_last_observation_beside_the_next_first_one(bootstrap):
    played = play("append", BOOTSTRAP_TRUNCATED=bootstrap)
    plain = play("none", BOOTSTRAP_TRUNCATED=bootstrap)
    np.testing.assert_array_equal(played["obs"][..., :3], plain["obs"])
    boundary, done = plain["memory_boundary"], plain["done"]
    assert (done & boundary).any()
    assert (done & ~boundary).sum() > 50
    shown = (done & ~boundary)[..., None]
    np.testing.assert_array_equal(played["next"][..., 3:], plain["final_observation"] * shown)
    np.testing.assert_array_equal(played["final_observation"][..., :3], plain["final_observation"])
    assert not played["final_observation"][..., 3:].any()
    assert not played["obs"][0, :, 3:].any()


def test_a_step_of_its_own_shows_the_end_and_changes_nothing_else():
    played = play("step")
    episode, left, _ = np.moveaxis(played["obs"], -1, 0)
    done, boundary = played["done"], played["memory_boundary"]
    ends = done & ~boundary
    assert ends[:-2].sum() > 30
    for t, b in zip(*np.nonzero(ends[:-2]), strict=True):
        # The last observation comes once more, with reward 0, before the next episode.
        assert left[t + 1, b] == 0
        np.testing.assert_array_equal(played["obs"][t + 1, b], played["final_observation"][t, b])
        assert played["reward"][t + 1, b] == 0
        assert not done[t + 1, b]
        assert episode[t + 2, b] == episode[t, b] + 1
        assert left[t + 2, b] >= 1
    for t, b in zip(*np.nonzero(boundary[:-1]), strict=True):
        assert done[t, b]
        assert (episode[t + 1, b], left[t + 1, b] >= 1) == (0, True)
    assert (left == 0).sum() == ends[:-1].sum()


@pytest.mark.parametrize("episode_end", ["none", "append", "step"])
def test_without_a_trials_memory_nothing_outlasts_an_episode(episode_end):
    played = play(episode_end, TRIAL_MEMORY=False, PREV_ACTION_REWARD=True)
    kept = play(episode_end, PREV_ACTION_REWARD=True)
    assert played["obs"].shape == kept["obs"].shape
    assert "memory_boundary" not in played
    done = played["done"]
    assert done.sum() > 50
    action, reward = played["next"][..., :2], played["next"][..., -1]
    assert not action[done].any()
    assert not reward[done].any()
    assert (action[~done].sum(axis=-1) == 1).all()
    if episode_end == "append":
        assert not played["next"][..., 5:-1].any()
    else:
        np.testing.assert_array_equal(np.diff(played["next"][..., 2], axis=0)[done[1:]] % 3, 1)


def test_the_previous_action_and_reward_last_for_a_trial():
    played = play("none", PREV_ACTION_REWARD=True)
    action, reward = played["next"][..., :2], played["next"][..., -1]
    boundary = played["memory_boundary"]
    assert (played["done"] & ~boundary).sum() > 50
    np.testing.assert_array_equal(action.sum(axis=-1), ~boundary)
    np.testing.assert_array_equal(reward, played["reward"] * ~boundary)


def test_without_trials_nothing_is_shown():
    chain = {**SMALL, "ENV_NAME": "MemoryChain-bsuite"}
    sizes = {
        make_env(PPO.check({**chain, "EPISODE_END": end}), 4).obs_size
        for end in ("none", "append", "step")
    }
    assert len(sizes) == 1
