"""Scripts that compare models: scores, curves, memory lengths, replaced actions."""

import json

import numpy as np
import pytest

from experiments import compare, curves, how_far_back, study

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


def test_one_level_is_read_alone():
    lines = [
        json.dumps({"name": f"a/{task}", "seed": 0, "status": 0, "mmer": value})
        for task, value in (("XEasy", 0.5), ("XHard", 0.0))
    ]
    assert compare.read(lines, "mmer", "Easy") == {"a": {"X": np.array([0.5])}}


def test_the_interquartile_mean_leaves_the_outer_quarters_out():
    scores = {"X": np.array([-100.0, 1.0, 2.0, 3.0]), "Y": np.array([4.0, 5.0, 6.0, 100.0])}
    assert compare.interquartile_mean(scores) == np.mean([2, 3, 4, 5])


def test_the_probability_of_improvement_counts_pairs():
    ours = {"X": np.array([1.0, 2.0]), "Y": np.array([0.0, 0.0])}
    theirs = {"X": np.array([0.0, 1.0, 3.0]), "Y": np.array([0.0])}
    # X: 1 against 0, 1, 3 is 1 + 1/2 + 0, and 2 is 1 + 1 + 0. Y: two ties.
    assert compare.improvement(ours, theirs) == pytest.approx((3.5 / 6 + 0.5) / 2)
    assert compare.improvement(theirs, ours) == pytest.approx(1 - (3.5 / 6 + 0.5) / 2)


@pytest.mark.weekly
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds, monkeypatch):
    """Coverage, 0.92 to 0.98 in 600 trials of 1,000 samples, is at least 0.85 with fewer."""
    monkeypatch.setattr(compare, "SAMPLES", 300)
    rng = np.random.default_rng(0)
    tasks = dict(enumerate(np.linspace(-0.1, 0.1, 10)))  # symmetric, so that the IQM is 0
    held = []
    for _ in range(60):
        ours, theirs = ({t: rng.normal(x, 0.1, seeds) for t, x in tasks.items()} for _ in range(2))
        for statistic, models, truth in (
            (compare.interquartile_mean, (ours,), 0.0),
            (compare.improvement, (ours, theirs), 0.5),
        ):
            low, high = compare.interval(statistic, *models)
            held.append((low <= truth <= high, truth))
    for truth in (0.0, 0.5):
        assert 0.85 <= np.mean([inside for inside, of in held if of == truth]) <= 0.995


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_are_as_wide_as_the_standard_error_says(seeds):
    """Resampling n of n seeds alone makes intervals too narrow by sqrt((n - 1) / n)."""
    rng = np.random.default_rng(0)
    scores = {task: rng.normal(size=seeds) for task in range(50)}

    def mean(scores):
        return float(np.mean([x.mean() for x in scores.values()]))

    low, high = compare.interval(mean, scores)
    variances = [np.var(x, ddof=1) / seeds for x in scores.values()]
    expected = 2 * 1.96 * np.sqrt(np.sum(variances)) / 50
    assert high - low == pytest.approx(expected, rel=0.045)


def test_seeds_are_drawn_within_their_task():
    scores = {"X": np.full(3, 0.0), "Y": np.full(3, 1.0)}
    assert compare.interval(compare.interquartile_mean, scores) == (0.5, 0.5)


def test_one_seed_has_no_interval():
    both = {"X": np.ones(2), "Y": np.ones(1)}
    assert np.isnan(compare.interval(compare.interquartile_mean, both)).all()


def test_the_table_has_every_task_and_says_over_how_many_it_compares():
    scores = compare.read(LINES, "mmer")
    text = compare.table(
        scores, {m: {t: x - 0.2 for t, x in of.items()} for m, of in scores.items()}
    )
    assert "| X | 0.600 ± 0.058 (0.400) | 0.100 ± 0.058 (-0.100) |" in text
    assert "| Z |  | 0.100 ± 0.058 (-0.100) |" in text
    text = compare.over_all(scores)
    assert "Tasks of all models: 1." in text
    assert "- a better than b: 1.00 (1.00 to 1.00)" in text
    apart = {"a": {"X": np.ones(1)}, "b": {"Y": np.ones(1)}}
    assert compare.over_all(apart) == "No task is common to all models."


def test_what_is_remembered_is_drawn_by_length_and_by_cost():
    rows = [
        {"name": "gru-5e-4/10", "status": 0, "final_return": 1.0},
        {"name": "gru-5e-4/10", "status": 0, "final_return": 0.9},
        {"name": "transformer-16x1/100", "status": 1},
        {"name": "gru-5e-4/100", "status": 0, "final_return": 0.25},
    ]
    returns = how_far_back.read_returns("\n".join(map(json.dumps, rows)))
    assert returns == {"gru-5e-4": {10: [1.0, 0.9], 100: [0.25]}}
    by_length, by_cost = how_far_back.draw(returns, {"gru-5e-4": 50.0}).axes
    (line,) = by_length.lines
    assert [*line.get_xdata()] == [10, 100]
    np.testing.assert_allclose(line.get_ydata(), [0.95, 0.25])
    assert by_length.get_legend_handles_labels()[1] == ["gru-5e-4"]
    (point,) = by_cost.lines
    assert (*point.get_xdata(), *point.get_ydata()) == (50.0, 10)


def test_a_model_without_a_cost_is_named(tmp_path):
    results, costs = tmp_path / "results.jsonl", tmp_path / "costs.json"
    results.write_text(json.dumps({"name": "none/10", "status": 0, "final_return": 0.0}))
    costs.write_text('{"gru-5e-4": 50.0}')
    with pytest.raises(SystemExit, match=r"error: .*costs\.json has no cost of none"):
        how_far_back.write_picture(results, costs, tmp_path / "picture.png")


def test_the_longest_length_solved_is_one_that_no_seed_fails():
    assert how_far_back.longest_solved({10: [1.0], 20: [0.95, 0.91], 50: [0.99, 0.89]}) == 20
    assert how_far_back.longest_solved({10: [0.5], 20: [1.0]}) == 0


def test_curves_are_drawn_by_task_and_model():
    rows = [
        {"name": "ppo/X", "status": 0, "updates": 4, "curve": [None, 1.0, 2.0, 3.0]},
        {"name": "ppo/X", "status": 0, "updates": 4, "curve": [0.0, 2.0, 4.0, 6.0]},
        {"name": "muesli/X", "status": 0, "updates": 2, "curve": [5.0, 7.0]},
        {"name": "muesli/X", "status": 1},
        {"name": "muesli/Y", "status": 0, "steps": 200, "fifths": [5.0]},  # before 2026-11-26
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
    """A curve of 75 updates has 25 points of two updates, then 25 of one."""
    metrics = {"returned_episode_returns": np.arange(75.0), "num_episodes": np.ones(75)}
    row = study.summary(metrics | {"env_steps": 10 * np.arange(1, 76)})
    read = curves.read_curves([json.dumps({"name": "a/X", "status": 0} | row)])
    ((steps, returns),) = read["X"]["a"]
    np.testing.assert_array_equal(steps, [*range(20, 501, 20), *range(510, 751, 10)])
    assert [*returns[:2], returns[-1]] == [0.5, 2.5, 74.0]


def test_when_a_curve_is_above_a_return_is_told_of_each_seed():
    rows = [
        {"name": f"ppo/{task}", "status": 0, "updates": 4, "steps": 4000, "curve": curve}
        for task, curve in (
            ("X", [0.95, None, 0.95, 0.99]),
            ("X", [0.0, 0.95, 0.1, 0.95]),
            ("X", [0.0, 0.95, 0.95, 0.9]),
            ("X", [None, 0.0, 0.0, 0.0]),
            ("Y", [0.0, 0.0, 0.0, 1.0]),
        )
    ]
    report = curves.report_above(curves.read_curves(map(json.dumps, rows)), 0.9)
    assert report == ("X ppo: 1,000 (1,000); 2,000 (4,000); 2,000 (-); - (-)\nY ppo: 4,000 (4,000)")


def test_curves_that_are_not_there_are_one_line(tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps({"name": "ppo/X", "status": 1}))
    with pytest.raises(SystemExit, match=r"error: no run that ended has a curve in"):
        curves.read_tasks(str(results), [])
    row = {"name": "ppo/X", "status": 0, "updates": 1, "steps": 8, "curve": [1.0]}
    results.write_text(json.dumps(row))
    assert [*curves.read_tasks(str(results), [])] == ["X"]
    with pytest.raises(SystemExit, match=r"error: no curve of Y in .*; there are X"):
        curves.read_tasks(str(results), ["X", "Y"])
