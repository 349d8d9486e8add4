"""Jumanji: routing, packing, logic and games."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trxl.environments.adapters import (
    argument_names,
    check_env_kwargs,
    each,
    flatten_obs,
    import_suite,
    is_bool,
    make_box,
    making,
)
from trxl.environments.base import SingleEnvironment
from trxl.errors import ConfigError
from trxl.spaces import ActionSpace, Box, Discrete, MultiDiscrete, mask_size

NAMES = [
    *each("{}-v0", "Cleaner FlatPack JobShop LevelBasedForaging MMST Maze Minesweeper"),
    *each("{}-v0", "MultiCVRP RobotWarehouse RubiksCube RubiksCube-partly-scrambled"),
    *each("{}-v0", "SearchAndRescue SlidingTilePuzzle Sokoban Sudoku Sudoku-very-easy Tetris"),
    *each("{}-v1", "CVRP Game2048 GraphColoring Knapsack PacMan Snake TSP"),
    *("BinPack-v2", "Connector-v3"),
]


def registered() -> list[str]:
    """Returns the names in the installed Jumanji."""
    return list(import_suite("jumanji").registered_environments())


def make(name: str, env_kwargs: dict[str, Any]) -> SingleEnvironment:
    """Makes an environment of Jumanji."""
    return JumanjiAdapter(name, env_kwargs)


CATEGORIES = 64
"""Largest number of values of a scalar in an observation that is encoded as one-hot."""


class JumanjiAdapter(SingleEnvironment):
    """Environment of Jumanji, its observation flattened, its action mask in front.

    - If the mask has an entry per combination of choices, the combinations are the actions.
    - Scalars with at most `CATEGORIES` values, such as TSP's city, are one-hot. Their row of every
      table with a row per value is appended, such as the city's coordinates.
    - One agent plays all agents of the environment, whose rewards are summed.
    - The timestep's scalar extras are metrics, averaged over episodes.
    """

    def __init__(self, name: str, env_kwargs: dict[str, Any]):
        jumanji, registration = import_suite("jumanji"), import_suite("jumanji.registration")
        entry_point = registration.load(registration._REGISTRY[name].entry_point)
        check_env_kwargs(name, env_kwargs, argument_names(entry_point))
        attempt = making(name, env_kwargs)
        self._env = attempt(lambda: jumanji.make(name, **env_kwargs))
        _, timestep = attempt(lambda: jax.eval_shape(self._env.reset, jax.random.key(0)))
        mask, arrays = jax.eval_shape(self._parts, timestep.observation)
        self.action_space = self._read_action_space(name, mask)
        masked = mask_size(self.action_space)
        self.num_binary = masked + sum(x.size for x in arrays if is_bool(x))
        self.obs_size = masked + sum(x.size for x in arrays)
        self.episode_metrics = tuple(
            name for name, value in timestep.extras.items() if value.shape == ()
        )

    def reset(self, key: jax.Array):
        state, timestep = self._env.reset(key)
        return self._observe(timestep), state

    def step(self, key: jax.Array, state: Any, action: jax.Array):
        if self._joint:
            action = jnp.stack(jnp.unravel_index(action, self._joint))
        elif isinstance(self.action_space, Box):
            action = action.reshape(self._env.action_spec.shape)
        state, timestep = self._env.step(state, action.astype(self._env.action_spec.dtype))
        # A last timestep whose discount is not 0 was truncated.
        terminated = timestep.last() & jnp.all(timestep.discount == 0)
        truncated = timestep.last() & ~terminated
        info = {name: jnp.asarray(timestep.extras[name], float) for name in self.episode_metrics}
        obs, reward = self._observe(timestep), jnp.sum(timestep.reward)
        return obs, state, reward, terminated, truncated, info

    def _observe(self, timestep: Any) -> jax.Array:
        mask, arrays = self._parts(timestep.observation)
        return flatten_obs(arrays if mask is None else [mask, *arrays])

    def _parts(self, observation: Any) -> tuple[jax.Array | None, list[jax.Array]]:
        """Returns the action mask, or None, and the other arrays, bool arrays first."""
        mask, tables, arrays = None, [], []
        leaves = jax.tree_util.tree_leaves_with_path(observation)
        for path, x in leaves:
            if jax.tree_util.keystr(path).strip("[].'") == "action_mask":
                mask = x
            elif len(jnp.shape(x)) > 1:
                tables.append(x)
        for path, x in leaves:
            number = self._categories(path, x)
            if number:
                arrays += [x == jnp.arange(number), *(y[x] for y in tables if len(y) == number)]
            elif x is not mask:
                arrays.append(x)
        return mask, sorted(arrays, key=lambda x: not is_bool(x))

    def _categories(self, path: tuple, x: jax.Array) -> int:
        """Returns the number of values of a scalar by its spec; 0 if unknown or too many."""
        spec = self._env.observation_spec
        for key in path:
            spec = getattr(spec, getattr(key, "name", ""), None)
        number = int(getattr(spec, "num_values", None) or 0)
        return number if not jnp.shape(x) and number <= CATEGORIES else 0

    def _read_action_space(self, name: str, mask: Any) -> ActionSpace:
        self._joint = None
        spec = self._env.action_spec
        if not jnp.issubdtype(spec.dtype, jnp.integer):
            return make_box(spec.minimum, spec.maximum, spec.shape)
        if not spec.shape:
            return Discrete(int(spec.num_values), masked=mask is not None)
        sizes = tuple(np.broadcast_to(np.asarray(spec.maximum) + 1, spec.shape).ravel().tolist())
        if mask is None:
            return MultiDiscrete(sizes)
        if mask.shape == sizes:
            self._joint = sizes
            return Discrete(mask.size, masked=True)
        # MultiCVRP's mask is right; its spec has one action too many.
        space = MultiDiscrete(tuple(min(n, mask.shape[-1]) for n in sizes), masked=True)
        if mask.shape != space.table:
            raise ConfigError(f"{name} has an action mask {mask.shape} for the choices {sizes}")
        return space
