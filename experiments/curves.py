"""Draws or reads returns over training, of all tasks or of those named:

    python experiments/curves.py draw RESULTS PICTURE [TASK ...]
    python experiments/curves.py above RETURN RESULTS [TASK ...]

RESULTS is what study.py or sweep.py writes for runs named <model>/<task> or <model>. A point of a
curve is the mean of a fiftieth of the training, or of one update. `draw` draws a panel for each
task, with each model's mean over its seeds and a band from the lowest seed to the highest. `above`
prints the environment steps after which a point of each seed is above RETURN for the first time,
and in brackets the steps after which all points are.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from experiments.study import parts_of  # noqa: E402

Curves = dict[str, dict[str, list[tuple[np.ndarray, np.ndarray]]]]
"""Mapping from task to model to (environment steps, returns) of each seed."""


def read_curves(lines: Iterable[str]) -> Curves:
    """Reads the curves of runs that ended; NaN is a part in which no episode ended."""
    curves: Curves = defaultdict(lambda: defaultdict(list))
    for row in map(json.loads, lines):
        if row["status"] == 0 and "curve" in row:
            model, _, task = row["name"].partition("/")
            returns = np.array(row["curve"], float)
            ends = np.cumsum([*map(len, parts_of(np.arange(row["updates"])))])
            steps = row["steps"] * ends / row["updates"]
            curves[task][model].append((steps, returns))
    return curves


def band(
    axes: Axes, label: str, x: Iterable[float], values: Iterable[Sequence[float]], **style: Any
) -> None:
    """Draws the mean of each x's values, one per seed, and a band around all of them."""
    mean, least, most = zip(*((np.mean(of), np.min(of), np.max(of)) for of in values), strict=True)
    (line,) = axes.plot(x, mean, label=label, **style)
    axes.fill_between(x, least, most, color=line.get_color(), alpha=0.15)


def draw(curves: Curves, columns: int = 3) -> Figure:
    """Draws a panel for each task."""
    columns = min(columns, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for (task, models), axes in zip(curves.items(), panels, strict=False):
        for model, seeds in models.items():
            band(axes, model, seeds[0][0], np.stack([returns for _, returns in seeds], axis=1))
        axes.set(title=task, xlabel="environment steps", ylabel="return")
        axes.ticklabel_format(axis="x", scilimits=(0, 0))
        axes.grid(alpha=0.3)
        axes.legend()
    for axes in panels:
        axes.set_axis_off()
    return figure


def first_above(steps: np.ndarray, returns: np.ndarray, threshold: float) -> tuple[str, str]:
    """Returns the steps of the first point above the threshold, and of the first above to the end.

    Points of NaN do not count. A dash stands for no such point.
    """
    steps, is_above = steps[~np.isnan(returns)], returns[~np.isnan(returns)] > threshold
    to_the_end = np.logical_and.accumulate(is_above[::-1])[::-1]

    def first(points: np.ndarray) -> str:
        return f"{steps[points][0]:,.0f}" if points.any() else "-"

    return first(is_above), first(to_the_end)


def report_above(curves: Curves, threshold: float) -> str:
    """Returns a line for each task and model."""
    lines = []
    for task, models in curves.items():
        for model, seeds in models.items():
            found = (first_above(*seed, threshold) for seed in seeds)
            cells = "; ".join(f"{first} ({to_the_end})" for first, to_the_end in found)
            lines.append(f"{task} {model}: {cells}")
    return "\n".join(lines)


def read_tasks(results: str, tasks: Sequence[str]) -> Curves:
    """Reads the curves of those tasks, or of all; exits with one line if there are none."""
    curves = read_curves(Path(results).read_text().splitlines())
    if not curves:
        sys.exit(f"error: no run that ended has a curve in {results}")
    if unknown := [task for task in tasks if task not in curves]:
        sys.exit(
            f"error: no curve of {', '.join(unknown)} in {results}; there are {', '.join(curves)}"
        )
    return {task: curves[task] for task in tasks or curves}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["draw", results, picture, *tasks]:
            draw(read_tasks(results, tasks)).savefig(picture, dpi=110)
        case ["above", threshold, results, *tasks]:
            print(report_above(read_tasks(results, tasks), float(threshold)))
        case _:
            sys.exit(__doc__)
