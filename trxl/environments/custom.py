"""Environments of one's own, `<file.py>:<class>`: a file that is run, and when it may be."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from trxl.environments.adapters import making
from trxl.environments.base import SingleEnvironment
from trxl.environments.validation import check_environment
from trxl.errors import ConfigError, one_line, shortened

REPOSITORY = Path(__file__).resolve().parents[2]


def is_own(name: str) -> bool:
    """Returns whether an ENV_NAME names a file and a class in it, not a suite's environment."""
    return ":" in name


def file_and_class(name: str) -> tuple[Path, str]:
    """The two parts of `<file.py>:<class>`."""
    path, _, class_name = name.rpartition(":")
    return Path(path), class_name


def find(file: Path) -> Path | None:
    """The file seen from the current directory, else from where the scripts are."""
    file = Path(os.path.expanduser(file))
    # os.path, for which a name that is too long is no file either.
    return next((path for path in (file, REPOSITORY / file) if os.path.isfile(path)), None)


def located(name: str) -> str:
    """An ENV_NAME that means the same from any directory, if its file is there."""
    if not is_own(name):
        return name
    file, class_name = file_and_class(name)
    path = find(file)
    return f"{path.resolve()}:{class_name}" if path else name


def make_own(name: str, env_kwargs: dict[str, Any]) -> SingleEnvironment:
    """An environment of the user's own: an object of `<file.py>:<class>`, made with ENV_KWARGS.

    Raises:
      ConfigError: there is no such file or class, or it can't be made.
    """
    named, class_name = file_and_class(name)
    path = find(named)
    if path is None:
        raise ConfigError(f"ENV_NAME={name}: there is no file {named}, nor beside the scripts")
    spec = importlib.util.spec_from_file_location(f"own_environment.{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"ENV_NAME={name}: {path} is no file of Python, <file.py>")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up annotations
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise ConfigError(
            f"ENV_NAME={name}: {path} can't be imported: {one_line(error)}"
        ) from error
    own_class = getattr(module, class_name, None)
    if not (isinstance(own_class, type) and issubclass(own_class, SingleEnvironment)):
        raise ConfigError(f"ENV_NAME={name}: {path} has no SingleEnvironment {class_name}")
    env = making(name, env_kwargs)(lambda: own_class(**env_kwargs))
    check_environment(name.replace(":", ", "), env, str(path))
    return env


def named_by_user(saved: str, given: str | None, argument: str) -> str:
    """The ENV_NAME to make the environment of a saved config by.

    A saved config may be a stranger's, and to make an environment of one's own is to run its file.
    So the file is the one that the user names in this very command, never the one that the config
    names. It may have moved: the file's name without its folder and ending, and the class, agree.
    Where there is none of the name that they give, they are told which file the config names.

    Args:
      saved: ENV_NAME in the saved config.
      given: what the user names, if anything.
      argument: how to name it, with `{}` where the name goes.

    Raises:
      ConfigError: it is a file that the user didn't name, or one that isn't there, or they named
        another environment.
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
