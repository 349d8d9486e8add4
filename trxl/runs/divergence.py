"""Seeds whose agent broke: a run marks them in its `diverged.json`, and the others go on."""

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
    """A loss or a parameter is infinite or not a number; a line for each seed that has it."""


class Divergence(NamedTuple):
    """The mark of a seed that diverged."""

    what: str  # the metric that is not finite, such as "total_loss is nan"
    update: int  # after how many updates


def read_divergences(folder: Path, updates: int) -> dict[int, Divergence]:
    """Returns the seeds of a run that had diverged after so many updates.

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
    except Exception as error:  # what is no such file may raise almost anything
        raise ConfigError(f"RESUME: {path} is broken: {one_line(error)}") from error


def save_divergences(folder: Path, marks: dict[int, Divergence]) -> None:
    """Writes `diverged.json`, and removes it where no seed has diverged."""
    path = folder / "diverged.json"
    if marks:
        text = json.dumps({seed: mark._asdict() for seed, mark in marks.items()}, indent=1)
        write_whole(path, lambda file: file.write(text.encode()))
    else:
        path.unlink(missing_ok=True)


def what_is_not_finite(metrics: Metrics, must_be_finite: Iterable[str]) -> str | None:
    """Returns which metric shows that the update broke the agent; None if none does."""
    for name in (*INPUTS, *must_be_finite):
        if not np.isfinite(metrics[name]):
            return f"{INPUTS.get(name, name)} is {metrics[name]}"
    return None
