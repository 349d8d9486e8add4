"""Files and plots of a finished run, and its new folder."""

import itertools
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from trxl.environments import resolve_name
from trxl.errors import ConfigError, one_line
from trxl.runs.processes import warn_main


def results_root(config: dict[str, Any]) -> Path:
    """Returns the parent of a run's folder."""
    suite, _ = resolve_name(config["ENV_NAME"])
    return Path(os.path.normpath(config["RESULTS_DIR"] or f"runs/{suite}"))


def fresh_folder(config: dict[str, Any], algorithm: str = "PPO") -> Path:
    """Makes a run's folder, with a number appended if the name is taken.

    Args:
      algorithm: name of the algorithm, part of the folder's name unless PPO.

    Raises:
      ConfigError: the folder can't be made.
    """
    root, (_, name) = results_root(config), resolve_name(config["ENV_NAME"])
    name += f"_{algorithm}" if algorithm != "PPO" else ""
    try:
        root.mkdir(parents=True, exist_ok=True)
        return next(
            folder
            for number in itertools.count(1)
            if make_fresh(folder := root / (name if number == 1 else f"{name}_{number}"))
        )
    except OSError as error:
        raise ConfigError(
            f"can't write the results to {root}: {error.strerror}; set RESULTS_DIR to a folder"
            " that can be written"
        ) from error


def missing_folders(root: Path) -> list[Path]:
    """Returns a folder and those of its parents that don't exist, innermost first."""
    return [path for path in (root, *root.parents) if not os.path.exists(path)]


def discard(folder: Path, made: Iterable[Path]) -> None:
    """Removes a folder, and the parents made for it if they are empty."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        for parent in made:
            parent.rmdir()


def make_fresh(folder: Path) -> bool:
    """Makes the folder; returns False if it exists."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def save_results(
    folder: Path,
    config: dict[str, Any],
    seeds: list[int],
    curves: list[dict[str, np.ndarray]],
    params: list[Any],
) -> None:
    """Writes the files and plots of every seed; `params` are None for diverged seeds."""
    for seed, curve, of_seed in zip(seeds, curves, params, strict=True):
        own_config = {**config, "seed": seed, "NUM_SEEDS": 1}
        save_seed(folder, seed, own_config, curve, of_seed)
    diverged = [seed for seed, of_seed in zip(seeds, params, strict=True) if of_seed is None]
    try:
        save_plot(folder, config, seeds, curves, diverged)
    except Exception as error:  # Matplotlib may raise anything
        warn_main(f"no plot of the returns: {one_line(error)}")


def save_seed(
    folder: Path, seed: int, config: dict[str, Any], curve: dict[str, np.ndarray], params: Any
) -> None:
    """Writes a seed's config, metrics and parameters, each a dict in an `.npy` file.

    Without parameters, an existing file of parameters is removed.
    """
    for name, content in (("config", config), ("metrics", curve), ("params", params)):
        path = folder / f"{seed}_{name}.npy"
        if content is None:
            path.unlink(missing_ok=True)
        else:
            write_whole(path, lambda file, content=content: np.save(file, content))


def write_whole(path: Path, write: Callable) -> None:
    """Writes a file atomically: calls `write` with a temporary file, then renames it."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        write(file)
    os.replace(partial, path)


def save_plot(
    folder: Path,
    config: dict[str, Any],
    seeds: list[int],
    curves: list[dict[str, np.ndarray]],
    diverged: Collection[int] = (),
) -> None:
    """Draws each seed's returns to return_<seed>.png, and the mean of several seeds.

    The mean leaves out diverged seeds.
    """
    title, whole = config["ENV_NAME"], []
    for seed, curve in zip(seeds, curves, strict=True):
        label = f"seed {seed}"
        if seed in diverged:
            label += ", diverged"
        else:
            whole.append(curve)
        plot_returns(folder / f"return_{seed}.png", title, [curve], label)
    if len(seeds) > 1:
        of = f" of {len(seeds)}" if diverged else ""
        label = f"mean of {len(whole)}{of} seeds, and their standard deviation"
        plot_returns(folder / f"return_{seeds[0]}_to_{seeds[-1]}.png", title, whole, label)


def plot_returns(path: Path, title: str, curves: list[dict[str, np.ndarray]], label: str) -> None:
    """Draws the mean return of the episodes that ended in each update, unsmoothed."""
    from matplotlib.figure import Figure

    # Updates in which no episode ended are left out.
    returns = np.ma.masked_invalid([curve["returned_episode_returns"] for curve in curves])
    mean, deviation = returns.mean(axis=0), returns.std(axis=0)
    ended = ~np.ma.getmaskarray(mean)
    mean, deviation = mean[ended], deviation[ended]
    env_steps = curves[0]["env_steps"][ended]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(env_steps, mean, label=label)
    if len(curves) > 1:
        axes.fill_between(env_steps, mean - deviation, mean + deviation, alpha=0.25)
    axes.set(title=title, xlabel="environment steps", ylabel="mean episode return")
    axes.grid(alpha=0.3)
    axes.legend()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))
