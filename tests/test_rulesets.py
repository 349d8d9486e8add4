"""Generated rulesets: format, solvability, held-out goals."""

import bz2
import re
import sys
from collections import Counter

import jax
import numpy as np
import pytest
from PIL import Image
from support import QUICK, run, save_untrained

from trxl.environments import xminigrid_rulesets
from trxl.environments.xminigrid import load_rulesets, split_rulesets
from trxl.errors import ConfigError
from trxl.results import load_results, unpickle_arrays

import evaluate_PPO_trXL as evaluate
from trainer_PPO_trXL import PPO
from wrappers import make_env

xminigrid = pytest.importorskip("xminigrid")
from xminigrid.benchmarks import load_benchmark_from_path  # noqa: E402
from xminigrid.core import goals, rules  # noqa: E402


@pytest.fixture(scope="module", params=[*xminigrid_rulesets.KINDS])
def drawn(request):
    """Draws 300 rulesets of a kind."""
    return request.param, xminigrid_rulesets.draw_rulesets(request.param, 300, seed=1)


@pytest.fixture
def file(tmp_path, monkeypatch, capsys):
    """Writes 40 small rulesets by the command line and returns the file."""
    path = tmp_path / "small.bz2"
    monkeypatch.setattr(sys, "argv", ["rulesets", "small", "40", str(path), "3"])
    xminigrid_rulesets.main()
    assert capsys.readouterr().out.startswith(f"40 rulesets in {path}: 0 to ")
    return path


def tiles(encoding):
    """Returns the tiles of an encoded goal or rule without padding."""
    pairs = zip(encoding[1::2], encoding[2::2], strict=True)
    return [pair for pair in pairs if pair != (0, 0)]


def can_be_solved(ruleset):
    """Returns whether productions can reach the goal's objects, by exhaustive search."""
    wanted = Counter(tiles(ruleset.goal))
    start = Counter(ruleset.objects)
    seen, ahead = set(), [start]
    while ahead:
        there = ahead.pop()
        if wanted <= there:
            return True
        for rule in ruleset.rules:
            *takes, makes = tiles(rule)
            if Counter(takes) <= there:
                after = there - Counter(takes) + Counter([makes])
                if (key := frozenset(after.items())) not in seen:
                    seen.add(key)
                    ahead.append(after)
    return False


def test_every_ruleset_can_be_solved(drawn):
    assert all(map(can_be_solved, drawn[1]))


def test_a_ruleset_that_can_not_be_solved_would_be_seen(drawn):
    kind, several = drawn
    without = [ruleset._replace(objects=ruleset.objects[1:]) for ruleset in several]
    assert not all(map(can_be_solved, without)), kind


def test_no_two_have_the_same_goal_and_rules_and_the_seed_decides(drawn):
    kind, several = drawn
    assert len({ruleset[:2] for ruleset in several}) == 300
    assert xminigrid_rulesets.draw_rulesets(kind, 300, seed=1) == several
    assert xminigrid_rulesets.draw_rulesets(kind, 300, seed=2) != several


def test_goals_and_rules_are_encoded_as_xminigrid_does():
    numbers = {
        xminigrid_rulesets.HOLD: ["AgentHold"],
        xminigrid_rulesets.NEAR: [
            f"AgentNear{side}" for side in ("", "Up", "Down", "Left", "Right")
        ],
        xminigrid_rulesets.BESIDE: [
            f"TileNear{side}" for side in ("", "Up", "Down", "Left", "Right")
        ],
    }
    a, b, c = (np.array(pair) for pair in [(3, 1), (6, 10), (12, 9)])
    for what, names in numbers.items():
        of_two = what == xminigrid_rulesets.BESIDE
        inputs = {"tile_a": a, "tile_b": b} if of_two else {"tile": a}
        pairs = [tuple(x.tolist()) for x in inputs.values()]
        for index, name in enumerate(names):
            goal = getattr(goals, f"{name}Goal")(**inputs).encode()
            ours = xminigrid_rulesets.encode(xminigrid_rulesets.GOALS[what][index], tuple(pairs), 5)
            assert ours == tuple(goal.tolist()), name
            rule = getattr(rules, f"{name}Rule")(**inputs, prod_tile=c).encode()
            ours = xminigrid_rulesets.encode(
                xminigrid_rulesets.RULES[what][index], (*pairs, (12, 9)), 7
            )
            assert ours == tuple(rule.tolist()), name


def test_the_trees_are_as_deep_and_as_wide_as_the_kind_says(drawn):
    kind, several = drawn
    of_kind = xminigrid_rulesets.KINDS[kind]
    most = 2 ** (of_kind.depth + 1) - 2 + of_kind.distractor_rules
    assert max(len(ruleset.rules) for ruleset in several) <= most
    if of_kind.depth:
        assert np.mean([len(ruleset.rules) for ruleset in several]) > of_kind.depth
    else:
        assert {len(ruleset.objects) for ruleset in several} == {4, 5}


def test_a_file_loads_through_xminigrid_and_through_the_restricted_unpickler(file):
    theirs = load_benchmark_from_path(str(file))
    ours = load_rulesets("XLand-MiniGrid-R1-9x9", str(file))
    jax.tree.map(np.testing.assert_array_equal, theirs, ours)
    assert ours.num_rulesets() == 40
    expected = xminigrid_rulesets.as_arrays(xminigrid_rulesets.draw_rulesets("small", 40, seed=3))
    with bz2.open(file) as stream:
        jax.tree.map(np.testing.assert_array_equal, unpickle_arrays(stream), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage:"),
        (["small", "many", "file"], "usage:"),
        (["tiny", "3", "file"], "error: no rulesets 'tiny'; there are trivial, small"),
        (["trivial", "1e5", "file"], "error: there are from 1 to 21410 different rulesets trivial"),
        (["small", "0", "file"], "error: there are from 1 to"),
        (["small", "3", "/nowhere/file"], "error: can't write to /nowhere/file"),
    ],
)
def test_bad_input_is_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rulesets", *arguments])
    with pytest.raises(SystemExit) as exit:
        xminigrid_rulesets.main()
    assert exit.value.code.startswith(message)


def test_what_is_held_out_is_never_trained_on(file):
    every = load_rulesets("XLand-MiniGrid-R1-9x9", str(file))
    parts = {split: split_rulesets(every, 0.25, split) for split in ("train", "held_out")}
    assert [part.num_rulesets() for part in parts.values()] == [30, 10]
    rows = {
        split: {(tuple(goal), rules.tobytes()) for goal, rules in zip(*pair(part), strict=True)}
        for split, part in parts.items()
    }
    assert not rows["train"] & rows["held_out"]
    assert len(rows["train"] | rows["held_out"]) == 40


def pair(benchmark):
    return np.asarray(benchmark.goals).tolist(), np.asarray(benchmark.rules)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"held_out": 1.0}, "held_out is 1.0, but must be in"),
        ({"held_out": "x"}, "held_out is 'x', but must be in"),
        ({"held_out": 0.001, "split": "held_out"}, "leaves none to held_out"),
        ({"split": "test"}, "split is 'test', not one of train, held_out"),
    ],
)
def test_a_share_that_is_none_is_one_line(kwargs, message, file):
    kwargs = {"benchmark": str(file), **kwargs}
    config = PPO.check({**QUICK, "ENV_NAME": "XLand-MiniGrid-R1-9x9", "ENV_KWARGS": kwargs})
    with pytest.raises(ConfigError, match=message):
        make_env(config, 4)


@pytest.mark.weekly
def test_an_agent_trains_on_them_and_plays_those_held_out(file, tmp_path, monkeypatch, capsys):
    kwargs = {"benchmark": str(file), "held_out": 0.25, "episodes_per_trial": 2, "max_steps": 5}
    config = {**QUICK, "ENV_NAME": "XLand-MiniGrid-R1-9x9", "ENV_KWARGS": kwargs}
    run({**config, "RESULTS_DIR": str(tmp_path / "runs")})
    folder, plot = tmp_path / "runs" / "XLand-MiniGrid-R1-9x9", tmp_path / "trials.png"
    metrics = load_results(folder / "0_metrics.npy")
    assert np.isfinite(metrics["total_loss"]).all()
    assert np.isfinite(metrics["trial_return/episode_2"]).all()
    capsys.readouterr()
    film = plot.with_suffix(".gif")
    arguments = [str(folder), "EPISODES=8", f"PLOT={plot}", f"GIF={film}", "TRIAL_MEMORY=False"]
    monkeypatch.setattr(sys, "argv", ["evaluate_PPO_trXL.py", *arguments])
    played, results = [], []
    play = evaluate.play

    def seen(agent, *more):
        played.append(agent)
        results.append(play(agent, *more))
        return results[-1]

    monkeypatch.setattr(evaluate, "play", seen)
    evaluate.main()
    for result in results:  # a return is logged under its episode's number alone
        first, second = (result[f"trial_return/episode_{i}"] for i in (1, 2))
        np.testing.assert_array_equal(np.isnan(first), ~np.isnan(second))
        assert np.isnan(first).sum() == 4
    splits = [agent.config["ENV_KWARGS"].get("split", "train") for agent in played]
    assert splits == ["train", "held_out"]
    lines = capsys.readouterr().out.splitlines()
    for split in splits:
        start = lines.index(
            f"8 episodes of XLand-MiniGrid-R1-9x9 of the rulesets {split}, sampled actions"
            " of seed 0"
        )
        (line,) = [x for x in lines[start : start + 6] if x.startswith("trial_return/episode_2: ")]
        assert re.search(r"mean .* median .*, 20th percentile ", line)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert not any(agent.config["TRIAL_MEMORY"] for agent in played)
    assert re.fullmatch(rf"a trial with return \d.\d is in {film}", lines[-1])
    with Image.open(film) as gif:
        assert gif.n_frames == 10  # two episodes of 5 steps, the time limit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, ["SPLIT=held_out"], "error: SPLIT=held_out: the agent was trained on all rulesets"),
        ({"held_out": 0.1}, ["PLOT=x.gif"], "error: PLOT: x.gif must end in .png"),
        ({}, ["SPLIT=test"], "error: SPLIT must be one of train, held_out, not 'test'"),
    ],
)
def test_a_split_that_there_is_not_is_told_before_anything_is_played(
    changes, arguments, message, file, tmp_path, monkeypatch
):
    kwargs = {"benchmark": str(file), "max_steps": 5, **changes}
    save_untrained(tmp_path, ENV_NAME="XLand-MiniGrid-R1-9x9", ENV_KWARGS=kwargs)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path), *arguments])
    monkeypatch.delattr(evaluate, "play")
    with pytest.raises(SystemExit) as exit:
        evaluate.main()
    assert exit.value.code.startswith(message)
