"""Trains a study's runs in few programs: `python experiments/sweep.py STUDY OUT [SEED ...]`.

STUDY is what study.py reads. Runs that differ only in the seed and in keys that may be traced (LR,
GAMMA ...; docs/keys.md) are rows of one vmapped program. A GPU trains it in little more than the
time of one run. When a program ends, it adds a line for each run to OUT/results.jsonl, as study.py
does; finished runs are skipped. Config, metrics and parameters of the given seeds are saved in
OUT/<name>. Ctrl-C or SIGTERM stops after the update and saves; the lines' status is the signal's.
"""

import importlib
import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from experiments.study import Run, add_line, read_study, summary, taken_of  # noqa: E402
from trxl.config import read_overrides  # noqa: E402
from trxl.runs.outputs import save_seed  # noqa: E402
from trxl.runs.parameters import saved_params  # noqa: E402
from trxl.runs.saved_config import as_saved  # noqa: E402
from trxl.search.population import MemberBatch, Programs, Row  # noqa: E402
from trxl.training import Algorithm, TrainState  # noqa: E402


class Trained(NamedTuple):
    """Trained program and its metrics."""

    metrics: list[dict[str, np.ndarray]]  # for each row, {name: (updates,)}
    whole: np.ndarray  # (rows,) bool, whether each has only finite numbers
    chunk: MemberBatch  # its rows
    stopped_by: int  # the signal that ended it, else 0


def config_of(run: Run) -> tuple[dict[str, Any], Algorithm]:
    """Returns a run's checked config, and the algorithm of its script."""
    script = importlib.import_module(run.script.removesuffix(".py"))
    algorithm = next(value for value in vars(script).values() if isinstance(value, Algorithm))
    overrides = read_overrides([*run.overrides], algorithm.keys)
    return algorithm.check(script.config | overrides), algorithm


def programs_of(runs: list[Run]) -> list[tuple[Algorithm, dict[str, Any], list[tuple[Run, Row]]]]:
    """Returns the algorithm of each program, the config that its rows share, and its rows."""
    programs: dict[str, tuple[Algorithm, dict[str, Any], list[tuple[Run, Row]]]] = {}
    for run in runs:
        config, algorithm = config_of(run)
        traced = {
            name for name, key in algorithm.keys.items() if key.traced and config[name] is not None
        }
        shape = {name: value for name, value in config.items() if name not in traced}
        _, _, rows = programs.setdefault(f"{run.script} {shape}", (algorithm, config, []))
        values = {name: config[name] for name in sorted(traced)}
        for seed in range(run.seed, run.seed + config["NUM_SEEDS"]):
            rows.append((run._replace(seed=seed), Row(values, seed)))
    return [*programs.values()]


SIGNALS: list[int] = []
"""The signals that were received."""


def train(algorithm: Algorithm, config: dict[str, Any], rows: list[Row]) -> Trained:
    """Trains all rows, to the end or until a signal."""
    programs = Programs(config, algorithm, len(rows), 1)
    chunk = programs.load(rows, programs.init(rows))
    seen, whole = [], np.ones(len(rows), bool)
    for _ in tqdm(range(programs.num_updates), mininterval=5):
        whole &= chunk.update().finite
        seen.append(chunk.metrics())
        if SIGNALS:
            break
    steps = programs.steps_per_update * (1 + np.arange(len(seen)))
    curves = {name: np.stack([metrics[name] for metrics in seen]) for name in seen[0]}
    of_rows = [{name: x[:, i] for name, x in curves.items()} for i in range(len(rows))]
    metrics = [{**of_row, "env_steps": steps} for of_row in of_rows]
    return Trained(metrics, whole, chunk, SIGNALS[0] if SIGNALS else 0)


def keep(
    folder: Path,
    algorithm: Algorithm,
    config: dict[str, Any],
    row: Row,
    metrics: dict[str, np.ndarray],
    train_state: TrainState,
) -> None:
    """Saves config, metrics and parameters of a row, as a run does."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {**config, **row.traced, "seed": row.seed, "NUM_SEEDS": 1, "ALGORITHM": algorithm.name}
    params = jax.tree.map(np.asarray, saved_params(config, algorithm, train_state))
    save_seed(folder, row.seed, as_saved(own), metrics, params)


def main(study: Path, out: Path, kept_seeds: Collection[int] = ()) -> None:
    """Trains all programs one after the other."""
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    taken = taken_of(results)
    runs = [run for run in read_study(study.read_text()) if run[:2] not in taken]
    for algorithm, config, members in programs_of(runs):
        if SIGNALS:
            return
        start = time.monotonic()
        trained = train(algorithm, config, [row for _, row in members])
        seconds = round(time.monotonic() - start)
        for i, (run, row) in enumerate(members):
            status = -trained.stopped_by or int(not trained.whole[i])
            line = run._asdict() | {"status": status, "seconds": seconds}
            add_line(results, line | summary(trained.metrics[i]))
            if row.seed in kept_seeds and trained.whole[i]:
                agent = trained.chunk.train_state(i)
                keep(out / run.name, algorithm, config, row, trained.metrics[i], agent)


if __name__ == "__main__":
    if len(sys.argv) < 3 or not all(seed.isdigit() for seed in sys.argv[3:]):
        sys.exit("usage: python experiments/sweep.py STUDY OUT [SEED ...]")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: SIGNALS.append(number))
    main(Path(sys.argv[1]), Path(sys.argv[2]), [*map(int, sys.argv[3:])])
