"""A config: read from a command line, and checked before anything compiles."""

import ast
import difflib
import json
import shlex
import sys
from collections.abc import Iterable, Iterator
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import jax

from trxl.keys import MEMORIES, NETWORKS, Key, Keys

SETTINGS = Path(__file__).resolve().parents[1] / "settings"
"""Files of KEY=VALUE words that are known to work, one for each task."""

MOST = {int: 2**63, float: sys.float_info.max}
"""What no machine counts to, by the type of a key."""


class ConfigError(ValueError):
    """A config that cannot be run. Its message is one line that says what to change."""


def check_config(config: dict[str, Any], keys: Keys, num_devices: int = 1) -> dict[str, Any]:
    """Completes a config with the defaults and checks every value and size.

    Args:
      config: left unchanged.
      keys: the algorithm's whole table.
      num_devices: over how many devices NUM_ENVS is spread.

    Returns:
      A new dict with every key of the table, whole numbers as int.

    Raises:
      ConfigError: an unknown key, a value of the wrong type or range, sizes that don't divide.
    """
    checked = check_values(config, keys)
    checked |= MEMORIES[checked["MEMORY"]]
    _check_sizes(checked, num_devices)
    return checked


def check_values(values: dict[str, Any], keys: Keys) -> dict[str, Any]:
    """Completes settings with their defaults and checks each value by itself.

    Raises:
      ConfigError: an unknown key, a value of the wrong type or range.
    """
    for name in values:
        _check_known(name, keys)
    return {
        name: _check_value(name, key, values.get(name, key.default)) for name, key in keys.items()
    }


def piece(config: dict[str, Any], name: str) -> Any:
    """What the config says of a piece of the network, or what NETWORK says of it."""
    return NETWORKS[config["NETWORK"]][name] if config[name] is None else config[name]


def num_updates(config: dict[str, Any]) -> int:
    """How many updates a checked config runs: TOTAL_TIMESTEPS // (T * B)."""
    return config["TOTAL_TIMESTEPS"] // (config["NUM_STEPS"] * config["NUM_ENVS"])


def read_overrides(arguments: list[str], keys: Keys) -> dict[str, Any]:
    """The command line's KEY=VALUE arguments as a dict; of a key given twice, the last.

    Args:
      arguments: the command line. `@name` stands for what is in `settings/<name>.txt`.
      keys: the keys that there are.

    Raises:
      ConfigError: an argument without "=", an unknown key, a value that does not read as its type,
        settings that are not there.
    """
    overrides = {}
    for name, text in names_and_texts(arguments):
        _check_known(name, keys)
        overrides[name] = read_value(name, keys[name], text)
    return overrides


def names_and_texts(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """The command line's KEY=VALUE arguments, those of `@name` too, cut in two.

    Raises:
      ConfigError: an argument without "=", settings that are not there.
    """
    for argument in with_settings(arguments):
        name, equals, text = argument.partition("=")
        if not equals:
            raise ConfigError(f"{shortened(argument)} is not of the form KEY=VALUE")
        yield name, text


def with_settings(arguments: list[str]) -> Iterator[str]:
    """The arguments, each `@name` replaced by the words of that file of `SETTINGS`.

    Raises:
      ConfigError: there is none of that name.
    """
    for argument in arguments:
        if not argument.startswith("@"):
            yield argument
            continue
        path = SETTINGS / f"{argument[1:]}.txt"
        if path.parent != SETTINGS or not path.is_file():
            names = [path.stem for path in sorted(SETTINGS.glob("*.txt"))]
            hint = did_you_mean(argument[1:], names) or f"; there are {', '.join(names)}"
            raise ConfigError(f"no settings {shortened(argument)} in settings/{hint}")
        yield from shlex.split(path.read_text(), comments=True)


def shortened(value: Any, length: int = 80) -> str:
    """A value as an error line shows it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of more than 4,300 digits
        text = "a number of thousands of digits"
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def did_you_mean(word: str, candidates: Iterable[Any]) -> str:
    """A clause that names the candidates close to `word`, empty where there are none."""
    by_lower_case = {str(candidate).lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(word.lower(), by_lower_case, n=4, cutoff=0.5)
    return f"; did you mean {' or '.join(by_lower_case[name] for name in close)}?" if close else ""


def _check_known(name: str, keys: Keys) -> None:
    if name not in keys:
        raise ConfigError(f"unknown config key {shortened(name)}{did_you_mean(name, keys)}")


def read_value(name: str, key: Key, text: str) -> Any:
    """The value that a command line's text stands for."""
    if key.default is None and text.lower() == "none":
        return None
    if key.kind is str:
        return text
    if key.kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for read in (ast.literal_eval, json.loads):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    raise ConfigError(f"{name}={shortened(text)[1:-1]} is not {_describe(key)}")


def _describe(key: Key) -> str:
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
    words[dict] = "a dict such as {'memory_length': 10}"
    return words[key.kind] + (" or None" if key.default is None else "")


def _check_value(name: str, key: Key, value: Any) -> Any:
    """`value` as the type of its key, or a ConfigError."""
    if value is None and key.default is None:
        return None
    if key.traced and isinstance(value, jax.core.Tracer):
        return value
    wrong = ConfigError(f"{name} must be {_describe(key)}, not {shortened(value)}")
    if getattr(value, "ndim", None) == 0:  # a scalar of NumPy's or JAX's
        value = value.item()
    if key.kind in (int, float):
        most = MOST[key.kind]
        if isinstance(value, bool) or not isinstance(value, Real) or not -most <= value <= most:  # type: ignore[operator]
            raise wrong  # infinite and NaN too
        # PureJaxRL's configs write sizes as 5e5.
        if key.kind is int and not (isinstance(value, Integral) or float(value).is_integer()):
            raise wrong
        value = key.kind(value)
    elif not isinstance(value, key.kind):
        raise wrong
    elif value == "" and key.default is None:
        raise ConfigError(f"{name} is empty; give {_describe(key)}")
    if key.choices and value not in key.choices:
        raise ConfigError(f"{name} must be one of {', '.join(key.choices)}, not {shortened(value)}")
    if (key.low is not None and value < key.low) or (key.high is not None and value > key.high):
        wanted = f"at least {key.low}" if key.high is None else f"from {key.low} to {key.high}"
        raise ConfigError(f"{name} must be {wanted}, not {shortened(value)}")
    return value


def _check_sizes(config: dict[str, Any], num_devices: int) -> None:
    """Raises a ConfigError where sizes don't fit together."""

    def divides(divisor_name: str, divisor: int, name: str, size: int) -> None:
        if size % divisor:
            raise ConfigError(
                f"{divisor_name} must divide {name}: {divisor} does not divide {size}"
            )

    divides("num_heads", config["num_heads"], "qkv_features", config["qkv_features"])
    divides("2 (sines and cosines)", 2, "EMBED_SIZE", config["EMBED_SIZE"])
    divides("WINDOW_GRAD", config["WINDOW_GRAD"], "NUM_STEPS", config["NUM_STEPS"])
    divides("the number of devices", num_devices, "NUM_ENVS", config["NUM_ENVS"])
    name = "NUM_ENVS" if num_devices == 1 else f"NUM_ENVS / {num_devices} devices"
    envs_per_device = config["NUM_ENVS"] // num_devices
    divides("NUM_MINIBATCHES", config["NUM_MINIBATCHES"], name, envs_per_device)
    if config["RESET_STRATEGY"] == "optimistic":
        divides("RESET_RATIO", config["RESET_RATIO"], name, envs_per_device)
    if config["seed"] + config["NUM_SEEDS"] > 2**32:
        raise ConfigError("seed + NUM_SEEDS must not exceed 2**32")
    if num_updates(config) < 1:
        rollout = f"NUM_ENVS * NUM_STEPS = {config['NUM_ENVS'] * config['NUM_STEPS']}"
        raise ConfigError(
            f"TOTAL_TIMESTEPS = {config['TOTAL_TIMESTEPS']} is less than one rollout, {rollout}"
        )
    if num_updates(config) >= 2**31:
        raise ConfigError(
            f"{num_updates(config)} updates are more than 2**31 - 1; lower TOTAL_TIMESTEPS, or"
            " raise NUM_ENVS or NUM_STEPS"
        )
