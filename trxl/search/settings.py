"""What `search_trXL.py` takes: the settings of a search, and what it searches in.

A key of the trainer with a range, `LR=1e-5..1e-2`, or with choices, `num_layers=1,2,3`, is
searched; with one value it is that of all members.
"""

import math
import re
from typing import Any, NamedTuple

import numpy as np

from trxl.config import Key, Keys, check_values, names_and_texts, read_value
from trxl.environments import located
from trxl.errors import ConfigError, did_you_mean, shortened
from trxl.training import Algorithm

_KEYS = {
    "ALGORITHM": Key("PPO", "whose trainer: `PPO` or `Muesli`", choices=("PPO", "Muesli")),
    "TRAIN": Key(
        "gradient",
        "`gradient`: members are configs, and train; `evolution`: members are parameters, and an"
        " evosax STRATEGY alone moves them",
        choices=("gradient", "evolution"),
    ),
    "STRATEGY": Key(
        "halving",
        "`halving`, successive halving of random members; `pbt`, population-based training; or the"
        " name of one of evosax's algorithms, such as `CMA_ES`, `Sep_CMA_ES`, `Open_ES`",
    ),
    "POPULATION": Key(
        27,
        "members of a generation; the default config is among the first, with evosax beside them",
        low=2,
        high=100_000,
    ),
    "BUDGET": Key(
        None,
        "environment steps of all members together, spent on as many generations as it has room"
        " for; None: one of `halving` or `pbt`, ten of another STRATEGY",
        type=int,
        low=1,
    ),
    "SEEDS": Key(
        1, "seeds that a member is trained with; its score is their mean", low=1, high=1000
    ),
    "ETA": Key(3, "of `halving`: one member in so many goes on", low=2),
    "INTERVALS": Key(10, "of `pbt`: how often members are compared over a run", low=1),
    "REPORT_SEEDS": Key(
        5, "fresh seeds on which the best and the default are compared", low=0, high=1000
    ),
    "CHUNK": Key(
        None,
        "members in one program at a time; None: 4 on a CPU, on a GPU as many as fit",
        type=int,
        low=1,
    ),
    "ES_STD": Key(
        1.0,
        "first deviation of an evosax algorithm's proposals; of hyperparameters 1 covers the"
        " ranges",
        low=0,
    ),
    "ES_LR": Key(0.1, "learning rate of an evosax algorithm that has an optimiser", low=0),
}

SEARCH_KEYS = {name: key._replace(resumable=False) for name, key in _KEYS.items()}
"""The settings of a search."""

OF_THE_SEARCH = (
    "NUM_SEEDS",
    "CHECKPOINT_EVERY",
    "KEEP_CHECKPOINTS",
    "CHECKPOINT_KIND",
    "PARAMS",
    "TRACK",
)
"""A run's keys that mean nothing to a search."""

RANGE = re.compile(r"(?P<low>.+?)\.\.(?P<high>.+)")


class Dimension(NamedTuple):
    """A key that is searched, and where its values lie between 0 and 1.

    A range runs in its natural scale: log x where it is above 0, log(1 - x) for what is a decay,
    such as GAMMA, that stays below 1; else x itself.
    """

    name: str
    traced: bool  # whether members of one program may differ in it
    low: float = 0.0
    high: float = 0.0
    scale: str = "linear"  # or log, or decay
    choices: tuple[Any, ...] = ()

    def value(self, position: float) -> Any:
        """What stands at a position from 0 to 1."""
        if self.choices:
            return self.choices[min(int(position * len(self.choices)), len(self.choices) - 1)]
        low, high = self._transformed(self.low), self._transformed(self.high)
        x = low + position * (high - low)
        value = {"linear": x, "log": math.exp(min(x, 700)), "decay": 1 - math.exp(x)}[self.scale]
        return min(max(value, self.low), self.high)

    def position(self, value: Any) -> float:
        """Where a value stands, from 0 to 1; one outside of the range stands at its nearer end."""
        if self.choices:
            at = self.choices.index(value) if value in self.choices else 0
            return (at + 0.5) / len(self.choices)
        value = min(max(value, self.low), self.high)
        low, high = self._transformed(self.low), self._transformed(self.high)
        return (self._transformed(value) - low) / (high - low)

    def _transformed(self, x: float) -> float:
        return {
            "linear": lambda: x,
            "log": lambda: math.log(x),
            "decay": lambda: math.log1p(-x),
        }[self.scale]()


class Space(NamedTuple):
    """All that is searched."""

    dimensions: tuple[Dimension, ...]

    def values(self, positions: Any) -> dict[str, Any]:
        """The searched keys' values at positions from 0 to 1, one for each dimension."""
        pairs = zip(self.dimensions, positions, strict=True)
        return {dimension.name: dimension.value(float(x)) for dimension, x in pairs}

    def positions(self, values: dict[str, Any]) -> np.ndarray:
        """Undoes `values`."""
        return np.array([d.position(values[d.name]) for d in self.dimensions])

    def shape_of(self, values: dict[str, Any]) -> dict[str, Any]:
        """Of the values those that shape the program."""
        return {d.name: values[d.name] for d in self.dimensions if not d.traced}

    def only(self, traced: bool) -> "Space":
        """The space of the keys that members of a program may differ in, or of the others."""
        return Space(tuple(d for d in self.dimensions if d.traced == traced))


def read_arguments(arguments: list[str], keys: Keys) -> dict[str, str]:
    """The command line's KEY=VALUE arguments as texts.

    Raises:
      ConfigError: one that is not of that form, or an unknown key.
    """
    given = {}
    for name, text in names_and_texts(arguments):
        check_known(name, keys)
        given[name] = text
    return given


def check_known(name: str, keys: Keys) -> None:
    """Raises a ConfigError for what is neither a key of the trainer nor of the search."""
    known = {**keys, **SEARCH_KEYS}
    if name not in known:
        raise ConfigError(f"unknown config key {shortened(name)}{did_you_mean(name, known)}")
    if name in OF_THE_SEARCH:
        raise ConfigError(f"{name} is not a setting of a search")


def read_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the search itself, complete and checked.

    Raises:
      ConfigError: one can't be.
    """
    own = {
        name: read_value(name, SEARCH_KEYS[name], value) if isinstance(value, str) else value
        for name, value in given.items()
        if name in SEARCH_KEYS
    }
    return check_values(own, SEARCH_KEYS)


def read_space(given: dict[str, Any], keys: Keys) -> tuple[Space, dict[str, Any]]:
    """What is searched, and what has one value for all members.

    Args:
      given: the trainer's keys with their values, or texts as on the command line.
      keys: of the trainer.

    Raises:
      ConfigError: a text that is neither a value, nor a range, nor choices of its key.
    """
    dimensions, fixed = [], {}
    for name, value in given.items():
        check_known(name, keys)
        if name in SEARCH_KEYS:
            continue
        dimension = read_dimension(name, keys[name], value) if isinstance(value, str) else None
        if dimension:
            dimensions.append(dimension)
        elif isinstance(value, str):
            fixed[name] = read_value(name, keys[name], value)
        else:
            fixed[name] = value
    return Space(tuple(dimensions)), fixed


def read_dimension(name: str, key: Key, text: str) -> Dimension | None:
    """The range or the choices that a text stands for, None where it is one value.

    Raises:
      ConfigError: the key can't have them.
    """
    found = RANGE.fullmatch(text) if key.kind in (int, float) else None
    parts = [part.strip() for part in text.split(",")]
    if not found and (key.kind is dict or len(parts) < 2):
        return None
    fixed_alone = ("ENV_NAME", "TOTAL_TIMESTEPS", "seed")
    if key.group == "Run" or name in fixed_alone:
        raise ConfigError(f"{name} has one value in a search, not {shortened(text)}")
    if found:
        return read_range(name, key, found)
    choices = tuple(checked(name, key, part) for part in parts)
    if len(set(choices)) < len(choices):
        raise ConfigError(f"{name}={text} has a choice twice")
    return Dimension(name, key.traced, choices=choices)


def read_range(name: str, key: Key, found: re.Match) -> Dimension:
    """A range of a key that may be traced.

    Raises:
      ConfigError: it shapes the program, or its ends are not in order or not allowed.
    """
    if not key.traced:
        raise ConfigError(
            f"{name} shapes the program, so it has choices such as {found['low']},{found['high']},"
            " not a range"
        )
    low, high = (checked(name, key, found[end]) for end in ("low", "high"))
    if not low < high:
        raise ConfigError(f"{name}={low}..{high} is empty; the smaller end comes first")
    scale = "linear"
    if key.high == 1 and high < 1:
        scale = "decay"
    elif key.high != 1 and low > 0:
        scale = "log"
    return Dimension(name, True, low, high, scale)


def checked(name: str, key: Key, text: str) -> Any:
    """One value of a key, from its text."""
    return check_values({name: read_value(name, key, text)}, {name: key})[name]


def default_config(algorithm: Algorithm, base: dict[str, Any], fixed: dict[str, Any]):
    """The config that a search starts from, checked: an entry script's with what has one value."""
    config = algorithm.check({**base, **fixed, "RESUME": None})
    return {**config, "ENV_NAME": located(config["ENV_NAME"])}
