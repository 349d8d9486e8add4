"""Table of all settings, and configs read from a command line and checked.

`SHARED_KEYS` are the settings of every algorithm; `with_shared` adds an algorithm's own. `--help`,
docs/keys.md and the keys that RESUME may change follow from the table.
"""

import ast
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import jax

from trxl.errors import ConfigError, did_you_mean, shortened

GROUPS = ("Environment", "Training", "Network", "Run")

LARGEST_SIZE = 2**31 - 1
"""Largest integer of a key without `high`, the largest array size in JAX."""

LARGEST_WIDTH = 10**6
"""Largest width of a layer."""

LARGEST_INT = 2**63 - 1
"""Largest number of steps."""


class Key(NamedTuple):
    """A setting. If the default is None, None is a valid value."""

    default: Any
    help: str  # one line of Markdown: meaning and unit
    group: str = "Training"  # one of GROUPS
    type: Any = None  # of a value; None: the default's
    low: float | None = None  # inclusive bounds; None: no bound
    high: float | None = None
    choices: tuple[str, ...] = ()  # valid strings; empty: all
    traced: bool = False  # whether a value may be traced, for sweeps with `jax.vmap`
    resumable: bool = True  # whether a resumed run may change it
    derive: Callable | None = None  # (config, devices) -> value in place of None
    needs: tuple[tuple[str, Any], ...] = ()  # values of other keys required unless None

    @property
    def kind(self) -> type:
        """Type of a value that is not None."""
        return self.type or type(self.default)


Keys = Mapping[str, Key]


def environment_key(*args: Any, **more: Any) -> Key:
    """Makes a key of the environment, which a resumed run may not change."""
    return Key(*args, **{"group": "Environment", "resumable": False, **more})


def network_key(*args: Any, **more: Any) -> Key:
    """Makes a key of the network, which a resumed run may not change."""
    return Key(*args, **{"group": "Network", "resumable": False, **more})


def minibatches(most: int) -> Key:
    """Makes the key NUM_MINIBATCHES, whose default is at most `most`."""

    def largest(config: dict[str, Any], num_devices: int) -> int:
        rows = config["NUM_ENVS"] // num_devices
        return max(number for number in range(1, most + 1) if rows % number == 0)

    return Key(
        None,
        "minibatches per pass over a rollout, each of whole environments; None: the largest"
        f" divisor up to {most} of the environments per device",
        type=int,
        low=1,
        derive=largest,
    )


NETWORKS = {
    "published": {"ENCODER": "linear", "SKIP": False, "HEADS": "mlp"},
    "wide": {"ENCODER": "features", "SKIP": True, "HEADS": "residual"},
}
"""Encoder, skip connection and heads of each NETWORK."""


def by_network(name: str) -> Callable:
    """Returns the `derive` of a key of `NETWORKS`."""
    return lambda config, _: NETWORKS[config["NETWORK"]][name]


def half_of(steps: int) -> int:
    """Returns half of an even number, and an odd number itself."""
    return steps if steps % 2 else steps // 2


SHARED_KEYS = {
    "ENV_NAME": environment_key(
        "MemoryChain-bsuite", "`<suite>/<name>`, or a name that only one suite has"
    ),
    "ENV_KWARGS": environment_key({}, "parameters or constructor arguments of the environment"),
    "RESET_STRATEGY": environment_key(
        None,
        "`auto`, `optimistic` or `pool`; None: the suite's default",
        type=str,
        choices=("auto", "optimistic", "pool"),
    ),
    "RESET_RATIO": environment_key(
        16, "environments per level generated at a time, with `optimistic` and `pool`", low=1
    ),
    "BOOTSTRAP_TRUNCATED": environment_key(
        None,
        "whether truncated episodes are bootstrapped; None: the environment's default",
        type=bool,
        resumable=True,
    ),
    "TRIAL_CREDIT": environment_key(
        True,
        "in meta-RL, whether returns continue in the next episode of a trial",
        resumable=True,
    ),
    "TRIAL_MEMORY": environment_key(
        True,
        "in meta-RL, whether memory and credit last for the trial; False: for an episode",
    ),
    "EPISODE_END": environment_key(
        "append",
        "in meta-RL, how the agent observes an episode's last observation: `none`; `append`, beside"
        " the next episode's first; `step`, in an extra step",
        choices=("none", "append", "step"),
    ),
    "PREV_ACTION_REWARD": environment_key(
        None,
        "whether observations hold the previous action and reward; None: in meta-RL",
        type=bool,
    ),
    "MIRRORS": environment_key(
        False,
        "whether each environment has a row per symmetry that sees it mirrored, and learns from"
        " what was played",
    ),
    "NORMALIZE_OBS": environment_key(
        False, "whether observations are normalised by running mean and variance"
    ),
    "NORMALIZE_REWARD": environment_key(
        False, "whether rewards are divided by the running standard deviation of discounted returns"
    ),
    "TOTAL_TIMESTEPS": Key(
        500_000, "environment steps, summed over environments", low=1, high=LARGEST_INT
    ),
    "NUM_ENVS": Key(64, "environments, summed over devices", low=1, resumable=False),
    "NUM_STEPS": Key(64, "steps of each environment per rollout", low=1, resumable=False),
    "NUM_MINIBATCHES": minibatches(8),
    "LR": Key(1e-3, "learning rate of Adam", low=0, traced=True),
    "ANNEAL_LR": Key(True, "whether LR decays linearly to 0 over the run"),
    "GAMMA": Key(0.99, "discount per step", low=0, high=1, traced=True),
    "NETWORK": network_key(
        "published",
        "defaults of ENCODER, SKIP and HEADS: `published` (`linear`, False, `mlp`) or `wide`"
        " (`features`, True, `residual`)",
        choices=("published", "wide"),
    ),
    "ENCODER": network_key(
        None,
        "`linear`: one dense layer; `features`: convolutions for the grid, a dense layer for the"
        " rest, norms; None: by NETWORK",
        type=str,
        choices=("linear", "features"),
        derive=by_network("ENCODER"),
    ),
    "SKIP": network_key(
        None,
        "whether actor and critic read the encoder's features beside the transformer's output;"
        " None: by NETWORK",
        type=bool,
        derive=by_network("SKIP"),
    ),
    "HEADS": network_key(
        None,
        "actor and critic: `mlp` with two hidden layers, or `residual` with norms; None: by"
        " NETWORK",
        type=str,
        choices=("mlp", "residual"),
        derive=by_network("HEADS"),
    ),
    "encoder_features": network_key(
        512,
        "features of the grid with ENCODER=features; the rest has a fourth as many",
        low=4,
        high=LARGEST_WIDTH,
    ),
    "ACTIVATION": network_key(
        "relu",
        "activation of the hidden layers with HEADS=mlp: `relu` or `tanh`",
        choices=("relu", "tanh"),
    ),
    "MEMORY": network_key(
        "transformer",
        "`transformer`, `gru` with as many layers, or `none`: actor and critic read the encoder",
        choices=("transformer", "gru", "none"),
    ),
    "EMBED_SIZE": network_key(64, "width of the residual stream, even", low=1, high=LARGEST_WIDTH),
    "qkv_features": network_key(
        64, "width of queries, keys and values, summed over heads", low=1, high=LARGEST_WIDTH
    ),
    "num_heads": network_key(4, "attention heads, divides `qkv_features`", low=1),
    "num_layers": network_key(2, "transformer or GRU layers; 0 with MEMORY=none", low=0, high=1000),
    "hidden_layers": network_key(
        64, "width of the actor's and the critic's hidden layers", low=1, high=LARGEST_WIDTH
    ),
    "WINDOW_GRAD": network_key(
        None,
        "steps that a gradient flows through, divides `NUM_STEPS`; None: half of `NUM_STEPS`, all"
        " if odd",
        type=int,
        low=1,
        derive=lambda config, _: half_of(config["NUM_STEPS"]),
    ),
    "WINDOW_MEM": network_key(
        None,
        "steps that attention reaches back in each layer; None: `WINDOW_GRAD`; 1 with MEMORY=gru,"
        " 0 with MEMORY=none",
        type=int,
        low=0,
        derive=lambda config, _: config["WINDOW_GRAD"],
    ),
    "gating": network_key(True, "whether layers have GTrXL's gates; False: residual sums"),
    "gating_bias": network_key(2.0, "initial bias of the gates; larger is more closed"),
    "COMPUTE_DTYPE": network_key(
        "float32",
        "dtype of matrix products: `float32` or `bfloat16`",
        choices=("float32", "bfloat16"),
        resumable=True,
    ),
    "seed": Key(
        0,
        "seed of parameters, environments and actions",
        "Run",
        low=0,
        high=2**32 - 1,
        resumable=False,
    ),
    "NUM_SEEDS": Key(
        1, "seeds trained in parallel: `seed`, `seed` + 1, ...", "Run", low=1, resumable=False
    ),
    "RESULTS_DIR": Key(
        None,
        "parent of the run's folder; None: `runs/<suite>`",
        "Run",
        type=str,
        resumable=False,
    ),
    "CHECKPOINT_EVERY": Key(50, "updates between checkpoints", "Run", low=1),
    "KEEP_CHECKPOINTS": Key(2, "number of newest checkpoints that are kept", "Run", low=1),
    "CHECKPOINT_KIND": Key(
        "full",
        "`full`, `learner` (parameters and optimiser) or `params`",
        "Run",
        choices=("full", "learner", "params"),
    ),
    "RESUME": Key(None, "folder of a run to resume", "Run", type=str),
    "PARAMS": Key(
        None,
        "folder of a run, or its `<seed>_params.npy`, that initialises the parameters",
        "Run",
        type=str,
    ),
    "TRACK": Key(
        None,
        "`wandb` or `tensorboard`; None: neither",
        "Run",
        type=str,
        choices=("wandb", "tensorboard"),
    ),
}
"""Settings of every algorithm."""

MEMORIES = {
    "transformer": {},
    "gru": {"WINDOW_MEM": 1},
    "none": {"WINDOW_MEM": 0, "num_layers": 0},
}
"""Values of other keys that each value of MEMORY fixes."""

BEFORE_THEY_WERE_SAVED = {"EPISODE_END": "none", "NORMALIZE_VALUE": False, "ADVANTAGE_FLOOR": 0.0}
"""Values of keys in runs that are older than the keys. They differ from today's defaults."""


def of_saved_run(saved: dict[str, Any], keys: Keys) -> dict[str, Any]:
    """Completes a saved config with the values of keys that are newer than the run."""
    return {name: x for name, x in BEFORE_THEY_WERE_SAVED.items() if name in keys} | saved


LAUNCH_KEYS = {
    "ALL_DEVICES": Key(
        False, "whether to train on all devices of all processes; True in the pmap script", "Run"
    ),
    "COORDINATOR": Key(
        None, "`host:port` of process 0, with a free port; None under SLURM", "Run", type=str
    ),
    "NUM_PROCESSES": Key(None, "number of processes", "Run", type=int, low=1),
    "PROCESS_ID": Key(None, "index of this process, from 0", "Run", type=int, low=0),
    "CONNECT_TIMEOUT": Key(
        300, "seconds to wait for all processes to connect", "Run", low=1, high=10**6
    ),
    "HEARTBEAT_TIMEOUT": Key(
        20,
        "seconds without a heartbeat until a process counts as dead",
        "Run",
        low=1,
        high=10**6,
    ),
}
"""Settings of one process of several, which are not saved with the run."""


def with_shared(own: Keys) -> dict[str, Key]:
    """Returns an algorithm's whole table: the shared keys and its own, sorted by group."""
    keys = {**SHARED_KEYS, **own}
    return {name: key for group in GROUPS for name, key in keys.items() if key.group == group}


def defaults(keys: Keys) -> dict[str, Any]:
    """Returns the default of every key."""
    return {name: key.default for name, key in keys.items()}


SETTINGS = Path(__file__).resolve().parents[1] / "settings"
"""Folder of tested KEY=VALUE words, one file per task."""


def check_config(config: dict[str, Any], keys: Keys, num_devices: int = 1) -> dict[str, Any]:
    """Completes a config with defaults and derived values, and checks it.

    Args:
      config: not modified.
      keys: the algorithm's whole table.
      num_devices: devices that share NUM_ENVS.

    Returns:
      A new dict with every key of the table.

    Raises:
      ConfigError: a key is unknown, a value has the wrong type or range, two keys contradict each
        other, or sizes don't divide.
    """
    checked = check_values(config, keys)
    for name, key in keys.items():
        if checked[name] is None and key.derive is not None:
            checked[name] = key.derive(checked, num_devices)
    checked |= MEMORIES[checked["MEMORY"]]
    for name, key in keys.items():
        for needed, value in key.needs if checked[name] is not None else ():
            if checked[needed] != value:
                raise ConfigError(
                    f"{name}={checked[name]} needs {needed}={value}, not {checked[needed]}"
                )
    _check_sizes(checked, num_devices)
    return checked


def check_values(values: dict[str, Any], keys: Keys) -> dict[str, Any]:
    """Completes settings with their defaults, and checks each value by itself.

    Raises:
      ConfigError: `values` is no dict, a key is unknown, or a value has the wrong type or range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"a config must be a dict of keys and values, not {shortened(values)}")
    for name in values:
        check_known(name, keys)
    return {
        name: _check_value(name, key, values.get(name, key.default)) for name, key in keys.items()
    }


def num_updates(config: dict[str, Any]) -> int:
    """Returns the number of updates of a checked config: TOTAL_TIMESTEPS // (T * B)."""
    return config["TOTAL_TIMESTEPS"] // (config["NUM_STEPS"] * config["NUM_ENVS"])


def read_overrides(arguments: list[str], keys: Keys) -> dict[str, Any]:
    """Reads KEY=VALUE arguments into a dict. If a key is given twice, the last value counts.

    Args:
      arguments: the command line; `@name` stands for the words of `settings/<name>.txt`.
      keys: the table of known keys.

    Raises:
      ConfigError: an argument has no "=", a key is unknown, a value can't be parsed, or a settings
        file is missing.
    """
    check_names(arguments, keys)
    return {name: read_value(name, keys[name], text) for name, text in names_and_texts(arguments)}


def names_and_texts(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Yields key and value text of each KEY=VALUE argument, those of `@name` included.

    Raises:
      ConfigError: an argument has no "=", or a settings file is missing.
    """
    for argument in arguments:
        file = argument.startswith("@")
        for word in read_settings_file(argument) if file else [argument]:
            name, equals, text = word.partition("=")
            if not equals:
                raise ConfigError(
                    f"{f'{argument}: ' * file}{shortened(word)} is not of the form KEY=VALUE; put"
                    " quotes around a value with spaces"
                )
            yield name, text


def read_settings_file(argument: str) -> list[str]:
    """Returns the words of the settings file of `@name`.

    Raises:
      ConfigError: the file is missing or can't be read.
    """
    path = SETTINGS / f"{argument[1:]}.txt"
    if path.parent != SETTINGS or not os.path.isfile(path):  # `Path.is_file` raises on long names
        names = [path.stem for path in sorted(SETTINGS.glob("*.txt"))]
        hint = did_you_mean(argument[1:], names) or f"; there are {', '.join(names)}"
        raise ConfigError(f"no settings {shortened(argument)} in settings/{hint}")
    try:
        return shlex.split(path.read_text(encoding="utf-8-sig"), comments=True)
    except ValueError as error:
        raise ConfigError(f"{argument}: {error}") from error


def check_names(arguments: list[str], keys: Keys) -> None:
    """Raises a ConfigError for an unknown key of the command line or of its settings."""
    for argument in arguments:
        for name, _ in names_and_texts([argument]):
            check_known(name, keys, f"{argument}: " if argument.startswith("@") else "")


OF_SETTINGS = (
    "; @muesli-... is for train_Muesli_trXL.py, or search_trXL.py with ALGORITHM=Muesli, all others"
    " are for PPO"
)


def check_known(name: str, keys: Keys, where: str = "") -> None:
    """Raises a ConfigError for an unknown key.

    Args:
      where: start of the error line: the file or `@name` of the key.
    """
    if name not in keys:
        hint = did_you_mean(name, keys) + OF_SETTINGS * where.startswith("@")
        raise ConfigError(f"{where}unknown config key {shortened(name)}{hint}")


def read_value(name: str, key: Key, text: str) -> Any:
    """Parses the text of a value.

    Raises:
      ConfigError: the text does not parse.
    """
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


def expanded(path: str) -> str:
    """Expands `~` and variables, since shells leave both in quotes and the `~` of KEY=~/folder."""
    return os.path.expanduser(os.path.expandvars(path))


def _check_value(name: str, key: Key, value: Any) -> Any:
    """Returns `value` as the type of its key, or raises a ConfigError."""
    if value is None and key.default is None:
        return None
    given = shortened(value)
    wrong = ConfigError(f"{name} must be {_describe(key)}, not {given}")
    held = value.values() if isinstance(value, dict) else [value]
    if any(isinstance(x, jax.core.Tracer) for x in held):
        if not key.traced:
            what = f"{name} shapes the program, so jax.vmap can't sweep it; give it a value"
            raise ConfigError(what)
        if value.ndim:
            raise wrong
        return value
    if getattr(value, "ndim", None) == 0:  # a scalar of NumPy or JAX
        value = value.item()
    if key.kind in (int, float):
        most = sys.float_info.max
        if isinstance(value, bool) or not (isinstance(value, Real) and -most <= value <= most):  # type: ignore[operator]
            raise wrong  # also infinity and NaN
        # Sizes may be written as 5e5, as in PureJaxRL.
        if key.kind is int and not (isinstance(value, Integral) or float(value).is_integer()):
            raise wrong
        value = key.kind(value)
    elif not isinstance(value, key.kind):
        raise wrong
    elif value == "" and key.default is None:
        raise ConfigError(f"{name} is empty; give {_describe(key)}")
    elif key.kind is str:
        value = expanded(value)
    if key.choices and value not in key.choices:
        raise ConfigError(f"{name} must be one of {', '.join(key.choices)}, not {given}")
    high = LARGEST_SIZE if key.high is None and key.kind is int else key.high
    if (key.low is not None and value < key.low) or (high is not None and value > high):
        low_alone = key.high is None and value < key.low
        wanted = f"at least {key.low}" if low_alone else f"from {key.low} to {high}"
        raise ConfigError(f"{name} must be {wanted}, not {given}")
    return value


def _check_sizes(config: dict[str, Any], num_devices: int) -> None:
    """Raises a ConfigError if sizes don't fit together."""

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


def help_text(keys: Keys, values: Mapping[str, Any]) -> str:
    """Returns a line for each key with its value and help, group by group."""
    groups = dict.fromkeys(key.group for key in keys.values())
    return "\n\n".join(f"{one}\n{key_lines(in_group(keys, one), values)}" for one in groups)


def key_lines(keys: Keys, values: Mapping[str, Any]) -> str:
    """Returns a line for each key with its value and help."""
    return "\n".join(
        f"  {f'{name}={values[name]!r}':<36}  {key.help.replace('`', '')}"
        for name, key in keys.items()
    )


def in_group(keys: Keys, group: str) -> Keys:
    """Returns the keys of one group."""
    return {name: key for name, key in keys.items() if key.group == group}
