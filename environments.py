"""`make_env`: from an environment's name to a batched environment that resets itself.

Adapters turn each suite's own interface into the single environment that wrappers.py describes.
Observations leave here as flat float32 vectors.
"""

import dataclasses
import importlib
import inspect
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from config import ConfigError, did_you_mean
from wrappers import AutoReset, LogEpisodes, OptimisticReset, WorldPool


class Discrete(NamedTuple):
    """Actions 0 .. n - 1."""

    n: int


class Box(NamedTuple):
    """Real-valued actions of `size` numbers; `low` and `high` are tuples of that length."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def size(self) -> int:
        return len(self.low)


class StoredObs(NamedTuple):
    """Observations (..., obs_size) in the smallest types that hold them exactly."""

    binary: jax.Array  # (..., num_binary) bool, the leading entries, which are 0 or 1
    real: jax.Array  # (..., obs_size - num_binary) float32, the others


def store_obs(obs: jax.Array, num_binary: int) -> StoredObs:
    """(..., obs_size) float32, the first `num_binary` of them 0 or 1, in fewer bytes."""
    return StoredObs(obs[..., :num_binary].astype(bool), obs[..., num_binary:])


def restore_obs(stored: StoredObs) -> jax.Array:
    """Undoes `store_obs`."""
    return jnp.concatenate([stored.binary.astype(jnp.float32), stored.real], axis=-1)


CRAFTAX_NAMES = {
    "craftax": "Craftax-Symbolic-v1",
    "craftax-symbolic-v1": "Craftax-Symbolic-v1",
    "craftax-classic-symbolic-v1": "Craftax-Classic-Symbolic-v1",
}

CRAFTAX_BLOCK_PIXELS = 16  # one of the sizes that Craftax has textures for

# Tasks that are their time limit and show the agent the clock: nothing is cut off at the end, so
# truncation counts as termination (Pardo et al. 2018, arXiv 1712.00378, time-aware tasks).
ENDS_WITH_ITS_CLOCK = (
    "BernoulliBandit-misc",
    "DiscountingChain-bsuite",
    "GaussianBandit-misc",
    "MetaMaze-misc",
    "PointRobot-misc",
)


def make_env(config: dict[str, Any], num_envs: int):
    """Makes the batched environment of a checked config.

    Args:
      config: of it `ENV_NAME`, `ENV_KWARGS`, `BOOTSTRAP_TRUNCATED`, `RESET_STRATEGY` and
        `RESET_RATIO` are used.
      num_envs: B, how many environments run here: NUM_ENVS, or one device's share.

    Returns:
      An environment as the head of wrappers.py describes it, with the attributes `action_space`,
      `obs_size`, `num_binary` (so many leading entries of an observation are always 0 or 1) and
      `episode_metrics`, the names of what it logs in info at an episode's end.

    Raises:
      ConfigError: an unknown environment, one that can't be made or has actions of no supported
        kind, an unknown name in ENV_KWARGS.
    """
    suite, name = resolve_name(config["ENV_NAME"])
    adapter = {"gymnax": GymnaxAdapter, "craftax": CraftaxAdapter}[suite]
    env = adapter(name, config["ENV_KWARGS"], config["BOOTSTRAP_TRUNCATED"])
    strategy = config["RESET_STRATEGY"] or env.default_reset_strategy
    if strategy == "auto":
        env = AutoReset(env, num_envs)
    elif strategy == "optimistic":
        env = OptimisticReset(env, num_envs, config["RESET_RATIO"])
    else:
        env = WorldPool(env, num_envs, max(1, num_envs // config["RESET_RATIO"]))
    return LogEpisodes(env)


def resolve_name(name: str) -> tuple[str, str]:
    """The suite and the full name of an environment.

    Raises:
      ConfigError: there is none of that name, or it is one of pixels; names close ones.
    """
    if name.lower() in CRAFTAX_NAMES:
        return "craftax", CRAFTAX_NAMES[name.lower()]
    if name.lower().startswith("craftax") and "pixels" in name.lower():
        raise ConfigError(
            f"{name} observes pixels, which this network has no encoder for: its input is a flat"
            " vector; use the same game's Symbolic variant"
        )
    import gymnax

    if name in gymnax.registered_envs:
        return "gymnax", name
    known = [*gymnax.registered_envs, *CRAFTAX_NAMES.values(), "craftax"]
    raise ConfigError(f"unknown environment {name!r}{did_you_mean(name, known)}")


class GymnaxAdapter:
    """An environment of `gymnax.registered_envs`, on Gymnax 1.0's `step_env` and `is_truncated`."""

    default_reset_strategy = "auto"
    can_truncate = True
    episode_metrics = ()

    def __init__(self, name: str, env_kwargs: dict[str, Any], bootstrap_truncated: bool | None):
        import gymnax

        def make(**constructor_kwargs):
            # Constructors check by assertion, and MNISTBandit's downloads its data.
            try:
                return gymnax.make(name, **constructor_kwargs)
            except OSError as error:
                raise ConfigError(f"{name} could not load its data: {error}") from error
            except Exception as error:
                reason = str(error) or type(error).__name__
                raise ConfigError(f"{name} can't be made with {env_kwargs}: {reason}") from error

        self._env, params = make()
        of_params, of_constructor = split_env_kwargs(
            name, env_kwargs, _field_names(params), _argument_names(type(self._env))
        )
        if of_constructor:
            self._env, params = make(**of_constructor)
        self._params = replace_fields(params, of_params)
        self.action_space = read_action_space(name, self._env.action_space(self._params))
        obs_space = self._env.observation_space(self._params)
        self._num_categories = getattr(obs_space, "n", None)
        self.obs_size = self._num_categories or int(np.prod(obs_space.shape))
        obs, _ = jax.eval_shape(self._env.reset_env, jax.random.key(0), self._params)
        binary = self._num_categories or obs.dtype == bool
        self.num_binary = self.obs_size if binary else 0
        if bootstrap_truncated is None:
            bootstrap_truncated = name not in ENDS_WITH_ITS_CLOCK
        self.can_truncate = bootstrap_truncated

    def reset(self, key: jax.Array):
        obs, state = self._env.reset_env(key, self._params)
        return self._flatten(obs), state

    def step(self, key: jax.Array, state: Any, action: jax.Array):
        if isinstance(self.action_space, Box):
            low, high = jnp.asarray(self.action_space.low), jnp.asarray(self.action_space.high)
            action = jnp.clip(action, low, high)
        obs, state, reward, terminated, info = self._env.step_env(key, state, action, self._params)
        terminated = jnp.asarray(terminated, bool)
        truncated = jnp.asarray(self._env.is_truncated(state, self._params), bool)
        if not self.can_truncate:
            terminated, truncated = terminated | truncated, jnp.zeros_like(truncated)
        obs = self._flatten(obs)
        return obs, state, jnp.asarray(reward, jnp.float32), terminated, truncated, info

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
            visualizer.update(0)
            visualizer.ax.set_title("")
            visualizer.fig.canvas.draw()
            return np.asarray(visualizer.fig.canvas.buffer_rgba())[..., :3].copy()

        return render

    def _flatten(self, obs: jax.Array) -> jax.Array:
        if self._num_categories:
            return jax.nn.one_hot(obs, self._num_categories)
        return jnp.ravel(obs).astype(jnp.float32)


class CraftaxAdapter:
    """Craftax and Craftax-Classic with symbolic observations, in the variant without auto-reset.

    Craftax reports its step limit as an end like any other, so no step is truncated.
    """

    default_reset_strategy = "pool"
    can_truncate = False

    def __init__(self, name: str, env_kwargs: dict[str, Any], bootstrap_truncated: bool | None):
        del bootstrap_truncated  # there is nothing to bootstrap
        try:
            from craftax.craftax_env import make_craftax_env_from_name
        except ImportError as error:
            raise ConfigError(f"{name} needs the package craftax: {error}") from error

        env = make_craftax_env_from_name(name, auto_reset=False)
        static_params = env.default_static_params()
        of_params, of_static_params = split_env_kwargs(
            name, env_kwargs, _field_names(env.default_params), _field_names(static_params)
        )
        self._env = type(env)(replace_fields(static_params, of_static_params))
        self._params = replace_fields(env.default_params, of_params)
        self.action_space = Discrete(env.num_actions)
        obs, _, _, _, info = jax.eval_shape(self._own_step, jax.random.key(0))
        self.obs_size = obs.size
        # The map comes first: one-hot blocks, items and creatures, and whether there is light.
        self.num_binary = importlib.import_module(type(env).__module__).get_flat_map_obs_shape()
        self.episode_metrics = tuple(name for name in info if name.startswith("Achievements/"))

    def reset(self, key: jax.Array):
        return self._env.reset_env(key, self._params)

    def step(self, key: jax.Array, state: Any, action: jax.Array):
        obs, state, reward, done, info = self._env.step_env(key, state, action, self._params)
        return obs, state, reward, done, jnp.zeros_like(done), info

    def renderer(self) -> Callable[[Any], np.ndarray]:
        """A function from a state to its picture (height, width, 3), uint8, by Craftax itself."""
        package = "craftax_classic" if "Classic" in self._env.name else "craftax"
        module = importlib.import_module(f"craftax.{package}.renderer")
        render = jax.jit(module.make_craftax_pixel_renderer(CRAFTAX_BLOCK_PIXELS))
        return lambda state: np.asarray(render(state)).astype(np.uint8)

    def _own_step(self, key: jax.Array):
        _, state = self._env.reset_env(key, self._params)
        return self._env.step_env(key, state, 0, self._params)


def split_env_kwargs(
    name: str, env_kwargs: dict[str, Any], fields: list[str], arguments: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """ENV_KWARGS, split into fields of the environment's parameters and constructor arguments.

    Raises:
      ConfigError: a name that is neither; the message says which exist.
    """
    for key in env_kwargs:
        if key not in fields and key not in arguments:
            exist = ", ".join([*fields, *(a for a in arguments if a not in fields)])
            raise ConfigError(
                f"{name} has no {key!r} for ENV_KWARGS to set; it has: {exist or 'none'}"
            )
    of_params = {key: value for key, value in env_kwargs.items() if key in fields}
    of_constructor = {key: value for key, value in env_kwargs.items() if key not in fields}
    return of_params, of_constructor


def replace_fields(params: Any, values: dict[str, Any]) -> Any:
    """A dataclass with some fields replaced, each by a value of the type that was there.

    Raises:
      ConfigError: a value of another type or shape.
    """
    converted = {}
    for field, value in values.items():
        default = getattr(params, field)
        wrong = ConfigError(f"ENV_KWARGS: {field} is {value!r}, but must be like {default!r}")
        if isinstance(default, jax.Array | np.ndarray):
            try:
                converted[field] = jnp.asarray(value, default.dtype)
            except (TypeError, ValueError) as error:
                raise wrong from error
            if converted[field].shape != default.shape:
                raise wrong
        elif isinstance(default, tuple):
            if not isinstance(value, tuple | list) or len(value) != len(default):
                raise wrong
            converted[field] = tuple(value)
        elif isinstance(default, float) and type(value) in (int, float):
            converted[field] = float(value)
        elif type(value) is type(default):
            converted[field] = value
        else:
            raise wrong
    return dataclasses.replace(params, **converted)


def read_action_space(name: str, space: Any) -> Discrete | Box:
    """A suite's action space as ours, told apart by its fields.

    Raises:
      ConfigError: it is neither discrete nor a box.
    """
    if hasattr(space, "n"):
        return Discrete(int(space.n))
    if hasattr(space, "low"):
        low, high = (np.broadcast_to(bound, space.shape) for bound in (space.low, space.high))
        return Box(tuple(map(float, low.ravel())), tuple(map(float, high.ravel())))
    raise ConfigError(f"{name} has an action space that is neither discrete nor a box: {space!r}")


def _field_names(params: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(params)]


def _argument_names(environment_class: type) -> list[str]:
    return list(inspect.signature(environment_class).parameters)
