"""Trains a study's runs in as few programs as can be.

    python benchmarks/sweep.py STUDY OUT [SEED ...]

STUDY is what benchmarks/study.py reads. Its runs that differ in nothing but the seed and keys that
may be traced (LR, GAMMA ...; docs/keys.md) are rows of one vmapped program, which a GPU trains in
little more than the time of one of them. As a program ends, OUT/results.jsonl has a line for each
run, as study.py writes it; what is there is not run again. Of the seeds that are named config,
metrics and parameters are kept in OUT/<name>, as of a run. Ctrl-C or SIGTERM, when a rented GPU's
time is up, ends it after the update; lines, whose status is then the signal's, and files say how
far it came.
"""

import json
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

from benchmarks.gpu_program import read_script  # noqa: E402
from benchmarks.study import Run, read_study, summary, taken_of  # noqa: E402
from trxl.runs.outputs import save_seed  # noqa: E402
from trxl.runs.parameters import saved_params  # noqa: E402
from trxl.runs.saved_config import as_saved  # noqa: E402
from trxl.search.population import Chunk, Programs, Row  # noqa: E402
from trxl.training import Algorithm, TrainState  # noqa: E402


class Trained(NamedTuple):
    """What a program leaves."""

    metrics: list[dict[str, np.ndarray]]  # of each row, {name: (updates,)}
    whole: np.ndarray  # (rows,) bool, whether each has only finite numbers
    chunk: Chunk  # of the rows
    stopped_by: int  # the signal that ended it, 0 where none did


def programs_of(runs: list[Run]) -> list[tuple[Algorithm, dict[str, Any], list[tuple[Run, Row]]]]:
    """The algorithm of each program, the config its rows have in common, and its rows."""
    programs: dict[str, tuple[Algorithm, dict[str, Any], list[tuple[Run, Row]]]] = {}
    for run in runs:
        config, algorithm = read_script([run.script, *run.overrides])
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
"""Those that came."""


def train(algorithm: Algorithm, config: dict[str, Any], rows: list[Row]) -> Trained:
    """A whole training of each row, or what of it there was time for."""
    programs = Programs(config, algorithm, len(rows), 1)
    chunk = programs.load(rows, programs.init(rows))
    seen, whole = [], np.ones(len(rows), bool)
    for _ in tqdm(range(programs.num_updates), mininterval=5):
        whole &= chunk.update().whole[: len(rows)]
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
    """Writes config, metrics and parameters of a row, as a run does."""
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
        with open(results, "a") as file:
            for i, (run, row) in enumerate(members):
                line = {"name": run.name, "seed": run.seed, "script": run.script}
                status = -trained.stopped_by or int(not trained.whole[i])
                line |= {"overrides": run.overrides, "status": status, "seconds": seconds}
                line |= summary(trained.metrics[i])
                file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
                if row.seed in kept_seeds and trained.whole[i]:
                    agent = trained.chunk.train_state(i)
                    keep(out / run.name, algorithm, config, row, trained.metrics[i], agent)


if __name__ == "__main__":
    if len(sys.argv) < 3 or not all(seed.isdigit() for seed in sys.argv[3:]):
        sys.exit("usage: python benchmarks/sweep.py STUDY OUT [SEED ...]")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: SIGNALS.append(number))
    main(Path(sys.argv[1]), Path(sys.argv[2]), [*map(int, sys.argv[3:])])
