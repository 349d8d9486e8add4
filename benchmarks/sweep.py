"""Trains a study's runs in as few programs as can be: `python benchmarks/sweep.py STUDY OUT`.

STUDY is what benchmarks/study.py reads. Its runs that differ in nothing but the seed and keys that
may be traced (LR, GAMMA ...; docs/keys.md) are rows of one vmapped program, which a GPU trains in
little more than the time of one of them. As a program ends, OUT/results.jsonl has a line for each
run, as study.py writes it; what is there is not run again. No parameters are kept.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.gpu_program import read_script  # noqa: E402
from benchmarks.study import Run, read_study, summary, taken_of  # noqa: E402
from learning import Algorithm  # noqa: E402
from search.population import Programs, Row  # noqa: E402


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


def train(algorithm: Algorithm, config: dict[str, Any], rows: list[Row]) -> list[dict[str, Any]]:
    """The summary of each row's metrics after a whole training."""
    programs = Programs(config, algorithm, len(rows), 1)
    chunk = programs.load(rows, programs.init(rows))
    seen = [chunk.update() for _ in tqdm(range(programs.num_updates), mininterval=5)]
    steps = programs.steps_per_update * (1 + np.arange(programs.num_updates))
    returns = np.stack([update.returns for update in seen], axis=1)
    episodes = np.stack([update.episodes for update in seen], axis=1)
    return [
        summary({"env_steps": steps, "returned_episode_returns": of, "episodes": number})
        for of, number in zip(returns, episodes, strict=True)
    ]


def main(study: Path, out: Path) -> None:
    """Trains all programs one after the other."""
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    taken = taken_of(results)
    runs = [run for run in read_study(study.read_text()) if run[:2] not in taken]
    for algorithm, config, members in programs_of(runs):
        start = time.monotonic()
        found = train(algorithm, config, [row for _, row in members])
        seconds = round(time.monotonic() - start)
        with open(results, "a") as file:
            for (run, _), numbers in zip(members, found, strict=True):
                line = {"name": run.name, "seed": run.seed, "script": run.script}
                line |= {"overrides": run.overrides, "status": 0, "seconds": seconds, **numbers}
                file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
