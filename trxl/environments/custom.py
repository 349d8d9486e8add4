"""Environments of your own, `<file.py>:<class>`: files that are executed only if named."""

import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trxl.config import expanded
from trxl.environments import gymnax
from trxl.environments.adapters import making
from trxl.environments.base import ATTRIBUTES, SingleEnvironment
from trxl.environments.validation import check_environment, check_values, flat, is_number
from trxl.errors import OWN_PACKAGE, ConfigError, one_line, shortened

REPOSITORY = Path(__file__).resolve().parents[2]

# JAX prints the traceback of errors in callbacks, which the error's message also has.
logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)

PLAYED: set[tuple[Path, int, str, str]] = set()
"""Files, modification times, classes and arguments that passed `check_values`."""


def is_own(name: str) -> bool:
    """Returns whether an ENV_NAME is a file and a class, not a suite's environment."""
    return ":" in name or name.endswith(".py")


def file_and_class(name: str) -> tuple[Path, str]:
    """Splits `<file.py>:<class>`; the class is empty for a file alone."""
    path, colon, class_name = name.rpartition(":")
    return (Path(name), "") if name.endswith(".py") or not colon else (Path(path), class_name)


def find(file: Path) -> Path | None:
    """Finds a file in the current directory, else beside the scripts; None if missing."""
    file = Path(expanded(str(file)))
    # `Path.is_file` raises on names that are too long.
    return next((path for path in (file, REPOSITORY / file) if os.path.isfile(path)), None)


def located(name: str) -> str:
    """Returns an ENV_NAME with the absolute path of its file, if that exists."""
    file, class_name = file_and_class(name)
    path = find(file) if class_name else None
    return f"{path.resolve()}:{class_name}" if path else name


NOT_METRICS = (
    *("memory_boundary", "terminated", "truncated", "returned_episode", "discount"),
    "final_observation",
)
"""Names in info that describe a step's end, in Gymnax and here."""


class OwnEnvironment(SingleEnvironment):
    """Environment of the user's own, with float32 observations, and numbers in info as metrics.

    Args:
      env: after `check_environment`.
      info: info of a step, as shapes.
    """

    def __init__(self, env: SingleEnvironment, info: dict[str, Any]):
        self.env = env
        for name in ATTRIBUTES:
            setattr(self, name, getattr(env, name))
        numbers = (name for name, x in flat(info) if is_number(x) and name not in NOT_METRICS)
        self.episode_metrics = env.episode_metrics or tuple(numbers)

    @property
    def continues(self) -> bool:
        return self.env.continues

    def reset(self, key: jax.Array):
        obs, state = self.env.reset(key)
        return jnp.asarray(obs, jnp.float32), state

    def step(self, key: jax.Array, state: Any, action: jax.Array):
        obs, state, reward, terminated, truncated, info = self.env.step(key, state, action)
        kept = {
            name: jnp.asarray(x, jnp.float32)
            for name, x in flat(info)
            if name in self.episode_metrics
        }
        kept |= {name: info[name] for name in ("memory_boundary",) if name in info}
        return jnp.asarray(obs, jnp.float32), state, reward, terminated, truncated, kept

    def next_episode(self, key: jax.Array, state: Any):
        obs, state = self.env.next_episode(key, state)
        return jnp.asarray(obs, jnp.float32), state

    def agents_done(self, state: Any) -> jax.Array:
        return self.env.agents_done(state)

    def renderer(self) -> Callable[[Any], np.ndarray]:
        return self.env.renderer()


def make_own(name: str, env_kwargs: dict[str, Any]) -> SingleEnvironment:
    """Makes an environment of the class in `<file.py>:<class>`, with ENV_KWARGS.

    The class is a `SingleEnvironment`, or was written for Gymnax. Executes the file.

    Raises:
      ConfigError: the file or class is missing, or the environment can't be made.
    """
    named, class_name = file_and_class(name)
    path = find(named)
    if path is None:
        raise ConfigError(f"ENV_NAME={name}: there is no file {named}, nor beside the scripts")
    label = name.replace(":", ", ")
    with keeping_precision(name, path):
        own_class = find_class(name, import_file(name, path), class_name)
        env, own = construct(name, env_kwargs, own_class)
        info = check_environment(label, env, own)
    env = OwnEnvironment(env, info)
    version = (path.resolve(), path.stat().st_mtime_ns, class_name, repr(env_kwargs))
    if version not in PLAYED:
        check_values(label, env)
        PLAYED.add(version)
    return env


def construct(
    name: str, env_kwargs: dict[str, Any], own_class: type
) -> tuple[SingleEnvironment, Any]:
    """Makes an environment of the user's class; returns it and the user's object."""
    if issubclass(own_class, SingleEnvironment):
        env = making(name, env_kwargs)(lambda: own_class(**env_kwargs))
        return env, env
    adapter = gymnax.make_own(name, env_kwargs, own_class)
    return adapter, adapter.env


def find_class(name: str, module: ModuleType, class_name: str) -> type:
    """Returns a module's class of environments, a `SingleEnvironment` or written for Gymnax.

    Raises:
      ConfigError: the class is missing; the message lists the others.
    """
    found = {
        own: x
        for own, x in vars(module).items()
        if isinstance(x, type)
        and (issubclass(x, SingleEnvironment) or {"reset_env", "step_env"} <= set(dir(x)))
    }
    if class_name in found:
        return found[class_name]
    file = file_and_class(name)[0]
    names = [f"{file}:{own}" for own, x in found.items() if x.__module__ == module.__name__]
    what = f"ENV_NAME={name}: {module.__file__} has no environment {class_name}".rstrip()
    if names:
        raise ConfigError(f"{what}; say {' or '.join(names)}")
    raise ConfigError(f"{what}, a subclass of SingleEnvironment or of Gymnax's Environment")


def import_file(name: str, path: Path) -> ModuleType:
    """Executes a file as a module, which may import files beside it, also relatively.

    Raises:
      ConfigError: the file can't be imported.
    """
    package = ModuleType(OWN_PACKAGE)
    package.__path__ = [str(path.resolve().parent)]
    for old in [module for module in sys.modules if module.startswith(f"{OWN_PACKAGE}.")]:
        del sys.modules[old]  # from another folder or an older version
    sys.modules[OWN_PACKAGE] = package
    if package.__path__[0] not in sys.path:
        sys.path.append(package.__path__[0])
    spec = importlib.util.spec_from_file_location(f"{OWN_PACKAGE}.{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"ENV_NAME={name}: {path} is no file of Python, <file.py>")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses resolve annotations there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise ConfigError(f"{path} can't be imported: {one_line(error)}") from error
    return module


@contextmanager
def keeping_precision(name: str, path: Path) -> Iterator[None]:
    """Refuses a file that changes jax_enable_x64, since parts of the program exist already."""
    before = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    try:
        yield
        if jax.config.jax_enable_x64 != before:  # type: ignore[attr-defined]
            raise ConfigError(
                f"ENV_NAME={name}: {path} sets jax_enable_x64; remove that line, and start with"
                " JAX_ENABLE_X64=1 if you need it"
            )
    finally:
        jax.config.update("jax_enable_x64", before)


def named_by_user(saved: str, given: str | None, argument: str) -> str:
    """Returns the ENV_NAME with which to make the environment of a saved config.

    A saved config may be untrusted, and loading its environment executes a file. So the file must
    be named in the current command. It may have moved: only file stem and class must agree.

    Args:
      saved: ENV_NAME in the saved config.
      given: ENV_NAME of the command, if any.
      argument: how to name the file, with `{}` for the name.

    Raises:
      ConfigError: the command does not name the file, names a missing file, or names another
        environment.
    """
    if given is None:
        if is_own(saved):
            raise ConfigError(
                f"the environment is {saved}, a file that is run only if you name it: add"
                f" {argument.format(saved)}"
            )
        return saved
    if is_own(saved) and is_own(given):
        (before, saved_class), (now, class_name) = map(file_and_class, (saved, given))
        if (before.stem, saved_class) == (now.stem, class_name):
            if not find(now) and find(before):
                raise ConfigError(
                    f"there is no file {now}, nor beside the scripts; the run's was {before}: add"
                    f" {argument.format(saved)}"
                )
            return given
    if saved == given:
        return given
    raise ConfigError(
        f"ENV_NAME can't change; the run has ENV_NAME = {shortened(saved)}, not {shortened(given)}"
    )
