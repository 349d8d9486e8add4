"""A whole search: a strategy, then what it found beside the default config on fresh seeds."""

from collections.abc import Callable, Generator

from trxl.search.strategies import (
    Best,
    Member,
    Round,
    Schedule,
    Scores,
    Search,
    Strategy,
    make_strategy,
)

Plan = Generator[Round, Scores, Best]

DEFAULT, FOUND, LAST = "default", "found", "found, last values"
"""The candidates of the report; the third where what was found changed on its way."""


def make_plan(strategy: str, search: Search, fresh_seeds: tuple[int, ...]) -> Plan:
    """The rounds of the strategy, then those of the report."""
    best, trials = yield from counted(make_strategy(strategy, search))
    yield from compared(best, search, fresh_seeds, trials)
    return best


def counted(strategy: Strategy) -> Generator[Round, Scores, tuple[Best, int]]:
    """A strategy's rounds; its result, and the first number that none of its trials has."""
    trials = 0
    round_ = next(strategy)
    while True:
        trials = max(trials, *(member.trial + 1 for member in round_.members))
        scores = yield round_
        try:
            round_ = strategy.send(scores)
        except StopIteration as end:
            return end.value, trials


def candidates(best: Best, search: Search) -> dict[str, Schedule]:
    """What is compared, by name; the default alone where nothing better was found."""
    default = ((0.0, search.default),)
    if best.schedule == default:
        return {DEFAULT: default}
    found = {DEFAULT: default, FOUND: best.schedule}
    if len(best.schedule) > 1:
        found[LAST] = ((0.0, best.schedule[-1][1]),)
    return found


def compared(
    best: Best, search: Search, seeds: tuple[int, ...], first_trial: int
) -> Generator[Round, Scores, None]:
    """Every candidate on every seed, a trial each."""
    if not seeds:
        return
    schedules = candidates(best, search)
    changes = {start for schedule in schedules.values() for start, _ in schedule} - {0.0}
    runs = [(role, seed) for role in schedules for seed in seeds]
    start = 0.0
    for until in [*sorted(changes), 1.0]:
        members = tuple(
            Member(first_trial + i, values_at(schedules[role], start), None, (seed,), role)
            for i, (role, seed) in enumerate(runs)
        )
        yield Round(members, until)
        start = until


def values_at(schedule: Schedule, share: float) -> dict:
    """Which values hold from a share of a run on."""
    return [values for start, values in schedule if start <= share][-1]


def size_of(plan: Plan, rows_of: Callable[[Member], int], steps: Callable[[Member], int]) -> int:
    """How many environment steps a plan trains: if later trials are better, the most.

    Args:
      rows_of: how many seeds a member has.
      steps: environment steps of a whole run of one of them.
    """
    reached: dict[int, float] = {}
    total = 0.0
    try:
        round_ = next(plan)
        while True:
            for member in round_.members:
                start = reached.get(member.parent, 0.0) if member.parent is not None else 0.0
                before = reached.get(member.trial, start)
                total += (round_.until - before) * rows_of(member) * steps(member)
            reached |= {member.trial: round_.until for member in round_.members}
            round_ = plan.send({member.trial: float(member.trial) for member in round_.members})
    except StopIteration:
        return round(total)
