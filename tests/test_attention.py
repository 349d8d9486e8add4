"""Attention weights of an agent, recorded and drawn."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support import QUICK, run

from trxl.errors import ConfigError
from trxl.runs.pictures import by_step, check_attention, record, view

import evaluate_PPO_trXL as evaluate
from evaluate_PPO_trXL import load_agent

SOLVED = "results_gymnax/memory_length_20/MemoryChain-bsuite"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    run({**QUICK, "num_layers": 2, "WINDOW_MEM": 3, "RESULTS_DIR": str(root)})
    return root / "MemoryChain-bsuite"


def test_attention_is_on_the_step_itself_and_on_those_in_reach(folder):
    episode = record(load_agent(folder), jax.random.key(0))
    layers, steps, _ = episode.attention.shape
    assert (layers, steps) == (2, len(episode.rewards))
    assert episode.ends.tolist() == [False] * (steps - 1) + [True]
    np.testing.assert_allclose(episode.attention.sum(axis=2), 1, atol=1e-5)
    distance = np.arange(steps)[:, None] - np.arange(steps)
    in_reach = (distance >= 0) & (distance <= 3)
    assert (episode.attention[:, in_reach] > 0).all()
    assert not episode.attention[:, ~in_reach].any()


def test_looking_changes_no_action(folder):
    agent = load_agent(folder)
    memory = agent.initial_memory(5)
    for t in range(6):
        key = jax.random.key(t)
        obs, done = jax.random.normal(key, (5, 3)), jnp.arange(5) == t
        action, after = agent.act(memory, obs, done, key)
        looked, memory, attention = agent.look(memory, obs, done, key)
        np.testing.assert_array_equal(action, looked)
        jax.tree.map(np.testing.assert_array_equal, after, memory)
        assert attention.shape == (5, 2, QUICK["num_heads"], 4)
        if t < 5:  # after a reset, itself alone
            np.testing.assert_array_equal(attention[t, :, :, 0], 1)


def test_ages_become_steps():
    looks = [np.array([[0.5, 0.3, 0.2]]) + i for i in range(4)]
    expected = [
        [0.5, 0, 0, 0],
        [1.3, 1.5, 0, 0],
        [2.2, 2.3, 2.5, 0],
        [0, 3.2, 3.3, 3.5],
    ]
    np.testing.assert_allclose(by_step(looks), [expected])


def test_the_answer_looks_back_at_the_cue():
    episode = record(load_agent(SOLVED), jax.random.key(0))
    assert episode.rewards[-1] == 1
    at_the_cue = episode.attention[:, :, :2].sum(axis=-1)  # (layers, steps), both steps of the cue
    uniform = 2 / episode.attention.shape[1]
    assert (at_the_cue[:, -1] > 3 * uniform).any()


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_it_is_drawn_by_the_evaluation(suffix, folder, tmp_path, monkeypatch, capsys):
    path = tmp_path / f"attention.{suffix}"
    arguments = [str(folder), "EPISODES=4", f"ATTENTION={path}"]
    monkeypatch.setattr(sys, "argv", ["evaluate_PPO_trXL.py", *arguments])
    evaluate.main()
    assert f"is drawn in {path}" in capsys.readouterr().out
    with Image.open(path) as picture:
        assert getattr(picture, "n_frames", 1) == (1 if suffix == "png" else 6)
        assert max(picture.size) < 1600
        assert np.asarray(picture.convert("L"), float).std() > 10


def test_without_a_picture_the_observation_is_one(folder):
    episode = record(load_agent(folder), jax.random.key(0))
    assert view(episode, 0).shape == (2, 2)
    assert view(episode._replace(pictures=[np.ones((4, 5, 3))]), 0).shape == (4, 5, 3)


@pytest.mark.parametrize("change", [{"MEMORY": "gru"}, {"WINDOW_MEM": 0}, {"num_layers": 0}])
def test_what_attends_to_nothing_is_told(change, folder, tmp_path):
    agent = load_agent(folder)
    agent = agent._replace(config={**agent.config, **change})
    with pytest.raises(ConfigError, match="ATTENTION: this agent attends to nothing"):
        check_attention(agent, tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"must end in \.png"):
        check_attention(load_agent(folder), tmp_path / "a.jpg")
