"""Parameters of a finished run, saved and read to start a new run."""

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
    """Returns the content of `<seed>_params.npy`: parameters, and statistics if any."""
    if algorithm.saved_params is not None:
        params = jax.device_get(algorithm.saved_params(config, train_state))
    else:
        params = (algorithm.agent_params or algorithm.behaviour_params)(train_state)
    if not train_state.normalizer:
        return params
    normalizer = {name: moments._asdict() for name, moments in train_state.normalizer.items()}
    return {**params, "normalizer": normalizer}


def saved_seeds(folder: Path) -> dict[int, Path]:
    """Returns the files `<seed>_params.npy` in a run's folder by seed, ascending.

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
      ConfigError: the seed has none.
    """
    if seed not in paths:
        folder, there = next(iter(paths.values())).parent, ", ".join(map(str, paths))
        raise ConfigError(f"{folder} has no agent of seed {seed!r}, but of {there}")
    return paths[seed]


def read_start(path: Path, seeds: list[int]) -> list[Start]:
    """Reads the initial parameters of each seed of a new run.

    A single file is for all seeds; of several files each seed has its own.

    Args:
      path: a run's folder, or a file of parameters.

    Raises:
      ConfigError: a file is missing or broken.
    """
    with told_of("PARAMS"):
        paths = {0: path} if os.path.isfile(path) else saved_seeds(path)
        if len(paths) == 1:
            paths = dict.fromkeys(seeds, *paths.values())
        return [read_params(file_of_seed(paths, seed)) for seed in seeds]


def read_params(path: Path) -> Start:
    """Reads a file of parameters as float32.

    Raises:
      ConfigError: the file can't be read, holds other content, or parameters are not finite.
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
    """Converts an array of floats to float32.

    Raises:
      TypeError: the array has another dtype.
    """
    if not np.issubdtype(x.dtype, np.floating):
        raise TypeError(f"{x.dtype} is no type of parameters")
    return np.asarray(x, np.float32)


def fits(start: Start, fresh: Start) -> bool:
    """Returns whether parameters and statistics agree in structure and shapes."""
    return jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, fresh)


def check_fit(start: Start, fresh: Start) -> None:
    """Checks parameters and statistics against the shapes of fresh ones.

    Raises:
      ConfigError: they differ.
    """
    if not fits(start, fresh):
        raise ConfigError(
            "PARAMS: these parameters are of another network, environment or normalisation than"
            " this config's; compare with the <seed>_config.npy beside them"
        )
