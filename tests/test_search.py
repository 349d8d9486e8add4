"""Population search: space, strategies, members as rows, kills, the report."""

import functools
import json
import math
import os
import signal
import subprocess
import sys
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import OWN_ENVIRONMENT, QUICK

from trxl.config import names_and_texts
from trxl.errors import ConfigError, RunError
from trxl.results import load_results
from trxl.rollout import Rollout, Transition
from trxl.search import evolution, loop, main, population, record, strategies
from trxl.search.evosax_strategies import Evosax
from trxl.search.loop import Loop
from trxl.search.population import Programs, Row, UpdateResult
from trxl.search.record import Trial, read_trial
from trxl.search.report import comparison, interval, write_report
from trxl.search.settings import SEARCH_KEYS, default_config, read_settings, read_space
from trxl.search.strategies import Best, Member, Round, Search
from trxl.training import make_init_and_update

from search_trXL import TRAINERS
from trainer_Muesli_trXL import MUESLI
from trainer_PPO_trXL import PPO

REPOSITORY = Path(__file__).resolve().parents[1]
TOYS = Path(__file__).with_name("toys.py")

SIZES = {**QUICK, "ENV_NAME": "CartPole-v1", "TOTAL_TIMESTEPS": 768}  # 12 updates
SIZES |= {"NUM_MINIBATCHES": 1, "UPDATE_EPOCHS": 1, "MEMORY": "none"}


def space_of(*arguments):
    return read_space(dict(names_and_texts(list(arguments))), PPO.keys)


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


def positions_of(space, values):
    return [d.position(values[d.name]) for d in space.dimensions]


# ------------------------------------------------------------------ what is searched


def test_ranges_run_in_their_natural_scale():
    space, fixed = space_of("LR=1e-5..1e-3", "GAMMA=0.9..0.99", "GAE_LAMBDA=0.5..1", "VF_COEF=0..2")
    assert not fixed
    middle = space.values([0.5] * 4)
    assert middle == pytest.approx(
        {"LR": 1e-4, "GAMMA": 1 - 10**-1.5, "GAE_LAMBDA": 0.75, "VF_COEF": 1.0}
    )
    for positions in ([0.0] * 4, [1.0] * 4, [0.1, 0.9, 0.3, 0.7]):
        np.testing.assert_allclose(positions_of(space, space.values(positions)), positions)
    assert space.values([0.0] * 4) == {"LR": 1e-5, "GAMMA": 0.9, "GAE_LAMBDA": 0.5, "VF_COEF": 0}
    assert space.values([1.0] * 4) == {"LR": 1e-3, "GAMMA": 0.99, "GAE_LAMBDA": 1, "VF_COEF": 2}
    outside = {"LR": 1.0, "GAMMA": 0.0, "GAE_LAMBDA": 0.75, "VF_COEF": 0.5}
    np.testing.assert_allclose(positions_of(space, outside), [1, 0, 0.5, 0.25])


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
        (["LR"], "is not of the form KEY=VALUE"),
        (["NUM_SEEDS=2"], "NUM_SEEDS is not a setting of a search"),
        (["POPULATION=1"], "POPULATION must be from 2 to 100000"),
        (["TRAIN=both"], "TRAIN must be one of gradient, evolution"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    def read():
        given = dict(names_and_texts(arguments))
        read_settings(given)
        read_space(given, PPO.keys)

    with pytest.raises(ConfigError, match=message) as error:
        read()
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ strategies


def known_optimum(values):
    """Returns a score whose maximum is 0, at LR = 1e-3 and GAMMA = 0.99."""
    return -((math.log10(values["LR"]) + 3) ** 2) - (math.log10(1 - values["GAMMA"]) + 2) ** 2


def play(name, search, score=known_optimum):
    """Returns a strategy's rounds and its best member, with `score` in place of training."""
    strategy = strategies.run_strategy(name, search, count())
    rounds = [next(strategy)]
    while True:
        scores = {member.trial: score(member.values) for member in rounds[-1].members}
        try:
            rounds.append(strategy.send(scores))
        except StopIteration as end:
            return rounds, end.value


RANGES = ("LR=1e-5..1e-1", "GAMMA=0.5..0.9999")


@pytest.mark.slow
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
    rounds, best = play(name, search)
    assert rounds[0].members[0].values == search.default
    assert known_optimum(best.schedule[-1][1]) > -near
    again = play(name, search)
    assert again == (rounds, best)


def test_halving_keeps_the_right_members():
    rounds, best = play("halving", search_of(*RANGES))
    assert [len(round_.members) for round_ in rounds] == [27, 9, 3, 1]
    assert [round_.until for round_ in rounds] == pytest.approx([1 / 27, 1 / 9, 1 / 3, 1])
    for before, after in pairwise(rounds):
        ranked = sorted(before.members, key=lambda m: -known_optimum(m.values))
        assert list(after.members) == ranked[: len(after.members)]
    assert best.trial == rounds[-1].members[0].trial


def test_rungs_are_no_shorter_than_asked():
    rounds, _ = play("halving", search_of(*RANGES, shortest=0.2))
    assert [(len(r.members), r.until) for r in rounds] == [(27, pytest.approx(1 / 3)), (9, 1.0)]


def test_one_that_diverges_is_worst():
    def score(values):
        return -math.inf if values["LR"] > 1e-3 else known_optimum(values)

    rounds, best = play("halving", search_of(*RANGES), score)
    assert all(score(member.values) > -math.inf for member in rounds[-1].members)
    assert best.schedule[0][1]["LR"] <= 1e-3
    search = search_of(*RANGES, population=12, generations=10)
    _, best = play("CMA_ES", search, score)
    assert best.schedule[0][1]["LR"] <= 1e-3
    assert known_optimum(best.schedule[0][1]) > -0.3


def test_shapes_share_the_population():
    search = search_of(*RANGES, "num_layers=1,2,3", population=6)
    rounds, _ = play("halving", search)
    layers = [member.values["num_layers"] for member in rounds[0].members]
    assert sorted(layers[1:]) == [1, 2, 2, 3, 3]  # after the default
    rounds, _ = play("CMA_ES", search)
    assert [m.values["num_layers"] for m in rounds[0].members] == [2, 1, 1, 2, 2, 3, 3]
    rounds, _ = play("halving", search_of(*RANGES, "num_layers=1,3", population=4))
    assert [m.values["num_layers"] for m in rounds[0].members] == [2, 3, 1, 3]  # the default is 2


def test_pbt_replaces_the_worst_by_copies_of_the_best_and_moves_their_values():
    search = search_of(*RANGES, "num_layers=1,2", population=10)
    strategy = strategies.run_strategy("pbt", search, count())
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
        steps = np.abs(
            np.subtract(positions_of(ranges, child.values), positions_of(ranges, parent))
        )
        np.testing.assert_allclose(steps, strategies.MOVED, atol=1e-9)


def test_of_pbts_best_the_schedule_is_known():
    def score(values):
        return values["LR"]

    search = search_of("LR=1e-5..1e-1", population=5, intervals=4)
    rounds, best = play("pbt", search, score)
    starts = [start for start, _ in best.schedule]
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert best.schedule[-1][1]["LR"] == max(m.values["LR"] for m in rounds[-1].members)
    assert strategies.values_at(best.schedule, 0.0) == best.schedule[0][1]
    assert strategies.values_at(best.schedule, 1.0) == best.schedule[-1][1]


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
        next(strategies.run_strategy(name, search_of(*arguments, **changes), count()))


def test_what_was_found_is_compared_with_the_default_unless_it_is_the_default():
    search = search_of("LR=1e-5..1e-1")
    default, other = search.default, {"LR": 0.05}

    def roles(*schedule):
        return list(strategies.candidates(Best(0.0, 0, schedule), search))

    assert roles((0.0, default)) == ["default"]
    assert roles((0.0, other)) == ["default", "found"]
    assert roles((0.0, default), (0.5, other)) == ["default", "found", "found, last values"]


def test_candidates_change_their_values_on_their_way_and_have_fresh_seeds():
    search = search_of("LR=1e-5..1e-1")
    best = Best(0.0, 0, ((0.0, {"LR": 0.01}), (0.5, {"LR": 0.02})))
    first, second = strategies.evaluate_candidates(best, search, (7, 8), count(5))
    assert (first.until, second.until) == (0.5, 1.0)
    assert [m.trial for m in first.members] == [m.trial for m in second.members] == [*range(5, 11)]
    assert [m.seeds for m in first.members] == [(7,), (8,)] * 3
    rates = [[m.values["LR"] for m in round_.members[::2]] for round_ in (first, second)]
    assert rates == [[search.default["LR"], 0.01, 0.02], [search.default["LR"], 0.02, 0.02]]


@pytest.mark.parametrize(
    ("name", "changes"),
    [("halving", {"shortest": 0.1}), ("pbt", {}), ("CMA_ES", {"generations": 2})],
)
def test_what_a_strategy_costs(name, changes):
    search = search_of(*RANGES, population=9, **changes)
    rounds, _ = play(name, search)
    done, total = {}, 0.0
    for members, until in rounds:
        total += sum(until - done.get(m.trial, done.get(m.parent, 0.0)) for m in members)
        done |= {m.trial: until for m in members}
    assert strategies.cost(name, search, search.generations) == pytest.approx(total)


# ------------------------------------------------------------------ members as rows


def config_of(**changes):
    return PPO.check({**SIZES, **changes})


@functools.cache
def programs(rows=4, devices=1, env_name="CartPole-v1"):
    return Programs(config_of(ENV_NAME=env_name), PPO, rows, devices)


@functools.cache
def train_alone(row, updates):
    lr, gamma, seed = row
    init, update = make_init_and_update(config_of(LR=lr, GAMMA=gamma), PPO)
    state, metrics = jax.jit(init)(jax.random.key(seed)), []
    update = jax.jit(update)
    for _ in range(updates):
        state, one = update(state)
        metrics.append(one)
    return state, metrics


ROWS = [
    Row({"LR": 1e-3, "GAMMA": 0.9}, 3),
    Row({"LR": 1e-2, "GAMMA": 0.99}, 4),
    Row({"LR": 3e-4, "GAMMA": 0.999}, 3),
]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.weekly)])
def test_a_member_is_the_run_of_its_config(devices):
    """Rows of a program of four equal their runs alone, on one device and two."""
    batch = programs(4, devices).load(ROWS, programs(4, devices).init(ROWS))
    results = [batch.update() for _ in range(3)]
    for i in (1, 2):
        row = ROWS[i]
        state, metrics = train_alone((*row.traced.values(), row.seed), 3)
        for one, alone in zip(results, metrics, strict=True):
            np.testing.assert_allclose(one.returns[i], alone["returned_episode_returns"], rtol=1e-4)
            assert one.episodes[i] == alone["num_episodes"]
        own = jax.tree.map(lambda x, i=i: x[i], batch.state().train_state.params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), own, state.train_state.params
        )


def test_a_member_that_diverges_touches_no_other():
    bad = [ROWS[0], Row({"LR": 1e30, "GAMMA": 0.99}, 4), ROWS[2]]
    with_bad, without = (programs().load(rows, programs().init(rows)) for rows in (bad, ROWS))
    for _ in range(4):
        ours, others = with_bad.update(), without.update()
        np.testing.assert_array_equal(ours.returns[[0, 2]], others.returns[[0, 2]])
        assert ours.finite[[0, 2]].all()
    assert not ours.finite[1]
    for a, b in zip(
        jax.tree.leaves(with_bad.state().train_state.params),
        jax.tree.leaves(without.state().train_state.params),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(a)[[0, 2]], np.asarray(b)[[0, 2]])


def test_waiting_agents_outlive_the_training_of_others():
    """Waiting agents are copies on the host, since an update donates its state's arrays."""
    first = programs().init(ROWS)
    batch = programs().load(ROWS, first)
    batch.update()
    kept = batch.state()
    before = jax.device_get(kept.train_state.params)
    batch.update()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(kept.train_state.params), before)
    assert np.isfinite(np.asarray(first.rollout_state.obs)).all()


def test_a_copy_has_the_agent_and_goes_its_own_way():
    parent = programs().init(ROWS[:1])
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
    """Members are batched by their updates, as after a resume with larger programs."""
    space, fixed = space_of("LR=1e-4..1e-2")
    members = tuple(Member(trial, {"LR": 1e-3}) for trial in range(6))
    far = (4, 4, 2, 2, 0, 0)
    trials = {i: Trial(i, {"LR": 1e-3}, [0], updates=n) for i, n in enumerate(far)}
    search = Loop(PPO.check(fixed), PPO, space, 1, 4, 1, SimpleNamespace(notes={}))
    search.trials = trials
    search._states = dict.fromkeys(range(5))  # trial 4 has a state but no update
    batches = [[m.trial for m in batch] for batch in search.batches(Round(members, 1.0))]
    assert batches == [[0, 1], [2, 3], [4], [5]]


def test_keys_that_are_not_set_follow_one_that_is_searched():
    """WINDOW_GRAD and WINDOW_MEM are half of each member's NUM_STEPS."""
    space, fixed = space_of("NUM_STEPS=8,16")
    given = {**fixed, "ENV_NAME": "CartPole-v1", "NUM_ENVS": 2}
    search = Loop(given, PPO, space, 1, 1, 1, SimpleNamespace(notes={}))
    for steps in (8, 16):
        state = search.programs({"NUM_STEPS": steps}).shapes([Row({}, 0)])
        assert state.rollout_state.memory.shape[:3] == (1, 2, steps // 2)


def test_the_default_has_the_first_choice_where_its_own_is_none():
    """The script's NUM_STEPS, 64, does not go with this budget; WINDOW_GRAD follows NUM_STEPS."""
    space, fixed = space_of("NUM_STEPS=8,16", "WINDOW_GRAD=2,4", "NUM_ENVS=4,64", "gating=False")
    given = default_config(PPO, {}, {**fixed, "TOTAL_TIMESTEPS": 512}, space)
    config = PPO.check(given)
    assert [config[name] for name in ("NUM_STEPS", "WINDOW_GRAD", "NUM_ENVS")] == [8, 4, 64]
    assert not config["gating"]


def test_episodes_that_do_not_end_are_seen_with_their_return_so_far():
    endless = programs(1, 1, f"{TOYS}:Endless")
    batch = endless.load(ROWS[:1], endless.init(ROWS[:1]))
    trial = Trial(0, {}, [3])
    for updates in (1, 2, 3):
        trial.log_update(batch.update())
        assert trial.running == [[SIZES["NUM_ENVS"]], [updates * SIZES["NUM_STEPS"]]]
        assert trial.score() == updates * SIZES["NUM_STEPS"]


# ------------------------------------------------------------------ trials


def result(returns, episodes=(1,), running=(0,), running_returns=(0.0,), finite=(True,)):
    fields = (returns, episodes, running, running_returns, finite)
    return UpdateResult(*map(np.array, fields))


class PretendedLoop(Loop):
    """Search whose members have the returns `curve(trial, update)`."""

    def __init__(self, space, curve):
        folder = SimpleNamespace(notes={}, is_time=lambda: False, save=lambda *_: None)
        super().__init__(PPO.check({}), PPO, space, 1, 64, 1, folder)
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
                trial.log_update(result([self._curve(trial.trial, trial.updates)]))

    def save(self):
        """Saves nothing."""


def pretend(curve, **changes):
    """Runs population-based training on a curve; returns the loop and the best member."""
    search = search_of("LR=1e-5..1e-1", **{"population": 10, "intervals": 10} | changes)
    pretended = PretendedLoop(search.space, curve)
    stop = SimpleNamespace(signal=None)
    best = pretended.run(strategies.run_strategy("pbt", search, count()), stop, 100)
    return pretended, best


def again(trial):
    """Returns a trial as read back from its line."""
    return read_trial(json.loads(json.dumps(trial.row())))


def test_a_copy_and_its_parent_are_scored_over_the_same_updates():
    pretended, _ = pretend(lambda trial, updates: updates)
    assert len(pretended.copied) > 10
    for number, scores in enumerate(pretended._scores, start=1):
        window = min(2 * number, 10)
        expected = 10 * number - (window + 1) / 2
        assert scores == pytest.approx([expected] * 10)
    for trial in pretended.trials.values():
        assert again(trial).score() == trial.score()


def test_among_members_that_differ_in_noise_alone_copies_are_no_better():
    recent = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        pretended, best = pretend(lambda trial, updates, rng=rng: rng.normal(), seed=seed)
        recent.append(pretended.trials[best.trial].first_update == 90)
    assert np.mean(recent) < 0.45  # 0.2 of all members


def test_a_copys_random_streams_are_its_own():
    pretended, _ = pretend(lambda trial, updates: updates)
    for parent, child in pretended.copied.values():
        assert not np.array_equal(*map(jax.random.key_data, (parent, child)))


def test_who_lives_longer_than_the_updates_that_count_has_a_score():
    """Unfinished episodes count: of 64 environments 63 never end, with 100 steps per update."""
    lives = Trial(0, {}, [1])
    for updates in range(1, 7):
        returns, ended = (20.0, 1) if updates == 6 else (np.nan, 0)
        lives.log_update(result([returns], [ended], [63], [100.0 * updates]))
        assert again(lives).score() == lives.score()
        if updates < 6:
            assert lives.score() == 100 * updates
    assert lives.score() == pytest.approx((63 * 600 + 20) / 64)


def test_a_score_is_of_the_last_fifth_and_weighs_episodes():
    trial = Trial(0, {}, [1, 2], steps_per_update=10)
    none = {"running": [0, 0], "running_returns": [0.0, 0.0]}
    for i in range(10):
        ended = [1 + (i == 9), int(i == 9)]
        trial.log_update(result([float(i), np.nan if i < 9 else 5.0], ended, **none))
    assert trial.seed_scores() == [(8 + 9 + 9) / 3, 5.0]
    assert trial.env_steps == 200
    assert again(trial) == trial
    trial.log_update(result([0.0, 0.0], [1, 1], **none, finite=[True, False]))
    assert trial.status == "diverged"
    assert trial.score() == -math.inf
    assert Trial(0, {}, [1]).score() == -math.inf


def test_intervals_are_students():
    half = 4.303 * 1 / math.sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == f"2 +- {half:.2g}"
    assert interval([1.0]) == "1"
    assert interval([-math.inf, 1.0]) == "-inf"


def test_a_copy_that_never_trained_is_in_no_plot(tmp_path):
    """Some copies have no update of their own if there are more INTERVALS than updates."""
    space, _ = space_of("LR=1e-4..1e-2")
    parent = Trial(0, {"LR": 1e-3}, [0], updates=2, returns=[[1.0], [2.0]], episodes=[[1], [1]])
    parent.running = [[0], [0.0]]
    copy = Trial(1, {"LR": 2e-3}, [0], parent=0, first_update=2, updates=2)
    write_report(tmp_path, "a search", space, [parent, copy], parent, ["python"])
    assert "1 trials (1 running)" in (tmp_path / "report.md").read_text()


def test_candidates_are_compared_seed_by_seed():
    def run(role, seed, score):
        trial = Trial(0, {}, [seed], role)
        trial.log_update(result([score]))
        return trial

    scores = {"default": (1.0, 2.0, 6.0), "found": (2.0, 3.0, 7.0)}
    trials = [run(role, seed, x) for role in scores for seed, x in enumerate(scores[role])]
    *_, found = comparison([*trials, Trial(9, {}, [1])]).splitlines()
    assert found == "| found | 4 +- 6.6 | 1 +- 0 | 2, 3, 7 |"
    assert comparison([Trial(9, {}, [1])]) == ""


# ------------------------------------------------------------------ whole searches


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """Shares compiled programs, of one device, among searches of one config."""
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    monkeypatch.setattr(loop, "Programs", cached_programs)


def cached_programs(config, algorithm, rows, devices):
    where = ("RESULTS_DIR", "RESUME")
    key = (str({k: v for k, v in config.items() if k not in where}), algorithm.name, rows, devices)
    if key not in CACHE:
        CACHE[key] = Programs(config, algorithm, rows, devices)
    return CACHE[key]


CACHE = {}


def trials_of(folder):
    """Returns the lines of trials.jsonl without the clock."""
    rows = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name != "seconds"} for row in rows]


SEARCHED = {
    **SIZES,
    "MEMORY": "transformer",
    "TOTAL_TIMESTEPS": 576,
    "STRATEGY": "pbt",
    "LR": "1e-4..1e-2",
    "GAMMA": "0.9..0.999",
    "POPULATION": 5,
    "INTERVALS": 3,
    "REPORT_SEEDS": 2,
    "CHUNK": 2,
}


@pytest.mark.slow
def test_a_whole_search_and_one_that_is_killed_and_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    assert main.start({**SEARCHED, "RESULTS_DIR": str(tmp_path / "whole")}, TRAINERS, []) is None
    folder = tmp_path / "whole" / "CartPole-v1"
    whole = trials_of(folder)
    said = capsys.readouterr().out
    assert "best: trial" in said
    assert "python train_PPO_trXL.py ENV_NAME=CartPole-v1" in said
    for name in ("report.md", "returns.png", "values.png", "search.json"):
        assert (folder / name).stat().st_size
    roles = [row["role"] for row in whole]
    assert roles.count("search") == 5 + 2
    assert roles.count("default") == roles.count("found") == 2
    assert {row["status"] for row in whole} == {"finished", "stopped"}
    assert whole[0]["values"] == {"LR": 1e-3, "GAMMA": 0.99}
    assert [row["seeds"] for row in whole if row["role"] == "default"] == [[0], [1]]

    # An interval has nine updates, three per batch: killed in the second, stopped in the third.
    killed = tmp_path / "killed" / "CartPole-v1"
    code = (
        "import os, signal, sys\n"
        "from trxl.search import main, population, record\n"
        "import search_trXL\n"
        "update, left = population.MemberBatch.update, [14]\n"
        "def counted(batch):\n"
        "    left[0] -= 1\n"
        "    if left[0] < 3: record.SAVE_SECONDS = 0\n"
        "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return update(batch)\n"
        "population.MemberBatch.update = counted\n"
        "main.main(search_trXL.config, search_trXL.TRAINERS)\n"
    )
    given = [f"{name}={x}" for name, x in (SEARCHED | {"RESULTS_DIR": killed.parent}).items()]
    env = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=2")}
    done = subprocess.run([sys.executable, "-c", code, *given], cwd=REPOSITORY, env=env)
    assert done.returncode == -signal.SIGKILL

    update, left = population.MemberBatch.update, [10]

    def stopped(batch):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(batch)

    with monkeypatch.context() as patch:
        patch.setattr(population.MemberBatch, "update", stopped)
        assert main.start({}, TRAINERS, [f"RESUME={killed}"]) == signal.SIGTERM
    said = capsys.readouterr().out
    assert f"go on with RESUME={killed}" in said
    assert (killed / "report.md").exists()
    assert sum(row["updates"] for row in trials_of(killed)) < sum(row["updates"] for row in whole)
    assert main.start({}, TRAINERS, [f"RESUME={killed}"]) is None
    assert trials_of(killed) == whole


def fail_in(config, saved):
    with record.open_folder({}, config, None, "a search") as (folder, _):
        if saved:
            folder.save({}, {"x": jnp.arange(3)})
        raise ValueError("of a kind")


def test_an_error_that_nothing_foresaw_says_how_to_go_on(tmp_path):
    config = {"ENV_NAME": "CartPole-v1", "RESULTS_DIR": str(tmp_path / "new" / ".." / "runs")}
    folder = tmp_path / "runs" / "CartPole-v1"
    for saved in (False, True):
        with pytest.raises(
            RunError, match=r"^ValueError: of a kind; .*the traceback is in "
        ) as error:
            fail_in(config, saved)
        assert (f"; RESUME={folder} goes on; " in str(error.value)) == saved
        assert list(tmp_path.iterdir()) == ([tmp_path / "runs"] if saved else [])
    assert "of a kind" in (folder / "error.txt").read_text()


def test_a_disk_that_fails_is_reported_once_and_tried_again(tmp_path, monkeypatch, capsys):
    folder = record.SearchFolder(tmp_path, {}, False)
    state = {"x": jnp.arange(3)}
    write = record.write_whole

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "write_whole", full)
    folder.save({"number": 1}, state)
    folder.save({"number": 2}, state)
    said = capsys.readouterr()
    assert (said.out + said.err).count("No space left on device; the search goes on in memory") == 1
    monkeypatch.setattr(record, "write_whole", write)
    folder.save({"number": 3}, state)
    folder.close()
    again = record.SearchFolder(tmp_path, {}, True)
    assert again.notes == {"number": 3}
    shapes = jax.eval_shape(lambda: state)
    np.testing.assert_array_equal(again.restore(shapes)["x"], [0, 1, 2])
    again.close()


def start(tmp_path, monkeypatch, **asked):
    monkeypatch.chdir(tmp_path)
    sizes = {name: value for name, value in SIZES.items() if name in MUESLI.keys}
    config = {**sizes, "TOTAL_TIMESTEPS": 128, "REPORT_SEEDS": 0, **asked}
    assert main.start(config, TRAINERS, []) is None
    return trials_of(tmp_path / "runs" / "search_gymnax" / "CartPole-v1")


@pytest.mark.slow
def test_shapes_and_members_that_diverge(tmp_path, monkeypatch):
    asked = {"POPULATION": 4, "SEEDS": 2, "LR": "1e-4..1e30", "hidden_layers": "16,64"}
    trials = start(tmp_path, monkeypatch, **asked)
    states = {row["trial"]: row["status"] for row in trials}
    assert states[0] == "finished"  # the default
    assert "diverged" in states.values()
    assert {row["values"]["hidden_layers"] for row in trials} == {16, 64}
    assert len({seed for row in trials for seed in row["seeds"]}) == 8
    assert {len(row["returns"][0]) for row in trials} == {2}


@pytest.mark.weekly
def test_muesli_is_searched_too(tmp_path, monkeypatch, capsys):
    asked = {"ALGORITHM": "Muesli", "POPULATION": 2, "LR": "1e-4..1e-3", "MODEL_STEPS": 1}
    trials = start(tmp_path, monkeypatch, **asked)
    assert {row["status"] for row in trials} <= {"finished", "stopped"}
    assert "python train_Muesli_trXL.py" in capsys.readouterr().out


def test_another_budget_is_more_generations_or_refused(tmp_path):
    space, fixed = space_of(*RANGES)
    config = PPO.check({**SIZES, **fixed})
    settings = read_settings({"POPULATION": 4, "STRATEGY": "CMA_ES", "BUDGET": 768 * 12})
    assert main.make_task(settings, config, space).generations == 2  # of four and the default
    with pytest.raises(ConfigError, match="a generation takes 3840 environment steps"):
        main.make_task({**settings, "BUDGET": 1000}, config, space)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["LR=1e-3", "GAMMA=0.9"], "nothing to search"),
        (["RESUME=nowhere"], "RESUME: no search in nowhere: search.json: No such file"),
        (["LRR=1"], "^unknown config key 'LRR'; did you mean LR"),
        (["RESUME=nowhere", "LR=1"], "give no other setting"),
        (["ALGORITHM=DQN"], "ALGORITHM must be one of PPO, Muesli"),
        (["TRAIN=evolution"], "needs an algorithm of evosax"),
        (["TRAIN=evolution", "STRATEGY=SNES", "num_layers=1,2"], "parameters, not num_layers"),
        (["TRAIN=evolution", "STRATEGY=Sep_CMA_ES", "NORMALIZE_OBS=True"], "NORMALIZE_OBS gathers"),
        (["ENV_NAME=CartPol"], "unknown environment 'CartPol'"),
        (["ENV_NAME=nowhere.py:Own", "CHUNK=2"], "there is no file nowhere.py"),
        (["num_heads=1,3"], "num_heads must divide qkv_features"),
        (["LR=1e-4...1e-2"], r"LR=1e-4...1e-2 has three dots; a range has two, LOW..HIGH"),
        (["TRAIN=evolution", "STRATEGY=SNES", "LR=1e-5..1e-2"], "moves parameters, not LR"),
        ([f"seed={2**32 - 1}"], r"seed \+ REPORT_SEEDS must not exceed 2\*\*32"),
        (["@muesli-memory-s8"], "@muesli-memory-s8: unknown .* with ALGORITHM=Muesli"),
        (["BUDGET=1e30"], "BUDGET must be from 1 to"),
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


def test_a_search_of_another_version_is_said_to_be_that(tmp_path):
    (tmp_path / "search.json").write_text('{"NEW": 1}')
    with pytest.raises(ConfigError, match=r"^RESUME: .*search.json: unknown config key 'NEW'"):
        main.start({}, TRAINERS, [f"RESUME={tmp_path}"])


def test_a_file_of_ones_own_is_run_again_only_if_it_is_named(tmp_path):
    own = tmp_path / "corridor.py"
    own.write_text(OWN_ENVIRONMENT)
    asked = {"ENV_NAME": f"{own}:Corridor", "LR": "1e-4..1e-3"}
    (tmp_path / "search.json").write_text(json.dumps(asked))
    with pytest.raises(
        ConfigError, match=f"a file that is run only if you name it: add ENV_NAME={own}"
    ):
        main.start({}, TRAINERS, [f"RESUME={tmp_path}"])
    with pytest.raises(ConfigError, match="ENV_NAME can't change"):
        main.start({}, TRAINERS, [f"RESUME={tmp_path}", "ENV_NAME=CartPole-v1"])
    assert not (tmp_path / "ran").exists()
    named = {"RESUME": str(tmp_path), "ENV_NAME": f"{own}:Corridor"}
    assert main.resumed_search(tmp_path, named) == asked


# ------------------------------------------------------------------ evolution


@pytest.mark.slow
def test_parameters_evolve_resume_and_can_be_played_with(tmp_path, monkeypatch):
    from evaluate_PPO_trXL import load_agent

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "local_device_count", lambda: 3)  # of 8 members one device has 2
    monkeypatch.setattr(record, "SAVE_SECONDS", 0)
    options = {"TRAIN": "evolution", "STRATEGY": "Sep_CMA_ES", "POPULATION": 8, "ES_STD": 0.1}
    config = {**SIZES, "MEMORY": "gru", **options, "BUDGET": 8 * 64 * 4, "seed": 3}
    assert main.start({**config, "RESULTS_DIR": "whole"}, TRAINERS, []) is None
    whole = Path("whole/CartPole-v1")
    metrics = load_results(whole / "3_metrics.npy")
    assert len(metrics["returned_episode_returns"]) == 4
    assert np.all(metrics["best_of_population"] >= metrics["mean_of_population"])
    agent = load_agent(whole, seed=3)
    agent.act(agent.initial_memory(1), jnp.zeros((1, 4)), jnp.array([True]), jax.random.key(0))

    save, calls = record.SearchFolder.save, []

    def killed(*args):
        save(*args)
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(record.SearchFolder, "save", killed)
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
    """Fitness averages -20, of an episode of 20 steps, and -1,000, of one that never ends."""
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

    algorithm = Evosax("Sep_CMA_ES", 4, jnp.zeros(3), 0.1, 0.1, jax.random.key(0))
    evolution.next_generation(algorithm, evaluate, jax.random.key(1))
    of_candidates, of_curve = keys
    assert not np.array_equal(of_candidates, of_curve)


def test_all_settings_have_help_and_the_scripts_are_among_them():
    import search_trXL

    own = {name: value for name, value in search_trXL.config.items() if name in SEARCH_KEYS}
    assert read_settings(own)["POPULATION"] == own["POPULATION"]
    assert all(key.help for key in SEARCH_KEYS.values())
