"""Returns over training, a panel a task: `python benchmarks/curves.py RESULTS PICTURE [TASK ...]`.

RESULTS is what study.py or sweep.py leaves, lines named <model>/<task> or <model>; PICTURE the file
that is drawn, of all tasks or of those named: a line for each model, the mean over its seeds, and a
band from the least of them to the most. A point is the mean of a fiftieth of the training, or of
one update.
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

from benchmarks.study import parts_of  # noqa: E402

Curves = dict[str, dict[str, list[tuple[np.ndarray, np.ndarray]]]]
"""task: {model: (environment steps, returns) of each seed}."""


def read_curves(lines: Iterable[str]) -> Curves:
    """Of the runs that ended; a part of the training in which no episode ended is NaN."""
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
    """The mean of each x's values, one for each seed, and a band from the least to the most."""
    mean, least, most = zip(*((np.mean(of), np.min(of), np.max(of)) for of in values), strict=True)
    (line,) = axes.plot(x, mean, label=label, **style)
    axes.fill_between(x, least, most, color=line.get_color(), alpha=0.15)


def draw(curves: Curves, columns: int = 3) -> Figure:
    """A panel for each task."""
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


if __name__ == "__main__":
    results, picture, *tasks = sys.argv[1:]
    curves = read_curves(Path(results).read_text().splitlines())
    if unknown := [task for task in tasks if task not in curves]:
        sys.exit(
            f"error: no curve of {', '.join(unknown)} in {results}; there are {', '.join(curves)}"
        )
    draw({task: curves[task] for task in tasks or curves}).savefig(picture, dpi=110)
