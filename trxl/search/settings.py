"""Arguments of `search_trXL.py`: the settings of a search, and its space.

A key of the trainer is searched if it has a range, `LR=1e-5..1e-2`, or choices, `num_layers=1,2,3`.
A single value applies to all members.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from trxl.config import LARGEST_INT, Key, Keys, check_values, defaults, read_value
from trxl.environments import located
from trxl.errors import ConfigError, shortened
from trxl.training import Algorithm

_KEYS = {
    "ALGORITHM": Key("PPO", "`PPO` or `Muesli`", choices=("PPO", "Muesli")),
    "TRAIN": Key(
        "gradient",
        "`gradient`: members are configs that train; `evolution`: members are parameters that an"
        " evosax STRATEGY updates",
        choices=("gradient", "evolution"),
    ),
    "STRATEGY": Key(
        "halving",
        "`halving` (successive halving), `pbt` (population-based training), or an evosax algorithm"
        " such as `CMA_ES`, `Sep_CMA_ES`, `Open_ES`",
    ),
    "POPULATION": Key(
        27,
        "members of a generation; the first generation has the default config, with evosax in"
        " addition",
        low=2,
        high=100_000,
    ),
    "BUDGET": Key(
        None,
        "environment steps, summed over members, for as many generations as fit; None: 1"
        " generation of `halving` or `pbt`, 10 of others",
        type=int,
        low=1,
        high=LARGEST_INT,
    ),
    "SEEDS": Key(1, "seeds per member; a member's score is their mean", low=1, high=1000),
    "ETA": Key(3, "of `halving`: one in ETA members survives a comparison", low=2),
    "INTERVALS": Key(10, "of `pbt`: comparisons of members per run", low=1, high=10_000),
    "REPORT_SEEDS": Key(
        5, "new seeds that compare the best config with the default", low=0, high=1000
    ),
    "CHUNK": Key(
        None,
        "members per program call; None: 4 on a CPU, as many as fit on a GPU",
        type=int,
        low=1,
    ),
    "ES_STD": Key(
        1.0,
        "initial standard deviation of an evosax algorithm; for hyperparameters 1 covers the"
        " ranges",
        low=0,
    ),
    "ES_LR": Key(0.1, "learning rate of an evosax algorithm with an optimiser", low=0),
}

SEARCH_KEYS = {k: key._replace(group="Search", resumable=False) for k, key in _KEYS.items()}
"""Settings of a search."""

NOT_SEARCHED = (
    "NUM_SEEDS",
    "CHECKPOINT_EVERY",
    "KEEP_CHECKPOINTS",
    "CHECKPOINT_KIND",
    "PARAMS",
    "TRACK",
)
"""Keys of a run that a search refuses."""

RANGE = re.compile(r"(?P<low>.+?)\.\.(?P<high>.+)")

SCALES: dict[str, tuple[Callable, Callable]] = {
    "linear": (float, float),
    "log": (math.log, math.exp),
    "decay": (lambda x: math.log1p(-x), lambda y: 1 - math.exp(y)),
}
"""Scales of ranges: (to the scale, back)."""


class Dimension(NamedTuple):
    """Searched key, with values at positions from 0 to 1."""

    name: str
    traced: bool  # whether members of one program may differ in it
    low: float = 0.0
    high: float = 0.0
    scale: str = "linear"  # one of SCALES
    choices: tuple[Any, ...] = ()

    def value(self, position: float) -> Any:
        """Returns the value at a position from 0 to 1."""
        if self.choices:
            return self.choices[min(int(position * len(self.choices)), len(self.choices) - 1)]
        to_scale, back = SCALES[self.scale]
        low, high = to_scale(self.low), to_scale(self.high)
        return min(max(back(low + position * (high - low)), self.low), self.high)

    def position(self, value: Any) -> float:
        """Returns the position of a value, clipped to 0 .. 1; 0 for an unknown choice."""
        if self.choices:
            at = self.choices.index(value) if value in self.choices else 0
            return (at + 0.5) / len(self.choices)
        to_scale, _ = SCALES[self.scale]
        low, high = to_scale(self.low), to_scale(self.high)
        return (to_scale(min(max(value, self.low), self.high)) - low) / (high - low)


class Space(NamedTuple):
    """Space of a search."""

    dimensions: tuple[Dimension, ...]

    def values(self, positions: Any) -> dict[str, Any]:
        """Returns the searched keys' values at positions from 0 to 1, one for each dimension."""
        pairs = zip(self.dimensions, positions, strict=True)
        return {dimension.name: dimension.value(float(x)) for dimension, x in pairs}

    def shape_of(self, values: dict[str, Any]) -> dict[str, Any]:
        """Returns the values that shape the program."""
        return {d.name: values[d.name] for d in self.dimensions if not d.traced}

    def only(self, traced: bool) -> "Space":
        """Returns the subspace of traced keys, or of the others."""
        return Space(tuple(d for d in self.dimensions if d.traced == traced))


def read_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of the search itself, completed and checked.

    Args:
      given: values, or texts as on the command line; other keys are ignored.

    Raises:
      ConfigError: a value is invalid.
    """
    own = {name: value for name, value in given.items() if name in SEARCH_KEYS}
    read_own = {name: read(name, SEARCH_KEYS[name], value) for name, value in own.items()}
    return check_values(read_own, SEARCH_KEYS)


def read(name: str, key: Key, value: Any) -> Any:
    """Parses a text; returns any other value itself."""
    return read_value(name, key, value) if isinstance(value, str) else value


def read_space(given: Mapping[str, Any], keys: Keys) -> tuple[Space, dict[str, Any]]:
    """Returns the searched space, and the values that are the same for all members.

    Args:
      given: the trainer's keys with values, or texts as on the command line; settings of the search
        are ignored, and all others are known.
      keys: of the trainer.

    Raises:
      ConfigError: a text is no value, range or choices of its key.
    """
    dimensions, fixed = [], {}
    for name, value in given.items():
        if name in NOT_SEARCHED:
            raise ConfigError(f"{name} is not a setting of a search")
        if name in SEARCH_KEYS:
            continue
        dimension = read_dimension(name, keys[name], value) if isinstance(value, str) else None
        if dimension:
            dimensions.append(dimension)
        else:
            fixed[name] = read(name, keys[name], value)
    return Space(tuple(dimensions)), fixed


def read_dimension(name: str, key: Key, text: str) -> Dimension | None:
    """Parses a range or choices; returns None for a single value.

    Decays below 1, such as GAMMA, have the scale log(1 - x), positive ranges log(x), others x.

    Raises:
      ConfigError: the key can't have a range or choices.
    """
    found = RANGE.fullmatch(text) if key.kind in (int, float) else None
    if found and "..." in text:  # the third dot would be a decimal point
        raise ConfigError(f"{name}={text} has three dots; a range has two, LOW..HIGH")
    parts = [part.strip() for part in text.split(",")]
    if not found and (key.kind is dict or len(parts) < 2):
        return None
    if key.group == "Run" or name in ("ENV_NAME", "TOTAL_TIMESTEPS"):
        raise ConfigError(f"{name} has one value in a search, not {shortened(text)}")
    if found and not key.traced:
        raise ConfigError(
            f"{name} shapes the program, so it has choices such as {found['low']},{found['high']},"
            " not a range"
        )
    ends = [found["low"], found["high"]] if found else parts
    values = [check_values({name: read_value(name, key, x)}, {name: key})[name] for x in ends]
    if not found:
        if len(set(values)) < len(values):
            raise ConfigError(f"{name}={text} has a choice twice")
        return Dimension(name, key.traced, choices=tuple(values))
    low, high = values
    if not low < high:
        raise ConfigError(f"{name}={low}..{high} is empty; the smaller end comes first")
    is_decay = key.high == 1
    scale = "linear"
    if is_decay and high < 1:
        scale = "decay"
    elif not is_decay and low > 0:
        scale = "log"
    return Dimension(name, True, low, high, scale)


def default_config(
    algorithm: Algorithm, base: Mapping[str, Any], fixed: Mapping[str, Any], space: Space
) -> dict[str, Any]:
    """Returns the base config of a search: an entry script's with the values of all members.

    Derived keys stay None, since they are derived for each combination of values. A key that shapes
    the program has its first choice if the script's value is none of its choices.
    """
    default = {**defaults(algorithm.keys), **base}
    shaping = space.only(traced=False).dimensions
    first = {d.name: d.choices[0] for d in shaping if default[d.name] not in (None, *d.choices)}
    config = {**base, **fixed, **first, "RESUME": None}
    return {**config, "ENV_NAME": located(algorithm.check(config)["ENV_NAME"])}
