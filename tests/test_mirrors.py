"""Rows that see an environment mirrored: what they hold, and that they only learn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import QUICK

from trxl.environments import Discrete, Mirror, SingleEnvironment, craftax, xminigrid
from trxl.environments.validation import check_environment
from trxl.errors import ConfigError
from trxl.rollout import init_rollout, rollout
from trxl.spaces import obs_space
from trxl.training import init_params

import trainer_Muesli_trXL
import trainer_PPO_trXL
from evaluate_PPO_trXL import make_agent
from trainer_PPO_trXL import PPO, make_train
from transformerXL import make_network
from wrappers import make_env


class Line(SingleEnvironment):
    """Line with a random start, on which actions 0 and 1 walk; observes the place and the time."""

    action_space = Discrete(3)
    obs_size = 2
    mirrors = (
        Mirror(lambda obs: obs.at[0].multiply(-1), lambda way: jnp.where(way < 2, 1 - way, way)),
    )

    def reset(self, key):
        place = jax.random.randint(key, (), -3, 4)
        return jnp.stack([place, 0.0]), (place, jnp.int32(0))

    def step(self, key, state, action):
        place, time = state[0] + jnp.array([-1, 1, 0])[action], state[1] + 1
        obs = jnp.stack([place, time / 5.0])
        return obs, (place, time), jnp.abs(place) * 1.0, time == 5, jnp.bool_(False), {}


LINE = {**QUICK, "ENV_NAME": f"{__file__}:Line", "MIRRORS": True}
MUESLI_LINE = {**LINE, "MODEL_SIZE": 16, "VALUE_BINS": 11, "VALUE_LIMIT": 5.0, "MODEL_STEPS": 1}


def test_mirrored_rows_see_what_was_played_mirrored():
    config = PPO.check(LINE)
    env = make_env(config, 4)
    network = make_network(config, env.action_space, obs_space(env))
    params = init_params(config, network, env.obs_size, jax.random.key(0))
    state = init_rollout(config, env, jax.random.key(1), 0)
    state, _, collected = rollout(config, env, network, params, state, {})
    steps = jax.tree.map(
        lambda x: np.asarray(x).reshape(QUICK["NUM_STEPS"], 4, 2, *x.shape[2:]),
        collected.trajectory,
    )
    played, mirrored = (jax.tree.map(lambda x, i=i: x[:, :, i], steps) for i in (0, 1))
    np.testing.assert_array_equal(mirrored.obs.real, played.obs.real * [-1, 1])
    np.testing.assert_array_equal(mirrored.action, np.array([1, 0, 2])[played.action])
    assert set(np.unique(played.action)) == {0, 1, 2}
    for same in ("log_prob", "reward", "done", "terminated", "reach"):
        np.testing.assert_array_equal(getattr(mirrored, same), getattr(played, same))
    assert not np.allclose(mirrored.value, played.value)
    assert not np.allclose(mirrored.layer_inputs, played.layer_inputs)
    np.testing.assert_array_equal(played.returned_episode, played.done)
    assert played.done.any()
    assert not mirrored.returned_episode.any()
    np.testing.assert_array_equal(state.obs[1::2], state.obs[::2] * jnp.array([-1, 1]))


@pytest.mark.parametrize("trainer", [trainer_PPO_trXL, trainer_Muesli_trXL])
def test_training_counts_the_episodes_of_rows_that_play(trainer):
    config = LINE if trainer is trainer_PPO_trXL else MUESLI_LINE
    metrics = jax.jit(trainer.make_train(config))(jax.random.key(0))["metrics"]
    # 4 environments of 16 steps an update, and episodes of 5
    np.testing.assert_array_equal(metrics["num_episodes"][:2], [12, 12])
    assert np.isfinite(metrics["total_loss"]).all()


def test_a_trained_agent_plays_without_mirrored_rows():
    train_state = jax.jit(make_train(LINE))(jax.random.key(0))["runner_state"].train_state
    agent = make_agent(LINE, train_state)
    assert agent.environment(3).num_rows == 3
    assert not agent.config["MIRRORS"]


def test_mirrors_need_an_environment_that_names_them():
    with pytest.raises(ConfigError, match="it out for MemoryChain-bsuite"):
        make_train({**QUICK, "MIRRORS": True})


@pytest.mark.parametrize(
    ("mirrors", "message"),
    [
        (Mirror(lambda obs: obs, lambda way: way), "mirrors must be a tuple of Mirror"),
        ((Mirror(lambda obs: obs[:1], lambda way: way),), "Line.mirrors"),
        ((Mirror(lambda obs: obs, lambda way: way / 2),), "Line.mirrors.*action"),
        ((Mirror(lambda obs: obs.there, lambda way: way),), "Line.mirrors raises AttributeError"),
    ],
)
def test_wrong_mirrors_are_one_line(mirrors, message):
    env = Line()
    env.mirrors = mirrors
    with pytest.raises(ConfigError, match=message):
        check_environment("Line", env)


def flipped(state, axes):
    """Returns a state of Craftax whose world is flipped along axes of its maps."""
    size = state.map.shape[-1]

    def flip_position(position):
        return position.at[..., list(axes)].set(size - 1 - position[..., list(axes)])

    changes = {"player_position": flip_position(state.player_position)}
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if field.name in ("map", "item_map", "light_map"):
            changes[field.name] = jnp.flip(value, [axis - 2 for axis in axes])
        elif hasattr(value, "position"):
            changes[field.name] = value.replace(position=flip_position(value.position))
    left, right, up, down = (1, 2, 3, 4)
    turned = {left: right, right: left} if 1 in axes else {}
    turned |= {up: down, down: up} if 0 in axes else {}
    direction = int(state.player_direction)
    return state.replace(**changes, player_direction=turned.get(direction, direction))


@pytest.mark.slow
@pytest.mark.parametrize("name", craftax.NAMES)
def test_craftax_mirrors_what_it_shows_of_a_flipped_world(name):
    env = craftax.make(name, {})
    _, state = jax.jit(env.reset)(jax.random.key(0))
    observe = jax.jit(env._env.get_obs)
    for direction in (1, 2, 3, 4):
        state = state.replace(player_direction=direction)
        obs = observe(state)
        for mirror, axes in zip(env.mirrors, ((1,), (0,), (0, 1)), strict=True):
            seen = observe(flipped(state, axes))
            np.testing.assert_array_equal(mirror.obs(obs), seen)
            assert not np.array_equal(obs, seen)
            # A walk faces its way, and other actions are the same.
            facing = int(flipped(state, axes).player_direction)
            assert mirror.action(jnp.int32(direction)) == facing
    for action in (0, *range(5, env.action_space.n)):
        assert all(mirror.action(jnp.int32(action)) == action for mirror in env.mirrors)


def upside_down(timestep):
    """Returns a state of MiniGrid whose world has its rows flipped."""
    state = timestep.state
    height = state.grid.shape[0]

    def flip_position(position):
        return position.at[0].set(height - 1 - position[0])

    direction = jnp.array([2, 1, 0, 3])[state.agent.direction]
    agent = state.agent.replace(position=flip_position(state.agent.position), direction=direction)
    carry = jax.tree.map(flip_position, state.carry)
    state = state.replace(grid=state.grid[::-1], agent=agent, carry=carry)
    return timestep.replace(state=state)


@pytest.mark.parametrize("name", ["MiniGrid-MemoryS8", "MiniGrid-Empty-5x5"])
def test_minigrid_steps_alike_in_a_world_upside_down(name):
    pytest.importorskip("xminigrid")
    env = xminigrid.make(name, {"max_steps": 1000})
    (mirror,) = env.mirrors
    step = jax.jit(env.step)
    _, state = env.reset(jax.random.key(0))
    other = upside_down(state)
    terminated = False
    actions = iter(np.random.default_rng(0).choice(6, 1000, p=[0.5, 0.15, 0.15, 0.1, 0.05, 0.05]))
    while not terminated:
        action = jnp.int32(next(actions))
        obs, state, reward, terminated, *_ = step(jax.random.key(0), state, action)
        seen, other, *same, _, _ = step(jax.random.key(0), other, mirror.action(action))
        np.testing.assert_array_equal(mirror.obs(obs), seen)
        assert same == [reward, terminated]


def test_even_views_have_no_mirror():
    pytest.importorskip("xminigrid")
    assert xminigrid.make("MiniGrid-Empty-5x5", {"view_size": 4}).mirrors == ()
