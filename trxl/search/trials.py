"""What is noted of every trial of a search: how it trained, and how good it is."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trxl.runs.outputs import write_whole

COUNTED = 0.2
"""The share of an agent's updates, its last ones, whose episodes make its score."""


class Running(NamedTuple):
    """Episodes of one seed that have run through the whole last update and go on."""

    number: int = 0
    mean_return: float = 0.0  # so far


@dataclass
class Trial:
    """A config that trains, with one seed or several, from a fresh agent or a copy of another's."""

    trial: int
    values: dict[str, Any]  # of the keys that are searched
    seeds: list[int]
    role: str = "search"  # or of which candidate of the report it is a run
    parent: int | None = None
    first_update: int = 0  # from which on it trained, as a copy
    since: int = 0  # update from which all whom it was compared with trained themselves
    updates: int = 0  # of its agent, the parent's included
    steps_per_update: int = 0
    seconds: float = 0.0  # its share of what its programs took
    status: str = "running"  # or stopped, finished, diverged
    returns: list[list[float]] = field(default_factory=list)  # (updates, seeds); NaN: none ended
    episodes: list[list[int]] = field(default_factory=list)  # (updates, seeds)
    running: list[Running] = field(default_factory=list)  # (seeds,), after the last update

    def note(
        self,
        returns: np.ndarray,
        episodes: np.ndarray,
        whole: np.ndarray,
        running: Sequence[Running] = (),
    ) -> None:
        """Notes an update of each seed, and whether its agent is whole, (seeds,) each."""
        self.updates += 1
        self.running = [Running(*one) for one in running]
        self.returns.append([float(x) for x in returns])
        self.episodes.append([int(x) for x in episodes])
        if not whole.all():
            self.status = "diverged"

    @property
    def env_steps(self) -> int:
        """What it cost."""
        return len(self.returns) * self.steps_per_update * len(self.seeds)

    def seed_scores(self) -> list[float]:
        """Returns each seed's mean return over the episodes of the last updates.

        Counted are the last fifth of the agent's updates, of which no more than all whom it was
        compared with trained themselves (`since`): a copy and its parent are scored over the same
        updates. Episodes count that ended there, and those that have run through the whole last
        update, with their return so far. -inf where there is none, and of a trial that diverged.
        """
        if self.status == "diverged" or not self.returns:
            return [-math.inf] * len(self.seeds)
        counted = min(round(COUNTED * self.updates), self.updates - self.since)
        last = -max(1, min(counted, len(self.returns)))
        episodes = np.array(self.episodes[last:], float)
        returns = np.nan_to_num(np.array(self.returns[last:], float))
        sums, numbers = (returns * episodes).sum(axis=0), episodes.sum(axis=0)
        for seed, running in enumerate(self.running):
            numbers[seed] += running.number
            sums[seed] += running.number * running.mean_return
        return [float(s / n) if n else -math.inf for s, n in zip(sums, numbers, strict=True)]

    def score(self) -> float:
        """The mean over its seeds."""
        return float(np.mean(self.seed_scores()))

    def as_line(self) -> str:
        """The trial as a line of JSON, for `from_line` and for whoever reads trials.jsonl."""
        first = self.first_update
        curve = {
            "env_steps": [
                (first + i + 1) * self.steps_per_update for i in range(len(self.returns))
            ],
            "returns": [[plain(x) for x in row] for row in self.returns],
            "episodes": self.episodes,
        }
        own = {k: v for k, v in asdict(self).items() if k not in ("returns", "episodes")}
        own["seconds"] = round(self.seconds, 1)
        more = {"score": plain(self.score()), "env_steps": self.env_steps, "curve": curve}
        return json.dumps(own | more)


def from_line(line: str) -> Trial:
    """Undoes `Trial.as_line`."""
    row = json.loads(line)
    curve = row.pop("curve")
    del row["score"], row["env_steps"]
    returns = [[math.nan if x is None else x for x in one] for one in curve["returns"]]
    running = [Running(*one) for one in row.pop("running", [])]
    return Trial(**row, returns=returns, episodes=curve["episodes"], running=running)


def plain(x: float) -> float | None:
    """A number as JSON has it, None for what it has not."""
    return x if math.isfinite(x) else None


def save_trials(path: Path, trials: Iterable[Trial]) -> None:
    """Writes a line for each, all or none."""
    text = "".join(f"{trial.as_line()}\n" for trial in trials)
    write_whole(path, lambda file: file.write(text.encode()))
