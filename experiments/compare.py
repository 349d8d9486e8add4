"""Compares models over tasks: `python experiments/compare.py RESULTS.jsonl [LEVEL]`.

RESULTS.jsonl is what study.py writes for runs named <model>/<task>. LEVEL, such as Easy, selects
the tasks whose names end in it. Prints a table of tasks: the maximum of the mean return over the
training (MMER), and in brackets the return over its last tenth. Prints for the MMER of all tasks
each model's interquartile mean, and the probability that one model is better than another. Their
95 % intervals are by stratified bootstrap (Agarwal et al. 2021, "Deep Reinforcement Learning at the
Edge of the Statistical Precipice", arXiv 2108.13264), widened for few seeds. Returns go from -1 to
1, as POPGym's do.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import permutations
from pathlib import Path

import numpy as np

SAMPLES = 2000

Scores = dict[str, np.ndarray]
"""A model's scores by task, (seeds,) each."""


def read(lines: Iterable[str], metric: str, level: str = "") -> dict[str, Scores]:
    """Reads every model's scores on a level's tasks, without failed or stopped runs."""
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in map(json.loads, lines):
        if row["status"] == 0 and row[metric] is not None:
            model, task = row["name"].split("/", 1)
            if task.endswith(level):
                scores[model][task.removesuffix(level)].append(row[metric])
    return {m: {t: np.array(x) for t, x in tasks.items()} for m, tasks in scores.items()}


def common_tasks(models: dict[str, Scores]) -> list[str]:
    """Returns the tasks that every model has."""
    return [t for t in next(iter(models.values())) if all(t in s for s in models.values())]


def interquartile_mean(scores: Scores) -> float:
    """Returns the mean of the middle half of all runs of all tasks."""
    values = np.sort(np.concatenate([*scores.values()]))
    cut = len(values) // 4
    return float(values[cut : len(values) - cut].mean())


def improvement(ours: Scores, theirs: Scores) -> float:
    """Returns the probability that a run of ours beats one of theirs, averaged over the tasks."""
    tasks = ((x[:, None], theirs[task]) for task, x in ours.items())
    return float(np.mean([np.mean((a > b) + 0.5 * (a == b)) for a, b in tasks]))


def interval(statistic: Callable[..., float], *models: Scores) -> tuple[float, float]:
    """Returns the ends of a statistic's 95 % interval by stratified bootstrap.

    Each task's seeds are drawn anew, with replacement. Their means vary too little, by (n - 1) / n
    for n seeds. So the interval is widened by the root of n / (n - 1), n of the task with fewest.
    With one seed there is no interval: NaN.
    """
    seeds = min(len(x) for scores in models for x in scores.values())
    if seeds < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(0)

    def resampled(scores: Scores) -> Scores:
        return {task: rng.choice(x, len(x)) for task, x in scores.items()}

    found = statistic(*models)
    values = np.array([statistic(*map(resampled, models)) for _ in range(SAMPLES)])
    widened = found + np.sqrt(seeds / (seeds - 1)) * (values - found)
    low, high = np.percentile(widened, [2.5, 97.5])
    return float(low), float(high)


def table(models: dict[str, Scores], finals: dict[str, Scores]) -> str:
    """Returns a Markdown table of scores and final returns, tasks by models."""
    tasks = list(dict.fromkeys(task for scores in models.values() for task in scores))
    lines = [f"| task | {' | '.join(models)} |", "| --- |" + " --- |" * len(models)]
    for task in tasks:
        cells = [
            f"{describe(scores[task])} ({finals[model][task].mean():.3f})" if task in scores else ""
            for model, scores in models.items()
        ]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def over_all(models: dict[str, Scores]) -> str:
    """Returns, in Markdown, the comparison over the tasks that all models have."""
    shared = common_tasks(models)
    if not shared:
        return "No task is common to all models."
    models = {m: {t: (scores[t] + 1) / 2 for t in shared} for m, scores in models.items()}
    lines = [f"Tasks of all models: {len(shared)}. Returns from 0 to 1, intervals of 95 %:", ""]
    for model, scores in models.items():
        low, high = np.clip(interval(interquartile_mean, scores), 0, 1)
        mean = interquartile_mean(scores)
        lines.append(f"- interquartile mean of {model}: {mean:.3f} ({low:.3f} to {high:.3f})")
    for ours, theirs in permutations(models, 2):
        low, high = np.clip(interval(improvement, models[ours], models[theirs]), 0, 1)
        chance = improvement(models[ours], models[theirs])
        lines.append(f"- {ours} better than {theirs}: {chance:.2f} ({low:.2f} to {high:.2f})")
    return "\n".join(lines)


def describe(values: np.ndarray) -> str:
    """Returns mean and standard error, for one seed its value."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    error = values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():.3f} ± {error:.3f}"


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text().splitlines()
    scores, finals = (read(lines, metric, *sys.argv[2:]) for metric in ("mmer", "final_return"))
    if not scores:
        sys.exit(f"error: {' '.join(sys.argv[1:])}: no run of such a task ended")
    print(table(scores, finals), over_all(scores), sep="\n\n")
