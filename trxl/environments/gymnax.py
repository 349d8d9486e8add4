"""Gymnax: classic control, bsuite, MinAtar and smaller tasks."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trxl.environments.adapters import (
    argument_names,
    each,
    field_names,
    import_suite,
    making,
    read_action_space,
    replace_fields,
    split_env_kwargs,
)
from trxl.environments.base import SingleEnvironment
from trxl.errors import ConfigError
from trxl.spaces import Grid

NAMES = [
    *("Acrobot-v1", "CartPole-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1"),
    *each("{}-MinAtar", "Asterix Breakout Freeway Seaquest SpaceInvaders"),
    *each("{}-bsuite", "Catch DeepSea DiscountingChain MNISTBandit MemoryChain SimpleBandit"),
    *each("{}-bsuite", "UmbrellaChain"),
    *each("{}-misc", "BernoulliBandit FourRooms FrozenLake GaussianBandit MetaMaze PointRobot"),
    *each("{}-misc", "Pong Reacher Swimmer"),
]

# Tasks that are their time limit and show the agent the clock: nothing is cut off at the end, so
# truncation counts as termination (Pardo et al. 2018, arXiv 1712.00378, time-aware tasks).
ENDS_WITH_ITS_CLOCK = (
    "BernoulliBandit-misc",
    "DiscountingChain-bsuite",
    "GaussianBandit-misc",
    "MetaMaze-misc",
    "PointRobot-misc",
)


def registered() -> list[str]:
    """The names that the installed Gymnax knows."""
    return list(import_suite("gymnax").registered_envs)


def make(name: str, env_kwargs: dict[str, Any]) -> SingleEnvironment:
    """An environment of Gymnax."""
    return GymnaxAdapter(name, env_kwargs)


class GymnaxAdapter(SingleEnvironment):
    """An environment of `gymnax.registered_envs`, on Gymnax 1.0's `step_env` and `is_truncated`."""

    def __init__(self, name: str, env_kwargs: dict[str, Any]):
        gymnax = import_suite("gymnax")

        def construct(**constructor_kwargs):
            # Constructors check by assertion, and MNISTBandit's downloads its data.
            return making(name, env_kwargs)(lambda: gymnax.make(name, **constructor_kwargs))

        self._env, params = construct()
        of_params, of_constructor = split_env_kwargs(
            name, env_kwargs, field_names(params), argument_names(type(self._env))
        )
        if of_constructor:
            self._env, params = construct(**of_constructor)
        self._params = replace_fields(params, of_params)
        self.action_space = read_action_space(name, self._env.action_space(self._params))
        obs_space = self._env.observation_space(self._params)
        self._num_categories = getattr(obs_space, "n", None)
        self.obs_size = self._num_categories or int(np.prod(obs_space.shape))
        obs, _ = jax.eval_shape(self._env.reset_env, jax.random.key(0), self._params)
        is_minatar = name.endswith("-MinAtar")  # 0s and 1s, as float32
        binary = self._num_categories or obs.dtype == bool or is_minatar
        self.num_binary = self.obs_size if binary else 0
        if is_minatar:  # things of several kinds may share a cell
            rows, columns, kinds = obs.shape
            self.grid = Grid(0, rows, columns, ((1,) * kinds,))
        self.can_truncate = name not in ENDS_WITH_ITS_CLOCK

    def reset(self, key: jax.Array):
        obs, state = self._env.reset_env(key, self._params)
        return self._flatten(obs), state

    def step(self, key: jax.Array, state: Any, action: jax.Array):
        obs, state, reward, terminated, info = self._env.step_env(key, state, action, self._params)
        truncated = self._env.is_truncated(state, self._params)
        return self._flatten(obs), state, reward, terminated, truncated, info

    def renderer(self) -> Callable[[Any], np.ndarray]:
        """A function from a state to its picture (height, width, 3), uint8, by Gymnax's visualiser.

        Raises:
          ConfigError: it has none for this environment.
        """
        import matplotlib

        matplotlib.use("Agg")
        # The classic-control tasks are drawn by pygame, which need not find a screen or a speaker.
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
        from gymnax.visualize import Visualizer

        visualizer = Visualizer(self._env, self._params, [None])

        def render(state: Any) -> np.ndarray:
            visualizer.state_seq = [state]
            if not hasattr(visualizer, "im"):
                visualizer.init()
                if not hasattr(visualizer, "im"):
                    raise ConfigError(f"Gymnax can't draw {self._env.name}")
            with kept_open():
                visualizer.update(0)
            if hasattr(visualizer.im, "to_rgba"):  # an image, which need not be drawn into a figure
                return visualizer.im.to_rgba(visualizer.im.get_array(), bytes=True)[..., :3]
            visualizer.ax.set_title("")
            visualizer.fig.canvas.draw()
            return np.asarray(visualizer.fig.canvas.buffer_rgba())[..., :3].copy()

        return render

    def _flatten(self, obs: jax.Array) -> jax.Array:
        if self._num_categories:
            return jax.nn.one_hot(obs, self._num_categories)
        return jnp.ravel(obs).astype(jnp.float32)


@contextmanager
def kept_open() -> Iterator[None]:
    """Keeps pygame running, which Gymnax starts and ends for every frame, most of its time."""
    pygame = sys.modules.get("pygame")
    if pygame is None:
        yield
        return
    quit, pygame.quit = pygame.quit, lambda: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        pygame.quit = quit  # type: ignore[attr-defined]
