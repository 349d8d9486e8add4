"""Draws how far back each memory remembers, and what it costs:

    python experiments/how_far_back.py RESULTS COSTS PICTURE

RESULTS is what study.py writes for how_far_back.study or a study like it, with runs named
<model>/<length of the chain>. COSTS is a JSON object of each model's microseconds per environment
step. Prints the longest length that each model solves and draws PICTURE: the mean return over the
last tenth of the training against the length, and the longest length against the cost.
"""

import json
import sys
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from experiments import compare  # noqa: E402
from experiments.curves import band  # noqa: E402

Returns = dict[str, dict[int, list[float]]]
"""Mapping from model to length to each seed's return."""

SOLVED = 0.9
"""Minimum return of every seed at a solved length; the maximum is 1."""


def read_returns(text: str) -> Returns:
    """Reads the returns of a study's results."""
    models = compare.read(text.splitlines(), "final_return")
    return {m: {int(n): [*x] for n, x in by_length.items()} for m, by_length in models.items()}


def longest_solved(by_length: dict[int, list[float]]) -> int:
    """Returns the longest length up to which no seed of any length fails; 0 if there is none."""
    longest = 0
    for length in sorted(by_length):
        if min(by_length[length]) < SOLVED:
            break
        longest = length
    return longest


def draw(returns: Returns, costs: dict[str, float]) -> Figure:
    """Draws returns against lengths, with a band of all seeds, and lengths against costs."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    by_length, by_cost = figure.subplots(1, 2)
    shades = colormaps["tab20"].colors
    by_length.set_prop_cycle(color=[*shades[::2], *shades[1::2]])
    lengths = sorted({length for found in returns.values() for length in found})
    for model, found in returns.items():
        is_gru = model.startswith("gru")
        style = {"marker": "s" if is_gru else "o", "linestyle": "--" if is_gru else "-"}
        values = [found[length] for length in sorted(found)]
        band(by_length, model, sorted(found), values, **style)
        if longest := longest_solved(found):
            point = (costs[model], longest)
            by_cost.plot(*point, marker=style["marker"], color=by_length.lines[-1].get_color())
            offset = (5, -12 if is_gru else 5)
            name = model.removeprefix("transformer-")
            by_cost.annotate(name, point, offset, textcoords="offset points", fontsize=8)
    by_length.set(ylabel="return over the last tenth", xscale="log")
    by_length.set_xlabel("length of the chain, steps")
    by_length.set_xticks(lengths, map(str, lengths))
    by_cost.set(xlabel="microseconds per environment step", ylabel="longest length solved, steps")
    by_cost.set(yscale="log", xlim=(0, 1.25 * max(costs.values())))
    by_cost.set_yticks(lengths, map(str, lengths))
    by_cost.margins(y=0.15)
    for axes in (by_length, by_cost):
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    names = "transformer-WINDOW_MEM x layers\n(and LR, if not 5e-4), gru-LR"
    figure.legend(*by_length.get_legend_handles_labels(), loc="outside right", title=names)
    return figure


def write_picture(results: Path, costs: Path, picture: Path) -> None:
    """Prints a line for each model, and saves the picture."""
    returns, microseconds = read_returns(results.read_text()), json.loads(costs.read_text())
    if missing := returns.keys() - microseconds:
        sys.exit(f"error: {costs} has no cost of {', '.join(sorted(missing))}")
    for model, found in returns.items():
        print(f"{model}: {longest_solved(found)} steps back, {microseconds[model]} us per step")
    draw(returns, microseconds).savefig(picture, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    write_picture(*map(Path, sys.argv[1:]))
