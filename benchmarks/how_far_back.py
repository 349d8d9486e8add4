"""How far back each memory remembers: `python benchmarks/how_far_back.py RESULTS PICTURE`.

RESULTS is what benchmarks/study.py leaves of benchmarks/how_far_back.study, lines named
<model>/<length of the chain>; PICTURE the file that is drawn: the mean return over the last tenth
of the training against the length, a line for each model, over its seeds from least to most.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.curves import band  # noqa: E402

Returns = dict[str, dict[int, list[float]]]
"""model: {length: the return of each seed}."""


def read_returns(text: str) -> Returns:
    """Of a study's results."""
    returns: Returns = defaultdict(lambda: defaultdict(list))
    for line in text.splitlines():
        row = json.loads(line)
        model, _, length = row["name"].rpartition("/")
        if row["status"] == 0:
            returns[model][int(length)].append(row["last_tenth"])
    return returns


def draw(returns: Returns) -> Figure:
    """Returns against lengths; the band is from the least seed to the most."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for model, by_length in returns.items():
        lengths = sorted(by_length)
        values = [by_length[n] for n in lengths]
        band(axes, model.replace("-", " "), lengths, values, marker="o")
    axes.set(xscale="log", xlabel="length of the chain, steps", ylabel="return, last tenth")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


if __name__ == "__main__":
    draw(read_returns(Path(sys.argv[1]).read_text())).savefig(sys.argv[2], dpi=120)
