"""Gymnax: classic control, bsuite, MinAtar and smaller tasks."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from trxl.environments.adapters import (
    argument_names,
    each,
    field_names,
    flatten_obs,
    import_suite,
    is_bool,
    making,
    read_action_space,
    replace_fields,
    split_env_kwargs,
)
from trxl.environments.base import SingleEnvironment
from trxl.errors import ConfigError
from trxl.spaces import Box, Grid

NAMES = [
    *("Acrobot-v1", "CartPole-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1"),
    *each("{}-MinAtar", "Asterix Breakout Freeway Seaquest SpaceInvaders"),
    *each("{}-bsuite", "Catch DeepSea DiscountingChain MNISTBandit MemoryChain SimpleBandit"),
    *each("{}-bsuite", "UmbrellaChain"),
    *each("{}-misc", "BernoulliBandit FourRooms FrozenLake GaussianBandit MetaMaze PointRobot"),
    *each("{}-misc", "Pong Reacher Swimmer"),
]

# Tasks defined by their time limit that observe the time: truncation counts as termination
# (Pardo et al. 2018, arXiv 1712.00378, time-aware tasks).
ENDS_WITH_ITS_CLOCK = (
    "BernoulliBandit-misc",
    "DiscountingChain-bsuite",
    "GaussianBandit-misc",
    "MetaMaze-misc",
    "PointRobot-misc",
)


def registered() -> list[str]:
    """Returns the names in the installed Gymnax."""
    return list(import_suite("gymnax").registered_envs)


def make(name: str, env_kwargs: dict[str, Any]) -> SingleEnvironment:
    """Makes an environment of Gymnax."""
    gymnax = import_suite("gymnax")
    return GymnaxAdapter(name, env_kwargs, lambda **arguments: gymnax.make(name, **arguments))


def make_own(name: str, env_kwargs: dict[str, Any], own_class: type) -> "GymnaxAdapter":
    """Makes the user's own environment, written for Gymnax."""
    names = argument_names(own_class)
    given = {key: value for key, value in env_kwargs.items() if key in names}

    def construct(**arguments):
        env = own_class(**given | arguments)
        if callable(params := env.default_params):
            raise ConfigError(f"{name}: default_params is a method; make it a property")
        return env, params

    return GymnaxAdapter(name, env_kwargs, construct)


class GymnaxAdapter(SingleEnvironment):
    """Environment of Gymnax, by `step_env` and `is_truncated` of Gymnax 1.0.

    Args:
      construct: takes constructor arguments by name; returns an environment and its parameters.
    """

    def __init__(self, name: str, env_kwargs: dict[str, Any], construct: Callable):
        attempt = making(name, env_kwargs)
        # Constructors assert, and MNISTBandit's downloads data.
        self.env, params = attempt(construct)
        of_params, of_constructor = split_env_kwargs(
            name, env_kwargs, field_names(params), argument_names(type(self.env))
        )
        if of_constructor:
            self.env, params = attempt(lambda: construct(**of_constructor))
        self._params = replace_fields(params, of_params)
        action_space = self.env.action_space(self._params)
        self.action_space = read_action_space(name, action_space)
        self._action_shape = getattr(action_space, "shape", ())
        obs_space = self.env.observation_space(self._params)
        self._num_categories = getattr(obs_space, "n", None)
        obs, _ = jax.eval_shape(self.env.reset_env, jax.random.key(0), self._params)
        arrays = jax.tree.leaves(obs)
        for x in arrays:
            if x.dtype == np.uint8 and x.ndim == 3:
                raise ConfigError(
                    f"{name} observes an image, uint8 of shape {x.shape}, and the network reads"
                    " flat vectors of small numbers; return obs / 255"
                )
        self.obs_size = self._num_categories or sum(x.size for x in arrays)
        is_minatar = name.endswith("-MinAtar")  # float32, but only 0 and 1
        binary = self._num_categories or all(map(is_bool, arrays)) or is_minatar
        self.num_binary = self.obs_size if binary else 0
        if is_minatar:  # objects of several kinds may share a cell
            rows, columns, kinds = obs.shape
            self.grid = Grid(0, rows, columns, ((1,) * kinds,))
        self.can_truncate = name not in ENDS_WITH_ITS_CLOCK

    def reset(self, key: jax.Array):
        obs, state = self.env.reset_env(key, self._params)
        return self._flatten(obs), state

    def step(self, key: jax.Array, state: Any, action: jax.Array):
        if isinstance(self.action_space, Box):
            action = action.reshape(self._action_shape)
        obs, state, reward, terminated, info = self.env.step_env(key, state, action, self._params)
        truncated = self.env.is_truncated(state, self._params)
        return self._flatten(obs), state, reward, terminated, truncated, info

    def renderer(self) -> Callable[[Any], np.ndarray]:
        """Returns Gymnax's own renderer, from a state to (height, width, 3) uint8.

        The renderer raises a ConfigError if Gymnax can't draw the environment.
        """
        visualizers: list[Any] = []

        def render(state: Any) -> np.ndarray:
            if not visualizers:
                visualizers.append(make_visualizer(self.env, self._params, state))
            (visualizer,) = visualizers
            visualizer.state_seq = [state]
            with kept_open():
                visualizer.update(0)
            if hasattr(visualizer.im, "to_rgba"):  # an image, faster to read than the figure
                return visualizer.im.to_rgba(visualizer.im.get_array(), bytes=True)[..., :3]
            visualizer.ax.set_title("")
            visualizer.fig.canvas.draw()
            return np.asarray(visualizer.fig.canvas.buffer_rgba())[..., :3].copy()

        return render

    def _flatten(self, obs: jax.Array) -> jax.Array:
        if self._num_categories:
            return jax.nn.one_hot(obs, self._num_categories)
        return flatten_obs(jax.tree.leaves(obs))


def make_visualizer(env: Any, params: Any, state: Any) -> Any:
    """Makes Gymnax's visualiser and closes its figure, which a notebook would show.

    Raises:
      ConfigError: Gymnax can't draw the environment.
    """
    import matplotlib
    import matplotlib.pyplot as plt
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # pygame, which draws classic control, must not look for a screen or a speaker.
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    from gymnax.visualize import Visualizer

    backend = matplotlib.get_backend(auto_select=False)
    plt.switch_backend("agg")
    try:
        visualizer = Visualizer(env, params, [state])
        visualizer.init()
        plt.close(visualizer.fig)
        FigureCanvasAgg(visualizer.fig)  # instead of the one that was closed
    finally:
        if backend is not None:
            plt.switch_backend(backend)
    if not hasattr(visualizer, "im"):
        raise ConfigError(f"Gymnax can't draw {env.name}")
    return visualizer


@contextmanager
def kept_open() -> Iterator[None]:
    """Keeps pygame running, since Gymnax spends most time restarting it for every frame."""
    pygame = sys.modules.get("pygame")
    if pygame is None:
        yield
        return
    quit, pygame.quit = pygame.quit, lambda: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        pygame.quit = quit  # type: ignore[attr-defined]
