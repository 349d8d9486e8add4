"""Batching, reset strategies and the log of returns, on a toy environment."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Team

from trxl.spaces import Box, Discrete, mask_size

from wrappers import (
    AutoReset,
    FlattenAgents,
    LogWrapper,
    OptimisticReset,
    PreviousActionReward,
    ResetPool,
    SingleEnvironment,
)

B = 6


class ToyState(NamedTuple):
    world: jax.Array  # () uint32, drawn from the reset key
    time: jax.Array


class Toy(SingleEnvironment):
    """Environment that action 1 terminates and action 2 truncates; observes (world, time)."""

    action_space = Discrete(3)

    def reset(self, key):
        state = ToyState(jax.random.bits(key), jnp.int32(0))
        return self._observe(state), state

    def step(self, key, state, action):
        state = state._replace(time=state.time + 1)
        info = {"luck": jax.random.uniform(key)}
        reward = state.time * 10
        return self._observe(state), state, reward, action == 1, action == 2, info

    def _observe(self, state):
        return jnp.stack([state.world, state.time.astype(jnp.uint32)])


STRATEGIES = {
    "auto": lambda: AutoReset(Toy(), B),
    "optimistic": lambda: OptimisticReset(Toy(), B, ratio=2),
    "pool": lambda: ResetPool(Toy(), B, batch=2),
}


def play(env, actions, seed=0):
    """Plays actions (T, B); returns obs (T+1, B, 2), rewards, dones and infos (T, B)."""
    keys = jax.random.split(jax.random.key(seed), B)
    obs, state = jax.jit(env.reset)(keys)

    def step(state, inputs):
        t, action = inputs
        step_keys = jax.vmap(lambda key: jax.random.fold_in(key, t))(keys)
        obs, state, reward, done, info = env.step(step_keys, state, action)
        return state, (obs, reward, done, info)

    inputs = jnp.arange(len(actions)), jnp.asarray(actions)
    _, (later, reward, done, info) = jax.jit(lambda s: jax.lax.scan(step, s, inputs))(state)
    return np.concatenate([obs[None], later]), *jax.device_get((reward, done, info))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_finished_environment_starts_anew_in_that_step_and_the_others_go_on(strategy):
    actions = np.zeros((6, B), int)
    actions[2, 1] = 1
    actions[2, 4] = 2
    actions[4, 1] = 1
    obs, _, done, info = play(STRATEGIES[strategy](), actions)
    world, time = obs[..., 0], obs[..., 1]
    np.testing.assert_array_equal(done, actions > 0)
    np.testing.assert_array_equal(info["terminated"], actions == 1)
    np.testing.assert_array_equal(info["truncated"], actions == 2)
    np.testing.assert_array_equal(time[:, 0], np.arange(7))
    np.testing.assert_array_equal(time[:, 1], [0, 1, 2, 0, 1, 0, 1])
    np.testing.assert_array_equal(time[:, 4], [0, 1, 2, 0, 1, 2, 3])
    for b, episodes in {0: 1, 1: 3, 2: 1, 3: 1, 4: 2, 5: 1}.items():
        assert len(np.unique(world[:, b])) == episodes
        np.testing.assert_array_equal(np.diff(world[:, b].astype(float)) != 0, done[:, b])
    # The final observation belongs to the old episode.
    np.testing.assert_array_equal(info["final_observation"][2, 1], [world[2, 1], 3])
    assert len(np.unique(world)) == B + 3


def test_the_log_has_returns_and_lengths_of_the_finished_episodes():
    actions = np.zeros((6, B), int)
    actions[1, 0] = 1
    actions[4, 0] = 2
    env = LogWrapper(AutoReset(Toy(), B))
    _, reward, done, info = play(env, actions)
    assert env.episode_metrics == ("returned_episode_returns", "returned_episode_lengths")
    np.testing.assert_array_equal(info["returned_episode_returns"][done], [10 + 20, 10 + 20 + 30])
    np.testing.assert_array_equal(info["returned_episode_lengths"][done], [2, 3])
    np.testing.assert_array_equal(reward[:, 0], [10, 20, 10, 20, 30, 10])


def test_equal_keys_give_equal_transitions_under_every_strategy():
    actions = np.zeros((5, B), int)
    lucks = [play(make(), actions)[3]["luck"] for make in STRATEGIES.values()]
    np.testing.assert_array_equal(lucks[0], lucks[1])
    np.testing.assert_array_equal(lucks[0], lucks[2])


@pytest.mark.parametrize("batch", [1, 2, 4, B])
def test_no_world_of_the_pool_is_played_twice_even_when_it_runs_dry(batch):
    """Worlds stay unique when all environments end in every step, far beyond the pool's size."""
    obs, _, done, _ = play(ResetPool(Toy(), B, batch), np.ones((9, B), int))
    assert done.all()
    assert len(np.unique(obs[..., 0])) == 10 * B


def test_a_world_of_the_pool_depends_on_its_environment_and_episode_alone():
    rng = np.random.default_rng(0)
    actions = (rng.random((40, B)) < 0.3).astype(int)
    others = (rng.random((40, B)) < 0.6).astype(int)
    others[:, 2] = actions[:, 2]
    obs = play(ResetPool(Toy(), B, 2), actions)[0]
    np.testing.assert_array_equal(obs, play(ResetPool(Toy(), B, 5), actions)[0])
    with_others = play(ResetPool(Toy(), B, 2), others)[0]
    np.testing.assert_array_equal(obs[:, 2], with_others[:, 2])


def test_the_pool_generates_one_world_per_episode():
    """The pool makes two worlds per environment at the start, then a batch per batch used."""
    generated = []

    class Counting(Toy):
        def reset(self, key):
            jax.debug.callback(lambda _: generated.append(1), jax.random.bits(key))
            return super().reset(key)

    rng = np.random.default_rng(0)
    actions = np.zeros((60, B), int)
    actions[np.arange(60), np.arange(60) % B] = rng.random(60) < 0.5  # one per step: never dry
    play(ResetPool(Counting(), B, batch=3), actions)
    jax.effects_barrier()
    episodes = int(actions.sum())
    assert 2 * B + episodes - 3 <= len(generated) <= 2 * B + episodes


def test_optimistic_resets_share_worlds_only_when_more_finish_than_were_made():
    three = np.zeros((1, B), int)
    three[0, [0, 3, 5]] = 1  # B / ratio = 3 worlds
    world = play(OptimisticReset(Toy(), B, 2), three)[0][1, :, 0]
    assert len(np.unique(world)) == B
    all_of_them = np.ones((1, B), int)
    world = play(OptimisticReset(Toy(), B, 2), all_of_them)[0][1, :, 0]
    assert len(np.unique(world)) == 3


def test_the_pools_of_seeds_under_vmap_are_those_of_the_seeds_alone():
    """Pools equal those alone for seeds that end often, never, rarely and sometimes."""
    rng = np.random.default_rng(1)
    actions = jnp.stack([rng.random((30, B)) < often for often in (0.9, 0.0, 0.1, 0.4)])
    env = ResetPool(Toy(), B, 2)

    def run(key, actions):
        keys = jax.random.split(key, B)
        obs, state = env.reset(keys)

        def step(state, action):
            obs, state, *_ = env.step(keys, state, action)
            return state, obs

        return obs, *jax.lax.scan(step, state, actions.astype(int))

    keys = jax.random.split(jax.random.key(0), 4)
    _, together, all_obs = jax.jit(jax.vmap(run))(keys, actions)
    alone = jax.jit(run)
    for i, key in enumerate(keys):
        _, state, obs = alone(key, actions[i])
        np.testing.assert_array_equal(all_obs[i], obs)
        running = jax.tree.map(lambda x, i=i: x[i], together.running)
        jax.tree.map(np.testing.assert_array_equal, running, state.running)


def test_a_pool_that_another_seed_makes_generate_replaces_its_used_worlds_early():
    """The seeds' shared loop replaces used worlds also of a seed that isn't due."""
    env = ResetPool(Toy(), B, 2)
    keys = jax.random.split(jax.random.key(0), (2, B))
    _, state = jax.vmap(env.reset)(keys)
    step = jax.jit(jax.vmap(env.step))
    all_and_one = jnp.zeros((2, B), int).at[0].set(1).at[1, 0].set(1)
    _, state, *_ = step(keys, state, all_and_one)
    np.testing.assert_array_equal(state.pool.used.sum(axis=1), [B, 1])
    _, state, *_ = step(keys, state, jnp.zeros((2, B), int))
    np.testing.assert_array_equal(state.pool.used.sum(axis=1), [0, 0])
    episode = np.where(all_and_one, 2, 1)
    np.testing.assert_array_equal(state.pool.episode, episode)


def test_agents_are_rows_with_their_own_actions_and_their_teams_end():
    env = FlattenAgents(LogWrapper(AutoReset(Team(), 2)))
    assert env.num_rows == 6
    keys = jax.random.split(jax.random.key(0), 6)
    obs, state = env.reset(keys)
    action = jnp.arange(6) % 4
    np.testing.assert_array_equal(obs[:, 0], [0, 1, 2, 0, 1, 2])
    for t in range(1, 11):
        active = np.asarray(env.agents_active(state))
        np.testing.assert_array_equal(active, np.tile((t - 1) % 5 < 2 + np.arange(3), 2))
        obs, state, reward, done, info = env.step(keys, state, action)
        np.testing.assert_array_equal(reward, action)
        np.testing.assert_array_equal(obs[:, 1], np.full(6, t % 5))
        assert (done == (t % 5 == 0)).all()
        np.testing.assert_array_equal(info["returned_episode"], done & (np.arange(6) % 3 == 0))
        if t % 5 == 0:
            returns = 5 * np.asarray(action).reshape(2, 3).mean(axis=1)
            np.testing.assert_allclose(info["returned_episode_returns"], np.repeat(returns, 3))
            np.testing.assert_array_equal(info["returned_episode_lengths"], 5)


@pytest.mark.parametrize("space", [Discrete(3), Discrete(2, masked=True), Box((-1.0,), (1.0,))])
def test_the_previous_action_and_reward_are_part_of_the_observation(space):
    class Spaced(Toy):
        action_space = space
        obs_size = 2

        def step(self, key, state, action):
            ends = jnp.where(jnp.ravel(action)[0] > 0, 1, 0)
            return super().step(key, state, ends)

        def _observe(self, state):
            return super()._observe(state).astype(jnp.float32)

    env = PreviousActionReward(LogWrapper(AutoReset(Spaced(), B)))
    outputs, mask = space.num_outputs, mask_size(space)
    assert env.obs_size == 2 + outputs + 1
    shape = (5, B, 1) if isinstance(space, Box) else (5, B)
    actions = np.random.default_rng(0).integers(0, 2, shape)
    obs, reward, done, info = play(env, actions)
    encoded = actions if isinstance(space, Box) else np.eye(outputs)[actions]
    previous = slice(mask, mask + outputs)
    np.testing.assert_array_equal(obs[0][:, previous], 0)
    np.testing.assert_array_equal(obs[1:][..., previous], np.where(done[..., None], 0, encoded))
    np.testing.assert_array_equal(obs[1:][..., -1], np.where(done, 0, reward))
    np.testing.assert_array_equal(info["final_observation"][..., previous], encoded)
    np.testing.assert_array_equal(info["final_observation"][..., -1], reward)
    plain = play(LogWrapper(AutoReset(Spaced(), B)), actions)[0]
    np.testing.assert_array_equal(
        np.delete(obs, [*range(mask, mask + outputs), -1], axis=-1), plain
    )
