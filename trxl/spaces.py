"""Actions, as an environment describes them, and observations, as a rollout stores them."""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import block_diag


class Discrete(NamedTuple):
    """Actions 0 .. n - 1.

    `masked`: the first n entries of an observation say which of them are legal, 1 or 0.
    """

    n: int
    masked: bool = False

    @property
    def num_outputs(self) -> int:
        """The number of the actor's outputs."""
        return self.n


class MultiDiscrete(NamedTuple):
    """An action of several choices, the i-th among 0 .. sizes[i] - 1.

    `masked`: the first len(sizes) * max(sizes) entries of an observation say which options are
    legal, a row of max(sizes) for each choice.
    """

    sizes: tuple[int, ...]
    masked: bool = False

    @property
    def table(self) -> tuple[int, int]:
        """Choices, and options of the choice that has most."""
        return len(self.sizes), max(self.sizes)

    @property
    def num_outputs(self) -> int:
        """The number of the actor's outputs."""
        return int(np.prod(self.table))

    def exists(self) -> np.ndarray:
        """(choices, options) bool, False behind the last option of a choice with fewer."""
        return np.arange(max(self.sizes)) < np.array(self.sizes)[:, None]


class Box(NamedTuple):
    """Real-valued actions of `size` numbers; `low` and `high` are tuples of that length.

    `masked`: the first `size` entries of an observation say which of the numbers are used.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    masked: bool = False

    @property
    def size(self) -> int:
        return len(self.low)

    @property
    def num_outputs(self) -> int:
        """The number of the actor's outputs."""
        return self.size

    def bounds(self) -> tuple[jax.Array, jax.Array]:
        """The lower and the upper bounds, (size,) float32 each."""
        return jnp.asarray(self.low, jnp.float32), jnp.asarray(self.high, jnp.float32)

    def clip(self, action: jax.Array) -> jax.Array:
        """(..., size), within the bounds."""
        return jnp.clip(action, *self.bounds())


ActionSpace = Discrete | MultiDiscrete | Box


def mask_size(space: ActionSpace) -> int:
    """Returns how many leading entries of an observation are the mask of the actions."""
    return space.num_outputs if space.masked else 0


def encode_action(space: ActionSpace, action: jax.Array) -> jax.Array:
    """An action (...) as (..., num_outputs) float32: one-hot, or the numbers within the bounds."""
    if isinstance(space, Box):
        return space.clip(action)
    if isinstance(space, Discrete):
        return jax.nn.one_hot(action, space.n, dtype=jnp.float32)
    choices, options = space.table
    one_hot = jax.nn.one_hot(action, options, dtype=jnp.float32)
    return one_hot.reshape(*one_hot.shape[:-2], choices * options)


class Grid(NamedTuple):
    """A grid of cells that an observation holds: entries that are 0 or 1.

    It stands in the observation in `parts`, one behind the other, each of them row by row and cell
    by cell. A part has its channels of a cell in groups: of a group of n at most one is 1, so that
    it is one of n values or none. A channel that may be 1 beside any other is a group of 1.
    """

    start: int
    """Entries of the observation before the grid."""
    rows: int
    columns: int
    parts: tuple[tuple[int, ...], ...]
    """Sizes of the groups of each part."""

    @property
    def groups(self) -> tuple[int, ...]:
        """The groups of all parts."""
        return sum(self.parts, ())

    @property
    def size(self) -> int:
        """Entries of the observation that are the grid."""
        return self.rows * self.columns * sum(self.groups)

    def join(self, entries: jax.Array) -> jax.Array:
        """(..., size), as they stand in an observation, to (..., rows, columns, channels)."""
        sizes = [self.rows * self.columns * sum(groups) for groups in self.parts]
        parts = jnp.split(entries, np.cumsum(sizes)[:-1], axis=-1)
        shape = (*entries.shape[:-1], self.rows, self.columns, -1)
        return jnp.concatenate([part.reshape(shape) for part in parts], axis=-1)

    def flatten(self, cells: jax.Array) -> jax.Array:
        """Undoes `join`."""
        ends = np.cumsum([sum(groups) for groups in self.parts])[:-1]
        shape = (*cells.shape[:-3], -1)
        parts = jnp.split(cells, ends, axis=-1)
        return jnp.concatenate([part.reshape(shape) for part in parts], axis=-1)


class ObsSpace(NamedTuple):
    """The layout of an observation (size,) float32."""

    size: int
    num_binary: int = 0  # leading entries that are always 0 or 1, the grid's among them
    grid: Grid | None = None


def obs_space(env: Any) -> ObsSpace:
    """Returns the layout of an environment's observations, batched or not."""
    return ObsSpace(env.obs_size, env.num_binary, env.grid)


class StoredObs(NamedTuple):
    """Observations (..., size) in the smallest types that hold them exactly."""

    binary: jax.Array  # (..., num_binary - grid.size) bool, leading entries that are 0 or 1
    cells: jax.Array | None  # (..., rows, columns, words) uint16, see `cell_words`; of a grid
    real: jax.Array  # (..., size - num_binary) float32, the others


Obs = jax.Array | StoredObs
"""Observations (..., size), or the same as they are stored."""


class Word(NamedTuple):
    """A 16-bit word of a stored cell, and the channels that it holds."""

    values: np.ndarray  # (channels,) uint16, what the word has in the bits of a channel that is 1
    masks: np.ndarray  # (channels,) uint16, which bits those are


@cache
def cell_words(groups: tuple[int, ...]) -> tuple[Word, ...]:
    """Returns how a cell's channels are stored, word by word.

    A group of n takes the bits that hold 0 .. n: 0 where no channel is set, else 1 + its index.

    Raises:
      ValueError: a group takes more than 16 bits.
    """
    words: list[list[tuple[int, int]]] = [[]]  # (size, shift) of each group
    shift = 0
    for size in groups:
        bits = size.bit_length()
        if bits > 16:
            raise ValueError(f"a group of {size} channels takes more than 16 bits")
        if shift + bits > 16:
            words.append([])
            shift = 0
        words[-1].append((size, shift))
        shift += bits

    def make(fields: list[tuple[int, int]]) -> Word:
        values = [np.arange(1, size + 1) << shift for size, shift in fields]
        masks = [np.full(size, ((1 << size.bit_length()) - 1) << shift) for size, shift in fields]
        return Word(*(np.concatenate(x).astype(np.uint16) for x in (values, masks)))

    return tuple(map(make, words))


def pack_cells(channels: jax.Array, groups: tuple[int, ...]) -> jax.Array:
    """(..., channels) of 0s and 1s to (..., words) uint16."""
    words = cell_words(groups)
    weights = block_diag(*(word.values.astype(np.float32)[:, None] for word in words))
    # Sums below 2^16 are exact in float32, which a GPU would otherwise round its products to less.
    return jnp.matmul(channels, weights, precision="highest").astype(jnp.uint16)


def unpack_cells(cells: jax.Array, groups: tuple[int, ...]) -> jax.Array:
    """Undoes `pack_cells`, as float32."""
    channels = [
        (cells[..., index, None] & word.masks) == word.values
        for index, word in enumerate(cell_words(groups))
    ]
    return jnp.concatenate(channels, axis=-1).astype(jnp.float32)


def pack_obs(obs: jax.Array, space: ObsSpace) -> StoredObs:
    """(..., size) float32 in fewer bytes."""
    binary, real = jnp.split(obs, [space.num_binary], axis=-1)
    if space.grid is None:
        return StoredObs(binary.astype(bool), None, real)
    grid, binary = _cut_grid(binary, space.grid)
    return StoredObs(binary.astype(bool), pack_cells(grid, space.grid.groups), real)


def unpack_obs(obs: Obs, space: ObsSpace) -> jax.Array:
    """Undoes `pack_obs`; leaves observations alone that are (..., size)."""
    return jnp.concatenate(obs_parts(obs, space), axis=-1)


def obs_parts(obs: Obs, space: ObsSpace) -> list[jax.Array]:
    """Observations (..., size) as pieces of them, one behind the other, that are there already."""
    if not isinstance(obs, StoredObs):
        return [obs]
    binary = obs.binary.astype(jnp.float32)
    if obs.cells is None or space.grid is None:
        return [binary, obs.real]
    before, behind = jnp.split(binary, [space.grid.start], axis=-1)
    return [
        before,
        space.grid.flatten(unpack_cells(obs.cells, space.grid.groups)),
        behind,
        obs.real,
    ]


def grid_and_vector(obs: Obs, space: ObsSpace) -> tuple[jax.Array | None, jax.Array]:
    """The grid (..., rows, columns, channels), None without one, and all else (..., others)."""
    if space.grid is None:
        return None, unpack_obs(obs, space)
    if not isinstance(obs, StoredObs):
        return _cut_grid(obs, space.grid)
    assert obs.cells is not None
    vector = jnp.concatenate([obs.binary.astype(jnp.float32), obs.real], axis=-1)
    return unpack_cells(obs.cells, space.grid.groups), vector


def action_mask(obs: Obs, space: ActionSpace) -> jax.Array | None:
    """Returns which actions are legal, (..., mask_size) bool; None where all are."""
    if not space.masked:
        return None
    leading = obs.binary if isinstance(obs, StoredObs) else obs
    return leading[..., : mask_size(space)] > 0


def _cut_grid(entries: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """The grid (..., rows, columns, channels) and what is before and behind it."""
    before, cells, behind = jnp.split(entries, [grid.start, grid.start + grid.size], axis=-1)
    return grid.join(cells), jnp.concatenate([before, behind], axis=-1)
