"""Every setting: its default, its type, and the checks that run before anything compiles."""

import ast
import difflib
import json
import math
from numbers import Integral, Real
from typing import Any

import jax

DEFAULTS = {
    "ENV_NAME": "MemoryChain-bsuite",
    "ENV_KWARGS": {},
    "RESET_STRATEGY": None,
    "RESET_RATIO": 16,
    "BOOTSTRAP_TRUNCATED": None,
    "PREV_ACTION_REWARD": None,
    "NORMALIZE_OBS": False,
    "NORMALIZE_REWARD": False,
    "TOTAL_TIMESTEPS": 10_000_000,
    "NUM_ENVS": 512,
    "NUM_STEPS": 128,
    "UPDATE_EPOCHS": 4,
    "NUM_MINIBATCHES": 8,
    "LR": 2e-4,
    "ANNEAL_LR": True,
    "GAMMA": 0.99,
    "GAE_LAMBDA": 0.8,
    "CLIP_EPS": 0.2,
    "ENT_COEF": 0.01,
    "VF_COEF": 0.5,
    "MAX_GRAD_NORM": 1.0,
    "ACTIVATION": "relu",
    "EMBED_SIZE": 256,
    "qkv_features": 256,
    "num_heads": 8,
    "num_layers": 2,
    "hidden_layers": 256,
    "WINDOW_MEM": 128,
    "WINDOW_GRAD": 64,
    "gating": True,
    "gating_bias": 2.0,
    "COMPUTE_DTYPE": "float32",
    "seed": 0,
    "NUM_SEEDS": 1,
    "RESULTS_DIR": None,
    "CHECKPOINT_EVERY": 50,
    "KEEP_CHECKPOINTS": 2,
    "CHECKPOINT_KIND": "full",
    "RESUME": None,
    "TRACK": None,
}
"""What a key is worth where a config does not have it: the published setting for Gymnax's tasks."""

LAUNCH = {
    "COORDINATOR": None,  # host:port of process 0, where the others find it; None: under SLURM
    "NUM_PROCESSES": None,  # how many processes, one per node
    "PROCESS_ID": None,  # which of them this one is, from 0
    "CONNECT_TIMEOUT": 300,  # seconds to wait for all of them
    "HEARTBEAT_TIMEOUT": 20,  # seconds without a sign of life until a process counts as dead
}
"""The settings of one process of several, which are not the run's."""

OPTIONAL = {
    "RESET_STRATEGY": str,
    "BOOTSTRAP_TRUNCATED": bool,
    "PREV_ACTION_REWARD": bool,
    "RESULTS_DIR": str,
    "RESUME": str,
    "TRACK": str,
    "COORDINATOR": str,
    "NUM_PROCESSES": int,
    "PROCESS_ID": int,
}
"""The keys that may be None, with their type otherwise."""

TRACED = ("LR", "GAMMA", "GAE_LAMBDA", "CLIP_EPS", "ENT_COEF", "VF_COEF", "MAX_GRAD_NORM")
"""The keys whose value may be traced, so that `jax.vmap` sweeps them."""

CHOICES = {
    "ACTIVATION": ("relu", "tanh"),
    "COMPUTE_DTYPE": ("float32", "bfloat16"),
    "RESET_STRATEGY": ("auto", "optimistic", "pool"),
    "CHECKPOINT_KIND": ("full", "learner", "params"),
    "TRACK": ("wandb", "tensorboard"),
    "POLICY": ("sampled", "greedy", "random"),
}

# Inclusive bounds of a key's value; None is no bound.
BOUNDS = {
    **dict.fromkeys(
        [
            *("TOTAL_TIMESTEPS", "NUM_ENVS", "NUM_STEPS", "UPDATE_EPOCHS", "NUM_MINIBATCHES"),
            *("EMBED_SIZE", "qkv_features", "num_heads", "num_layers", "hidden_layers"),
            *("WINDOW_GRAD", "NUM_SEEDS", "RESET_RATIO"),
            *("CHECKPOINT_EVERY", "KEEP_CHECKPOINTS", "EPISODES"),
            *("NUM_PROCESSES", "CONNECT_TIMEOUT", "HEARTBEAT_TIMEOUT"),
        ],
        (1, None),
    ),
    **dict.fromkeys(
        [
            *("WINDOW_MEM", "LR", "CLIP_EPS", "ENT_COEF", "VF_COEF", "MAX_GRAD_NORM"),
            "PROCESS_ID",
        ],
        (0, None),
    ),
    **dict.fromkeys(["seed", "EVAL_SEED"], (0, 2**32 - 1)),
    "GAMMA": (0, 1),
    "GAE_LAMBDA": (0, 1),
}


class ConfigError(ValueError):
    """A config that cannot be run. Its message is one line that says what to change."""


def check_config(config: dict[str, Any], num_devices: int = 1) -> dict[str, Any]:
    """Completes a config with the defaults and checks every value and size.

    Args:
      config: left unchanged.
      num_devices: over how many devices NUM_ENVS is spread.

    Returns:
      A new dict with every key of `DEFAULTS`, whole numbers as int.

    Raises:
      ConfigError: an unknown key, a value of the wrong type or range, sizes that don't divide.
    """
    checked = check_values(config, DEFAULTS)
    _check_sizes(checked, num_devices)
    return checked


def check_values(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Completes settings with their defaults and checks each value by itself.

    Raises:
      ConfigError: an unknown key, a value of the wrong type or range.
    """
    for key in values:
        _check_known(key, defaults)
    return {
        key: _check_value(key, values.get(key, default), _key_type(key, defaults))
        for key, default in defaults.items()
    }


def num_updates(config: dict[str, Any]) -> int:
    """How many updates a checked config runs: TOTAL_TIMESTEPS // (T * B)."""
    return config["TOTAL_TIMESTEPS"] // (config["NUM_STEPS"] * config["NUM_ENVS"])


def read_overrides(arguments: list[str], defaults: dict[str, Any] = DEFAULTS) -> dict[str, Any]:
    """The command line's KEY=VALUE arguments as a dict.

    Args:
      arguments: the command line.
      defaults: the keys that there are; a value is read as the type of its key's default.

    Raises:
      ConfigError: an argument without "=", an unknown key, a value that does not read as its type.
    """
    overrides = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} is not of the form KEY=VALUE")
        _check_known(key, defaults)
        overrides[key] = _read_value(key, text, _key_type(key, defaults))
    return overrides


def did_you_mean(word: str, candidates) -> str:
    """A clause that names the candidates close to `word`, empty where there are none."""
    by_lower_case = {str(candidate).lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(word.lower(), by_lower_case, n=4, cutoff=0.5)
    return f"; did you mean {' or '.join(by_lower_case[name] for name in close)}?" if close else ""


def _check_known(key: str, defaults: dict[str, Any]) -> None:
    if key not in defaults:
        raise ConfigError(f"unknown config key {key!r}{did_you_mean(key, defaults)}")


def _key_type(key: str, defaults: dict[str, Any]) -> type:
    return OPTIONAL.get(key, type(defaults[key]))


def _read_value(key: str, text: str, kind: type) -> Any:
    """The value that a command line's text stands for."""
    if key in OPTIONAL and text.lower() == "none":
        return None
    if kind is str:
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for read in (ast.literal_eval, json.loads):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    raise ConfigError(f"{key}={text} is not {_describe(key, kind)}")


def _describe(key: str, kind: type) -> str:
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
    words[dict] = "a dict such as {'memory_length': 10}"
    return words[kind] + (" or None" if key in OPTIONAL else "")


def _check_value(key: str, value: Any, kind: type) -> Any:
    """`value` as the type of its key, or a ConfigError."""
    if value is None and key in OPTIONAL:
        return None
    if key in TRACED and isinstance(value, jax.core.Tracer):
        return value
    wrong = ConfigError(f"{key} must be {_describe(key, kind)}, not {value!r}")
    if getattr(value, "ndim", None) == 0:  # a scalar of NumPy's or JAX's
        value = value.item()
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise wrong
        # PureJaxRL's configs write sizes as 5e5.
        if kind is int and not (isinstance(value, Integral) or float(value).is_integer()):
            raise wrong
        value = kind(value)
    elif not isinstance(value, kind):
        raise wrong
    if value not in CHOICES.get(key, (value,)):
        raise ConfigError(f"{key} must be one of {', '.join(CHOICES[key])}, not {value!r}")
    low, high = BOUNDS.get(key, (None, None))
    if (low is not None and value < low) or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{key} must be {wanted}, not {value}")
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
