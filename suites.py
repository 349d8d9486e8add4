"""The suites' own environments as `wrappers.SingleEnvironment`s: one short adapter for each suite.

An adapter calls the suite's own reset and step and says what they mean. Observations leave here as
flat float32 vectors. Two suites have a file of their own: xland.py and multiagent.py.
"""

import contextlib
import dataclasses
import importlib
import inspect
import io
import os
from collections.abc import Callable, Iterable
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from config import ConfigError, did_you_mean
from spaces import ActionSpace, Box, Discrete, MultiDiscrete, mask_size
from wrappers import SingleEnvironment

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


class GymnaxAdapter(SingleEnvironment):
    """An environment of `gymnax.registered_envs`, on Gymnax 1.0's `step_env` and `is_truncated`."""

    def __init__(self, name: str, env_kwargs: dict[str, Any]):
        gymnax = import_suite("gymnax")

        def make(**constructor_kwargs):
            # Constructors check by assertion, and MNISTBandit's downloads its data.
            return making(name, env_kwargs)(lambda: gymnax.make(name, **constructor_kwargs))

        self._env, params = make()
        of_params, of_constructor = split_env_kwargs(
            name, env_kwargs, field_names(params), argument_names(type(self._env))
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
            visualizer.update(0)
            visualizer.ax.set_title("")
            visualizer.fig.canvas.draw()
            return np.asarray(visualizer.fig.canvas.buffer_rgba())[..., :3].copy()

        return render

    def _flatten(self, obs: jax.Array) -> jax.Array:
        if self._num_categories:
            return jax.nn.one_hot(obs, self._num_categories)
        return jnp.ravel(obs).astype(jnp.float32)


class CraftaxAdapter(SingleEnvironment):
    """Craftax and Craftax-Classic with symbolic observations, in the variant without auto-reset.

    Craftax reports its step limit as an end like any other, so no step is truncated.
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


class BraxAdapter(SingleEnvironment):
    """An environment of Brax under its `EpisodeWrapper`, whose time limit is a truncation.

    ENV_KWARGS: `episode_length` (1000), `action_repeat` (1), and arguments of the environment's
    constructor such as `backend`.
    """

    def __init__(self, name: str, env_kwargs: dict[str, Any]):
        envs = import_suite("brax.envs")
        wrapper = import_suite("brax.envs.wrappers.training").EpisodeWrapper
        limits = {"episode_length": 1000, "action_repeat": 1}
        known = [*limits, *argument_names(envs._envs[name]), "n_frames"]
        check_env_kwargs(name, env_kwargs, known)
        limits |= {key: env_kwargs[key] for key in limits if key in env_kwargs}
        of_constructor = {key: value for key, value in env_kwargs.items() if key not in limits}
        make = making(name, env_kwargs)
        mend_fluid()
        self._env = wrapper(make(lambda: envs.get_environment(name, **of_constructor)), **limits)
        self.action_space = make_box(-1, 1, (self._env.action_size,))
        self.obs_size = make(lambda: jax.eval_shape(self.reset, jax.random.key(0)))[0].size

    def reset(self, key: jax.Array):
        state = self._env.reset(key)
        return flatten_obs(jax.tree.leaves(state.obs)), state

    def step(self, key: jax.Array, state: Any, action: jax.Array):
        state = self._env.step(state, action)
        truncated = state.info["truncation"].astype(bool)
        terminated = state.done.astype(bool) & ~truncated
        obs = flatten_obs(jax.tree.leaves(state.obs))
        return obs, state, state.reward, terminated, truncated, {}


def mend_fluid() -> None:
    """Lets the swimmer swim: Brax 0.14.2 names an argument of `clip` as JAX no longer does."""

    def clip(x: jax.Array, a_min: Any = None, a_max: Any = None) -> jax.Array:
        return jnp.clip(x, a_min, a_max)

    import_suite("brax.fluid").jp = SimpleNamespace(**{**vars(jnp), "clip": clip})


class NavixAdapter(SingleEnvironment):
    """An environment of Navix, whose own step is not given the chance to reset.

    ENV_KWARGS: `max_steps` and other fields of Navix's `Environment`; functions such as
    `observation_fn` go by their name in Navix's module of that kind ("symbolic_first_person").
    """

    def __init__(self, name: str, env_kwargs: dict[str, Any]):
        navix = import_suite("navix")
        modules = {
            "observation_fn": navix.observations,
            "reward_fn": navix.rewards,
            "termination_fn": navix.terminations,
        }
        check_env_kwargs(name, env_kwargs, field_names(navix.environments.Environment))
        env_kwargs = {
            key: choose(key, value, vars(modules[key])) if key in modules else value
            for key, value in env_kwargs.items()
        }
        make = making(name, env_kwargs)
        self._env = make(lambda: navix.make(name, **env_kwargs))
        self.action_space = read_action_space(name, self._env.action_space)
        self.obs_size = make(lambda: jax.eval_shape(self.reset, jax.random.key(0)))[0].size
        self._draw = jax.jit(navix.observations.rgb)

    def reset(self, key: jax.Array):
        timestep = self._env.reset(key)
        return flatten_obs([timestep.observation]), timestep

    def step(self, key: jax.Array, state: Any, action: jax.Array):
        # `step` resets instead where the timestep before was a last one: never here.
        timestep = self._env._step(state, action)
        ends = timestep.is_termination(), timestep.is_truncation()
        return flatten_obs([timestep.observation]), timestep, timestep.reward, *ends, {}

    def renderer(self) -> Callable[[Any], np.ndarray]:
        """A function from a state to its picture (height, width, 3), uint8, by Navix itself."""
        return lambda timestep: np.asarray(self._draw(timestep.state))


class JumanjiAdapter(SingleEnvironment):
    """A registered environment of Jumanji, its observation flattened, its action mask in front.

    Where the mask has an entry for each combination of several choices, the combinations are the
    actions. Several agents' rewards are summed: one agent plays them all. What the environment
    logs in its timestep's extras is averaged over episodes.
    """

    def __init__(self, name: str, env_kwargs: dict[str, Any]):
        jumanji, registration = import_suite("jumanji"), import_suite("jumanji.registration")
        entry_point = registration.load(registration._REGISTRY[name].entry_point)
        check_env_kwargs(name, env_kwargs, argument_names(entry_point))
        make = making(name, env_kwargs)
        self._env = make(lambda: jumanji.make(name, **env_kwargs))
        _, timestep = make(lambda: jax.eval_shape(self._env.reset, jax.random.key(0)))
        mask, arrays = self._parts(timestep.observation)
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
        # A last timestep whose discount is not 0 is cut off by time.
        terminated = timestep.last() & jnp.all(timestep.discount == 0)
        truncated = timestep.last() & ~terminated
        info = {name: jnp.asarray(timestep.extras[name], float) for name in self.episode_metrics}
        obs, reward = self._observe(timestep), jnp.sum(timestep.reward)
        return obs, state, reward, terminated, truncated, info

    def _observe(self, timestep: Any) -> jax.Array:
        mask, arrays = self._parts(timestep.observation)
        return flatten_obs(arrays if mask is None else [mask, *arrays])

    def _parts(self, observation: Any) -> tuple[jax.Array | None, list[jax.Array]]:
        """The action mask, None where there is none, and the other arrays, bool ones first."""
        with_path = jax.tree_util.tree_leaves_with_path(observation)
        is_mask = [
            jax.tree_util.keystr(path).strip("[].'") == "action_mask" for path, _ in with_path
        ]
        arrays = [x for (_, x), mask in zip(with_path, is_mask, strict=True) if not mask]
        masks = [x for (_, x), mask in zip(with_path, is_mask, strict=True) if mask]
        return (masks or [None])[0], sorted(arrays, key=lambda x: not is_bool(x))

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
        # MultiCVRP's spec has an action more than its mask, which is right.
        space = MultiDiscrete(tuple(min(n, mask.shape[-1]) for n in sizes), masked=True)
        if mask.shape != space.table:
            raise ConfigError(f"{name} has an action mask {mask.shape} for the choices {sizes}")
        return space


REGISTRIES = {
    "gymnax": ("gymnax", lambda gymnax: gymnax.registered_envs),
    "craftax": ("craftax", lambda craftax: ()),
    "brax": ("brax.envs", lambda envs: envs._envs),
    "jumanji": ("jumanji", lambda jumanji: jumanji.registered_environments()),
    "navix": ("navix", lambda navix: navix.registry()),
    "xminigrid": ("xminigrid", lambda xminigrid: xminigrid.registered_environments()),
    "jaxmarl": ("jaxmarl", lambda jaxmarl: jaxmarl.registered_envs),
}
"""Where a suite lists its environments."""


def registered(suite: str) -> list[str]:
    """The names that an installed suite knows.

    Raises:
      ConfigError: it is not installed.
    """
    module, names = REGISTRIES[suite]
    return list(names(import_suite(module)))


def import_suite(module: str) -> ModuleType:
    """Imports a module of a suite, and keeps what it prints to itself.

    Raises:
      ConfigError: the suite, or what it needs, is not installed; says what to install.
    """
    package = module.partition(".")[0]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{package} is not installed ({error}): pip install {package}, or all suites:"
            " pip install -r requirements-envs.txt"
        ) from error


def making(name: str, env_kwargs: dict[str, Any]) -> Callable:
    """Calls a function that makes an environment; any error becomes a `ConfigError` of one line."""

    def make(function: Callable) -> Any:
        try:
            return function()
        except ConfigError:
            raise
        except Exception as error:  # suites check by assertion, download, or don't check at all
            reason = one_line(error)
            raise ConfigError(f"{name} can't be made with {env_kwargs}: {reason}") from error

    return make


def one_line(error: Exception) -> str:
    """What an error of a suite or of a file says, without its line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def choose(key: str, value: Any, by_name: dict[str, Any]) -> Any:
    """The object of that name.

    Raises:
      ConfigError: there is none.
    """
    public = [name for name in by_name if not name.startswith("_")]
    if value not in public:
        raise ConfigError(f"ENV_KWARGS: {key} is {value!r}{did_you_mean(str(value), public)}")
    return by_name[value]


def check_env_kwargs(name: str, env_kwargs: dict[str, Any], known: list[str]) -> None:
    """Raises a ConfigError for a name that ENV_KWARGS can't set; the message says which exist."""
    for key in env_kwargs:
        if key not in known:
            raise ConfigError(
                f"{name} has no {key!r} for ENV_KWARGS to set; it has: {', '.join(known) or 'none'}"
            )


def split_env_kwargs(
    name: str, env_kwargs: dict[str, Any], fields: list[str], arguments: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """ENV_KWARGS, split into fields of the environment's parameters and constructor arguments.

    Raises:
      ConfigError: a name that is neither; the message says which exist.
    """
    check_env_kwargs(name, env_kwargs, [*fields, *(a for a in arguments if a not in fields)])
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


def read_action_space(name: str, space: Any) -> ActionSpace:
    """A suite's action space as ours, told apart by its fields.

    Raises:
      ConfigError: it is of no kind that this agent has a policy for.
    """
    if hasattr(space, "n"):
        return Discrete(int(space.n))
    if hasattr(space, "num_categories"):
        return MultiDiscrete(tuple(map(int, space.num_categories)))
    if hasattr(space, "low"):
        return make_box(space.low, space.high, space.shape)
    raise ConfigError(f"{name} has an action space that is neither discrete nor a box: {space!r}")


def make_box(low: Any, high: Any, shape: tuple[int, ...]) -> Box:
    """A box of that shape, flattened."""
    low, high = (np.broadcast_to(bound, shape).ravel() for bound in (low, high))
    return Box(tuple(map(float, low)), tuple(map(float, high)))


def is_bool(x: Any) -> bool:
    """Whether it is an array or a number of bools."""
    return jnp.issubdtype(jnp.result_type(x), jnp.bool_)


def flatten_obs(arrays: Iterable[jax.Array]) -> jax.Array:
    """Arrays of any shapes as one float32 vector."""
    return jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in arrays])


def field_names(params: Any) -> list[str]:
    """The names of a dataclass's fields."""
    return [field.name for field in dataclasses.fields(params)]


def argument_names(environment_class: type) -> list[str]:
    """The names of its constructor's arguments."""
    parameters = inspect.signature(environment_class).parameters.values()
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
