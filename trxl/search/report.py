"""Report of a search: text, a table and plots, in its folder."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from trxl.runs.outputs import write_whole
from trxl.search.record import Trial
from trxl.search.settings import Space
from trxl.search.strategies import DEFAULT

SHOWN = 10
"""Number of trials in the table."""


def write_report(
    folder: Path,
    title: str,
    space: Space,
    trials: Sequence[Trial],
    best: Trial | None,
    command: Sequence[str],
) -> None:
    """Writes `report.md`, `returns.png` and `values.png`, and prints the best config.

    Args:
      title: heading of the report.
      best: the best trial; None if no trial has a score.
      command: words of the training command, without the best trial's values.
    """
    own = [trial for trial in trials if trial.role == "search" and trial.returns]
    statuses = [trial.status for trial in own]
    ended = [f"{statuses.count(status)} {status}" for status in dict.fromkeys(sorted(statuses))]
    parts = [
        f"# {title}",
        f"{len(own)} trials ({', '.join(ended)}), {sum(t.env_steps for t in own):.3g} environment"
        f" steps; {sum(t.seconds for t in trials):.0f} s with the report.",
    ]
    if best is None:
        parts.append("No trial has a score yet.")
        print(parts[-1])
    else:
        line = shlex.join([*command, *(f"{name}={x}" for name, x in best.values.items())])
        found, compared = f"trial {best.trial}, score {best.score():.4g}", comparison(trials)
        print(f"best: {found}\n  {line}", compared, sep="\n" if compared else "")
        parts += [f"The best: {found}.", f"```bash\n{line}\n```", compared]
        plot_returns(folder / "returns.png", own, best)
        plot_values(folder / "values.png", space, own, best)
        parts.append("![Return of every trial](returns.png)\n\n![Values and scores](values.png)")
    names = [dimension.name for dimension in space.dimensions]
    own.sort(key=lambda trial: (-trial.updates, -trial.score(), trial.trial))
    rows = [
        [t.trial, f"{t.score():.4g}", t.updates, *(shown(t.values[name]) for name in names)]
        for t in own[:SHOWN]
    ]
    parts.append(table(["trial", "score", "updates", *names], rows))
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_whole(folder / "report.md", lambda file: file.write(text.encode()))
    print(f"report in {folder / 'report.md'}")


def comparison(trials: Sequence[Trial]) -> str:
    """Returns a table of the candidates' returns on new seeds, and differences to the default."""
    scores: dict[str, list[float]] = {}
    for trial in trials:
        if trial.role != "search":
            scores.setdefault(trial.role, []).append(trial.score())
    rows = []
    for role, own in scores.items():
        gains = [a - b for a, b in zip(own, scores[DEFAULT], strict=True)]
        each = ", ".join(f"{score:.4g}" for score in own)
        rows.append([role, interval(own), "" if role == DEFAULT else interval(gains), each])
    headings = ["on fresh seeds", "return, mean and 95 % interval", "more than the default"]
    return table([*headings, "by seed"], rows) if rows else ""


def interval(scores: Sequence[float]) -> str:
    """Formats a mean over seeds +- half its 95 % confidence interval (Student's t)."""
    mean = sum(scores) / len(scores)
    if len(scores) < 2 or not math.isfinite(mean):
        return f"{mean:.4g}"
    half = stats.t.ppf(0.975, len(scores) - 1) * stats.sem(scores)
    return f"{mean:.4g} +- {half:.2g}"


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Formats a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def shown(value: Any) -> str:
    """Formats a value for a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def smoothed(trial: Trial) -> tuple[np.ndarray, np.ndarray]:
    """Returns a trial's env steps and mean return over its seeds, in at most 50 bins."""
    episodes = np.array(trial.episodes, float).sum(axis=1)
    sums = np.nansum(np.array(trial.returns, float) * np.array(trial.episodes), axis=1)
    steps = (trial.first_update + 1 + np.arange(len(sums))) * trial.steps_per_update
    starts = np.unique(np.linspace(0, len(sums), 50, endpoint=False).astype(int))
    episodes, sums = np.add.reduceat(episodes, starts), np.add.reduceat(sums, starts)
    ended = episodes > 0
    last = np.append(starts[1:], len(steps)) - 1
    return steps[last][ended], sums[ended] / episodes[ended]


def plot_returns(path: Path, trials: Sequence[Trial], best: Trial) -> None:
    """Draws every trial's return over environment steps; finished trials in colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for trial in trials:
        color = "tab:blue" if trial.status == "finished" else "0.7"
        axes.plot(*smoothed(trial), linewidth=1, color=color, alpha=0.8)
    axes.plot(*smoothed(best), color="tab:red", linewidth=2, label=f"trial {best.trial}, the best")
    axes.plot([], [], color="tab:blue", label="trained to the end")
    axes.plot([], [], color="0.7", label="stopped before")
    axes.set(xlabel="environment steps of the agent", ylabel="mean episode return")
    axes.grid(alpha=0.3)
    axes.legend()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))


def plot_values(path: Path, space: Space, trials: Sequence[Trial], best: Trial) -> None:
    """Draws scores over the values of each searched key, in the key's scale."""
    from matplotlib.figure import Figure

    own = [t for t in trials if math.isfinite(t.score())]
    colors = ["tab:blue" if trial.status == "finished" else "0.7" for trial in own]
    columns = min(len(space.dimensions), 3)
    rows = -(-len(space.dimensions) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, dimension in zip(panels, space.dimensions, strict=False):
        places = [dimension.position(trial.values[dimension.name]) for trial in own]
        axes.scatter(places, [trial.score() for trial in own], s=14, c=colors)
        place = dimension.position(best.values[dimension.name])
        axes.scatter(place, best.score(), s=40, color="tab:red")
        ticks = [dimension.position(x) for x in dimension.choices] or [0, 0.25, 0.5, 0.75, 1]
        axes.set_xticks(ticks, [shown(dimension.value(tick)) for tick in ticks])
        axes.set(xlabel=dimension.name, ylabel="score", xlim=(-0.05, 1.05))
        axes.grid(alpha=0.3)
    for axes in panels[len(space.dimensions) :]:
        axes.set_visible(False)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))
