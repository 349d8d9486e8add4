"""Craftax and Craftax-Classic.

Matthews et al. 2024, "Craftax" (arXiv 2402.16801).
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from trxl.environments.adapters import field_names, import_suite, replace_fields, split_env_kwargs
from trxl.environments.base import Mirror, SingleEnvironment
from trxl.environments.craftax_gpu import elementwise
from trxl.errors import ConfigError
from trxl.spaces import Discrete, Grid

NAMES = ["Craftax-Symbolic-v1", "Craftax-Classic-Symbolic-v1"]

SPELLINGS = {"craftax": NAMES[0], **{name.lower(): name for name in NAMES}}

BLOCK_PIXELS = 16  # one of the sizes of Craftax's textures


def registered() -> list[str]:
    """Returns no names, since Craftax has no registry."""
    return []


def full_name(name: str) -> str:
    """Returns the full name of `craftax` or of a name in lower case; other names unchanged.

    Raises:
      ConfigError: the environment observes pixels.
    """
    lower = name.lower()
    if lower.startswith("craftax") and "pixels" in lower:
        raise ConfigError(
            f"{name} observes pixels, which this network has no encoder for: its input is a flat"
            " vector; use the same game's Symbolic variant"
        )
    return SPELLINGS.get(lower, name)


def make(name: str, env_kwargs: dict[str, Any]) -> SingleEnvironment:
    """Makes Craftax or Craftax-Classic."""
    return CraftaxAdapter(name, env_kwargs)


def map_in_view(module: Any) -> Grid:
    """Returns the grid at the start of Craftax's observations.

    Channel groups of a cell:

    | Craftax | Craftax-Classic |
    | --- | --- |
    | block, item, melee, passive and ranged creature | block |
    | each projectile, lit (else the cell is 0) | each of four creatures |
    """
    rows, columns, channels = module.get_map_obs_shape()
    blocks = len(module.BlockType)
    if hasattr(module, "ItemType"):
        items, types = len(module.ItemType), 8
        projectiles_and_light = channels - blocks - items - 3 * types
        groups = (blocks, items, types, types, types, *(1,) * projectiles_and_light)
    else:
        groups = (blocks, *(1,) * (channels - blocks))
    return Grid(0, rows, columns, (groups,))


def mirror(grid: Grid, direction: int, axes: tuple[int, ...]) -> Mirror:
    """Makes the symmetry that flips the rows (axis 0) and columns (axis 1) of the world.

    Args:
      grid: map in view, at the start of the observation.
      direction: entry of the first of the four directions: left, right, up and down.
    """
    ways = np.array([*((1, 0) if 1 in axes else (0, 1)), *((3, 2) if 0 in axes else (2, 3))])

    def mirror_obs(obs: jax.Array) -> jax.Array:
        view = obs[: grid.size].reshape(grid.rows, grid.columns, -1)
        facing = obs[direction : direction + 4][ways]
        obs = obs.at[direction : direction + 4].set(facing)
        return obs.at[: grid.size].set(jnp.flip(view, axes).ravel())

    def mirror_action(action: jax.Array) -> jax.Array:
        walks = (action >= 1) & (action <= 4)  # in the order of the directions
        return jnp.where(walks, jnp.asarray(ways)[jnp.clip(action - 1, 0, 3)] + 1, action)

    return Mirror(mirror_obs, mirror_action)


@contextmanager
def choosing_at_once() -> Iterator[None]:
    """Replaces `jax.random.choice` by `choice` while Craftax is traced."""
    with mock.patch.object(jax.random, "choice", choice):
        yield


def choice(key: jax.Array, a: Any, shape: Any = (), replace: bool = True, p: Any = None, **more):
    """Samples the same values as `jax.random.choice`, with weights but without a loop.

    JAX bisects the cumulative weights, about 60 kernels on a GPU. Here a draw is compared with all
    of them.
    """
    if p is None or not replace or jnp.ndim(a) != 1 or more:
        return jax_choice(key, a, shape, replace, p, **more)
    sums = jnp.cumsum(jnp.asarray(p, jnp.result_type(p, float)))
    draws = sums[-1] * (1 - jax.random.uniform(key, shape, dtype=sums.dtype))
    return jnp.take(a, jnp.searchsorted(sums, draws, method="compare_all"))


jax_choice = jax.random.choice


@cache
def textures(module: Any) -> dict[int, Any]:
    """Returns Craftax's textures of size `BLOCK_PIXELS`.

    Craftax makes all three sizes, which takes minutes, and caches them in its folder. If
    interrupted, it leaves a truncated file, with which all later rendering fails.
    """
    print("making Craftax's textures ...", flush=True)
    return {BLOCK_PIXELS: module.load_all_textures_given_size(BLOCK_PIXELS)}


class CraftaxAdapter(SingleEnvironment):
    """Craftax or Craftax-Classic with symbolic observations, without auto-reset.

    Craftax reports its step limit as a termination, so no step is truncated.
    """

    default_reset_strategy = "pool"
    can_truncate = False

    def __init__(self, name: str, env_kwargs: dict[str, Any]):
        make_craftax_env_from_name = import_suite("craftax.craftax_env").make_craftax_env_from_name
        env = make_craftax_env_from_name(name, auto_reset=False)
        static_params = env.default_static_params()
        of_params, of_static_params = split_env_kwargs(
            name, env_kwargs, field_names(env.default_params), field_names(static_params)
        )
        self._env = type(env)(replace_fields(static_params, of_static_params))
        self._params = replace_fields(env.default_params, of_params)
        self.action_space = Discrete(env.num_actions)
        self._step = self._step_as_written
        if jax.default_backend() != "cpu":
            self._step = elementwise(self._step_as_written)
        obs, _, _, _, info = jax.eval_shape(self._first_step, jax.random.key(0))
        self.obs_size = obs.size
        self.grid = map_in_view(importlib.import_module(type(env).__module__))
        self.num_binary = self.grid.size
        # The direction follows inventory and needs, which differ between the games.
        direction = self.grid.size + (16 if "Classic" in name else 31)
        self.mirrors = tuple(mirror(self.grid, direction, axes) for axes in ((1,), (0,), (0, 1)))
        self.episode_metrics = tuple(name for name in info if name.startswith("Achievements/"))

    def reset(self, key: jax.Array):
        with choosing_at_once():
            return self._env.reset_env(key, self._params)

    def step(self, key: jax.Array, state: Any, action: jax.Array):
        obs, state, reward, done, info = self._step(key, state, action)
        return obs, state, reward, done, jnp.zeros_like(done), info

    def renderer(self) -> Callable[[Any], np.ndarray]:
        """Returns Craftax's own renderer, from a state to (height, width, 3) uint8."""
        package = "craftax_classic" if "Classic" in self._env.name else "craftax"
        module = importlib.import_module(f"craftax.{package}.renderer")
        with mock.patch.object(module, "load_all_textures", return_value=textures(module)):
            render = jax.jit(module.make_craftax_pixel_renderer(BLOCK_PIXELS))
        return lambda state: np.asarray(render(state)).astype(np.uint8)

    def _step_as_written(self, key: jax.Array, state: Any, action: jax.Array):
        with choosing_at_once():
            return self._env.step_env(key, state, action, self._params)

    def _first_step(self, key: jax.Array):
        _, state = self._env.reset_env(key, self._params)
        return self._step_as_written(key, state, jnp.int32(0))
