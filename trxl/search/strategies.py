"""Strategies of a search: which members train how far, and which come next.

A strategy is a generator: it yields a `Round`, is sent the scores of its members, {trial: score},
and at last returns the `Schedule` of the best. It sees nothing but scores, so that the same scores
lead to the same search: what was noted of a search brings its strategy to where it was.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from trxl.errors import ConfigError
from trxl.search.evosax_strategies import Proposals, make_algorithm
from trxl.search.settings import Space

Scores = dict[int, float]
"""Of each trial; that of one that diverged, or of which no episode ended, is -inf."""


class Member(NamedTuple):
    """A config that trains."""

    trial: int  # its number
    values: dict[str, Any]  # of the keys that are searched
    parent: int | None = None  # the trial whose agent it starts from, when it starts
    seeds: tuple[int, ...] = ()  # its own; none: the search gives it some
    role: str = "search"  # or of which candidate of the report it is a run


class Round(NamedTuple):
    """Members that train up to a share of a whole run, each from where it is."""

    members: tuple[Member, ...]
    until: float


Schedule = tuple[tuple[float, dict[str, Any]], ...]
"""From which share of a run on which values hold, the first from 0."""


class Best(NamedTuple):
    """The best trial, and how it came to be."""

    trial: int
    schedule: Schedule


Strategy = Generator[Round, Scores, Best]


class Search(NamedTuple):
    """What a strategy starts from."""

    space: Space
    default: dict[str, Any]  # the default config's values of the keys that are searched
    population: int
    generations: int
    eta: int
    intervals: int
    shortest: float  # share of a run that members train at least before they are compared
    es_std: float
    es_lr: float
    seed: int


def make_strategy(name: str, search: Search) -> Strategy:
    """The strategy of that name.

    Raises:
      ConfigError: there is none.
    """
    own: dict[str, Callable[[Search], Strategy]] = {"halving": halving, "pbt": population_based}
    if name in own:
        return own[name](search)
    return proposed(search, name)


def halving(search: Search) -> Strategy:
    """Random members; after each rung the better ones go on, one in eta (Jamieson and Talwalkar
    2016, arXiv 1502.07943, algorithm "Successive Halving").

    A rung is eta times as long as the one before, the last a whole run.
    """
    rng, trials = np.random.default_rng(search.seed), count()
    finished: Scores = {}
    members_of: dict[int, Member] = {}
    for generation in range(search.generations):
        members = first_members(search, rng, trials, with_default=generation == 0)
        members_of |= {member.trial: member for member in members}
        for until in rungs(search):
            scores = yield Round(tuple(members), until)
            if until < 1:
                members = better(members, scores, -(-len(members) // search.eta))
        finished |= scores
    best = better([members_of[trial] for trial in finished], finished, 1)[0]
    return Best(best.trial, ((0.0, best.values),))


def rungs(search: Search) -> list[float]:
    """Shares of a run after which members are compared, the last 1."""
    number, left = 1, search.population
    while left >= search.eta and search.eta**-number >= search.shortest:
        left = -(-left // search.eta)
        number += 1
    return [float(search.eta) ** -i for i in reversed(range(number))]


def population_based(search: Search) -> Strategy:
    """Population-based training (Jaderberg et al. 2017, arXiv 1711.09846): after each interval the
    worst fifth of the members is replaced by copies of the best fifth, whose values move.

    Exploit is their truncation selection; explore moves each value a tenth of its range, in its
    natural scale, up or down. What shapes the program is inherited.
    """
    rng, trials = np.random.default_rng(search.seed), count()
    finished: Scores = {}
    history: dict[int, Schedule] = {}
    for generation in range(search.generations):
        members = first_members(search, rng, trials, with_default=generation == 0)
        history |= {member.trial: ((0.0, member.values),) for member in members}
        for interval in range(search.intervals):
            until = (interval + 1) / search.intervals
            scores = yield Round(tuple(members), until)
            if until < 1:
                children = exploit(search, members, scores, rng, trials)
                for child in children:
                    if child.parent is not None:
                        changed = (until, child.values)
                        history[child.trial] = (*history[child.parent], changed)
                members = children
        finished |= scores
    best = max(finished, key=lambda trial: (finished[trial], -trial))
    return Best(best, history[best])


MOVED = 0.1
"""By how much of a range a copied member's value moves."""

REPLACED = 0.2
"""The share of the members that are replaced, and of those that they are copied from."""


def exploit(
    search: Search,
    members: Sequence[Member],
    scores: Scores,
    rng: np.random.Generator,
    trials: Iterator[int],
) -> list[Member]:
    """The members of the next interval, in the order of those before."""
    ranked = better(members, scores, len(members))
    cut = max(1, int(REPLACED * len(ranked)))
    best, worst = ranked[:cut], {member.trial for member in ranked[-cut:]}
    children = []
    for member in members:
        if member.trial not in worst:
            children.append(member._replace(parent=None))
            continue
        parent = best[rng.integers(cut)]
        children.append(Member(next(trials), moved(search.space, parent.values, rng), parent.trial))
    return children


def moved(space: Space, values: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """The values, those of the traced keys a step away."""
    new = dict(values)
    for dimension in space.only(traced=True).dimensions:
        step = MOVED if not dimension.choices else 1 / len(dimension.choices)
        position = dimension.position(values[dimension.name])
        new[dimension.name] = dimension.value(
            float(np.clip(position + rng.choice([-step, step]), 0, 1))
        )
    return new


def proposed(search: Search, name: str) -> Strategy:
    """What an algorithm of evosax proposes from generation to generation, each a whole run.

    It moves the traced keys; each combination of the others has an algorithm and a part of the
    population of its own.
    """
    rng, trials = np.random.default_rng(search.seed), count()
    traced = search.space.only(traced=True)
    if not traced.dimensions:
        raise ConfigError(f"STRATEGY={name} moves ranges; there is none, such as LR=1e-5..1e-2")
    shapes = combinations(search.space, search.population)
    sizes = [len(part) for part in np.array_split(range(search.population), len(shapes))]
    if min(sizes) < 2:
        raise ConfigError(
            f"POPULATION={search.population} leaves less than 2 members for each of the"
            f" {len(shapes)} combinations of the keys that shape the program"
        )
    algorithms = [
        Proposals(
            make_algorithm(name, size, len(traced.dimensions), search.es_std, search.es_lr),
            key,
            search.es_std,
        )
        for size, key in zip(sizes, rng.integers(2**31, size=len(sizes)), strict=True)
    ]
    finished: Scores = {}
    members_of: dict[int, Member] = {}
    for generation in range(search.generations):
        parts = []
        for shape, algorithm in zip(shapes, algorithms, strict=True):
            positions = algorithm.ask()
            parts.append([Member(next(trials), shape | traced.values(x)) for x in positions])
        members = [member for part in parts for member in part]
        extra = [Member(next(trials), search.default)] if generation == 0 else []
        members_of |= {member.trial: member for member in members + extra}
        scores = yield Round(tuple(extra + members), 1.0)
        for part, algorithm in zip(parts, algorithms, strict=True):
            algorithm.tell([scores[member.trial] for member in part])
        finished |= scores
    best = better([members_of[trial] for trial in finished], finished, 1)[0]
    return Best(best.trial, ((0.0, best.values),))


def first_members(
    search: Search, rng: np.random.Generator, trials: Iterator[int], with_default: bool
) -> list[Member]:
    """A population of random members, the first of them with the default config's values.

    Every combination of what shapes the program has as many members, or one more.
    """
    shapes = combinations(search.space, search.population)
    members = []
    for i in range(search.population):
        values = search.space.values(rng.random(len(search.space.dimensions)))
        members.append(Member(next(trials), values | shapes[i % len(shapes)]))
    if with_default:
        members[0] = members[0]._replace(values=search.default)
    return members


MOST_COMBINATIONS = 64
"""Each is a program of its own to compile."""


def combinations(space: Space, population: int) -> list[dict[str, Any]]:
    """All combinations of the keys that shape the program.

    Raises:
      ConfigError: there are more than members, or than anyone would wait for.
    """
    found: list[dict[str, Any]] = [{}]
    for dimension in space.only(traced=False).dimensions:
        found = [{**one, dimension.name: x} for one in found for x in dimension.choices]
    most = min(population, MOST_COMBINATIONS)  # one for each member of a POPULATION
    if len(found) > most:
        raise ConfigError(
            f"{len(found)} combinations of the keys that shape the program, where there may be"
            f" {most}; give fewer choices"
        )
    return found


def better(members: Sequence[Member], scores: Scores, number: int) -> list[Member]:
    """The best of the members, best first; of equals the earlier trial."""
    return sorted(members, key=lambda member: (-scores[member.trial], member.trial))[:number]
