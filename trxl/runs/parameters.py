"""The parameters of a finished run: what is saved, and a new run that starts from them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from trxl.errors import ConfigError, shortened
from trxl.results import load_results
from trxl.statistics import restored_normalizer
from trxl.training import Algorithm, Start, TrainState


def saved_params(
    config: dict[str, Any], algorithm: Algorithm, train_state: TrainState
) -> dict[str, Any]:
    """Returns what `<seed>_params.npy` holds: parameters, and statistics if there are any."""
    if algorithm.saved_params is not None:
        params = jax.device_get(algorithm.saved_params(config, train_state))
    else:
        params = algorithm.behaviour_params(train_state)
    if not train_state.normalizer:
        return params
    normalizer = {name: moments._asdict() for name, moments in train_state.normalizer.items()}
    return {**params, "normalizer": normalizer}


def read_start(folder: Path, seeds: list[int]) -> list[Start]:
    """Reads what each seed of a new run starts from: its namesake's parameters, or the only ones.

    Raises:
      ConfigError: there are none, or none of a seed among several, or they are broken.
    """
    try:
        found = list(folder.glob("[0-9]*_params.npy"))
    except OSError as error:  # a name too long for one, say
        raise ConfigError(f"PARAMS: {shortened(str(folder))}: {error.strerror}") from error
    paths = {int(path.name.split("_")[0]): path for path in found}
    if not paths:
        raise ConfigError(f"PARAMS: there is no <seed>_params.npy in {folder}")
    if len(paths) == 1:
        paths = dict.fromkeys(seeds, *paths.values())
    missing = [seed for seed in seeds if seed not in paths]
    if missing:
        there = ", ".join(map(str, sorted(paths)))
        raise ConfigError(f"PARAMS: {folder} has none of seed {missing[0]}, but of {there}")
    return [read_one(paths[seed]) for seed in seeds]


def read_one(path: Path) -> Start:
    """Reads a file of parameters."""
    try:
        params = load_results(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"PARAMS: {error}") from error
    normalizer = restored_normalizer(params.pop("normalizer", {}))
    return Start(params, normalizer)


def check_fit(start: Start, fresh: Start) -> None:
    """Sees that parameters are those of a network, given in shapes.

    Raises:
      ConfigError: they are of another.
    """
    if jax.tree.map(jnp.shape, start) != jax.tree.map(jnp.shape, fresh):
        raise ConfigError(
            "PARAMS: these parameters are of another network, environment or normalisation than"
            " this config's; compare with the <seed>_config.npy beside them"
        )
