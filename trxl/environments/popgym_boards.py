"""POPGym's boards and bandits, which observe only the last action's result.

Morad et al. 2023, "POPGym" (arXiv 2303.01859), appendix A.
"""

import jax
import jax.numpy as jnp
import numpy as np

from trxl.environments.base import SingleEnvironment
from trxl.environments.popgym_cards import one_hots
from trxl.spaces import Discrete, MultiDiscrete


def ship_places(board: jax.Array, size: int) -> jax.Array:
    """Returns the first tiles (2, n, n) bool where a ship of that size fits, down or right.

    All places are equally likely, as in the original, which draws until the ship fits.
    """

    def down(board: jax.Array) -> jax.Array:
        padded = jnp.pad(board, ((0, size - 1), (0, 0)), constant_values=True)
        shifted = [padded[shift : shift + len(board)] for shift in range(size)]
        return ~jnp.any(jnp.stack(shifted), axis=0)

    return jnp.stack([down(board), down(board.T).T])


class Battleship(SingleEnvironment):
    """Battleship: shots at a hidden board; the observation is whether the last shot hit.

    Args:
      size: side of the board, in tiles.
    """

    ships = (2, 3, 3, 4)

    def __init__(self, size: int):
        self.size = size
        self.action_space = MultiDiscrete((size, size))
        self.obs_size = self.num_binary = 2

    def reset(self, key: jax.Array):
        board = jnp.zeros((self.size, self.size), bool)
        for ship, place_key in zip(self.ships, jax.random.split(key, len(self.ships)), strict=True):
            fits = ship_places(board, ship)
            logits = jnp.where(fits.reshape(-1), 0.0, -jnp.inf)
            place = jax.random.categorical(place_key, logits)
            axis, row, column = jnp.unravel_index(place, fits.shape)
            rows, columns = jnp.indices(board.shape)
            along = jnp.where(axis == 0, rows - row, columns - column)
            across = jnp.where(axis == 0, columns - column, rows - row)
            board |= (along >= 0) & (along < ship) & (across == 0)
        state = {"board": board, "shot": jnp.zeros_like(board), "steps": jnp.int32(0)}
        return one_hots((0, 2)), state

    def step(self, key: jax.Array, state, action: jax.Array):
        board, shot = state["board"], state["shot"]
        row, column = action[0], action[1]
        hit = board[row, column] & ~shot[row, column]
        needed, tiles = sum(self.ships), self.size**2
        reward = jnp.where(hit, 1 / needed, -1 / (tiles - needed))
        state = {
            "board": board,
            "shot": shot.at[row, column].set(True),
            "steps": state["steps"] + 1,
        }
        sunk = jnp.all(state["shot"] | ~board)
        return one_hots((hit, 2)), state, reward, sunk, state["steps"] >= tiles, {}


class MineSweeper(SingleEnvironment):
    """MineSweeper: the observation is the number of mines in the 3 x 3 around the last tile.

    Args:
      size: side of the board, in tiles.
      mines: number of mines.
    """

    def __init__(self, size: int, mines: int):
        self.size, self.mines = size, mines
        self.numbers = min(mines + 1, 10)
        self.limit = size**2 - mines
        self.action_space = MultiDiscrete((size, size))
        self.obs_size = self.num_binary = self.numbers

    def reset(self, key: jax.Array):
        is_mine = np.arange(self.size**2) < self.mines
        mine = jax.random.permutation(key, is_mine).reshape(self.size, self.size)
        state = {"mine": mine, "viewed": jnp.zeros_like(mine), "steps": jnp.int32(0)}
        return one_hots((0, self.numbers)), state

    def step(self, key: jax.Array, state, action: jax.Array):
        mine, viewed = state["mine"], state["viewed"]
        row, column = action[0], action[1]
        lost, again = mine[row, column], viewed[row, column]
        success = 1 / self.limit
        reward = jnp.where(again, -0.5 / (self.limit - 2), success)
        reward = jnp.where(lost, -0.5 - success, reward)
        state = {
            "mine": mine,
            "viewed": viewed.at[row, column].set(viewed[row, column] | ~lost),
            "steps": state["steps"] + 1,
        }
        terminated = lost | jnp.all(state["viewed"] | mine)
        truncated = (state["steps"] == self.limit) & ~terminated
        around = jax.lax.dynamic_slice(jnp.pad(mine, 1), (row, column), (3, 3))
        obs = one_hots((jnp.sum(around), self.numbers))
        return obs, state, reward, terminated, truncated, {}


class MultiarmedBandit(SingleEnvironment):
    """Bernoulli bandit; the observation is whether the last arm paid.

    Args:
      arms: number of arms.
      length: steps per episode.
    """

    def __init__(self, arms: int, length: int):
        self.arms, self.length = arms, length
        self.action_space = Discrete(arms)
        self.obs_size = self.num_binary = 2

    def reset(self, key: jax.Array):
        state = {"chances": jax.random.uniform(key, (self.arms,)), "steps": jnp.int32(0)}
        return one_hots((0, 2)), state

    def step(self, key: jax.Array, state, action: jax.Array):
        pays = jax.random.uniform(key) < state["chances"][action]
        reward = jnp.where(pays, 1 / self.length, -1 / self.length)
        state = {**state, "steps": state["steps"] + 1}
        over = state["steps"] >= self.length
        return one_hots((pays, 2)), state, reward, jnp.bool_(False), over, {}
