"""Environment names, parameters, and the suites' transitions through the wrappers."""

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from craftax.craftax_env import make_craftax_env_from_name

from trxl.environments import Box, Discrete, craftax, resolve_name
from trxl.errors import ConfigError
from trxl.spaces import obs_space, pack_obs, unpack_obs

from trainer_PPO_trXL import PPO
from wrappers import make_env

NEEDS_NETWORK = "MNISTBandit-bsuite"
REGISTERED = [name for name in gymnax.registered_envs if name != NEEDS_NETWORK]
SLOW_TO_COMPILE = ("Seaquest-MinAtar", "Freeway-MinAtar", "Asterix-MinAtar")
STEPS = 300


def make(name, num_envs=2, **changes):
    return make_env(PPO.check({"ENV_NAME": name, "NUM_MINIBATCHES": 1, **changes}), num_envs)


def replay(env, keys, actions):
    """Plays actions (T, B); returns obs (T+1, B, .), reward, done and info."""

    def run(keys, actions):
        obs, state = env.reset(keys[0])

        def step(state, inputs):
            step_keys, action = inputs
            obs, state, reward, done, info = env.step(step_keys, state, action)
            return state, (obs, reward, done, info)

        _, (later, reward, done, info) = jax.lax.scan(step, state, (keys[1:], actions))
        return jnp.concatenate([obs[None], later]), reward, done, info

    return jax.device_get(jax.jit(run)(keys, actions))


def replay_in_suite(reset, step, keys, actions):
    """Plays actions through a suite's own functions, with its own auto-reset."""

    def run(keys, actions):
        obs, state = jax.vmap(reset)(keys[0])

        def one(state, inputs):
            obs, state, *rest = jax.vmap(step)(inputs[0], state, inputs[1])
            return state, (obs, rest)

        _, (later, rest) = jax.lax.scan(one, state, (keys[1:], actions))
        return jnp.concatenate([obs[None], later]), rest

    return jax.device_get(jax.jit(run)(keys, actions))


def keys_and_actions(space, num_envs, steps=STEPS):
    keys = jax.random.split(jax.random.key(5), (steps + 1, num_envs))
    if isinstance(space, Box):
        unit = jax.random.uniform(jax.random.key(6), (steps, num_envs, space.size))
        low, high = jnp.array(space.low), jnp.array(space.high)
        return keys, low + (high - low) * unit
    return keys, jax.random.randint(jax.random.key(6), (steps, num_envs), 0, space.n)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.weekly) if x in SLOW_TO_COMPILE else x for x in REGISTERED],
)
def test_gymnax_replays_as_through_its_own_api(name):
    """Transitions equal Gymnax's over 300 steps with automatic resets and its split of keys."""
    own, params = gymnax.make(name)
    env = make(name)
    own_space = own.action_space(params)
    if hasattr(own_space, "n"):
        assert env.action_space == Discrete(own_space.n)
    else:
        low, high = (np.broadcast_to(x, own_space.shape) for x in (own_space.low, own_space.high))
        assert env.action_space == Box(tuple(low.tolist()), tuple(high.tolist()))
    keys, actions = keys_and_actions(env.action_space, 2)
    obs, reward, done, info = replay(env, keys, actions)
    expected_obs, (expected_reward, terminated, truncated, own_info) = replay_in_suite(
        lambda key: own.reset(key, params),
        lambda key, state, action: own.step(key, state, action, params),
        *(keys, actions),
    )
    space = own.observation_space(params)

    def flatten(obs):
        if hasattr(space, "n"):
            return np.eye(space.n)[obs]
        return obs.reshape(*obs.shape[:2], -1)

    assert obs.dtype == np.float32
    assert obs.shape == (STEPS + 1, 2, env.obs_size)
    np.testing.assert_array_equal(unpack_obs(pack_obs(obs, obs_space(env)), obs_space(env)), obs)
    binary = hasattr(space, "n") or name.endswith("-MinAtar")
    assert env.num_binary == (env.obs_size if binary else 0)
    if name.endswith("-MinAtar"):
        *sides, kinds = space.shape
        assert env.grid == (0, *sides, ((1,) * kinds,))
        assert set(np.unique(obs)) == {0, 1}
    np.testing.assert_allclose(obs, flatten(expected_obs), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(reward, expected_reward, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(done, terminated | truncated)
    if env.can_truncate:
        np.testing.assert_array_equal(info["terminated"], terminated)
        np.testing.assert_array_equal(info["truncated"], truncated)
        final = flatten(own_info["final_observation"])
        np.testing.assert_allclose(info["final_observation"], final, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(info["terminated"], terminated | truncated)
        assert not info["truncated"].any()


def test_which_tasks_end_with_their_clock():
    ends = [name for name in REGISTERED if not make(name).can_truncate]
    assert sorted(ends) == [
        "BernoulliBandit-misc",
        "DiscountingChain-bsuite",
        "GaussianBandit-misc",
        "MetaMaze-misc",
        "PointRobot-misc",
    ]
    assert make("MetaMaze-misc", BOOTSTRAP_TRUNCATED=True).can_truncate
    assert not make("CartPole-v1", BOOTSTRAP_TRUNCATED=False).can_truncate


def assert_packed(obs, space, share):
    """Asserts lossless packing into this share of the bytes, one per binary entry."""
    np.testing.assert_array_equal(unpack_obs(pack_obs(obs, space), space), obs)
    stored = pack_obs(obs[0, 0], space)
    assert sum(x.nbytes for x in stored) < share * (space.num_binary + stored.real.nbytes)


def achievements_of(env):
    return [key for key in env.episode_metrics if key.startswith("Achievements/")]


@pytest.mark.weekly
def test_craftax_replays_as_through_its_own_api():
    """Transitions of the game alone equal Craftax's own; the next test adds pool and log."""
    own = make_craftax_env_from_name("Craftax-Symbolic-v1", auto_reset=False)
    params = own.default_params
    env = craftax.make("Craftax-Symbolic-v1", {})
    assert env.obs_size == own.observation_space(params).shape[0]
    keys, actions = keys_and_actions(env.action_space, 4)
    obs, (reward, done, truncated, _) = replay_in_suite(env.reset, env.step, keys, actions)
    expected_obs, (expected_reward, expected_done, _) = replay_in_suite(
        lambda key: own.reset(key, params),
        lambda key, state, action: own.step(key, state, action, params),
        *(keys, actions),
    )
    np.testing.assert_allclose(obs, expected_obs, atol=1e-6)
    np.testing.assert_allclose(reward, expected_reward, atol=1e-6)
    np.testing.assert_array_equal(done, expected_done)
    assert done.any()
    assert not truncated.any()
    assert_packed(obs, obs_space(env), 0.1)
    assert len(achievements_of(env)) == 67


@pytest.mark.weekly
def test_craftax_classic_replays_as_through_its_own_api_up_to_the_first_reset():
    own = make_craftax_env_from_name("Craftax-Classic-Symbolic-v1", auto_reset=False)
    params = own.default_params
    env = make("Craftax-Classic-Symbolic-v1", num_envs=4)
    assert env.obs_size == own.observation_space(params).shape[0]
    keys, actions = keys_and_actions(env.action_space, 4)
    obs, reward, done, info = replay(env, keys, actions)
    assert_packed(obs, obs_space(env), 0.16)  # 22 entries are real numbers

    def own_reset(key):
        # The pool splits a reset key: one for the first world, one for the later ones.
        return own.reset(jax.random.split(key)[0], params)

    def own_step(key, state, action):
        return own.step(jax.random.split(key)[0], state, action, params)

    expected_obs, (expected_reward, expected_done, _) = replay_in_suite(
        own_reset, own_step, keys, actions
    )
    assert done.any()
    for b in range(4):
        end = int(np.argmax(expected_done[:, b])) if expected_done[:, b].any() else STEPS
        assert not done[:end, b].any()
        np.testing.assert_allclose(obs[: end + 1, b], expected_obs[: end + 1, b], atol=1e-6)
        np.testing.assert_allclose(reward[: end + 1, b], expected_reward[: end + 1, b], atol=1e-6)
        if end < STEPS:
            assert done[end, b]
            assert info["returned_episode_lengths"][end, b] == end + 1
            np.testing.assert_allclose(
                *(info["returned_episode_returns"][end, b], expected_reward[: end + 1, b].sum()),
                rtol=1e-5,
            )
    assert not info["truncated"].any()
    assert len(achievements_of(env)) == 22


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_craftax_chooses_as_jax_does(shape):
    """Choices equal JAX's for unnormalised, integer, zero and NaN weights."""
    keys = jax.random.split(jax.random.key(0), 500)
    weights = jax.random.uniform(jax.random.key(1), (500, 40)) ** 8
    a = jnp.arange(40) + 3
    for p in (weights, (9 * weights).astype(int), weights > 0.5, 0 * weights, weights / 0):
        ours = jax.vmap(lambda key, p: craftax.choice(key, a, shape, p=p))(keys, p)
        theirs = jax.vmap(lambda key, p: jax.random.choice(key, a, shape, p=p))(keys, p)
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    rows = jnp.arange(12).reshape(6, 2)
    key = keys[0]
    for more in ({}, {"replace": False}, {"p": jnp.ones(6)}):
        np.testing.assert_array_equal(
            craftax.choice(key, rows, (2,), **more), jax.random.choice(key, rows, (2,), **more)
        )


def test_jax_chooses_by_itself_outside_of_craftax():
    own = jax.random.choice
    with craftax.choosing_at_once():
        assert jax.random.choice is craftax.choice
    assert jax.random.choice is own


def test_craftax_by_its_short_name():
    assert resolve_name("craftax") == ("craftax", "Craftax-Symbolic-v1")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("CartPole", ["unknown environment", "CartPole-v1"]),
        ("memorychain-bsuit", ["unknown environment", "MemoryChain-bsuite"]),
        ("Craftax-Symbolik-v1", ["unknown environment", "Craftax-Symbolic-v1"]),
        ("Craftax-Pixels-v1", ["pixels", "Symbolic"]),
        ("Craftax-Classic-Pixels-v1", ["pixels", "Symbolic"]),
    ],
)
def test_a_wrong_name_is_one_line_that_helps(name, words):
    with pytest.raises(ConfigError) as error:
        make(name)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_env_kwargs_override_parameters_before_constructor_arguments():
    env = make("MemoryChain-bsuite", ENV_KWARGS={"memory_length": 7, "num_bits": 3})
    assert env.obs_size == 5
    keys, actions = keys_and_actions(Discrete(2), 2, steps=20)
    _, _, done, info = replay(env, keys, actions)
    np.testing.assert_array_equal(info["returned_episode_lengths"][done], 8)


@pytest.mark.slow
def test_env_kwargs_reach_craftax():
    kwargs = {"max_timesteps": 5, "map_size": [32, 32]}
    env = make("Craftax-Classic-Symbolic-v1", ENV_KWARGS=kwargs)
    shapes = jax.eval_shape(env.reset, jax.random.split(jax.random.key(0), 2))
    assert shapes[1].env_state.running.map.shape == (2, 32, 32)
    game = craftax.make("Craftax-Classic-Symbolic-v1", kwargs)
    _, state = jax.jit(game.reset)(jax.random.key(0))
    step = jax.jit(game.step)
    for t in range(5):
        _, state, _, done, *_ = step(jax.random.key(t), state, 0)
        assert done == (t == 4)


@pytest.mark.parametrize(
    ("name", "env_kwargs", "words"),
    [
        (
            "MemoryChain-bsuite",
            {"memory_lenght": 7},
            ["memory_lenght", "memory_length", "num_bits"],
        ),
        ("MemoryChain-bsuite", {"memory_length": "long"}, ["memory_length", "'long'"]),
        ("MemoryChain-bsuite", {"memory_length": 2.5}, ["memory_length", "2.5"]),
        ("MetaMaze-misc", {"maze_size": 8}, ["MetaMaze-misc", "maze_size"]),
        ("Acrobot-v1", {"available_torque": [1.0]}, ["available_torque"]),
        ("Craftax-Symbolic-v1", {"map": 3}, ["max_timesteps", "map_size"]),
    ],
)
def test_wrong_env_kwargs_are_one_line_that_says_what_exists(name, env_kwargs, words):
    with pytest.raises(ConfigError) as error:
        make(name, ENV_KWARGS=env_kwargs)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_mnist_without_a_network_is_one_line(monkeypatch):
    from gymnax.utils import load_mnist

    def no_network(*_):
        raise OSError("no route to host")

    monkeypatch.setattr(load_mnist, "_download", no_network)
    with pytest.raises(ConfigError, match=r"MNISTBandit-bsuite can't be made: OSError: no route"):
        make(NEEDS_NETWORK)


def test_continuous_actions_are_clipped_to_the_bounds():
    env = make("Pendulum-v1")
    assert env.action_space == Box((-2.0,), (2.0,))
    keys, _ = keys_and_actions(Discrete(1), 2, steps=3)
    far = replay(env, keys, jnp.full((3, 2, 1), 50.0))
    at_bound = replay(env, keys, jnp.full((3, 2, 1), 2.0))
    np.testing.assert_array_equal(far[0], at_bound[0])
