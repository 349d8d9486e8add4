"""Single environments by name: suites, and environments of your own.

A suite is a file of this folder that has `NAMES`. It imports the suite's package on first use.

| name | content |
| --- | --- |
| `NAMES` | names of its environments, to resolve a bare name without importing any suite |
| `registered()` | names in the installed package |
| `make(name, env_kwargs)` | makes a `SingleEnvironment` |
| `full_name(name)` | resolves other spellings of a name; optional |
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import jax

from trxl.environments.adapters import check_numbers
from trxl.environments.base import Mirror, SingleEnvironment
from trxl.environments.custom import file_and_class, is_own, located, make_own, named_by_user
from trxl.environments.validation import check_environment
from trxl.errors import ConfigError, did_you_mean, shortened
from trxl.spaces import Box, Discrete, MultiDiscrete

__all__ = [
    "Box",
    "Discrete",
    "Mirror",
    "MultiDiscrete",
    "SingleEnvironment",
    "is_own",
    "located",
    "make_own",
    "named_by_user",
    "resolve_name",
    "suites",
]


def make_single_env(name: str, env_kwargs: dict[str, Any]) -> SingleEnvironment:
    """Makes an environment of a suite, or of your own.

    Raises:
      ConfigError: the name or an argument is invalid.
    """
    if is_own(name):
        return make_own(name, env_kwargs)
    suite, full_name = resolve_name(name)
    check_numbers(env_kwargs)
    with jax.enable_x64(False):
        env = suites()[suite].make(full_name, env_kwargs)
        env.float64 = False
        if env_kwargs:
            check_environment(f"{full_name} with {shortened(env_kwargs)}", env)
    return env


def suites() -> dict[str, ModuleType]:
    """Returns the suites' modules by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "NAMES")}


def resolve_name(name: str) -> tuple[str, str]:
    """Resolves a name to suite and full name, or to file stem and class.

    Args:
      name: `<suite>/<name>`, a bare name that only one suite has, or `<file.py>:<class>`.

    Raises:
      ConfigError: the name is unknown or ambiguous, or its environment observes pixels.
    """
    if is_own(name):
        path, class_name = file_and_class(name)
        return path.stem, class_name
    every = suites()
    suite, slash, bare = name.rpartition("/")
    suites_are = f"; the suites are {', '.join(every)}; <file.py>:<class> is one of your own"
    if slash and suite not in every:
        raise ConfigError(f"unknown suite {shortened(suite)} in {shortened(name)}{suites_are}")
    full = {s: getattr(module, "full_name", str)(bare) for s, module in every.items()}
    having = [s for s, module in every.items() if full[s] in module.NAMES]
    if slash and bare and suite not in having and full[suite] in every[suite].registered():
        having = [suite]  # registered by hand, or by a later version of the suite
    found = [suite] if suite in having else [] if slash else having
    if len(found) == 1:
        return found[0], full[found[0]]
    if having:
        what = f"{suite} has no" if slash else "several suites have"
        candidates = " or ".join(f"{s}/{bare}" for s in having)
        raise ConfigError(f"{what} {shortened(bare)}; say {candidates}")
    if (asked := name.strip("/")) in every:
        names = ", ".join(every[asked].NAMES)
        raise ConfigError(f"ENV_NAME={name} is a suite; choose one of its environments: {names}")
    known = [n for s, module in every.items() if s == suite or not slash for n in module.NAMES]
    hint = did_you_mean(bare, known) or suites_are
    raise ConfigError(f"unknown environment {shortened(name)}{hint}")
