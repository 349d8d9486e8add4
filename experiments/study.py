"""Trains the runs of a study, a few at once: `python experiments/study.py STUDY OUT [workers]`.

STUDY is a text file. It is read again whenever a run ends, so lines may be added meanwhile:

    common KEY=VALUE ...            applies to all lines below
    seeds 100 101 102               apply to all lines below
    script train_Muesli_trXL.py     applies to all lines below; default train_PPO_trXL.py
    <name> [KEY=VALUE ...]          a run for each seed

Runs start in the order of the file. Each run has the folder OUT/<name>/<seed> and, when it ends, a
line in OUT/results.jsonl (with NUM_SEEDS one line per seed). A restarted study skips finished runs
and resumes stopped ones. Ctrl-C, or SIGTERM to its process group, saves and stops the runs too.
SIGTERM to the study alone lets them end and starts no more.
"""

import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from trxl.config import num_updates  # noqa: E402
from trxl.environments import is_own  # noqa: E402
from trxl.results import load_results  # noqa: E402


class Run(NamedTuple):
    """Line of a study with one seed."""

    name: str
    seed: int
    overrides: tuple[str, ...]
    script: str

    def folder(self, out: Path) -> Path:
        """Returns the folder in which the run's results folder is made."""
        return out / self.name / str(self.seed)


def read_study(text: str) -> Iterator[Run]:
    """Yields the runs that a study's text lists, in its order."""
    common, seeds, script = [], [0], "train_PPO_trXL.py"
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        match words:
            case []:
                continue
            case ["common", *common]:
                continue
            case ["seeds", *numbers]:
                seeds = [int(number) for number in numbers]
            case ["script", script]:
                continue
            case [name, *overrides]:
                yield from (Run(name, seed, (*common, *overrides), script) for seed in seeds)


def command(run: Run, out: Path) -> list[str]:
    """Returns the command that starts a run, or resumes it."""
    script = [sys.executable, str(REPOSITORY / run.script)]
    folder = run.folder(out)
    checkpoints = list(folder.glob("*/checkpoints/[0-9]*"))
    if checkpoints:
        names = [word for word in run.overrides if word.startswith("ENV_NAME=")]
        own = [name for name in names[-1:] if is_own(name)]  # a file runs only if it is named
        return [*script, f"RESUME={checkpoints[0].parents[1]}", *own]
    return [*script, *run.overrides, f"seed={run.seed}", f"RESULTS_DIR={folder}"]


def train(run: Run, out: Path) -> list[dict[str, Any]]:
    """Trains one run in a process of low priority, whose output goes to its folder.

    Returns:
      A line for each seed that left metrics, else one line without.
    """
    run.folder(out).mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(run.folder(out) / "output.txt", "ab") as output:
        status = subprocess.run(
            ["nice", "-n", "19", *command(run, out)], stdout=output, stderr=output, check=False
        ).returncode
    line = run._asdict() | {"status": status, "seconds": round(time.monotonic() - start)}
    found = {
        int(path.name.removesuffix("_metrics.npy")): path
        for path in run.folder(out).glob("*/*_metrics.npy")
    }
    lines = [line | {"seed": seed} | of_seed(found[seed], status) for seed in sorted(found)]
    return lines or [line]


def of_seed(path: Path, status: int) -> dict[str, Any]:
    """Returns a seed's summary and status, which is 0 if only other seeds of the run diverged."""
    found = summary(load_results(path))
    config, params = (path.with_name(path.name.replace("metrics", x)) for x in ("config", "params"))
    if params.exists() and found["updates"] == num_updates(load_results(config)):
        status = 0
    return {"status": status} | found


STEPS_OF_A_MEAN = 65_536
"""Environment steps of one iteration of POPGym's baselines."""


def mmer(metrics: dict[str, np.ndarray]) -> float | None:
    """Returns the maximum over a training of the mean episode return (MMER), as POPGym reports it.

    Morad et al. 2023 (arXiv 2303.01859), section 5: means over `STEPS_OF_A_MEAN`. None if no
    episode ended.
    """
    iteration = (metrics["env_steps"] - 1) // STEPS_OF_A_MEAN
    episodes = metrics["num_episodes"]
    total = np.where(episodes > 0, metrics["returned_episode_returns"] * episodes, 0.0)
    sums, counts = (np.bincount(iteration, weights=x) for x in (total, episodes))
    if not counts.any():
        return None
    return round(float(np.max(sums[counts > 0] / counts[counts > 0])), 4)


def parts_of(of_updates: np.ndarray) -> list[np.ndarray]:
    """Splits the updates of a training into at most 50 parts, the points of its curve."""
    return np.array_split(of_updates, min(50, len(of_updates)))


def summary(metrics: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the mean return over the last tenth of the updates, MMER, and the curve."""
    returns = metrics["returned_episode_returns"]
    last = returns[-max(1, len(returns) // 10) :]
    return {
        "updates": len(returns),
        "steps": int(metrics["env_steps"][-1]),
        "final_return": mean_return(last),
        "mmer": mmer(metrics),
        "curve": [mean_return(part) for part in parts_of(returns)],
    }


def mean_return(returns: np.ndarray) -> float | None:
    """Returns the mean over the updates in which an episode ended; None if there are none."""
    returns = returns[~np.isnan(returns)]
    return round(float(returns.mean()), 4) if len(returns) else None


def taken_of(results: Path) -> set[tuple[str, int]]:
    """Returns name and seed of the runs that have a line in the results and did not fail."""
    lines = results.read_text().splitlines() if results.exists() else []
    done = (json.loads(line) for line in lines)
    return {(line["name"], line["seed"]) for line in done if line["status"] == 0}


def add_line(results: Path, line: dict[str, Any]) -> None:
    """Appends a line to the results, and prints it."""
    with open(results, "a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


STOPPING = threading.Event()
"""Set when no more runs are to be started."""


def main(study: Path, out: Path, workers: int) -> None:
    """Runs until nothing of the study is left, or until `STOPPING` is set."""
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    taken = taken_of(results)
    running: set[Future] = set()
    with ThreadPoolExecutor(workers) as pool:
        while True:
            runs = [run for run in read_study(study.read_text()) if run[:2] not in taken]
            for run in runs[: 0 if STOPPING.is_set() else workers - len(running)]:
                taken.add(run[:2])
                running.add(pool.submit(train, run, out))
            if not running:
                return
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for line in (line for future in ended for line in future.result()):
                add_line(results, line)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or not all(workers.isdigit() for workers in sys.argv[3:]):
        sys.exit("usage: python experiments/study.py STUDY OUT [workers]")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: STOPPING.set())
    workers = int(sys.argv[3]) if len(sys.argv) > 3 else 2
    main(Path(sys.argv[1]), Path(sys.argv[2]), workers)
