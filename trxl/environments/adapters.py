"""Functions that the suites' adapters share: imports, arguments, spaces and observations.

An adapter is a `SingleEnvironment` that calls the suite's reset and step. Its observations are flat
float32 vectors.
"""

import contextlib
import dataclasses
import importlib
import inspect
import io
import re
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trxl.errors import ConfigError, did_you_mean, one_line, shortened
from trxl.spaces import ActionSpace, Box, Discrete, MultiDiscrete


def each(pattern: str, parts: str) -> list[str]:
    """Returns names that differ in one part: `each("{}-v0", "Maze Tetris")`."""
    return [pattern.format(part) for part in parts.split()]


def import_suite(module: str) -> ModuleType:
    """Imports a module of a suite, without its output.

    Raises:
      ConfigError: the suite or a dependency is not installed.
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
    """Returns a function that calls another one, and turns any error into a `ConfigError`."""

    def make(function: Callable) -> Any:
        try:
            return function()
        except ConfigError:
            raise
        except (
            Exception,
            SystemExit,
        ) as error:  # suites raise almost anything: assertions, failed downloads
            given = f" with {shortened(env_kwargs)}" if env_kwargs else ""
            raise ConfigError(f"{name} can't be made{given}: {one_line(error)}") from error

    return make


def choose(key: str, value: Any, by_name: dict[str, Any]) -> Any:
    """Returns the object of that name.

    Raises:
      ConfigError: the name is unknown.
    """
    public = [name for name in by_name if not name.startswith("_")]
    if value not in public:
        raise ConfigError(
            f"ENV_KWARGS: {key} is {shortened(value)}{did_you_mean(str(value), public)}"
        )
    return by_name[value]


COUNTS = re.compile("(^|_)(num|max|min|size|length|steps?|episodes?|bits|depth)(_|$)|time_limit")
"""Names of arguments that are counts or lengths."""

ENDS = re.compile("max_(time)?steps|episode_length|time_limit")
"""Names of arguments that limit an episode."""


def check_numbers(env_kwargs: dict[str, Any]) -> None:
    """Raises a ConfigError for numbers that are invalid in every suite, since few suites check.

    These are infinite numbers, negative or oversized counts, and episodes of length 0.
    """
    for key, value in env_kwargs.items():
        numbers = value if isinstance(value, tuple | list) else [value]
        for number in numbers:
            if isinstance(number, float) and not np.isfinite(number):
                raise ConfigError(f"ENV_KWARGS: {key} is {shortened(value)}, which is not finite")
            low = 1 if ENDS.search(key) else 0
            if type(number) is int and COUNTS.search(key) and not low <= number < 2**31:
                wanted = f"must be from {low} to 2**31 - 1"
                raise ConfigError(f"ENV_KWARGS: {key} is {shortened(value)}, but {wanted}")


def check_env_kwargs(name: str, env_kwargs: dict[str, Any], known: list[str]) -> None:
    """Raises a ConfigError for an unknown name in ENV_KWARGS."""
    for key in env_kwargs:
        if key not in known:
            raise ConfigError(
                f"{name} has no {shortened(key)} for ENV_KWARGS to set; it has:"
                f" {', '.join(known) or 'none'}"
            )


def split_env_kwargs(
    name: str, env_kwargs: dict[str, Any], fields: list[str], arguments: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits ENV_KWARGS into fields of the environment's parameters and constructor arguments.

    Raises:
      ConfigError: a name is neither.
    """
    check_env_kwargs(name, env_kwargs, [*fields, *(a for a in arguments if a not in fields)])
    of_params = {key: value for key, value in env_kwargs.items() if key in fields}
    of_constructor = {key: value for key, value in env_kwargs.items() if key not in fields}
    return of_params, of_constructor


def replace_fields(params: Any, values: dict[str, Any]) -> Any:
    """Replaces fields of a dataclass by values of the same type and shape.

    Raises:
      ConfigError: a value has another type or shape.
    """
    converted: dict[str, Any] = {}
    for field, value in values.items():
        default = getattr(params, field)
        wrong = ConfigError(
            f"ENV_KWARGS: {field} is {shortened(value)}, but must be like {shortened(default)}"
        )
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
    """Converts a suite's action space, whose kind follows from its fields.

    Raises:
      ConfigError: the kind is unknown.
    """
    if hasattr(space, "n"):
        return Discrete(int(space.n))
    if hasattr(space, "num_categories"):
        return MultiDiscrete(tuple(map(int, space.num_categories)))
    if hasattr(space, "low"):
        return make_box(space.low, space.high, space.shape)
    raise ConfigError(
        f"{name} has an action space that is neither discrete nor a box: {shortened(space)}"
    )


def make_box(low: Any, high: Any, shape: tuple[int, ...]) -> Box:
    """Makes a flattened `Box`; bounds broadcast to the shape."""
    low, high = (np.broadcast_to(bound, shape).ravel() for bound in (low, high))
    return Box(tuple(map(float, low)), tuple(map(float, high)))


def is_bool(x: Any) -> bool:
    """Returns whether x is a bool or an array of bools."""
    return jnp.issubdtype(jnp.result_type(x), jnp.bool_)


def flatten_obs(arrays: Iterable[jax.Array]) -> jax.Array:
    """Flattens arrays of any shapes to one float32 vector."""
    return jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in arrays])


def field_names(params: Any) -> list[str]:
    """Returns the names of a dataclass's fields."""
    return [field.name for field in dataclasses.fields(params)]


def argument_names(environment_class: type) -> list[str]:
    """Returns the names of a constructor's arguments."""
    parameters = inspect.signature(environment_class).parameters.values()
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
