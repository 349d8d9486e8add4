"""A population of runs: what is searched, strategies, members as rows, kills, the report."""

import json
import math
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import OWN_ENVIRONMENT, QUICK

from trxl.errors import ConfigError
from trxl.results import load_results
from trxl.rollout import Rollout, Transition
from trxl.search import evolution, evosax_strategies, main, plan, population, record, strategies
from trxl.search.evosax_strategies import make_algorithm
from trxl.search.loop import Loop
from trxl.search.population import Programs, Row
from trxl.search.report import command_line, interval
from trxl.search.settings import SEARCH_KEYS, read_arguments, read_settings, read_space
from trxl.search.strategies import Member, Round, Search
from trxl.search.trials import Running, Trial, from_line

from search_trXL import TRAINERS
from trainer_Muesli_trXL import MUESLI
from trainer_PPO_trXL import PPO

REPOSITORY = Path(__file__).resolve().parents[1]
TOYS = Path(__file__).with_name("toys.py")

SIZES = {**QUICK, "ENV_NAME": "CartPole-v1", "TOTAL_TIMESTEPS": 768}  # 12 updates


def space_of(*arguments):
    return read_space(read_arguments(list(arguments), PPO.keys), PPO.keys)


def search_of(*arguments, **changes):
    space, fixed = space_of(*arguments)
    config = PPO.check(fixed)
    sizes = {"population": 27, "generations": 1, "eta": 3, "intervals": 5, "shortest": 0.01}
    default = {d.name: config[d.name] for d in space.dimensions}
    return Search(
        **{"space": space, "default": default, "es_std": 1.0, "es_lr": 0.1, "seed": 0}
        | sizes
        | changes
    )


# ------------------------------------------------------------------ what is searched


def test_ranges_run_in_their_natural_scale():
    space, fixed = space_of("LR=1e-5..1e-3", "GAMMA=0.9..0.99", "GAE_LAMBDA=0.5..1", "VF_COEF=0..2")
    assert not fixed
    middle = space.values([0.5] * 4)
    assert middle == pytest.approx(
        {"LR": 1e-4, "GAMMA": 1 - 10**-1.5, "GAE_LAMBDA": 0.75, "VF_COEF": 1.0}
    )
    for positions in ([0.0] * 4, [1.0] * 4, [0.1, 0.9, 0.3, 0.7]):
        np.testing.assert_allclose(space.positions(space.values(positions)), positions, atol=1e-12)
    assert space.values([0.0] * 4) == {"LR": 1e-5, "GAMMA": 0.9, "GAE_LAMBDA": 0.5, "VF_COEF": 0}
    assert space.values([1.0] * 4) == {"LR": 1e-3, "GAMMA": 0.99, "GAE_LAMBDA": 1, "VF_COEF": 2}
    outside = {"LR": 1.0, "GAMMA": 0.0, "GAE_LAMBDA": 0.75, "VF_COEF": 0.5}
    np.testing.assert_allclose(space.positions(outside), [1, 0, 0.5, 0.25])


def test_choices_and_what_has_one_value():
    space, fixed = space_of(
        "num_layers=1,2,3", "gating=True,False", "LR=3e-4", "ENV_KWARGS={'a': 1, 'b': 2}"
    )
    assert fixed == {"LR": 3e-4, "ENV_KWARGS": {"a": 1, "b": 2}}
    assert [d.choices for d in space.dimensions] == [(1, 2, 3), (True, False)]
    assert [space.values([x, 0])["num_layers"] for x in (0, 0.34, 0.99, 1)] == [1, 2, 3, 3]
    assert space.shape_of({"num_layers": 2, "gating": True}) == {"num_layers": 2, "gating": True}
    assert not space.only(traced=True).dimensions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["num_layers=1..3"], "num_layers shapes the program, so it has choices such as 1,3"),
        (["LR=1e-2..1e-5"], r"LR=0.01\.\.1e-05 is empty; the smaller end comes first"),
        (["LR=a..b"], "LR=a is not a number"),
        (["GAMMA=0.9..1.1"], "GAMMA must be from 0 to 1"),
        (["num_layers=1,1"], "has a choice twice"),
        (["ENV_NAME=CartPole-v1,Catch-bsuite"], "ENV_NAME has one value in a search"),
        (["seed=1,2"], "seed has one value in a search"),
        (["LRR=1"], "unknown config key 'LRR'; did you mean LR"),
        (["LR"], "is not of the form KEY=VALUE"),
        (["NUM_SEEDS=2"], "NUM_SEEDS is not a setting of a search"),
        (["POPULATION=1"], "POPULATION must be from 2 to 100000"),
        (["TRAIN=both"], "TRAIN must be one of gradient, evolution"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    def read():
        given = read_arguments(arguments, PPO.keys)
        read_settings(given)
        read_space(given, PPO.keys)

    with pytest.raises(ConfigError, match=message) as error:
        read()
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ strategies


def known_optimum(values):
    """Highest, 0, at LR = 1e-3 and GAMMA = 0.99."""
    return -((math.log10(values["LR"]) + 3) ** 2) - (math.log10(1 - values["GAMMA"]) + 2) ** 2


def play(strategy, score=known_optimum):
    """What a strategy asks for, and its best, where `score` stands for the training."""
    rounds = [next(strategy)]
    while True:
        scores = {member.trial: score(member.values) for member in rounds[-1].members}
        try:
            rounds.append(strategy.send(scores))
        except StopIteration as end:
            return rounds, end.value


RANGES = ("LR=1e-5..1e-1", "GAMMA=0.5..0.9999")


@pytest.mark.parametrize(
    ("name", "changes", "near"),
    [
        ("halving", {"population": 81, "shortest": 1e-3}, 0.3),
        ("pbt", {"population": 20, "intervals": 20}, 0.1),
        ("CMA_ES", {"population": 12, "generations": 20}, 0.02),
        ("Sep_CMA_ES", {"population": 12, "generations": 20}, 0.02),
        ("OpenES", {"population": 16, "generations": 40}, 0.1),
        ("SimpleGA", {"population": 16, "generations": 15}, 0.1),
    ],
)
def test_a_strategy_finds_a_known_optimum(name, changes, near):
    search = search_of(*RANGES, **changes)
    rounds, best = play(strategies.make_strategy(name, search))
    assert rounds[0].members[0].values == search.default
    assert known_optimum(best.schedule[-1][1]) > -near
    again = play(strategies.make_strategy(name, search))
    assert again == (rounds, best)  # the same scores, the same search


def test_halving_keeps_the_right_members():
    rounds, best = play(strategies.halving(search_of(*RANGES)))
    assert [len(round_.members) for round_ in rounds] == [27, 9, 3, 1]
    assert [round_.until for round_ in rounds] == pytest.approx([1 / 27, 1 / 9, 1 / 3, 1])
    for before, after in pairwise(rounds):
        ranked = sorted(before.members, key=lambda m: -known_optimum(m.values))
        assert list(after.members) == ranked[: len(after.members)]
    assert best.trial == rounds[-1].members[0].trial


def test_rungs_are_no_shorter_than_asked():
    rounds, _ = play(strategies.halving(search_of(*RANGES, shortest=0.2)))
    assert [(len(r.members), r.until) for r in rounds] == [(27, pytest.approx(1 / 3)), (9, 1.0)]


def test_one_that_diverges_is_worst():
    def score(values):
        return -math.inf if values["LR"] > 1e-3 else known_optimum(values)

    rounds, best = play(strategies.halving(search_of(*RANGES)), score)
    assert all(score(member.values) > -math.inf for member in rounds[-1].members)
    assert best.schedule[0][1]["LR"] <= 1e-3
    search = search_of(*RANGES, population=12, generations=10)
    _, best = play(strategies.make_strategy("CMA_ES", search), score)
    assert best.schedule[0][1]["LR"] <= 1e-3
    assert known_optimum(best.schedule[0][1]) > -0.3


def test_shapes_share_the_population():
    search = search_of(*RANGES, "num_layers=1,2,3", population=6)
    rounds, _ = play(strategies.halving(search))
    layers = [member.values["num_layers"] for member in rounds[0].members]
    assert sorted(layers[1:]) == [1, 2, 2, 3, 3]  # and the default
    rounds, _ = play(strategies.make_strategy("CMA_ES", search))
    assert [m.values["num_layers"] for m in rounds[0].members] == [2, 1, 1, 2, 2, 3, 3]


def test_pbt_replaces_the_worst_by_copies_of_the_best_and_moves_their_values():
    search = search_of(*RANGES, "num_layers=1,2", population=10)
    strategy = strategies.population_based(search)
    first = next(strategy).members
    scores = {member.trial: float(-member.trial) for member in first}
    second = strategy.send(scores).members
    assert second[:8] == first[:8]
    for child in second[8:]:
        assert child.trial >= 10
        assert child.parent in (0, 1)
        parent = first[child.parent].values
        assert child.values["num_layers"] == parent["num_layers"]
        ranges = search.space.only(traced=True)
        steps = np.abs(ranges.positions(child.values) - ranges.positions(parent))
        np.testing.assert_allclose(steps, strategies.MOVED, atol=1e-9)


def test_of_pbts_best_the_schedule_is_known():
    def score(values):
        return values["LR"]

    search = search_of("LR=1e-5..1e-1", population=5, intervals=4)
    rounds, best = play(strategies.population_based(search), score)
    starts = [start for start, _ in best.schedule]
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert best.schedule[-1][1]["LR"] == max(m.values["LR"] for m in rounds[-1].members)
    assert plan.values_at(best.schedule, 0.0) == best.schedule[0][1]
    assert plan.values_at(best.schedule, 1.0) == best.schedule[-1][1]


@pytest.mark.parametrize(
    ("name", "arguments", "changes", "message"),
    [
        ("CMAES2", RANGES, {}, "unknown STRATEGY 'CMAES2'; did you mean .*CMA_ES"),
        ("CMA_ES", ("num_layers=1,2",), {}, "moves ranges; there is none"),
        ("CMA_ES", (*RANGES, "num_layers=1,2"), {"population": 3}, "less than 2 members"),
        ("halving", ("num_layers=1,2,3",), {"population": 2}, "3 combinations"),
    ],
)
def test_a_strategy_that_cannot_be_is_one_line(name, arguments, changes, message):
    with pytest.raises(ConfigError, match=message):
        next(strategies.make_strategy(name, search_of(*arguments, **changes)))


def test_what_was_found_is_compared_with_the_default_unless_it_is_the_default():
    search = search_of("LR=1e-5..1e-1")
    default, other = search.default, {"LR": 0.05}

    def roles(*schedule):
        return list(plan.candidates(strategies.Best(0, schedule), search))

    assert roles((0.0, default)) == ["default"]
    assert roles((0.0, other)) == ["default", "found"]
    assert roles((0.0, default), (0.5, other)) == ["default", "found", "found, last values"]


def test_the_size_of_a_plan():
    search = search_of(*RANGES, population=9, shortest=0.1)
    size = plan.size_of(plan.make_plan("halving", search, (0, 1)), lambda m: 1, lambda m: 900)
    # 9 members for a ninth, 3 from there to a third, 1 to the end; two candidates on two seeds
    assert size == 900 * (9 / 9 + 3 * (1 / 3 - 1 / 9) + 2 / 3) + 4 * 900


# ------------------------------------------------------------------ members as rows


def config_of(**changes):
    return PPO.check({**SIZES, **changes})


def train_alone(config, seed, updates):
    from trxl.training import make_init_and_update

    init, update = make_init_and_update(config, PPO)
    state, metrics = jax.jit(init)(jax.random.key(seed)), []
    for _ in range(updates):
        state, one = jax.jit(update)(state)
        metrics.append(one)
    return state, metrics


ROWS = [
    Row({"LR": 1e-3, "GAMMA": 0.9}, 3),
    Row({"LR": 1e-2, "GAMMA": 0.99}, 4),
    Row({"LR": 3e-4, "GAMMA": 0.999}, 3),
]


@pytest.mark.parametrize("devices", [1, 2])
def test_a_member_is_the_run_of_its_config(devices):
    """Three rows in a program of four, on one device and two."""
    programs = Programs(config_of(), PPO, 4, devices)
    chunk = programs.load(ROWS, programs.init(ROWS))
    seen = [chunk.update() for _ in range(3)]
    for i, row in enumerate(ROWS):
        state, metrics = train_alone(config_of(**row.traced), row.seed, 3)
        for one, alone in zip(seen, metrics, strict=True):
            np.testing.assert_allclose(one.returns[i], alone["returned_episode_returns"], rtol=1e-4)
            assert one.episodes[i] == alone["num_episodes"]
        own = jax.tree.map(lambda x, i=i: x[i], chunk.state().train_state.params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), own, state.train_state.params
        )


def test_a_member_that_diverges_touches_no_other():
    programs = Programs(config_of(), PPO, 3, 1)
    bad = [ROWS[0], Row({"LR": 1e30, "GAMMA": 0.99}, 4), ROWS[2]]
    with_bad = programs.load(bad, programs.init(bad))
    without = programs.load(ROWS, programs.init(ROWS))
    whole = []
    for _ in range(4):
        ours, others = with_bad.update(), without.update()
        whole.append(ours.whole)
        for i in (0, 2):
            np.testing.assert_array_equal(ours.returns[i], others.returns[i])
    assert not whole[-1][1]
    assert np.all(np.array(whole)[:, [0, 2]])
    for a, b in zip(
        jax.tree.leaves(with_bad.state().train_state.params),
        jax.tree.leaves(without.state().train_state.params),
        strict=True,
    ):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[2], b[2])


def test_waiting_agents_outlive_the_training_of_others():
    """An update takes its state's arrays for its own; those on the host are copies."""
    programs = Programs(config_of(), PPO, 2, 1)
    rows = ROWS[:2]
    first = programs.init(rows)
    chunk = programs.load(rows, first)
    chunk.update()
    kept = chunk.state()
    before = jax.device_get(kept.train_state.params)
    chunk.update()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(kept.train_state.params), before)
    assert np.isfinite(np.asarray(first.rollout_state.obs)).all()


def test_a_copy_has_the_agent_and_goes_its_own_way():
    programs = Programs(config_of(), PPO, 1, 1)
    parent = programs.init(ROWS[:1])
    child = population.fork_random_streams(parent, 7)
    for name in ("params", "opt_state", "updates"):
        jax.tree.map(
            np.testing.assert_array_equal,
            getattr(child.train_state, name),
            getattr(parent.train_state, name),
        )
    np.testing.assert_array_equal(child.rollout_state.obs, parent.rollout_state.obs)
    data = jax.random.key_data
    ours, theirs = child.rollout_state.env_keys, parent.rollout_state.env_keys
    assert not np.any(np.all(data(ours) == data(theirs), axis=-1))


def test_members_that_are_not_equally_far_train_apart(tmp_path):
    """As where a search that had programs of two rows goes on with four."""
    space, fixed = space_of("LR=1e-4..1e-2")
    members = tuple(Member(trial, {"LR": 1e-3}) for trial in range(6))
    far = (4, 4, 2, 2, 0, 0)
    trials = {i: Trial(i, {"LR": 1e-3}, [0], updates=n) for i, n in enumerate(far)}
    loop = Loop(PPO.check(fixed), PPO, space, 1, 4, 1, SimpleNamespace(trials=trials))
    loop._states = dict.fromkeys(range(5))  # of trial 4 before its first update
    chunks = [[m.trial for m in chunk] for chunk in loop.chunks(Round(members, 1.0))]
    assert chunks == [[0, 1], [2, 3], [4], [5]]


def test_episodes_that_do_not_end_are_seen_with_their_return_so_far():
    programs = Programs(config_of(ENV_NAME=f"{TOYS}:Endless"), PPO, 1, 1)
    chunk = programs.load(ROWS[:1], programs.init(ROWS[:1]))
    trial = Trial(0, {}, [3])
    for updates in (1, 2, 3):
        seen = chunk.update()
        trial.note(seen.returns, seen.episodes, seen.whole, seen.running)
        assert trial.running == [(SIZES["NUM_ENVS"], updates * SIZES["NUM_STEPS"])]
        assert trial.score() == updates * SIZES["NUM_STEPS"]
    assert not set(chunk.metrics()) & set(population.RUNNING)


# ------------------------------------------------------------------ trials


class PretendedLoop(Loop):
    """A search whose members have the returns that `curve` gives, from (trial, update)."""

    def __init__(self, space, curve):
        nothing = SimpleNamespace(
            trials={}, history=[], is_time=lambda: False, groups=list, save=lambda *_: None
        )
        super().__init__(PPO.check({}), PPO, space, 1, 64, 1, nothing)
        self._curve = curve
        self.copied = {}

    def programs(self, values):
        return SimpleNamespace(num_updates=100, steps_per_update=1)

    def _prepare(self, round_):
        before = dict(self._states)
        super()._prepare(round_)
        for member in round_.members:
            if member.parent is not None:
                self.copied[member.trial] = before[member.parent], self._states[member.trial]

    def _train(self, members, until, stop):
        for trial in (self.trials[member.trial] for member in members):
            self._states.setdefault(trial.trial, jax.random.key(trial.trial))
            while trial.updates < round(100 * until):
                returns = np.array([self._curve(trial.trial, trial.updates)])
                trial.note(returns, np.ones(1), np.array([True]))


def pretend(curve, **changes):
    """A loop that has run population-based training."""
    search = search_of("LR=1e-5..1e-1", **{"population": 10, "intervals": 10} | changes)
    loop = PretendedLoop(search.space, curve)
    stop = SimpleNamespace(signal=None)
    best = loop.run(strategies.population_based(search), stop, 100)
    return loop, best


def test_a_copy_and_its_parent_are_scored_over_the_same_updates():
    loop, _ = pretend(lambda trial, updates: updates)
    assert len(loop.copied) > 10
    for number, scores in enumerate(loop._record.history, start=1):
        window = min(2 * number, 10)
        expected = 10 * number - (window + 1) / 2
        assert list(scores.values()) == pytest.approx([expected] * 10)
    again = [from_line(trial.as_line()).score() for trial in loop.trials.values()]
    assert again == [trial.score() for trial in loop.trials.values()]


def test_among_members_that_differ_in_noise_alone_copies_are_no_better():
    recent = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        loop, best = pretend(lambda trial, updates, rng=rng: rng.normal(), seed=seed)
        recent.append(loop.trials[best.trial].first_update == 90)
    assert np.mean(recent) < 0.45  # 0.2 of the members are


def test_a_copys_random_streams_are_its_own():
    loop, _ = pretend(lambda trial, updates: updates)
    for parent, child in loop.copied.values():
        assert not np.array_equal(*map(jax.random.key_data, (parent, child)))


def test_who_lives_longer_than_the_updates_that_count_has_a_score():
    """Of 64 environments 63 never end; 100 steps each update."""
    lives = Trial(0, {}, [1])
    for updates in range(1, 7):
        returns, ended = (20.0, 1) if updates == 6 else (np.nan, 0)
        running = [Running(63, 100.0 * updates)]
        lives.note(np.array([returns]), np.array([ended]), np.array([True]), running)
        assert from_line(lives.as_line()).score() == lives.score()
        if updates < 6:
            assert lives.score() == 100 * updates
    assert lives.score() == pytest.approx((63 * 600 + 20) / 64)


def test_a_score_is_of_the_last_fifth_and_weighs_episodes():
    trial = Trial(0, {}, [1, 2], steps_per_update=10)
    for i in range(10):
        returns = np.array([float(i), np.nan if i < 9 else 5.0])
        trial.note(returns, np.array([1 + (i == 9), int(i == 9)]), np.array([True, True]))
    assert trial.seed_scores() == [(8 + 9 + 9) / 3, 5.0]
    assert trial.env_steps == 200
    assert from_line(trial.as_line()).as_line() == trial.as_line()
    trial.note(np.zeros(2), np.ones(2), np.array([True, False]))
    assert trial.status == "diverged"
    assert trial.score() == -math.inf
    assert Trial(0, {}, [1]).score() == -math.inf


def test_the_line_that_trains_has_the_values_themselves():
    line = command_line("a.py", {"TOTAL_TIMESTEPS": 122880.0}, {"GAMMA": 0.99996, "ENV_NAME": "x"})
    assert line == "python a.py TOTAL_TIMESTEPS=122880.0 GAMMA=0.99996 ENV_NAME=x"


def test_intervals_are_students():
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half == pytest.approx(4.303 * 1 / math.sqrt(3), rel=1e-3)
    assert math.isnan(interval([1.0]).half)


# ------------------------------------------------------------------ whole searches


def command(*arguments):
    sizes = [f"{name}={value}" for name, value in SIZES.items()]
    return [sys.executable, REPOSITORY / "search_trXL.py", *sizes, *arguments]


SEARCHED = ("LR=1e-4..1e-2", "GAMMA=0.9..0.999", "POPULATION=6", "REPORT_SEEDS=2", "CHUNK=2")


def searched(folder, *arguments):
    """The lines of trials.jsonl but for what the clock says."""
    done = subprocess.run(
        command(*SEARCHED, f"RESULTS_DIR={folder}", *arguments), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done, trials_of(folder / "CartPole-v1")


def trials_of(folder):
    rows = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name != "seconds"} for row in rows]


def test_a_whole_search_and_one_that_is_killed_again_and_again(tmp_path, monkeypatch):
    done, whole = searched(tmp_path / "whole", "STRATEGY=pbt", "INTERVALS=3")
    folder = tmp_path / "whole" / "CartPole-v1"
    assert "best: trial" in done.stdout
    assert "python train_PPO_trXL.py ENV_NAME=CartPole-v1" in done.stdout
    for name in ("report.md", "returns.png", "values.png", "search.json"):
        assert (folder / name).stat().st_size
    roles = [row["role"] for row in whole]
    assert roles.count("search") == 6 + 2
    assert roles.count("default") == roles.count("found") == 2
    assert {row["status"] for row in whole} == {"finished", "stopped"}
    assert whole[0]["values"] == {"LR": 5e-4, "GAMMA": 0.99}
    assert [row["seeds"] for row in whole if row["role"] == "default"] == [[0], [1]]

    # A checkpoint after every update, and an end by SIGTERM after a few.
    code = (
        "import os, signal, sys\n"
        "from trxl.search import main, record, loop; record.SAVE_SECONDS = 0\n"
        "import search_trXL\n"
        "note, left = loop.Loop._note, [int(sys.argv.pop())]\n"
        "def counted(*args):\n"
        "    note(*args); left[0] -= 1\n"
        "    if not left[0]: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    if left[0] == -1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "loop.Loop._note = counted\n"
        "main.main(search_trXL.config, search_trXL.TRAINERS)\n"
    )
    start = [sys.executable, "-c", code, *map(str, command(*SEARCHED)[2:])]
    options = [f"RESULTS_DIR={tmp_path / 'killed'}", "STRATEGY=pbt", "INTERVALS=3"]
    killed = tmp_path / "killed" / "CartPole-v1"
    first = subprocess.run([*start, *options, "5"], cwd=REPOSITORY, capture_output=True, text=True)
    assert first.returncode == 128 + signal.SIGTERM, first.stderr
    assert f"go on with RESUME={killed}" in first.stdout
    assert (killed / "report.md").exists()
    again = [sys.executable, "-c", code, f"RESUME={killed}"]
    for left in ("17", "1000000"):
        done = subprocess.run([*again, left], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert trials_of(killed) == whole


def start(tmp_path, monkeypatch, **asked):
    monkeypatch.chdir(tmp_path)
    sizes = {name: value for name, value in SIZES.items() if name in MUESLI.keys}
    config = {**sizes, "TOTAL_TIMESTEPS": 256, "REPORT_SEEDS": 0, **asked}
    assert main.start(config, TRAINERS, []) is None
    return trials_of(tmp_path / "runs" / "search_gymnax" / "CartPole-v1")


def test_shapes_and_members_that_diverge(tmp_path, monkeypatch):
    trials = start(tmp_path, monkeypatch, POPULATION=4, SEEDS=2, LR="1e-4..1e30", num_heads="1,2")
    states = {row["trial"]: row["status"] for row in trials}
    assert states[0] == "finished"  # the default
    assert "diverged" in states.values()
    assert {row["values"]["num_heads"] for row in trials} == {1, 2, 4}  # the script has 4
    assert len({seed for row in trials for seed in row["seeds"]}) == 8
    assert {len(row["curve"]["returns"][0]) for row in trials} == {2}


def test_muesli_is_searched_too(tmp_path, monkeypatch, capsys):
    asked = {"ALGORITHM": "Muesli", "POPULATION": 2, "LR": "1e-4..1e-3", "MODEL_STEPS": 1}
    trials = start(tmp_path, monkeypatch, **asked)
    assert {row["status"] for row in trials} <= {"finished", "stopped"}
    assert "python train_Muesli_trXL.py" in capsys.readouterr().out


def test_another_budget_is_more_generations_or_refused(tmp_path):
    space, fixed = space_of(*RANGES)
    config = PPO.check({**SIZES, **fixed})
    settings = read_settings({"POPULATION": 4, "STRATEGY": "CMA_ES", "BUDGET": 768 * 13})
    assert main.sized(settings, config, space).generations == 2  # of five, with the default
    with pytest.raises(ConfigError, match="a generation takes 3840 environment steps"):
        main.sized({**settings, "BUDGET": 1000}, config, space)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["LR=1e-3", "GAMMA=0.9"], "nothing to search"),
        (["RESUME=nowhere"], "RESUME: no search in nowhere"),
        (["RESUME=nowhere", "LR=1"], "give no other setting"),
        (["ALGORITHM=DQN"], "ALGORITHM must be one of PPO, Muesli"),
        (["TRAIN=evolution"], "needs an algorithm of evosax"),
        (["TRAIN=evolution", "STRATEGY=SNES", "num_layers=1,2"], "parameters, not num_layers"),
        (["TRAIN=evolution", "STRATEGY=Sep_CMA_ES", "NORMALIZE_OBS=True"], "NORMALIZE_OBS gathers"),
        (["ENV_NAME=CartPol"], "unknown environment 'CartPol'"),
        (["num_heads=1,3"], "num_heads must divide qkv_features"),
        (["CHUNK=99999999"], r"\d+ runs at a time, CHUNK \* SEEDS: this run takes at least"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(arguments, message, tmp_path, monkeypatch):
    import search_trXL

    monkeypatch.chdir(tmp_path)
    sizes = [f"{name}={value}" for name, value in SIZES.items()]
    given = arguments if arguments[0].startswith("RESUME") else [*sizes, *arguments]
    with pytest.raises(ConfigError, match=message) as error:
        main.start(search_trXL.config, TRAINERS, given)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_file_of_ones_own_is_run_again_only_if_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "corridor.py"
    own.write_text(OWN_ENVIRONMENT)
    searched = {**SIZES, "ENV_NAME": f"{own}:Corridor", "LR": "1e-4..1e-3", "POPULATION": 2}
    assert main.start({**searched, "REPORT_SEEDS": 0}, TRAINERS, []) is None
    (tmp_path / "ran").unlink()
    (folder,) = (tmp_path / "runs").glob("search_*/*")
    with pytest.raises(
        ConfigError, match=f"a file that is run only if you name it: add ENV_NAME={own}"
    ):
        main.start({}, TRAINERS, [f"RESUME={folder}"])
    with pytest.raises(ConfigError, match="ENV_NAME can't change"):
        main.start({}, TRAINERS, [f"RESUME={folder}", "ENV_NAME=CartPole-v1"])
    assert not (tmp_path / "ran").exists()
    assert (
        main.start({}, TRAINERS, [f"RESUME={folder}", f"ENV_NAME={own}:Corridor"]) is None
    )  # it is done


# ------------------------------------------------------------------ evolution


def test_parameters_evolve_resume_and_can_be_played_with(tmp_path, monkeypatch):
    from evaluate_PPO_trXL import load_agent

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "SAVE_SECONDS", 0)
    options = {"TRAIN": "evolution", "STRATEGY": "Sep_CMA_ES", "POPULATION": 8, "ES_STD": 0.1}
    config = {**SIZES, **options, "BUDGET": 8 * 64 * 4, "seed": 3}
    assert main.start({**config, "RESULTS_DIR": "whole"}, TRAINERS, []) is None
    whole = Path("whole/CartPole-v1")
    metrics = load_results(whole / "3_metrics.npy")
    assert len(metrics["returned_episode_returns"]) == 4
    assert len((whole / "3_metrics.jsonl").read_text().splitlines()) == 4
    assert np.all(metrics["best_of_population"] >= metrics["mean_of_population"])
    agent = load_agent(whole, seed=3)
    agent.act(agent.initial_memory(1), jnp.zeros((1, 4)), jnp.array([True]), jax.random.key(0))

    note, calls = record.EvolutionRecord.note, []

    def killed(self, metrics):
        calls.append(metrics)
        if len(calls) == 3:
            raise KeyboardInterrupt
        note(self, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(record.EvolutionRecord, "note", killed)
        with pytest.raises(KeyboardInterrupt):
            main.start({**config, "RESULTS_DIR": "killed"}, TRAINERS, [])
    assert main.start({}, TRAINERS, ["RESUME=killed/CartPole-v1"]) is None
    again = load_results(Path("killed/CartPole-v1/3_metrics.npy"))
    for name, values in metrics.items():
        np.testing.assert_array_equal(again[name], values)
    jax.tree.map(
        np.testing.assert_array_equal,
        load_results(Path("killed/CartPole-v1/3_params.npy")),
        load_results(whole / "3_params.npy"),
    )


def test_fitness_is_the_return_of_every_environments_first_episode():
    """One whose episodes end after 20 steps with -20, and one that never ends: -1 in every step."""
    steps = 1000
    done = np.zeros((steps, 2), bool)
    done[19::20, 0] = True
    fields = dict.fromkeys(Transition._fields)
    fields |= {"reward": jnp.full((steps, 2), -1.0), "done": jnp.asarray(done)}
    played = Rollout(Transition(**fields), None, None, None)
    assert evolution.mean_return(played) == -(20 + 1000) / 2


def test_the_curve_of_an_evolution_is_of_episodes_that_chose_nobody():
    keys = []

    def evaluate(numbers, key):
        keys.append(np.asarray(jax.random.key_data(key)))
        return jnp.zeros(len(numbers))

    algorithm = make_algorithm("Sep_CMA_ES", 4, 3, 0.1, 0.1)
    params, state = evosax_strategies.start(algorithm, jax.random.key(0), jnp.zeros(3), 0.1)
    first = evolution.Evolving(state, jax.random.key_data(jax.random.key(1)))
    task = evolution.Task(algorithm, params, first, None, evaluate)
    evolution.next_generation(task, first)
    of_candidates, of_curve = keys
    assert not np.array_equal(of_candidates, of_curve)


def test_all_settings_have_help_and_the_scripts_are_among_them():
    import search_trXL

    own = {name: value for name, value in search_trXL.config.items() if name in SEARCH_KEYS}
    assert read_settings(own)["POPULATION"] == own["POPULATION"]
    assert all(key.help for key in SEARCH_KEYS.values())
