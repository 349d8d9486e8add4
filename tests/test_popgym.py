"""POPGym's tasks equal the original, given its random draws."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from support import QUICK, run

from trxl.environments import popgym, resolve_name
from trxl.environments.popgym_boards import ship_places
from trxl.errors import ConfigError

from trainer_PPO_trXL import PPO
from wrappers import make_env

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # from the labyrinths and old imports
    import popgym as original
    from popgym.wrappers import Antialias, PreviousAction

ACTIONS = 1000


def make_original(name):
    (found,) = (env for env in original.envs.ALL if env.__name__ == name)
    env = found()
    if hasattr(env, "noise_sigma"):
        env.noise_sigma = np.zeros_like(env.noise_sigma)
    return env


def start(theirs, rng):
    """Starts an episode of the original and returns the same state for ours."""
    theirs.reset(seed=int(rng.integers(2**31)))
    name = type(theirs).__name__
    ours = {"steps": 0}
    if name.startswith(("RepeatFirst", "RepeatPrevious", "Autoencode")):
        return {"cards": theirs.deck.suits_idx[theirs.deck.idx][::-1], "dealt": 1}
    if name.startswith("HigherLower"):
        return {"cards": theirs.deck.ranks_idx[theirs.deck.idx][::-1], "dealt": 1}
    if name.startswith("CountRecall"):
        decks = {"cards": theirs.value_deck, "queries": theirs.query_deck}
        orders = {key: theirs.deck_idx_type[deck.idx][::-1] for key, deck in decks.items()}
        return {**orders, "dealt": 1}
    if name.startswith("Concentration"):
        number = len(theirs.state)
        return {**ours, "cards": theirs.state, "up": np.zeros(number, bool), "turned": number}
    if name.startswith("Battleship"):
        board = theirs.board.astype(bool)
        return {**ours, "board": board, "shot": np.zeros_like(board)}
    if name.startswith("MineSweeper"):
        mine = theirs.hidden_grid == 1
        return {**ours, "mine": mine, "viewed": np.zeros_like(mine)}
    if name.startswith("MultiarmedBandit"):
        theirs.bandits[:] = theirs.bandits < 0.5  # arms pay always or never
        return {**ours, "chances": theirs.bandits.copy()}
    return {**ours, "physics": None}


def physics_of(theirs, like):
    """Returns the original's CartPole or Pendulum state as Gymnax's."""
    names = ("x", "x_dot", "theta", "theta_dot")[-len(theirs.state) :]
    return like.replace(**{k: np.float32(v) for k, v in zip(names, theirs.state, strict=True)})


def flat(space, value):
    """Returns a Gymnasium observation as our vector."""
    if isinstance(space, spaces.Discrete):
        return np.eye(space.n)[int(value)]
    if isinstance(space, spaces.MultiDiscrete):
        each = zip(space.nvec.reshape(-1), np.reshape(value, -1), strict=True)
        return np.concatenate([np.eye(int(n))[int(x)] for n, x in each])
    if isinstance(space, spaces.Tuple):
        return np.concatenate([flat(s, v) for s, v in zip(space, value, strict=True)])
    return np.asarray(value)


def choose(theirs, rng):
    """Returns an action, often a good one, so that episodes are won and lost."""
    action = theirs.action_space.sample()
    name = type(theirs).__name__
    if rng.random() < 0.3:
        return action
    if name.startswith("Battleship"):
        return rng.permutation(np.argwhere(theirs.board & (1 - theirs.guesses)))[0]
    if name.startswith("MineSweeper"):
        return rng.permutation(np.argwhere(theirs.hidden_grid == 0))[0]
    if name.startswith("Concentration"):
        cards, turned = theirs.state, theirs.deck["in_play_idx"]
        good = np.delete(np.arange(len(cards)), theirs.deck["face_up_idx"])
        if turned:
            good = good[(cards[good] == cards[turned[0]]) & (good != turned[0])]
        return rng.choice(good) if len(good) else action
    return action


def play_original(theirs, first):
    """Plays ACTIONS steps: episode begins, state, action, observation, reward, terminated, over.

    The state is the episode's first, with CartPole's or Pendulum's current numbers.
    """
    rng = np.random.default_rng(0)
    theirs.action_space.seed(0)
    steps, over = [], True
    for _ in range(ACTIONS):
        begins = over
        if begins:
            begun = start(theirs, rng)
            if "physics" in begun:
                begun["physics"] = first["physics"]
            begun = jax.tree.map(lambda x, like: np.asarray(x, like.dtype), begun, first)
        if "physics" in begun:  # so that rounding does not add up
            begun = {**begun, "physics": physics_of(theirs, begun["physics"])}
        action = choose(theirs, rng)
        obs, reward, terminated, truncated = theirs.step(action)[:4]
        over = terminated or truncated
        obs = flat(theirs.observation_space, obs)
        steps.append((begins, begun, np.asarray(action), obs, reward, terminated, over))
    return jax.tree.map(lambda *x: np.stack(x), *steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", popgym.NAMES)
def test_a_thousand_actions_give_what_the_original_gives(name):
    theirs, ours = make_original(name), popgym.bare(name)
    ours.noise = 0.0
    first = jax.tree.map(jnp.asarray, ours.reset(jax.random.key(0))[1])
    begins, begun, action, *expected = play_original(theirs, first)

    def step(state, inputs):
        begins, begun, action = inputs
        state = jax.tree.map(lambda new, old: jnp.where(begins, new, old), begun, state)
        if "physics" in state:
            physics = begun["physics"].replace(time=state["physics"].time)
            state = {**state, "physics": physics}
        obs, state, *ends, _ = ours.step(jax.random.key(0), state, action)
        return state, (obs, *ends)

    play = jax.jit(lambda *inputs: jax.lax.scan(step, first, inputs)[1])
    obs, reward, terminated, truncated = jax.device_get(play(begins, begun, action))
    their_obs, their_reward, their_terminated, over = expected
    np.testing.assert_allclose(obs, their_obs, atol=1e-5)
    np.testing.assert_allclose(reward, their_reward, rtol=1e-5, atol=1e-7)
    # An episode that ends at its time limit is terminated.
    np.testing.assert_array_equal(terminated, their_terminated)
    np.testing.assert_array_equal(terminated | truncated, over)
    assert (reward > 0).any() or "Pendulum" in name
    assert over.any()


@pytest.mark.parametrize("name", [f"{family}Easy" for family in popgym.FAMILIES])
def test_the_first_observation_and_its_wrappers_are_the_originals(name):
    theirs, ours = make_original(name), popgym.make(name, {})
    obs, _ = ours.reset(jax.random.key(0))
    wrapped = Antialias(PreviousAction(theirs))
    first, _ = wrapped.reset(seed=0)
    *core, action, is_first = first
    space = theirs.observation_space
    core = tuple(core) if isinstance(space, spaces.Tuple) else core[0]
    expected = [[is_first], flat(theirs.action_space, action), flat(space, core)]
    assert [len(x) for x in expected][1] == ours.action_space.num_outputs
    expected = np.concatenate(expected)
    assert obs.shape == expected.shape == (ours.obs_size,)
    known = 1 + ours.action_space.num_outputs  # the rest is drawn at random
    np.testing.assert_array_equal(obs[:known], expected[:known])
    if space.contains(0) and name.startswith(("Battleship", "MineSweeper", "Multiarmed")):
        np.testing.assert_array_equal(obs, expected)
    # After a step the observation is not the first and has the action that was taken.
    chosen = theirs.action_space.sample()
    *_, action, is_first = wrapped.step(chosen)[0]
    _, state = ours.reset(jax.random.key(0))
    obs, *_ = ours.step(jax.random.key(1), state, jnp.asarray(chosen))
    assert obs[0] == is_first == 0
    np.testing.assert_allclose(obs[1:known], flat(theirs.action_space, action), atol=1e-6)


def test_ships_lie_as_often_as_in_the_original():
    rng = np.random.default_rng(0)
    theirs = make_original("BattleshipEasy")
    boards = []
    for _ in range(3000):
        theirs.reset(seed=int(rng.integers(2**31)))
        boards.append(theirs.board.copy())
    reset = jax.jit(jax.vmap(popgym.bare("BattleshipEasy").reset))
    _, state = reset(jax.random.split(jax.random.key(0), 10_000))
    ours = np.asarray(state["board"])
    assert (ours.sum(axis=(1, 2)) == 12).all()
    expected, found = np.mean(boards, axis=0), ours.mean(axis=0)
    error = np.sqrt(expected * (1 - expected) * (1 / 3000 + 1 / 10_000))
    assert np.abs((found - expected) / error).max() < 4.5


def test_a_ship_fits_where_nothing_lies_in_its_way():
    rng = np.random.default_rng(0)
    board = rng.random((6, 6)) < 0.2
    for size in (2, 4):
        fits = np.asarray(ship_places(jnp.asarray(board), size))
        for row, column in np.ndindex(6, 6):
            down = board[row : row + size, column]
            right = board[row, column : column + size]
            assert fits[0, row, column] == (len(down) == size and not down.any())
            assert fits[1, row, column] == (len(right) == size and not right.any())


def test_what_is_drawn_is_drawn_as_it_should_be():
    keys = jax.random.split(jax.random.key(0), 10_000)
    _, state = jax.vmap(popgym.bare("MineSweeperEasy").reset)(keys)
    mines = np.asarray(state["mine"]).reshape(-1, 16)
    assert (mines.sum(axis=1) == 2).all()
    assert np.abs(mines.mean(axis=0) - 1 / 8).max() < 0.015
    bandit = popgym.bare("MultiarmedBanditEasy")
    state = {"chances": jnp.full(10, 0.3), "steps": jnp.int32(0)}
    _, _, reward, *_ = jax.vmap(bandit.step, (0, None, None))(keys, state, 3)
    assert abs(np.mean(np.asarray(reward) > 0) - 0.3) < 0.02
    noisy = popgym.bare("NoisyPositionOnlyCartPoleHard")
    obs, state = jax.vmap(noisy.reset)(keys)
    noise = np.asarray(obs[:, 0] - state["physics"].x)
    assert abs(noise.std() - 0.3) < 0.01
    assert abs(noise.mean()) < 0.01
    angles = np.abs(np.asarray(obs[:, 1]))
    assert angles.max() == pytest.approx(0.41887903)  # clipped to the original's space
    assert 0.1 < np.mean(angles > 0.4188) < 0.25


@pytest.mark.slow
def test_a_task_is_trained_by_its_name(tmp_path):
    assert resolve_name("popgym/RepeatFirstEasy") == ("popgym", "RepeatFirstEasy")
    run({**QUICK, "ENV_NAME": "popgym/BattleshipEasy", "RESULTS_DIR": str(tmp_path)})
    assert (tmp_path / "BattleshipEasy" / "0_params.npy").exists()


def test_it_takes_no_arguments():
    config = {**QUICK, "ENV_NAME": "RepeatFirstEasy", "ENV_KWARGS": {"num_decks": 3}}
    with pytest.raises(ConfigError, match="RepeatFirstEasy has no 'num_decks'"):
        make_env(PPO.check(config), 4)
