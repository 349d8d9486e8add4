"""Training loop of a search: a strategy's rounds, checkpoints and a progress bar."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from trxl.runs.interruption import StopOnSignal
from trxl.search.population import Programs, Row, fork_random_streams
from trxl.search.record import SearchFolder, Trial, read_trial
from trxl.search.settings import Space
from trxl.search.strategies import Best, Member, Round, Strategy
from trxl.training import Algorithm, RunnerState


@dataclass
class Loop:
    """Search in progress; `trials` has all trials by number."""

    given: dict[str, Any]  # base config, not completed
    algorithm: Algorithm
    space: Space
    seeds: int  # per member, if the strategy gives none
    batch_rows: int  # rows per program call
    devices: int  # that share a program
    folder: SearchFolder

    def __post_init__(self) -> None:
        self._seed = self.algorithm.check(self.given)["seed"]
        self._programs: dict[tuple, Programs] = {}
        self._states: dict[int, RunnerState] = {}  # by trial, leaves (seeds, ...)
        notes = self.folder.notes
        self.trials = {row["trial"]: read_trial(row) for row in notes.get("trials", [])}
        self._scores: list[list[float]] = notes.get("scores", [])  # of finished rounds

    def run(self, strategy: Strategy, stop: StopOnSignal, total_steps: float) -> Best | None:
        """Runs a strategy, continuing from the folder's checkpoint.

        Returns:
          the best trial; None if a signal stopped the search.
        """
        try:
            round_ = next(strategy)
            for scores in self._scores:
                round_ = strategy.send(by_trial(round_, scores))
            self._restore()
            done = sum(trial.env_steps for trial in self.trials.values())
            with tqdm(
                total=total_steps, initial=done, unit="step", unit_scale=True, mininterval=1
            ) as self._bar:
                while True:
                    self._prepare(round_)
                    for members in self.batches(round_):
                        self._train(members, round_.until, stop)
                        if stop.signal:
                            self.save()
                            return None
                    self._scores.append([self.trials[m.trial].score() for m in round_.members])
                    round_ = strategy.send(by_trial(round_, self._scores[-1]))
        except StopIteration as end:
            self._end_all_but(set())
            if self._states:
                self.save()
            return end.value

    def save(self) -> None:
        """Writes a checkpoint: the states of all unfinished members, concatenated per program.

        Its notes have the scores of finished rounds, and the trials.
        """
        groups = by_key(self._states, lambda trial: self._shape(self.trials[trial].values))
        notes = {
            "scores": self._scores,
            "groups": groups,
            "trials": [trial.row() for trial in self.trials.values()],
        }
        state = {str(i): join([self._states[t] for t in one]) for i, one in enumerate(groups)}
        self.folder.save(notes, state)

    def _restore(self) -> None:
        groups = [[self.trials[t] for t in one] for one in self.folder.notes.get("groups", [])]
        shapes = {
            str(i): self.programs(trials[0].values).shapes(self._rows(trials))
            for i, trials in enumerate(groups)
        }
        states = self.folder.restore(shapes) if groups else {}
        for i, trials in enumerate(groups):
            self._states |= split(states[str(i)], trials)

    def programs(self, values: dict[str, Any]) -> Programs:
        """Returns the programs of members with these values of the keys that shape a program."""
        shape = self._shape(values)
        if shape not in self._programs:
            config = self.algorithm.check({**self.given, **dict(shape)})
            self._programs[shape] = Programs(config, self.algorithm, self.batch_rows, self.devices)
        return self._programs[shape]

    def _shape(self, values: dict[str, Any]) -> tuple:
        return tuple(self.space.shape_of(values).items())

    def batches(self, round_: Round) -> Iterator[list[Member]]:
        """Yields batches of members of one shape, as many as a program has rows for.

        Members of a batch have done the same number of updates, also after a resume within a round.
        """

        def standing(member: Member) -> tuple:
            trial = self.trials[member.trial]
            return self._shape(member.values), trial.updates, trial.trial in self._states

        for members in by_key(round_.members, standing):
            batch: list[Member] = []
            for member in members:
                rows = sum(len(self.trials[m.trial].seeds) for m in [*batch, member])
                if batch and rows > self.batch_rows:
                    yield batch
                    batch = []
                batch.append(member)
            yield batch

    def _prepare(self, round_: Round) -> None:
        """Records a round's members, copies their parents' states, and drops other states."""
        for member in round_.members:
            trial = self.trials.setdefault(member.trial, self._new_trial(member))
            trial.values = member.values
            if member.parent is not None and member.trial not in self._states:
                parent = self._states[member.parent]
                self._states[member.trial] = fork_random_streams(parent, member.trial)
        # Scores count the updates since the last copy, which all members trained themselves.
        totals = {m.trial: self.programs(m.values).num_updates for m in round_.members}
        start = max(self.trials[number].first_update / total for number, total in totals.items())
        for number, total in totals.items():
            self.trials[number].since = round(start * total)
        self._end_all_but(totals)
        self._states = {t: state for t, state in self._states.items() if t in totals}

    def _new_trial(self, member: Member) -> Trial:
        seeds = member.seeds or search_seeds(self._seed, member.trial, self.seeds)
        updates = 0 if member.parent is None else self.trials[member.parent].updates
        return Trial(
            trial=member.trial,
            values=member.values,
            seeds=list(seeds),
            role=member.role,
            parent=member.parent,
            first_update=updates,
            updates=updates,
            steps_per_update=self.programs(member.values).steps_per_update,
        )

    def _end_all_but(self, going_on: Iterable[int]) -> None:
        for trial in self.trials.values():
            if trial.status == "running" and trial.trial not in going_on:
                whole = trial.updates >= self.programs(trial.values).num_updates
                trial.status = "finished" if whole else "stopped"

    def _rows(self, trials: Iterable[Trial]) -> list[Row]:
        names = [d.name for d in self.space.only(traced=True).dimensions]
        return [
            Row({name: float(trial.values[name]) for name in names}, seed)
            for trial in trials
            for seed in trial.seeds
        ]

    def _train(self, members: Sequence[Member], until: float, stop: StopOnSignal) -> None:
        """Trains members of one batch up to a share of a whole run."""
        programs = self.programs(members[0].values)
        target = max(1, round(until * programs.num_updates))
        trials = [self.trials[member.trial] for member in members]
        if trials[0].updates >= target:  # equal within a batch
            return
        rows = self._rows(trials)
        if trials[0].trial in self._states:
            state = join([self._states[trial.trial] for trial in trials])
        else:
            state = programs.init(rows)
        batch = programs.load(rows, state)
        while trials[0].updates < target and not stop.signal:
            start = time.perf_counter()
            results = split(batch.update(), trials)
            seconds = (time.perf_counter() - start) / len(trials)
            for trial in trials:
                trial.log_update(results[trial.trial])
                trial.seconds += seconds
            best = best_trial(self.trials.values())
            self._bar.set_postfix_str(f"best {best.score() if best else np.nan:.3f}", refresh=False)
            self._bar.update(programs.steps_per_update * len(rows))
            if self.folder.is_time():
                self._states |= split(batch.state(), trials)
                self.save()
            stop.agree()
        self._states |= split(batch.state(), trials)


def search_seeds(seed: int, trial: int, number: int) -> tuple[int, ...]:
    """Returns the seeds of a trial, disjoint from the report's."""
    rng = np.random.default_rng([seed, trial])
    return tuple(int(x) for x in rng.integers(2**31, 2**32, number))


def by_trial(round_: Round, scores: list[float]) -> dict[int, float]:
    """Returns the scores of a round's members by trial."""
    return {m.trial: score for m, score in zip(round_.members, scores, strict=True)}


def by_key(items: Iterable[Any], key: Callable) -> list[list[Any]]:
    """Groups items by key, in order."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def join(states: list[RunnerState]) -> RunnerState:
    """Concatenates the rows of several trials."""
    return jax.tree.map(lambda *x: jnp.concatenate(x), *states)


def split(rows: Any, trials: Sequence[Trial]) -> dict[int, Any]:
    """Splits leaves (rows, ...) by trial, inverting `join`."""
    ends = np.cumsum([len(trial.seeds) for trial in trials])
    parts = {t.trial: slice(end - len(t.seeds), end) for t, end in zip(trials, ends, strict=True)}
    return {t: jax.tree.map(lambda x, part=part: x[part], rows) for t, part in parts.items()}


def best_trial(trials: Iterable[Trial]) -> Trial | None:
    """Returns the best trial so far: most updates, then highest score."""
    own = [trial for trial in trials if trial.role == "search" and np.isfinite(trial.score())]
    return max(own, key=lambda trial: (trial.updates, trial.score()), default=None)
