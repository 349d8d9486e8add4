"""Marks of diverged seeds, in a run's `diverged.json`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trxl.errors import ConfigError, one_line
from trxl.rollout import Metrics
from trxl.runs.outputs import write_whole
from trxl.training import INPUTS


class NotFiniteError(Exception):
    """Error of a loss or parameter that is not finite, with a line per diverged seed."""


class Divergence(NamedTuple):
    """Mark of a diverged seed."""

    what: str  # the metric, such as "total_loss is nan"
    update: int  # number of updates done


def read_divergences(folder: Path, updates: int) -> dict[int, Divergence]:
    """Returns the seeds that had diverged after `updates` updates.

    Raises:
      ConfigError: the file is broken.
    """
    path = folder / "diverged.json"
    try:
        saved = json.loads(path.read_text())
        marks = {int(seed): Divergence(**mark) for seed, mark in saved.items()}
        return {seed: mark for seed, mark in marks.items() if mark.update <= updates}
    except FileNotFoundError:
        return {}
    except Exception as error:  # other content may raise anything
        raise ConfigError(f"RESUME: {path} is broken: {one_line(error)}") from error


def save_divergences(folder: Path, marks: dict[int, Divergence]) -> None:
    """Writes `diverged.json`; removes it if no seed has diverged."""
    path = folder / "diverged.json"
    if marks:
        text = json.dumps({seed: mark._asdict() for seed, mark in marks.items()}, indent=1)
        write_whole(path, lambda file: file.write(text.encode()))
    else:
        path.unlink(missing_ok=True)


def what_is_not_finite(metrics: Metrics, must_be_finite: Iterable[str]) -> str | None:
    """Describes the first metric that is not finite; None if all are finite."""
    for name in (*INPUTS, *must_be_finite):
        if not np.isfinite(metrics[name]):
            return f"{INPUTS.get(name, name)} is {metrics[name]}"
    return None
