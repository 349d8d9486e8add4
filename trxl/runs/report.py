"""What episodes were played, in words and as a picture."""

from pathlib import Path
from typing import Any

import numpy as np

from trxl.environments import resolve_name
from trxl.runs.results_files import write_whole

MAX_RETURN = {"Craftax-Symbolic-v1": 226.0, "Craftax-Classic-Symbolic-v1": 22.0}
"""Return of a perfect episode (Matthews et al. 2024): the score is given in % of it."""

OF_A_TRIAL = "trial_return/episode_"
"""What the metrics of a trial begin with; the number of the episode, from 1, follows."""


def describe(values: np.ndarray) -> str:
    """Mean, its standard error, interquartile mean, minimum and maximum of any values."""
    if not len(values):
        return "none"
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    cut = len(values) // 4
    middle = np.sort(values)[cut : len(values) - cut]
    return (
        f"mean {values.mean():.3f} +- {error:.3f}, interquartile mean {middle.mean():.3f},"
        f" min {values.min():.3f}, max {values.max():.3f}"
    )


def crafter_score(rates: list[float]) -> float:
    """The geometric mean of success rates in % (Hafner 2021, arXiv 2109.06780), of 1 + rate."""
    return float(np.expm1(np.mean(np.log1p(rates))))


def report(config: dict[str, Any], results: dict[str, np.ndarray]) -> str:
    """What `play` gave, in words, with Craftax's score and its achievements' success rates."""
    returns = results["returned_episode_returns"]
    lines = [
        f"return: {describe(returns)}",
        f"length: {describe(results['returned_episode_lengths'])}",
    ]
    _, name = resolve_name(config["ENV_NAME"])
    if name in MAX_RETURN:
        score = 100 * returns.mean() / MAX_RETURN[name]
        lines.append(f"score: {score:.2f} % of the maximum {MAX_RETURN[name]:.0f}")
    for key, values in results.items():
        given = values[~np.isnan(values)]
        if key.startswith(OF_A_TRIAL) and len(given):
            middle, low = np.percentile(given, [50, 20])
            more = f", median {middle:.3f}, 20th percentile {low:.3f}"
            lines.append(f"{key}: {describe(given)}{more}")
        elif not key.startswith(("returned_episode_", "Achievements/")):
            lines.append(f"{key}: {describe(given)}")
    rates = {key: values.mean() for key, values in results.items() if "Achievements/" in key}
    if rates:
        lines.append(f"Crafter score: {crafter_score(list(rates.values())):.2f} %")
    for key, rate in sorted(rates.items(), key=lambda item: -item[1]):
        if rate > 0:
            lines.append(f"  {rate:6.2f} %  {key.partition('/')[2]}")
    if any(rate == 0 for rate in rates.values()):
        never = sum(rate == 0 for rate in rates.values())
        lines.append(f"  never: the other {never} of {len(rates)} achievements")
    return "\n".join(lines)


def plot_trials(path: Path, results: dict[str, dict[str, np.ndarray]]) -> None:
    """Draws the return by an episode's number in its trial.

    Mean with its standard error, median and 20th percentile over the trials, as XLand-MiniGrid's
    authors report them (Nikulin et al. 2024, arXiv 2312.12044).

    Args:
      results: what was played of each part of the rulesets.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (split, metrics) in enumerate(results.items()):
        names = [name for name in metrics if name.startswith(OF_A_TRIAL)]
        values = [metrics[name][~np.isnan(metrics[name])] for name in names]
        numbers = np.arange(1, 1 + len(names))
        mean = [x.mean() for x in values]
        error = [x.std(ddof=1) / np.sqrt(len(x)) for x in values]
        colour = f"C{index}"
        axes.errorbar(numbers, mean, error, color=colour, label=f"{split}, mean", capsize=3)
        for percent, style in ((50, "--"), (20, ":")):
            line = [np.percentile(x, percent) for x in values]
            label = f"{split}, {'median' if percent == 50 else '20th percentile'}"
            axes.plot(numbers, line, style, color=colour, label=label)
    axes.set(xlabel="episode of the trial", ylabel="return", xticks=numbers)
    axes.grid(alpha=0.3)
    axes.legend()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))
