"""What a search found: in words, as a table and as plots, in its folder."""

import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from trxl.runs.outputs import write_whole
from trxl.search.plan import DEFAULT
from trxl.search.settings import Dimension, Space
from trxl.search.trials import Trial


class Interval(NamedTuple):
    """A mean over seeds, and half of its 95 % confidence interval by Student's t."""

    mean: float
    half: float
    number: int

    def __str__(self) -> str:
        if math.isnan(self.half):
            return f"{self.mean:.4g}"
        return f"{self.mean:.4g} +- {self.half:.2g}"


def interval(scores: Sequence[float]) -> Interval:
    """Of scores of several seeds; one that is not finite makes the mean so."""
    number, mean = len(scores), float(np.mean(scores))
    if number < 2 or not math.isfinite(mean):
        return Interval(mean, math.nan, number)
    error = float(np.std(scores, ddof=1)) / math.sqrt(number)
    return Interval(mean, float(stats.t.ppf(0.975, number - 1)) * error, number)


def by_role(trials: Iterable[Trial]) -> dict[str, list[Trial]]:
    """The runs of the report by their candidate, in the order of their seeds."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.role != "search":
            found.setdefault(trial.role, []).append(trial)
    return found


def write_report(
    folder: Path,
    title: str,
    space: Space,
    trials: Sequence[Trial],
    best: Trial | None,
    command: Callable[[dict[str, Any]], str],
) -> str:
    """Writes `report.md`, `returns.png` and `values.png`.

    Args:
      title: what was searched, in a line.
      best: trial of the search.
      command: from values to the line that runs them.

    Returns:
      the report's text.
    """
    parts = [f"# {title}\n", summary_line(trials)]
    if best is None:
        parts.append("No trial has a score yet.")
    else:
        parts.append(f"The best, trial {best.trial}, has a score of {best.score():.4g}:")
        parts.append(f"```bash\n{command(best.values)}\n```")
        parts.append(comparison(by_role(trials)))
        plot_returns(folder / "returns.png", trials, best)
        plot_values(folder / "values.png", space, trials, best)
        parts.append("![Return of every trial](returns.png)\n\n![Values and scores](values.png)")
    parts.append(table_of_best(space, trials))
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_whole(folder / "report.md", lambda file: file.write(text.encode()))
    return text


def summary_line(trials: Sequence[Trial]) -> str:
    """How much was tried, and how it ended."""
    own = [trial for trial in trials if trial.role == "search"]
    states = {
        s: sum(t.status == s for t in own) for s in ("finished", "stopped", "diverged", "running")
    }
    ended = ", ".join(f"{number} {state}" for state, number in states.items() if number)
    steps = sum(trial.env_steps for trial in own)
    seconds = sum(trial.seconds for trial in trials)
    cost = f"{steps:.3g} environment steps; {seconds:.0f} s with the report"
    return f"{len(own)} trials ({ended}), {cost}."


def comparison(candidates: dict[str, list[Trial]]) -> str:
    """The candidates on fresh seeds, and what each has more than the default."""
    if not candidates:
        return ""
    lines = [
        "| on fresh seeds | return, mean and 95 % interval | more than the default | by seed |"
    ]
    lines.append("| --- | --- | --- | --- |")
    of_default = {trial.seeds[0]: trial.score() for trial in candidates[DEFAULT]}
    for role, runs in candidates.items():
        scores = [trial.score() for trial in runs]
        gains = [trial.score() - of_default[trial.seeds[0]] for trial in runs]
        more = "" if role == DEFAULT else str(interval(gains))
        each = ", ".join(f"{score:.4g}" for score in scores)
        lines.append(f"| {role} | {interval(scores)} | {more} | {each} |")
    return "\n".join(lines)


SHOWN = 10
"""How many trials the table has."""


def table_of_best(space: Space, trials: Sequence[Trial]) -> str:
    """The best trials of those that trained furthest, with their values."""
    own = [trial for trial in trials if trial.role == "search" and trial.updates]
    own.sort(key=lambda trial: (-trial.updates, -trial.score(), trial.trial))
    names = [dimension.name for dimension in space.dimensions]
    lines = [
        f"| trial | score | updates | {' | '.join(names)} |",
        "| --- " * (3 + len(names)) + "|",
    ]
    for trial in own[:SHOWN]:
        values = " | ".join(shown(trial.values[name]) for name in names)
        lines.append(f"| {trial.trial} | {trial.score():.4g} | {trial.updates} | {values} |")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A value, short, for a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def command_line(script: str, given: dict[str, Any], values: dict[str, Any]) -> str:
    """The line that trains with these values.

    Args:
      given: what of the config differs from the script's own.
    """
    settings = {**given, **values}
    words = [f"{name}={value}" for name, value in settings.items()]
    return " ".join(["python", script, *map(shlex.quote, words)])


def smoothed(trial: Trial) -> tuple[np.ndarray, np.ndarray]:
    """A trial's env steps and mean return over its seeds, in at most 50 bins with episodes."""
    returns, episodes = np.array(trial.returns, float), np.array(trial.episodes, float)
    sums = np.nan_to_num(returns) * episodes
    steps = (trial.first_update + 1 + np.arange(len(returns))) * trial.steps_per_update
    bins = np.array_split(np.arange(len(returns)), min(50, max(1, len(returns))))
    points = [
        (steps[rows[-1]], sums[rows].sum() / episodes[rows].sum())
        for rows in bins
        if len(rows) and episodes[rows].sum()
    ]
    x, y = zip(*points, strict=True) if points else ((), ())
    return np.array(x), np.array(y)


def plot_returns(path: Path, trials: Sequence[Trial], best: Trial) -> None:
    """Every member's return over its steps: those that went on strong, the others pale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for trial in (t for t in trials if t.role == "search" and t.returns):
        survived = trial.status == "finished"
        color, alpha = ("tab:blue", 0.9) if survived else ("0.7", 0.6)
        axes.plot(*smoothed(trial), linewidth=1, color=color, alpha=alpha)
    axes.plot(*smoothed(best), color="tab:red", linewidth=2, label=f"trial {best.trial}, the best")
    axes.plot([], [], color="tab:blue", label="trained to the end")
    axes.plot([], [], color="0.7", label="stopped before")
    axes.set(xlabel="environment steps of the agent", ylabel="mean episode return")
    axes.grid(alpha=0.3)
    axes.legend()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))


def plot_values(path: Path, space: Space, trials: Sequence[Trial], best: Trial) -> None:
    """Scores against every searched key's values, in its natural scale."""
    from matplotlib.figure import Figure

    own = [t for t in trials if t.role == "search" and math.isfinite(t.score())]
    number = len(space.dimensions)
    columns = min(number, 3)
    rows = -(-number // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, dimension in zip(panels, space.dimensions, strict=False):
        for trial in own:
            x = dimension.position(trial.values[dimension.name])
            color = "tab:blue" if trial.status == "finished" else "0.7"
            axes.scatter(x, trial.score(), s=14, color=color)
        axes.scatter(
            dimension.position(best.values[dimension.name]), best.score(), s=40, color="tab:red"
        )
        label_positions(axes, dimension)
    for axes in panels[number:]:
        axes.set_visible(False)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))


def label_positions(axes: Any, dimension: Dimension) -> None:
    """Ticks where the values stand."""
    if dimension.choices:
        places = [dimension.position(choice) for choice in dimension.choices]
    else:
        places = [0, 0.25, 0.5, 0.75, 1]
    axes.set(xlabel=dimension.name, ylabel="score", xlim=(-0.05, 1.05))
    axes.set_xticks(places, [shown(dimension.value(place)) for place in places])
    axes.grid(alpha=0.3)
