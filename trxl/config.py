"""Settings: one table of all keys, and configs read from a command line and checked.

`SHARED_KEYS` are the settings of any algorithm; an algorithm's table is made by `with_shared` from
its own ones. `--help`, docs/keys.md and what a resumed run may change come from such a table.
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
"""The largest integer of a key without `high`, since JAX has no larger sizes."""

LARGEST_WIDTH = 10**6
"""The largest width of a layer: the largest square of weights that fits JAX's integers by far."""

LARGEST_INT = 2**63 - 1
"""The largest number of steps."""


class Key(NamedTuple):
    """A setting. Where the default is None, a value may be None too."""

    default: Any  # what it is worth where a config does not have it
    help: str  # one line of Markdown: what it is, and its unit
    group: str = "Training"  # one of GROUPS
    type: Any = None  # of a value; None: the default's
    low: float | None = None  # inclusive bounds; None is no bound
    high: float | None = None
    choices: tuple[str, ...] = ()  # all values that there are, if they are few
    traced: bool = False  # whether a value may be traced, so that `jax.vmap` sweeps it
    resumable: bool = True  # whether a resumed run may change it
    derive: Callable | None = None  # (config, devices) -> the value that None stands for
    needs: tuple[tuple[str, Any], ...] = ()  # other keys' values without which it must be None

    @property
    def kind(self) -> type:
        """The type of a value that is not None."""
        return self.type or type(self.default)


Keys = Mapping[str, Key]


def environment(*args: Any, **more: Any) -> Key:
    """A key of the environment: what a state means depends on it."""
    return Key(*args, **{"group": "Environment", "resumable": False, **more})


def network(*args: Any, **more: Any) -> Key:
    """A key of the network: what a state means depends on it."""
    return Key(*args, **{"group": "Network", "resumable": False, **more})


def minibatches(most: int) -> Key:
    """Returns the key NUM_MINIBATCHES, by default the largest number up to `most` that fits."""

    def largest(config: dict[str, Any], num_devices: int) -> int:
        rows = config["NUM_ENVS"] // num_devices
        return max(number for number in range(1, most + 1) if rows % number == 0)

    return Key(
        None,
        "minibatches per pass, each of whole environments; None: the largest number up to"
        f" {most} that divides the environments of a device",
        type=int,
        low=1,
        derive=largest,
    )


NETWORKS = {
    "published": {"ENCODER": "linear", "SKIP": False, "HEADS": "mlp"},
    "wide": {"ENCODER": "features", "SKIP": True, "HEADS": "residual"},
}
"""The encoder, skip connection and heads of each NETWORK."""


def by_network(name: str) -> Callable:
    """Returns what a key of `NETWORKS` is derived by."""
    return lambda config, _: NETWORKS[config["NETWORK"]][name]


def half_of(steps: int) -> int:
    """Returns half of an even number, an odd one itself."""
    return steps if steps % 2 else steps // 2


SHARED_KEYS = {
    "ENV_NAME": environment(
        "MemoryChain-bsuite", "`<suite>/<name>`, or the name where one suite alone has it"
    ),
    "ENV_KWARGS": environment({}, "overrides of its parameters or constructor arguments"),
    "RESET_STRATEGY": environment(
        None,
        "`auto`, `optimistic` or `pool`; None: the suite's default",
        type=str,
        choices=("auto", "optimistic", "pool"),
    ),
    "RESET_RATIO": environment(16, "environments per world generated at a time", low=1),
    "BOOTSTRAP_TRUNCATED": environment(
        None, "whether a time limit is bootstrapped; None: by task", type=bool, resumable=True
    ),
    "TRIAL_CREDIT": environment(
        True,
        "in meta-RL, whether values and advantages run on to the next episode of a trial",
        resumable=True,
    ),
    "TRIAL_MEMORY": environment(
        True,
        "in meta-RL, whether memory and credit last for the trial; False: every episode's end ends"
        " both",
    ),
    "EPISODE_END": environment(
        "append",
        "what is seen of an episode's end within a trial: `none`, nothing; `append`, the last"
        " observation beside the first of the next; `step`, a step of its own",
        choices=("none", "append", "step"),
    ),
    "PREV_ACTION_REWARD": environment(
        None,
        "whether observations hold the previous action and reward; None: in meta-RL",
        type=bool,
    ),
    "NORMALIZE_OBS": environment(False, "observations by their running mean and variance"),
    "NORMALIZE_REWARD": environment(
        False, "rewards by the running deviation of discounted returns"
    ),
    "TOTAL_TIMESTEPS": Key(
        500_000, "environment steps, of all environments together", low=1, high=LARGEST_INT
    ),
    "NUM_ENVS": Key(64, "environments, over all devices", low=1, resumable=False),
    "NUM_STEPS": Key(64, "steps of each environment per rollout", low=1, resumable=False),
    "NUM_MINIBATCHES": minibatches(8),
    "LR": Key(5e-4, "learning rate of Adam", low=0, traced=True),
    "ANNEAL_LR": Key(True, "linear decay to 0 over the run"),
    "GAMMA": Key(0.99, "discount per step", low=0, high=1, traced=True),
    "NETWORK": network(
        "published",
        "what stands around the transformer where ENCODER, SKIP and HEADS are None: `published`,"
        " or `wide`: `features`, True and `residual`",
        choices=("published", "wide"),
    ),
    "ENCODER": network(
        None,
        "`linear`: one dense layer over the observation; `features`: grid and vector apart, with"
        " norms; None: by NETWORK",
        type=str,
        choices=("linear", "features"),
        derive=by_network("ENCODER"),
    ),
    "SKIP": network(
        None,
        "whether actor and critic read the encoder's features beside the transformer's output;"
        " None: by NETWORK",
        type=bool,
        derive=by_network("SKIP"),
    ),
    "HEADS": network(
        None,
        "actor and critic: `mlp` of two layers, or `residual` with norms; None: by NETWORK",
        type=str,
        choices=("mlp", "residual"),
        derive=by_network("HEADS"),
    ),
    "encoder_features": network(
        512,
        "numbers that ENCODER=features makes of a grid; a fourth of that of all else",
        low=4,
        high=LARGEST_WIDTH,
    ),
    "ACTIVATION": network(
        "relu",
        "of the hidden layers of HEADS=mlp: `relu` or `tanh`",
        choices=("relu", "tanh"),
    ),
    "MEMORY": network(
        "transformer",
        "`transformer`; `gru`, of as many layers; `none`: actor and critic on the encoder alone",
        choices=("transformer", "gru", "none"),
    ),
    "EMBED_SIZE": network(64, "width of the transformer's stream, even", low=1, high=LARGEST_WIDTH),
    "qkv_features": network(
        64, "width of queries, keys and values, all heads together", low=1, high=LARGEST_WIDTH
    ),
    "num_heads": network(4, "attention heads, divides `qkv_features`", low=1),
    "num_layers": network(2, "layers that remember; MEMORY=none has 0", low=0, high=1000),
    "hidden_layers": network(
        64, "width of the actor's and the critic's hidden layers", low=1, high=LARGEST_WIDTH
    ),
    "WINDOW_GRAD": network(
        None,
        "steps that a gradient flows through, divides `NUM_STEPS`; None: half of `NUM_STEPS`, all"
        " where it is odd",
        type=int,
        low=1,
        resumable=True,
        derive=lambda config, _: half_of(config["NUM_STEPS"]),
    ),
    "WINDOW_MEM": network(
        None,
        "steps that attention reaches back in each layer, 0 for none; None: `WINDOW_GRAD`;"
        " MEMORY=gru has 1, its carry",
        type=int,
        low=0,
        derive=lambda config, _: config["WINDOW_GRAD"],
    ),
    "gating": network(True, "GTrXL's gates; False: residual sums"),
    "gating_bias": network(2.0, "initial bias of the gates: how closed they start"),
    "COMPUTE_DTYPE": network(
        "float32",
        "of matrix products: `float32` or `bfloat16`; all else is float32",
        choices=("float32", "bfloat16"),
        resumable=True,
    ),
    "seed": Key(
        0,
        "of parameters, environments and actions",
        "Run",
        low=0,
        high=2**32 - 1,
        resumable=False,
    ),
    "NUM_SEEDS": Key(
        1, "seeds trained at once under vmap, from `seed` on", "Run", low=1, resumable=False
    ),
    "RESULTS_DIR": Key(
        None,
        "where the run's folder is made; None: `runs/<suite>`",
        "Run",
        type=str,
        resumable=False,
    ),
    "CHECKPOINT_EVERY": Key(50, "updates between checkpoints", "Run", low=1),
    "KEEP_CHECKPOINTS": Key(2, "how many of the newest checkpoints are kept", "Run", low=1),
    "CHECKPOINT_KIND": Key(
        "full",
        "`full`, `learner` (parameters and optimiser) or `params`",
        "Run",
        choices=("full", "learner", "params"),
    ),
    "RESUME": Key(None, "folder of a run to go on with", "Run", type=str),
    "PARAMS": Key(
        None,
        "folder of a run, or its `<seed>_params.npy`, whose parameters a new run starts from",
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
"""The settings that any algorithm has."""

ADVANTAGE_FLOOR = Key(
    0.0,
    "least deviation that advantages are divided by, in root mean squares of the returns",
    low=0,
    traced=True,
)
"""Of the algorithms that divide advantages by their deviation."""

MEMORIES = {
    "transformer": {},
    "gru": {"WINDOW_MEM": 1},
    "none": {"WINDOW_MEM": 0, "num_layers": 0},
}
"""What is kept of the steps before, by the value of MEMORY, whatever else a config asks for."""

BEFORE_THEY_WERE_SAVED = {"EPISODE_END": "none", "NORMALIZE_VALUE": False}
"""Values of keys that a saved config lacks because it is older than they are, not the defaults."""


def of_saved_run(saved: dict[str, Any], keys: Keys) -> dict[str, Any]:
    """Returns a saved config with what its run had of keys that came later."""
    return {name: x for name, x in BEFORE_THEY_WERE_SAVED.items() if name in keys} | saved


LAUNCH_KEYS = {
    "ALL_DEVICES": Key(
        False, "whether to train on all devices of all processes; True in the pmap script", "Run"
    ),
    "COORDINATOR": Key(
        None, "`host:port` of process 0, a free port there; None under SLURM", "Run", type=str
    ),
    "NUM_PROCESSES": Key(None, "how many processes", "Run", type=int, low=1),
    "PROCESS_ID": Key(None, "which one this is, from 0", "Run", type=int, low=0),
    "CONNECT_TIMEOUT": Key(300, "seconds to wait until all are there", "Run", low=1, high=10**6),
    "HEARTBEAT_TIMEOUT": Key(
        20,
        "seconds without a sign of life until a process counts as dead",
        "Run",
        low=1,
        high=10**6,
    ),
}
"""The settings of one process of several, which are not the run's."""


def with_shared(own: Keys) -> dict[str, Key]:
    """An algorithm's whole table: the shared keys and its own, group by group."""
    keys = {**SHARED_KEYS, **own}
    return {name: key for group in GROUPS for name, key in keys.items() if key.group == group}


def defaults(keys: Keys) -> dict[str, Any]:
    """Returns the default of every key."""
    return {name: key.default for name, key in keys.items()}


SETTINGS = Path(__file__).resolve().parents[1] / "settings"
"""Files of KEY=VALUE words that are known to work, one for each task."""


def check_config(config: dict[str, Any], keys: Keys, num_devices: int = 1) -> dict[str, Any]:
    """Completes a config, with defaults and what follows from other keys, and checks it.

    Args:
      config: left unchanged.
      keys: the algorithm's whole table.
      num_devices: over how many devices NUM_ENVS is spread.

    Returns:
      A new dict with every key of the table, whole numbers as int.

    Raises:
      ConfigError: an unknown key, a value of the wrong type or range, keys that contradict each
        other, sizes that don't divide.
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
    """Completes settings with their defaults and checks each value by itself.

    Raises:
      ConfigError: no dict, an unknown key, a value of the wrong type or range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"a config must be a dict of keys and values, not {shortened(values)}")
    for name in values:
        _check_known(name, keys)
    return {
        name: _check_value(name, key, values.get(name, key.default)) for name, key in keys.items()
    }


def num_updates(config: dict[str, Any]) -> int:
    """Returns the number of updates of a checked config: TOTAL_TIMESTEPS // (T * B)."""
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
    check_settings_fit(arguments, keys)
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
        yield from read_settings_file(argument) if argument.startswith("@") else [argument]


def read_settings_file(argument: str) -> list[str]:
    """Returns the words of the file of `SETTINGS` that `@name` names.

    Raises:
      ConfigError: there is none of that name.
    """
    path = SETTINGS / f"{argument[1:]}.txt"
    if path.parent != SETTINGS or not os.path.isfile(path):  # False for a name too long, too
        names = [path.stem for path in sorted(SETTINGS.glob("*.txt"))]
        hint = did_you_mean(argument[1:], names) or f"; there are {', '.join(names)}"
        raise ConfigError(f"no settings {shortened(argument)} in settings/{hint}")
    return shlex.split(path.read_text(encoding="utf-8"), comments=True)


def check_settings_fit(arguments: list[str], keys: Keys) -> None:
    """Raises a ConfigError where the settings of an `@name` are another script's."""
    for argument in arguments:
        for word in read_settings_file(argument) if argument.startswith("@") else ():
            name = word.partition("=")[0]
            if name not in keys:
                algorithm = "Muesli" if argument.startswith("@muesli-") else "PPO"
                raise ConfigError(
                    f"{argument} is for train_{algorithm}_trXL.py, or search_trXL.py with"
                    f" ALGORITHM={algorithm}; its {name} is no key of this script"
                )


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
    if isinstance(value, jax.core.Tracer):
        if key.traced:
            return value
        raise ConfigError(f"{name} shapes the program, so jax.vmap can't sweep it; give it a value")
    given = shortened(value)
    wrong = ConfigError(f"{name} must be {_describe(key)}, not {given}")
    if getattr(value, "ndim", None) == 0:  # a scalar of NumPy's or JAX's
        value = value.item()
    if key.kind in (int, float):
        most = sys.float_info.max
        if isinstance(value, bool) or not (isinstance(value, Real) and -most <= value <= most):  # type: ignore[operator]
            raise wrong  # infinite and NaN too
        # PureJaxRL's configs write sizes as 5e5.
        if key.kind is int and not (isinstance(value, Integral) or float(value).is_integer()):
            raise wrong
        value = key.kind(value)
    elif not isinstance(value, key.kind):
        raise wrong
    elif value == "" and key.default is None:
        raise ConfigError(f"{name} is empty; give {_describe(key)}")
    elif key.kind is str:
        value = os.path.expanduser(value)  # a shell leaves the ~ of KEY=~/folder, or of quotes
    if key.choices and value not in key.choices:
        raise ConfigError(f"{name} must be one of {', '.join(key.choices)}, not {given}")
    high = LARGEST_SIZE if key.high is None and key.kind is int else key.high
    if (key.low is not None and value < key.low) or (high is not None and value > high):
        low_alone = key.high is None and value < key.low
        wanted = f"at least {key.low}" if low_alone else f"from {key.low} to {high}"
        raise ConfigError(f"{name} must be {wanted}, not {given}")
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


def help_text(keys: Keys, values: Mapping[str, Any]) -> str:
    """Returns every key with a value and what it is, a line each, group by group."""
    groups = dict.fromkeys(key.group for key in keys.values())
    return "\n\n".join(f"{one}\n{key_lines(in_group(keys, one), values)}" for one in groups)


def key_lines(keys: Keys, values: Mapping[str, Any]) -> str:
    """Returns every key with a value and what it is, a line each."""
    return "\n".join(
        f"  {f'{name}={values[name]!r}':<36}  {key.help.replace('`', '')}"
        for name, key in keys.items()
    )


def in_group(keys: Keys, group: str) -> Keys:
    """Returns the keys of one group."""
    return {name: key for name, key in keys.items() if key.group == group}
