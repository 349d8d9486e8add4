"""Trains what a plan asks for, round by round, with checkpoints and a bar."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from trxl.runs.interruption import StopOnSignal
from trxl.search.plan import Plan
from trxl.search.population import Chunk, Programs, Row, fork_random_streams
from trxl.search.record import SearchRecord, cut, joined
from trxl.search.settings import Space
from trxl.search.strategies import Best, Member, Round
from trxl.search.trials import Trial
from trxl.training import Algorithm, RunnerState


class Loop:
    """A search that trains.

    Args:
      config: checked, the default config.
      algorithm: that trains.
      space: that is searched.
      seeds: of a member whose plan gives it none.
      chunk_rows: rows of a program.
      devices: that a program is spread over.
      record: where the search is noted.
    """

    def __init__(
        self,
        config: dict[str, Any],
        algorithm: Algorithm,
        space: Space,
        seeds: int,
        chunk_rows: int,
        devices: int,
        record: SearchRecord,
    ):
        self._config = config
        self._algorithm = algorithm
        self._space = space
        self._seeds = seeds
        self._chunk_rows = chunk_rows
        self._devices = devices
        self._record = record
        self._programs: dict[tuple, Programs] = {}
        self._states: dict[int, RunnerState] = {}

    @property
    def trials(self) -> dict[int, Trial]:
        """All of them by their number."""
        return self._record.trials

    def run(self, plan: Plan, stop: StopOnSignal, total_steps: int) -> Best | None:
        """Goes through the plan from where the record is.

        Returns:
          the strategy's best, None where a signal stopped it before the plan's end.
        """
        round_ = next(plan)
        for scores in self._record.history:
            self._note_members(round_)
            try:
                round_ = plan.send(scores)
            except StopIteration as end:
                return end.value
        self._states = self._restored()
        with tqdm(
            total=total_steps, initial=self.env_steps(), unit="step", unit_scale=True, mininterval=1
        ) as self._bar:
            while True:
                self._prepare(round_)
                for members in self.chunks(round_):
                    self._train(members, round_.until, stop)
                    if stop.signal:
                        self.save()
                        return None
                scores = {m.trial: self.trials[m.trial].score() for m in round_.members}
                self._record.history.append(scores)
                try:
                    round_ = plan.send(scores)
                except StopIteration as end:
                    self._end(set())
                    self.save()
                    return end.value
                self._end({member.trial for member in round_.members})
                if self._record.is_time():
                    self.save()

    def env_steps(self) -> int:
        """Of all members so far."""
        return sum(trial.env_steps for trial in self.trials.values())

    def save(self) -> None:
        """Writes a checkpoint."""
        groups = by_key(self._states, lambda trial: self._shape(self.trials[trial].values))
        self._record.save(self._states, groups)

    def programs(self, values: dict[str, Any]) -> Programs:
        """Of all members that are shaped as these values say."""
        shape = self._shape(values)
        if shape not in self._programs:
            config = {**self._config, **dict(shape)}
            self._programs[shape] = Programs(
                config, self._algorithm, self._chunk_rows, self._devices
            )
        return self._programs[shape]

    def chunks(self, round_: Round) -> Iterator[list[Member]]:
        """Members of one shape that train together, as many as a program has rows for.

        They are equally far, also where a search goes on in the midst of a round, and with another
        number of rows than before.
        """
        for members in by_key(round_.members, self._standing):
            chunk: list[Member] = []
            for member in members:
                rows = sum(len(self.trials[m.trial].seeds) for m in [*chunk, member])
                if chunk and rows > self._chunk_rows:
                    yield chunk
                    chunk = []
                chunk.append(member)
            yield chunk

    def _standing(self, member: Member) -> tuple:
        """The program of a member, and how far it is."""
        shape, trial = self._shape(member.values), self.trials[member.trial]
        return shape, trial.updates, trial.trial in self._states

    def _shape(self, values: dict[str, Any]) -> tuple:
        return tuple(self._space.shape_of(values).items())

    def _prepare(self, round_: Round) -> None:
        """Notes a round's members, copies their parents' agents, and forgets all others."""
        self._note_members(round_)
        for member in round_.members:
            if member.parent is not None and member.trial not in self._states:
                parent = self._states[member.parent]
                self._states[member.trial] = fork_random_streams(parent, member.trial)
        alive = {member.trial for member in round_.members}
        self._states = {t: state for t, state in self._states.items() if t in alive}

    def _note_members(self, round_: Round) -> None:
        for member in round_.members:
            trial = self.trials.get(member.trial)
            if trial is None:
                trial = self._new_trial(member)
                self.trials[member.trial] = trial
            trial.values = member.values
        # Members are compared over what all of them trained themselves since the last copies.
        totals = {m.trial: self.programs(m.values).num_updates for m in round_.members}
        start = max(self.trials[number].first_update / total for number, total in totals.items())
        for number, total in totals.items():
            self.trials[number].since = round(start * total)

    def _new_trial(self, member: Member) -> Trial:
        seeds = member.seeds or search_seeds(self._config["seed"], member.trial, self._seeds)
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

    def _end(self, going_on: set[int]) -> None:
        """Notes which trials are over."""
        for trial in self.trials.values():
            if trial.status == "running" and trial.trial not in going_on:
                whole = trial.updates >= self.programs(trial.values).num_updates
                trial.status = "finished" if whole else "stopped"

    def _restored(self) -> dict[int, RunnerState]:
        groups = {
            tuple(trials): (self.programs(self.trials[trials[0]].values), self._rows(trials))
            for trials in self._record.groups()
        }
        return self._record.restore(groups) if groups else {}

    def _rows(self, trials: Iterable[int]) -> list[Row]:
        traced = [d.name for d in self._space.only(traced=True).dimensions]
        return [
            Row({name: float(self.trials[trial].values[name]) for name in traced}, seed)
            for trial in trials
            for seed in self.trials[trial].seeds
        ]

    def _train(self, members: Sequence[Member], until: float, stop: StopOnSignal) -> None:
        """Trains members of one chunk up to a share of a whole run."""
        programs = self.programs(members[0].values)
        target = max(1, round(until * programs.num_updates))
        trials = [self.trials[member.trial] for member in members]
        if trials[0].updates >= target:  # all of a chunk have as many
            return
        numbers = [trial.trial for trial in trials]
        rows = self._rows(numbers)
        if numbers[0] not in self._states:  # nor is another of the chunk
            self._states |= cut(programs.init(rows), [len(t.seeds) for t in trials], numbers)
        chunk = programs.load(rows, joined([self._states[number] for number in numbers]))
        while trials[0].updates < target and not stop.signal:
            start = time.perf_counter()
            self._note(trials, chunk, start)
            if self._record.is_time():
                self._keep(trials, chunk)
                self.save()
            stop.agree()
        self._keep(trials, chunk)

    def _note(self, trials: list[Trial], chunk: Chunk, start: float) -> None:
        """An update of a chunk, and what it shows."""
        seen = chunk.update()
        seconds = (time.perf_counter() - start) / len(trials)
        first = 0
        for trial in trials:
            rows = slice(first, first + len(trial.seeds))
            trial.note(
                seen.returns[rows], seen.episodes[rows], seen.whole[rows], seen.running[rows]
            )
            trial.seconds += seconds
            first += len(trial.seeds)
        self._bar.set_postfix_str(f"best {self.best_score():.3f}", refresh=False)
        self._bar.update(sum(trial.steps_per_update * len(trial.seeds) for trial in trials))

    def best_score(self) -> float:
        """Of all trials of the search so far."""
        scores = [trial.score() for trial in self.trials.values() if trial.role == "search"]
        finite = [score for score in scores if np.isfinite(score)]
        return max(finite, default=float("nan"))

    def _keep(self, trials: list[Trial], chunk: Chunk) -> None:
        lengths = [len(trial.seeds) for trial in trials]
        self._states |= cut(chunk.state(), lengths, [trial.trial for trial in trials])


def search_seeds(seed: int, trial: int, number: int) -> tuple[int, ...]:
    """The seeds that a trial of a search trains with, none of which its report has."""
    rng = np.random.default_rng([seed, trial])
    return tuple(int(x) for x in rng.integers(2**31, 2**32, number))


def by_key(items: Iterable[Any], key: Callable) -> list[list[Any]]:
    """The items in groups of one key each, in their order."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def best_of(trials: Iterable[Trial]) -> Trial | None:
    """Returns the trial of a search that is best so far: furthest, then highest."""
    own = [trial for trial in trials if trial.role == "search" and np.isfinite(trial.score())]
    return max(own, key=lambda trial: (trial.updates, trial.score()), default=None)
