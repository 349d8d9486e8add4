"""Models compared over tasks, as `benchmarks/compare.py` does it."""

import json

import numpy as np
import pytest

from benchmarks import compare, curves, how_far_back, study

LINES = [
    json.dumps({"name": f"{model}/{task}", "seed": seed, "status": 0, "mmer": value + 0.1 * seed})
    for model, task, value in (("a", "X", 0.5), ("a", "Y", -0.3), ("b", "X", 0.0), ("b", "Z", 0.0))
    for seed in (0, 1, 2)
] + [
    json.dumps({"name": "a/X", "seed": 3} | line)
    for line in ({"status": 1}, {"status": 143, "mmer": -1.0}, {"status": 0, "mmer": None})
]


def test_scores_are_read_by_model_and_task():
    models = compare.read(LINES, "mmer")
    np.testing.assert_allclose(models["a"]["X"], [0.5, 0.6, 0.7])
    assert {model: [*scores] for model, scores in models.items()} == {
        "a": ["X", "Y"],
        "b": ["X", "Z"],
    }
    assert compare.common_tasks(models) == ["X"]


def test_the_interquartile_mean_leaves_the_outer_quarters_out():
    scores = {"X": np.array([-100.0, 1.0, 2.0, 3.0]), "Y": np.array([4.0, 5.0, 6.0, 100.0])}
    assert compare.interquartile_mean(scores) == np.mean([2, 3, 4, 5])


def test_the_probability_of_improvement_counts_pairs():
    ours = {"X": np.array([1.0, 2.0]), "Y": np.array([0.0, 0.0])}
    theirs = {"X": np.array([0.0, 1.0, 3.0]), "Y": np.array([0.0])}
    # Of X, 1 against 0, 1, 3: 1 + 1/2 + 0; 2: 1 + 1 + 0; of Y two ties.
    assert compare.improvement(ours, theirs) == pytest.approx((3.5 / 6 + 0.5) / 2)
    assert compare.improvement(theirs, ours) == pytest.approx(1 - (3.5 / 6 + 0.5) / 2)


def test_intervals_hold_the_mean_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(compare, "SAMPLES", 300)
    rng = np.random.default_rng(1)

    def mean(scores):
        return float(np.mean([x.mean() for x in scores.values()]))

    held = []
    for _ in range(60):
        low, high = compare.interval(mean, {t: rng.normal(size=10) for t in "XYZ"})
        held.append(low < 0 < high)
    assert 0.82 <= np.mean(held) <= 1


def test_the_table_has_every_task_and_says_over_how_many_it_compares():
    text = compare.table(compare.read(LINES, "mmer"))
    assert "| X | 0.600 ± 0.058 | 0.100 ± 0.058 |" in text
    assert "| Z |  | 0.100 ± 0.058 |" in text
    assert "Over 1 tasks" in text
    assert "- a better than b: 1.00 (1.00 to 1.00)" in text


def test_what_is_remembered_is_drawn_by_model_and_length():
    rows = [
        {"name": "gru/10", "status": 0, "last_tenth": 1.0},
        {"name": "gru/10", "status": 0, "last_tenth": 0.5},
        {"name": "memory-16/100", "status": 1},
        {"name": "gru/100", "status": 0, "last_tenth": 0.25},
    ]
    returns = how_far_back.read_returns("\n".join(map(json.dumps, rows)))
    assert returns == {"gru": {10: [1.0, 0.5], 100: [0.25]}}
    (axes,) = how_far_back.draw(returns).axes
    (line,) = axes.lines
    assert [*line.get_xdata()] == [10, 100]
    assert [*line.get_ydata()] == [0.75, 0.25]
    assert axes.get_legend_handles_labels()[1] == ["gru"]


def test_curves_are_drawn_by_task_and_model():
    rows = [
        {"name": "ppo/X", "status": 0, "updates": 4, "curve": [None, 1.0, 2.0, 3.0]},
        {"name": "ppo/X", "status": 0, "updates": 4, "curve": [0.0, 2.0, 4.0, 6.0]},
        {"name": "muesli/X", "status": 0, "updates": 2, "curve": [5.0, 7.0]},
        {"name": "muesli/X", "status": 1},
        {"name": "muesli/Y", "status": 0, "steps": 200, "fifths": [5.0]},  # of before 2026-11-26
    ]
    rows = [row | {"steps": 100 * row.get("updates", 2)} for row in rows]
    read = curves.read_curves(map(json.dumps, rows))
    (axes,) = curves.draw(read).axes
    assert axes.get_title() == "X"
    ppo, muesli = axes.lines
    np.testing.assert_array_equal(ppo.get_xdata(), [100, 200, 300, 400])
    np.testing.assert_array_equal(ppo.get_ydata(), [np.nan, 1.5, 3.0, 4.5])
    np.testing.assert_array_equal(muesli.get_xdata(), [100, 200])
    assert axes.get_legend_handles_labels()[1] == ["ppo", "muesli"]
    panels = curves.draw(dict.fromkeys("ABCD", read["X"])).axes
    assert [axes.axison for axes in panels] == [True] * 4 + [False] * 2


def test_a_point_of_a_curve_stands_where_its_part_ends():
    """Of 75 updates the first 25 parts have two each, the other 25 one."""
    metrics = {"returned_episode_returns": np.arange(75.0), "episodes": np.ones(75)}
    row = study.summary(metrics | {"env_steps": 10 * np.arange(1, 76)})
    read = curves.read_curves([json.dumps({"name": "a/X", "status": 0} | row)])
    ((steps, returns),) = read["X"]["a"]
    np.testing.assert_array_equal(steps, [*range(20, 501, 20), *range(510, 751, 10)])
    assert [*returns[:2], returns[-1]] == [0.5, 2.5, 74.0]
