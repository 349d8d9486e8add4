"""The parameters of a finished run: what is saved, and a new run that starts from them."""

import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trxl.errors import ConfigError, shown_path, told_of
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


def saved_seeds(folder: Path) -> dict[int, Path]:
    """Returns the files of parameters in a run's folder by their seeds, in order.

    The seed is all that stands before `_params.npy`: `0_old_params.npy` is no seed's.

    Args:
      folder: of a run, or one of these files.

    Raises:
      ConfigError: there are none.
    """
    files = folder.glob("*_params.npy") if os.path.isdir(folder) else []
    files = [folder] if os.path.isfile(folder) else files
    found = {path.name.removesuffix("_params.npy"): path for path in files}
    paths = {int(seed): path for seed, path in found.items() if re.fullmatch("[0-9]{1,10}", seed)}
    if not paths:
        raise ConfigError(
            f"there is no <seed>_params.npy in {shown_path(folder)}; a run writes it when it ends"
            " or is stopped"
        )
    return dict(sorted(paths.items()))


def file_of_seed(paths: dict[int, Path], seed: int) -> Path:
    """Returns a seed's file of parameters.

    Raises:
      ConfigError: there is none.
    """
    if seed not in paths:
        folder, there = next(iter(paths.values())).parent, ", ".join(map(str, paths))
        raise ConfigError(f"{folder} has no agent of seed {seed!r}, but of {there}")
    return paths[seed]


def read_start(path: Path, seeds: list[int]) -> list[Start]:
    """Reads what each seed of a new run starts from: its namesake's parameters, or the only ones.

    Args:
      path: of a run's folder, or of a file of parameters.

    Raises:
      ConfigError: there are none, or none of a seed among several, or they are broken.
    """
    with told_of("PARAMS"):
        paths = {0: path} if os.path.isfile(path) else saved_seeds(path)
        if len(paths) == 1:
            paths = dict.fromkeys(seeds, *paths.values())
        return [read_params(file_of_seed(paths, seed)) for seed in seeds]


def read_params(path: Path) -> Start:
    """Reads a file of parameters, those of another float type as float32.

    Raises:
      ConfigError: it can't be read, or holds something else, or they are not finite.
    """
    params = read_file(path)
    try:
        normalizer = restored_normalizer(params.pop("normalizer", {}))
        params = jax.tree.map(as_float32, params)
        finite = all(np.all(np.isfinite(x)) for x in jax.tree.leaves((params, normalizer)))
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise ConfigError(f"{path} holds no parameters; is it another file's content?") from error
    if not finite:
        raise ConfigError(f"{path}: not all parameters are finite; it diverged")
    return Start(params, normalizer)


def read_file(path: Path) -> dict[str, Any]:
    """Reads one of a run's files.

    Raises:
      ConfigError: there is none, or it is broken.
    """
    try:
        return load_results(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def as_float32(x: np.ndarray) -> np.ndarray:
    """Returns an array of floats as float32.

    Raises:
      TypeError: it is none.
    """
    if not np.issubdtype(x.dtype, np.floating):
        raise TypeError(f"{x.dtype} is no type of parameters")
    return np.asarray(x, np.float32)


def fits(start: Start, fresh: Start) -> bool:
    """Returns whether parameters and statistics have the structure and the shapes of others."""
    return jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, fresh)


def check_fit(start: Start, fresh: Start) -> None:
    """Sees that parameters are those of a network, given in shapes.

    Raises:
      ConfigError: they are of another.
    """
    if not fits(start, fresh):
        raise ConfigError(
            "PARAMS: these parameters are of another network, environment or normalisation than"
            " this config's; compare with the <seed>_config.npy beside them"
        )
