"""Seeds whose agent broke while others of the run went on: which, when, and from what to resume."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from trxl.errors import ConfigError, first_line

COPIED = ("run.json", "diverged.json", "*_metrics.jsonl")
"""The files of a run that it needs to be resumed, besides a checkpoint."""


class Divergence(NamedTuple):
    """What is known of a seed that diverged."""

    what: str  # the metric that is not finite, such as "total_loss is nan"
    update: int  # after how many updates it was seen
    checkpoint: int | None  # after how many updates the newest from before was taken


def read_divergences(folder: Path, updates: int) -> dict[int, Divergence]:
    """The seeds of a run that had diverged after so many updates, from its `diverged.json`.

    What came later is not part of a run that goes on from there.

    Raises:
      ConfigError: the file is broken.
    """
    path = folder / "diverged.json"
    if not path.exists():
        return {}
    try:
        saved = json.loads(path.read_text())
        marks = {int(seed): Divergence(**mark) for seed, mark in saved.items()}
    except Exception as error:  # what is no such file may raise almost anything
        raise ConfigError(f"RESUME: {path} is broken: {first_line(str(error))}") from error
    return {seed: mark for seed, mark in marks.items() if mark.update <= updates}


def save_divergences(folder: Path, marks: dict[int, Divergence]) -> None:
    """Writes `diverged.json`, and removes it where no seed has diverged."""
    path = folder / "diverged.json"
    if not marks:
        path.unlink(missing_ok=True)
        return
    partial = folder / "diverged.json.partial"
    partial.write_text(json.dumps({seed: mark._asdict() for seed, mark in marks.items()}, indent=1))
    os.replace(partial, path)


def discard_copies(folder: Path, but: dict[int, Divergence]) -> None:
    """Removes the copies of checkpoints that `keep_copy` made for other seeds than these."""
    for copy in folder.glob("diverged_*"):
        if copy.is_dir() and copy.name not in {f"diverged_{seed}" for seed in but}:
            shutil.rmtree(copy)


def keep_copy(checkpoint: Path, seed: int) -> Path:
    """Keeps a checkpoint that the run itself will prune, as `diverged_<seed>/`.

    Args:
      checkpoint: its folder, `<folder of the run>/<kind>/<updates>`.
      seed: that diverged after it.

    Returns:
      `diverged_<seed>`, which is the folder of a run that RESUME can go on with.
    """
    folder = checkpoint.parents[1]
    copy = folder / f"diverged_{seed}"
    partial = folder / f"diverged_{seed}.partial"
    for old in (partial, copy):
        if old.exists():
            shutil.rmtree(old)
    shutil.copytree(
        checkpoint, partial / checkpoint.relative_to(folder), copy_function=link_or_copy
    )
    # The run goes on to change these, so that they can't be shared.
    for pattern in COPIED:
        for path in folder.glob(pattern):
            shutil.copy2(path, partial)
    os.rename(partial, copy)
    return copy


def link_or_copy(source: str, target: str) -> Any:
    """A second name of a file that never changes, or a copy where the file system has no such."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
