"""Spaces of actions and observations, and packing of observations for storage."""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import block_diag


class Discrete(NamedTuple):
    """Actions 0 .. n - 1.

    If `masked`, the first n entries of an observation are 1 for legal actions, else 0.
    """

    n: int
    masked: bool = False

    @property
    def num_outputs(self) -> int:
        """Number of the actor's outputs."""
        return self.n


class MultiDiscrete(NamedTuple):
    """Actions of several choices, the i-th among 0 .. sizes[i] - 1.

    If `masked`, an observation begins with len(sizes) rows of max(sizes) entries: 1 for legal
    options, else 0.
    """

    sizes: tuple[int, ...]
    masked: bool = False

    @property
    def table(self) -> tuple[int, int]:
        """Number of choices, and of options of the largest choice."""
        return len(self.sizes), max(self.sizes)

    @property
    def num_outputs(self) -> int:
        """Number of the actor's outputs."""
        return int(np.prod(self.table))

    def exists(self) -> np.ndarray:
        """Returns (choices, options) bool, False for the padding of smaller choices."""
        return np.arange(max(self.sizes)) < np.array(self.sizes)[:, None]


class Box(NamedTuple):
    """Real-valued actions (size,) between `low` and `high`.

    If `masked`, the first `size` entries of an observation are 1 for numbers in use, else 0.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    masked: bool = False

    @property
    def size(self) -> int:
        return len(self.low)

    @property
    def num_outputs(self) -> int:
        """Number of the actor's outputs."""
        return self.size

    def bounds(self) -> tuple[jax.Array, jax.Array]:
        """Returns the lower and the upper bounds, (size,) float32 each."""
        return jnp.asarray(self.low, jnp.float32), jnp.asarray(self.high, jnp.float32)

    def clip(self, action: jax.Array) -> jax.Array:
        """Clips actions (..., size) to the bounds."""
        return jnp.clip(action, *self.bounds())


ActionSpace = Discrete | MultiDiscrete | Box


def mask_size(space: ActionSpace) -> int:
    """Returns the number of entries of the action mask, at the start of an observation."""
    return space.num_outputs if space.masked else 0


def encode_action(space: ActionSpace, action: jax.Array) -> jax.Array:
    """Encodes actions as (..., num_outputs) float32: one-hot, or clipped to the bounds."""
    if isinstance(space, Box):
        return space.clip(action)
    if isinstance(space, Discrete):
        return jax.nn.one_hot(action, space.n, dtype=jnp.float32)
    choices, options = space.table
    one_hot = jax.nn.one_hot(action, options, dtype=jnp.float32)
    return one_hot.reshape(*one_hot.shape[:-2], choices * options)


class Grid(NamedTuple):
    """Layout of a grid of cells, entries 0 or 1, within an observation.

    The grid consists of consecutive `parts`, each row by row and cell by cell. A part is a tuple of
    sizes of channel groups. At most one channel of a group is 1, as in a one-hot encoding.
    Independent channels are groups of size 1.
    """

    start: int
    """Entries of the observation before the grid."""
    rows: int
    columns: int
    parts: tuple[tuple[int, ...], ...]
    """Sizes of the groups of each part."""

    @property
    def groups(self) -> tuple[int, ...]:
        """Group sizes of all parts."""
        return sum(self.parts, ())

    @property
    def size(self) -> int:
        """Number of entries of the grid."""
        return self.rows * self.columns * sum(self.groups)

    def join(self, entries: jax.Array) -> jax.Array:
        """Reshapes entries (..., size) of an observation to (..., rows, columns, channels)."""
        sizes = [self.rows * self.columns * sum(groups) for groups in self.parts]
        parts = jnp.split(entries, np.cumsum(sizes)[:-1], axis=-1)
        shape = (*entries.shape[:-1], self.rows, self.columns, -1)
        return jnp.concatenate([part.reshape(shape) for part in parts], axis=-1)

    def flatten(self, cells: jax.Array) -> jax.Array:
        """Inverts `join`."""
        ends = np.cumsum([sum(groups) for groups in self.parts])[:-1]
        shape = (*cells.shape[:-3], -1)
        parts = jnp.split(cells, ends, axis=-1)
        return jnp.concatenate([part.reshape(shape) for part in parts], axis=-1)


class ObsSpace(NamedTuple):
    """Layout of an observation (size,) float32."""

    size: int
    num_binary: int = 0  # leading entries that are always 0 or 1, including the grid
    grid: Grid | None = None


def obs_space(env: Any) -> ObsSpace:
    """Returns the layout of an environment's observations, batched or not."""
    return ObsSpace(env.obs_size, env.num_binary, env.grid)


class StoredObs(NamedTuple):
    """Observations (..., size), stored losslessly in small types."""

    binary: jax.Array  # (..., num_binary - grid.size) bool, leading entries outside the grid
    cells: jax.Array | None  # (..., rows, columns, words) uint16, see `cell_words`; of a grid
    real: jax.Array  # (..., size - num_binary) float32, the other entries


Obs = jax.Array | StoredObs
"""Observations (..., size), plain or stored."""


class Word(NamedTuple):
    """Channels in a 16-bit word of a stored cell."""

    values: np.ndarray  # (channels,) uint16, bits of the word if the channel is 1
    masks: np.ndarray  # (channels,) uint16, bits of the channel's group


@cache
def cell_words(groups: tuple[int, ...]) -> tuple[Word, ...]:
    """Returns the storage layout of a cell's channels.

    A group of n channels takes the bits of 0 .. n: 0 if no channel is 1, else 1 + its index.

    Raises:
      ValueError: a group needs more than 16 bits.
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
    """Packs channels (..., channels), 0 or 1, to (..., words) uint16."""
    words = cell_words(groups)
    weights = block_diag(*(word.values.astype(np.float32)[:, None] for word in words))
    # Sums below 2^16 are exact in float32. GPUs use lower precision by default.
    return jnp.matmul(channels, weights, precision="highest").astype(jnp.uint16)


def unpack_cells(cells: jax.Array, groups: tuple[int, ...]) -> jax.Array:
    """Inverts `pack_cells`, to float32."""
    channels = [
        (cells[..., index, None] & word.masks) == word.values
        for index, word in enumerate(cell_words(groups))
    ]
    return jnp.concatenate(channels, axis=-1).astype(jnp.float32)


def pack_obs(obs: jax.Array, space: ObsSpace) -> StoredObs:
    """Packs observations (..., size) float32 for storage."""
    binary, real = jnp.split(obs, [space.num_binary], axis=-1)
    if space.grid is None:
        return StoredObs(binary.astype(bool), None, real)
    grid, binary = _cut_grid(binary, space.grid)
    return StoredObs(binary.astype(bool), pack_cells(grid, space.grid.groups), real)


def unpack_obs(obs: Obs, space: ObsSpace) -> jax.Array:
    """Inverts `pack_obs`; returns plain observations (..., size) unchanged."""
    return jnp.concatenate(obs_parts(obs, space), axis=-1)


def obs_parts(obs: Obs, space: ObsSpace) -> list[jax.Array]:
    """Returns consecutive parts of observations (..., size), without concatenating them."""
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
    """Returns the grid (..., rows, columns, channels), or None, and the rest (..., others)."""
    if space.grid is None:
        return None, unpack_obs(obs, space)
    if not isinstance(obs, StoredObs):
        return _cut_grid(obs, space.grid)
    assert obs.cells is not None
    vector = jnp.concatenate([obs.binary.astype(jnp.float32), obs.real], axis=-1)
    return unpack_cells(obs.cells, space.grid.groups), vector


def action_mask(obs: Obs, space: ActionSpace) -> jax.Array | None:
    """Returns the action mask (..., mask_size) bool; None if all actions are legal."""
    if not space.masked:
        return None
    leading = obs.binary if isinstance(obs, StoredObs) else obs
    return leading[..., : mask_size(space)] > 0


def _cut_grid(entries: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """Splits entries into the grid (..., rows, columns, channels) and the rest (..., others)."""
    before, cells, behind = jnp.split(entries, [grid.start, grid.start + grid.size], axis=-1)
    return grid.join(cells), jnp.concatenate([before, behind], axis=-1)
