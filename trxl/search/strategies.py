"""Strategies of a search, and the comparison of the best config with the default.

A strategy is a generator. It yields a `Round`, receives its members' scores {trial: score}, and
returns the best member. It depends only on scores, so replaying saved scores restores it.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import count, pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trxl.errors import ConfigError
from trxl.search.evosax_strategies import Evosax
from trxl.search.settings import Space

Scores = dict[int, float]
"""Score of each trial; -inf if it diverged or has no episodes."""


class Member(NamedTuple):
    """Config in training."""

    trial: int  # number of the trial
    values: dict[str, Any]  # of the searched keys
    parent: int | None = None  # trial whose agent is copied at the start
    seeds: tuple[int, ...] = ()  # empty: chosen by the search
    role: str = "search"  # or a candidate of the report


class Round(NamedTuple):
    """Members that continue training up to a share of a whole run."""

    members: tuple[Member, ...]
    until: float


Schedule = tuple[tuple[float, dict[str, Any]], ...]
"""Values, and the share of a run from which they apply; the first is 0."""


class Best(NamedTuple):
    """Best trial and its schedule."""

    score: float
    trial: int
    schedule: Schedule


Strategy = Generator[Round, Scores, Best]

DEFAULT, FOUND, LAST = "default", "found", "found, last values"
"""Candidates of the report; the third only if the best trial's values changed."""


class Search(NamedTuple):
    """Inputs of a strategy."""

    space: Space
    default: dict[str, Any]  # default values of the searched keys
    population: int
    generations: int
    eta: int
    intervals: int
    shortest: float  # minimum share of a run before members are compared
    es_std: float
    es_lr: float
    seed: int


def run_search(name: str, search: Search, fresh_seeds: Sequence[int]) -> Strategy:
    """Runs a strategy by name, then its best and the default config on new seeds."""
    trials = count()
    best = yield from run_strategy(name, search, trials)
    yield from evaluate_candidates(best, search, fresh_seeds, trials)
    return best


def run_strategy(name: str, search: Search, trials: Iterator[int]) -> Strategy:
    """Runs all generations of a strategy by name.

    Raises:
      ConfigError: the name is unknown.
    """
    if name not in STRATEGIES:
        return (yield from propose(name, search, trials))
    rng = np.random.default_rng(search.seed)
    found = []
    for generation in range(search.generations):
        members = first_members(search, rng, trials, with_default=generation == 0)
        found.append((yield from STRATEGIES[name](search, members, rng, trials)))
    return best_of(found)


def best_of(found: Sequence[Best]) -> Best:
    """Returns the best of several generations; the earlier trial of equals."""
    return max(found, key=lambda best: (best.score, -best.trial))


def first_members(
    search: Search, rng: np.random.Generator, trials: Iterator[int], with_default: bool
) -> list[Member]:
    """Samples a population, optionally with the default config as its first member.

    Members are spread evenly over the combinations of keys that shape the program.
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
"""Largest number of combinations, each of which compiles a program."""


def combinations(space: Space, population: int) -> list[dict[str, Any]]:
    """Returns all combinations of values of the keys that shape the program.

    Raises:
      ConfigError: there are more than members or `MOST_COMBINATIONS`.
    """
    found: list[dict[str, Any]] = [{}]
    for dimension in space.only(traced=False).dimensions:
        found = [{**one, dimension.name: x} for one in found for x in dimension.choices]
    most = min(population, MOST_COMBINATIONS)
    if len(found) > most:
        raise ConfigError(
            f"{len(found)} combinations of the keys that shape the program, where there may be"
            f" {most}; give fewer choices"
        )
    return found


def halving(
    search: Search, members: list[Member], rng: np.random.Generator, trials: Iterator[int]
) -> Strategy:
    """Runs successive halving: after each rung the best 1/eta of the members continue.

    Jamieson and Talwalkar 2016 (arXiv 1502.07943), algorithm "Successive Halving".
    """
    scores: Scores = {}
    for until in rungs(search):
        scores = yield Round(tuple(members), until)
        members = best_first(members, scores)[: -(-len(members) // search.eta)]
    best = members[0]
    return Best(scores[best.trial], best.trial, ((0.0, best.values),))


def rungs(search: Search) -> list[float]:
    """Returns the shares of a run after which members are compared, growing by eta up to 1."""
    number, left = 1, search.population
    while left >= search.eta and search.eta**-number >= search.shortest:
        left = -(-left // search.eta)
        number += 1
    return [float(search.eta) ** -i for i in reversed(range(number))]


def best_first(members: Sequence[Member], scores: Scores) -> list[Member]:
    """Sorts members, best first; the earlier trial of equals first."""
    return sorted(members, key=lambda member: (-scores[member.trial], member.trial))


def population_based(
    search: Search, members: list[Member], rng: np.random.Generator, trials: Iterator[int]
) -> Strategy:
    """Runs population-based training (Jaderberg et al. 2017, arXiv 1711.09846).

    After each interval, copies of the best members replace the worst (truncation selection). A copy
    perturbs each traced value by a step of its range, up or down, in the range's scale. Other
    values are inherited.
    """
    scores: Scores = {}
    history: dict[int, Schedule] = {m.trial: ((0.0, m.values),) for m in members}
    for interval in range(search.intervals):
        until = (interval + 1) / search.intervals
        scores = yield Round(tuple(members), until)
        if until < 1:
            members = exploit(search.space, members, scores, rng, trials)
            for m in members:
                if m.parent is not None:
                    history[m.trial] = (*history[m.parent], (until, m.values))
    best = best_first(members, scores)[0].trial
    return Best(scores[best], best, history[best])


MOVED = 0.1
"""Perturbation of a copied member's value, as a share of the range."""

REPLACED = 0.2
"""Share of members that are replaced, and share of members that are copied."""


def exploit(
    space: Space,
    members: Sequence[Member],
    scores: Scores,
    rng: np.random.Generator,
    trials: Iterator[int],
) -> list[Member]:
    """Returns the members of the next interval, in the previous order."""
    ranked = best_first(members, scores)
    cut = max(1, int(REPLACED * len(ranked)))
    worst = {member.trial for member in ranked[-cut:]}
    children = []
    for member in members:
        if member.trial not in worst:
            children.append(member._replace(parent=None))
            continue
        parent = ranked[rng.integers(cut)]
        children.append(Member(next(trials), explore(space, parent.values, rng), parent.trial))
    return children


def explore(space: Space, values: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Perturbs the values of traced keys by one step."""
    new = dict(values)
    for dimension in space.only(traced=True).dimensions:
        step = MOVED if not dimension.choices else 1 / len(dimension.choices)
        position = dimension.position(values[dimension.name]) + rng.choice([-step, step])
        new[dimension.name] = dimension.value(float(np.clip(position, 0, 1)))
    return new


STRATEGIES: dict[str, Callable[..., Strategy]] = {"halving": halving, "pbt": population_based}
"""Strategies of our own, (search, members, rng, trials) -> best; the others are evosax's."""


def propose(name: str, search: Search, trials: Iterator[int]) -> Strategy:
    """Trains the proposals of an evosax algorithm, a whole run each.

    The algorithm's numbers are mapped by the normal distribution function to positions of the
    traced keys. So initial proposals, with mean 0 and standard deviation 1, are uniform. Each
    combination of the other keys has its own algorithm and part of the population.
    """
    rng = np.random.default_rng(search.seed)
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

    def next_key() -> jax.Array:
        return jax.random.key(int(rng.integers(2**31)))

    mean, std, lr = jnp.zeros(len(traced.dimensions), jnp.float32), search.es_std, search.es_lr
    algorithms = [Evosax(name, size, mean, std, lr, next_key()) for size in sizes]
    found = []
    for generation in range(search.generations):
        extra = [Member(next(trials), search.default)] if generation == 0 else []
        parts = []
        for shape, algorithm in zip(shapes, algorithms, strict=True):
            positions = jax.scipy.special.ndtr(algorithm.ask(next_key()))
            values = [shape | traced.values(x) for x in np.asarray(positions)]
            parts.append([Member(next(trials), x) for x in values])
        members = [*extra, *(member for part in parts for member in part)]
        scores = yield Round(tuple(members), 1.0)
        for part, algorithm in zip(parts, algorithms, strict=True):
            algorithm.tell(next_key(), [scores[member.trial] for member in part])
        first = best_first(members, scores)[0]
        found.append(Best(scores[first.trial], first.trial, ((0.0, first.values),)))
    return best_of(found)


def evaluate_candidates(
    best: Best, search: Search, seeds: Sequence[int], trials: Iterator[int]
) -> Generator[Round, Scores, None]:
    """Trains every candidate on every seed, a trial each."""
    schedules = candidates(best, search)
    runs = [(next(trials), role, seed) for role in schedules for seed in seeds]
    starts = sorted({start for schedule in schedules.values() for start, _ in schedule})
    for start, until in pairwise([*starts, 1.0]) if runs else ():
        yield Round(
            tuple(
                Member(trial, values_at(schedules[role], start), None, (seed,), role)
                for trial, role, seed in runs
            ),
            until,
        )


def candidates(best: Best, search: Search) -> dict[str, Schedule]:
    """Returns the schedules to compare, by name; the default alone if it is the best."""
    default = ((0.0, search.default),)
    if best.schedule == default:
        return {DEFAULT: default}
    found = {DEFAULT: default, FOUND: best.schedule}
    if len(best.schedule) > 1:
        found[LAST] = ((0.0, best.schedule[-1][1]),)
    return found


def values_at(schedule: Schedule, share: float) -> dict[str, Any]:
    """Returns the values of a schedule at a share of a run."""
    return [values for start, values in schedule if start <= share][-1]


def cost(name: str, search: Search, generations: int) -> float:
    """Returns the cost of generations of a strategy, in whole runs."""
    shares = rungs(search) if name == "halving" else [1.0]
    left, runs = search.population, 0.0
    for before, until in pairwise([0.0, *shares]):
        runs += left * (until - before)
        left = -(-left // search.eta)
    with_default = 0 if name in STRATEGIES else 1  # in addition to evosax's proposals
    return generations * runs + with_default
