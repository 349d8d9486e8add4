"""Saved agents act as they were trained, and episodes are counted without bias."""

import importlib
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image
from support import OWN_ENVIRONMENT, SMALL, make_window_form, reach_of, save_untrained

from trxl.environments import Discrete, craftax
from trxl.errors import ConfigError
from trxl.runs import evaluation
from trxl.runs.agent import Agent
from trxl.runs.outputs import save_seed
from trxl.runs.parameters import read_start
from trxl.runs.pictures import CAPTION_PIXELS
from trxl.spaces import ObsSpace
from trxl.training import init_params

import evaluate_PPO_trXL as evaluate
from trainer_PPO_trXL import PPO
from transformerXL import make_network
from wrappers import make_env

CHAIN = {**SMALL, "ENV_KWARGS": {"memory_length": 3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saves a MemoryChain agent whose parameters are large enough to prefer an action."""
    folder = tmp_path_factory.mktemp("agent")
    config = PPO.check(CHAIN)
    params = init_params(
        config, make_network(config, Discrete(2), ObsSpace(3)), 3, jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), params)
    params["params"]["actor"]["Dense_2"]["bias"][:] = 0
    save_seed(folder, 0, config, {"total_loss": np.zeros(1)}, params)
    return folder


def test_it_acts_by_the_network_and_the_memory_it_was_trained_with(folder):
    """Greedy actions over three memory lengths equal the window form's."""
    agent = evaluate.load_agent(folder, greedy=True)
    config = agent.config
    rng = np.random.default_rng(1)
    batch, steps = 4, 24
    obs = rng.standard_normal((batch, steps, 3)).astype(np.float32)
    done = rng.random((batch, steps)) < 0.15  # in the step before the observation
    memory = agent.initial_memory(batch)
    actions = []
    for t in range(steps):
        now = (obs[:, t], done[:, t]) if t else (obs[:, t].tolist(), done[:, t].tolist())
        action, memory = agent.act(memory, *now, jax.random.key(t))
        actions.append(action)

    boundary = np.pad(done[:, 1:], ((0, 0), (config["WINDOW_MEM"], 1)))
    boundary[:, config["WINDOW_MEM"] - 1] = True
    reach = reach_of(boundary, config["WINDOW_MEM"])
    no_memory = jnp.zeros((batch, config["WINDOW_MEM"], 2, config["EMBED_SIZE"]))
    params = np.load(folder / "0_params.npy", allow_pickle=True).item()
    logits, _ = make_window_form(make_network(config, Discrete(2), ObsSpace(3)), steps)(
        params, obs, no_memory, reach
    )
    np.testing.assert_array_equal(np.stack(actions, axis=1), np.argmax(logits, axis=-1))
    assert 0.1 < np.mean(actions) < 0.9


def test_an_agent_made_of_a_train_state_is_the_one_that_was_saved(folder):
    config = PPO.check(CHAIN)
    params = np.load(folder / "0_params.npy", allow_pickle=True).item()
    train_state = PPO.init(config, params)
    made, loaded = evaluate.make_agent(CHAIN, train_state), evaluate.load_agent(folder)
    assert made.config == loaded.config
    obs = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    looks = [
        agent.look(agent.initial_memory(4), obs, np.ones(4, bool), jax.random.key(0))
        for agent in (made, loaded)
    ]
    jax.tree.map(np.testing.assert_array_equal, *looks)
    averaged = PPO.init({**config, "EMA_RATE": 0.5}, params)
    averaged = averaged._replace(params=jax.tree.map(jnp.zeros_like, params))
    made = evaluate.make_agent({**CHAIN, "EMA_RATE": 0.5}, averaged)
    looks[0] = made.look(made.initial_memory(4), obs, np.ones(4, bool), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, *looks)
    seeds = jax.tree.map(lambda x: np.stack([x, x]), train_state)
    with pytest.raises(ConfigError, match="of several seeds take one"):
        evaluate.make_agent(CHAIN, seeds)


def test_every_environment_plays_the_same_number_of_complete_episodes(folder, monkeypatch):
    monkeypatch.setattr(evaluation, "MOST_ENVIRONMENTS", 8)
    results = evaluate.play(evaluate.load_agent(folder), 24, jax.random.key(0))
    assert results["returned_episode_returns"].shape == (24,)
    np.testing.assert_array_equal(results["returned_episode_lengths"], 5 - 1)
    assert set(results["returned_episode_returns"]) <= {-1.0, 1.0}


@pytest.mark.slow
def test_the_loop_is_compiled_once(tmp_path):
    """Reset and step give the loop's carry the same types, weak types included."""
    save_untrained(tmp_path, ENV_NAME="Craftax-Classic-Symbolic-v1")
    agent = evaluate.load_agent(tmp_path)
    env = make_env(agent.config, 2)
    keys = jax.random.split(jax.random.key(0), 2)
    assert any(x.weak_type for x in jax.tree.leaves(jax.eval_shape(env.reset, keys)))
    start, step = evaluation.make_loop(agent, env)
    before = jax.eval_shape(start, jax.random.key(0))
    after, _ = jax.eval_shape(step, before, jax.random.key(1))
    assert jax.tree.map(str, before) == jax.tree.map(str, after)


def test_an_agent_of_shared_worlds_is_evaluated_in_worlds_of_its_own(tmp_path):
    """An agent trained with shared worlds is evaluated without, in any number of environments."""
    shared = {"RESET_STRATEGY": "optimistic", "RESET_RATIO": 4, "NUM_ENVS": 8}
    limit = {"max_steps_in_episode": 3}
    save_untrained(tmp_path, ENV_NAME="CartPole-v1", ENV_KWARGS=limit, **shared)
    agent = evaluate.load_agent(tmp_path)
    assert len(evaluate.play(agent, 1, jax.random.key(0))["returned_episode_returns"]) == 1
    evaluate.save_gif(agent, tmp_path / "episode.gif", jax.random.key(0))
    assert Image.open(tmp_path / "episode.gif").n_frames == 3

    # All environments end in the same step, and all start differently.
    env = make_env(agent.config, 32)
    keys = jax.random.split(jax.random.key(0), (4, 32))
    _, state = env.reset(keys[0])
    step = jax.jit(env.step)
    for t in range(1, 4):
        obs, state, _, done, _ = step(keys[t], state, jnp.zeros(32, int))
    assert done.all()
    assert len(np.unique(obs, axis=0)) == 32


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """Saves an agent whose config names a file that leaves a trace when it is run."""
    (tmp_path / "corridor.py").write_text(OWN_ENVIRONMENT)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "agent").mkdir()
    save_untrained(tmp_path / "agent", ENV_NAME="corridor.py:Corridor")
    (tmp_path / "ran").unlink()
    return tmp_path


def test_a_file_that_only_the_config_names_is_not_run(stranger, monkeypatch):
    with pytest.raises(ConfigError) as error:
        evaluate.load_agent(stranger / "agent")
    assert 'environment="corridor.py:Corridor"' in str(error.value)
    monkeypatch.setattr(sys, "argv", ["evaluate_PPO_trXL.py", "agent"])
    with pytest.raises(SystemExit) as exit:
        evaluate.main()
    assert "ENV_NAME=corridor.py:Corridor" in exit.value.code
    for other in ("CartPole-v1", "corridor.py:Other", "elsewhere.py:Corridor"):
        with pytest.raises(ConfigError, match=r"the run has ENV_NAME = 'corridor.py:Corridor'"):
            evaluate.load_agent(stranger / "agent", environment=other)
    assert not (stranger / "ran").exists()


def test_a_file_that_the_user_names_is_run_wherever_it_is(stranger, monkeypatch, capsys):
    (stranger / "mine").mkdir()
    (stranger / "corridor.py").rename(stranger / "mine" / "corridor.py")
    name = "mine/corridor.py:Corridor"
    agent = evaluate.load_agent(stranger / "agent", environment=name)
    assert (stranger / "mine" / "ran").exists()
    lengths = evaluate.play(agent, 4, jax.random.key(0))["returned_episode_lengths"]
    np.testing.assert_array_equal(lengths, 3)
    arguments = ["agent", f"ENV_NAME={name}", "EPISODES=2", "POLICY=random"]
    monkeypatch.setattr(sys, "argv", ["evaluate_PPO_trXL.py", *arguments])
    evaluate.main()
    assert "2 episodes of mine/corridor.py:Corridor" in capsys.readouterr().out


def test_random_actions_are_no_better_than_chance(folder):
    agent = evaluate.random_agent(evaluate.load_agent(folder))
    returns = evaluate.play(agent, 512, jax.random.key(0))["returned_episode_returns"]
    assert abs(returns.mean()) < 5 / 512**0.5


def test_describe():
    text = evaluation.describe(np.array([0.0, 1.0, 2.0, 3.0, 100.0, 1.0, 2.0, 3.0]))
    error = np.std([0, 1, 2, 3, 100, 1, 2, 3], ddof=1) / 8**0.5
    assert text == (f"mean 14.000 +- {error:.3f}, interquartile mean 2.000, min 0.000, max 100.000")


def test_report_gives_craftax_its_score_and_achievements():
    results = {
        "returned_episode_returns": np.array([11.3, 33.9]),
        "returned_episode_lengths": np.array([100, 300]),
        "Achievements/collect_wood": np.array([100.0, 100.0]),
        "Achievements/eat_cow": np.array([0.0, 100.0]),
        "Achievements/defeat_necromancer": np.array([0.0, 0.0]),
    }
    text = evaluation.report({"ENV_NAME": "craftax"}, results)
    assert "score: 10.00 % of the maximum 226" in text
    assert f"Crafter score: {(101 * 51 * 1) ** (1 / 3) - 1:.2f} %" in text
    assert text.index("100.00 %  collect_wood") < text.index("50.00 %  eat_cow")
    assert "never: the other 1 of 3 achievements" in text


@pytest.mark.parametrize(
    ("name", "env_kwargs", "frames"),
    [
        pytest.param("Catch-bsuite", {}, 9, marks=pytest.mark.slow),
        pytest.param(
            "Craftax-Classic-Symbolic-v1", {"max_timesteps": 3}, 3, marks=pytest.mark.weekly
        ),
    ],
)
def test_a_gif_shows_an_episode_with_a_caption(name, env_kwargs, frames, tmp_path):
    save_untrained(tmp_path, ENV_NAME=name, ENV_KWARGS=env_kwargs)
    agent = evaluate.load_agent(tmp_path)
    evaluate.save_gif(agent, tmp_path / "episode.gif", jax.random.key(0))
    gif = Image.open(tmp_path / "episode.gif")
    assert gif.n_frames == frames
    pictures = []
    for index in range(frames):
        gif.seek(index)
        pictures.append(np.asarray(gif.convert("L"), float))
    scene, caption = (
        pictures[0][:-CAPTION_PIXELS],
        pictures[0][-CAPTION_PIXELS:],
    )
    assert scene.std() > 10
    assert caption.max() > 200
    assert (pictures[0] != pictures[1])[-CAPTION_PIXELS:].any()  # it counts steps


def test_an_environment_that_cannot_be_drawn_is_one_line(folder, tmp_path):
    with pytest.raises(ConfigError, match="Gymnax can't draw MemoryChain-bsuite"):
        evaluate.check_gif(evaluate.load_agent(folder), tmp_path / "no.gif")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["Catch-bsuite", "MemoryChain-bsuite"])
def test_drawing_leaves_pyplot_as_it_was(name):
    """Keeps the backend, by which a notebook shows figures, and leaves no figure to show."""
    backend, open_figures = plt.get_backend(), plt.get_fignums()
    plt.switch_backend("svg")
    env = make_env(PPO.check({**SMALL, "ENV_NAME": name}), 1)
    _, state = env.reset(jax.random.split(jax.random.key(0), 1))
    render = env.renderer()
    with nullcontext() if name == "Catch-bsuite" else pytest.raises(ConfigError):
        render(jax.tree.map(lambda x: x[0], env.single_states(state)))
    assert plt.get_backend() == "svg"
    assert plt.get_fignums() == open_figures
    plt.switch_backend(backend)


@pytest.mark.parametrize("picture", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), None])
def test_a_picture_that_is_none_is_one_line_before_an_episode_is_played(picture, folder, tmp_path):
    agent = evaluate.load_agent(folder)
    env = agent.environment()
    env.renderer = lambda: lambda state: picture
    with pytest.raises(
        ConfigError, match=r"GIF: a picture must be uint8 of shape .height, width, "
    ):
        evaluate.check_gif(agent._replace(make_env=lambda *_: env), tmp_path / "no.gif")
    env.renderer = lambda: picture
    with pytest.raises(ConfigError, match=r"^GIF: renderer.. must return a function, not "):
        evaluate.check_gif(agent._replace(make_env=lambda *_: env), tmp_path / "no.gif")


@pytest.mark.parametrize("path", ["episode.png", "nowhere/episode.gif", "."])
def test_a_gif_that_cannot_be_written_is_told_before_an_episode_is_played(
    path, folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate_PPO_trXL.py", str(folder), f"GIF={path}"])
    monkeypatch.delattr(evaluate, "play")
    with pytest.raises(SystemExit, match=r"^error: GIF: "):
        evaluate.main()
    assert not list(tmp_path.iterdir())


def test_an_episode_that_does_not_end_is_told_after_so_many_steps(folder):
    agent = evaluate.load_agent(folder)
    long = agent._replace(config={**agent.config, "ENV_KWARGS": {"memory_length": 200}})
    with pytest.raises(ConfigError, match="has not ended after MAX_STEPS=100"):
        evaluate.play(long, 4, jax.random.key(0), 100)
    assert len(evaluate.play(long, 4, jax.random.key(0), 300)["returned_episode_lengths"]) == 4


def test_parameters_that_are_not_finite_are_refused(folder, tmp_path):
    for name in ("config", "params"):
        shutil.copy(folder / f"0_{name}.npy", tmp_path)
    params = np.load(tmp_path / "0_params.npy", allow_pickle=True).item()
    params["params"]["critic"]["Dense_2"]["bias"][:] = np.nan
    np.save(tmp_path / "0_params.npy", params)
    with pytest.raises(ConfigError, match="not all parameters are finite; it diverged"):
        evaluate.load_agent(tmp_path)


def copy_of(folder, target, seed=0):
    """Copies an agent to another folder and seed."""
    target.mkdir(exist_ok=True)
    for name in ("config", "params"):
        shutil.copy(folder / f"0_{name}.npy", target / f"{seed}_{name}.npy")
    return target


def test_an_agent_that_is_not_there_is_one_line_with_those_that_are(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"there is no <seed>_params.npy in"):
        evaluate.load_agent(tmp_path, 3)
    for seed in (7, 12):
        copy_of(folder, tmp_path, seed)
    with pytest.raises(ConfigError, match="has no agent of seed 3, but of 7, 12"):
        evaluate.load_agent(tmp_path, 3)
    assert evaluate.load_agent(tmp_path).config["ENV_NAME"] == "MemoryChain-bsuite"


def test_the_seeds_that_are_there_are_played_and_the_first_is_drawn(folder, tmp_path, monkeypatch):
    root = tmp_path / "LR=0.1"  # a folder, not a setting
    for seed in (12, 7):
        copy_of(folder, root, seed)
    for name in ("best", "0-best", "7_old"):  # no seeds
        shutil.copy(folder / "0_params.npy", root / f"{name}_params.npy")
    played = []
    monkeypatch.setattr(evaluate, "evaluate", lambda _, x: played.append((x["seed"], x["GIF"])))
    monkeypatch.setattr(sys, "argv", ["evaluate_PPO_trXL.py", str(root), "GIF=a.gif"])
    evaluate.main()
    assert played == [(7, "a.gif"), (12, "")]
    monkeypatch.setattr(sys, "argv", ["evaluate_PPO_trXL.py", str(root / "12_params.npy")])
    evaluate.main()
    assert played[2:] == [(12, "")]
    assert evaluate.load_agent(root / "12_params.npy").config["NUM_ENVS"] == CHAIN["NUM_ENVS"]
    with pytest.raises(ConfigError, match="has no agent of seed '7', but of 7, 12"):
        evaluate.load_agent(root, seed="7")
    assert [start.params.keys() for start in read_start(root, [7, 12])] == [{"params"}] * 2
    with pytest.raises(ConfigError, match=r"PARAMS: .* has no agent of seed 0, but of 7, 12"):
        read_start(root, [0])
    assert len(read_start(root / "best_params.npy", [0, 1])) == 2


def of_kind(kind):
    return lambda params: jax.tree.map(lambda x: x.astype(kind), params)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("params", of_kind(int), "0_params.npy holds no parameters"),
        ("params", of_kind(str), "0_params.npy holds no parameters"),
        ("params", lambda _: {"LR": 0.1, "gating": True}, "0_params.npy holds no parameters"),
        ("params", lambda _: {"normalizer": 3}, "0_params.npy holds no parameters"),
        ("params", lambda x: jax.tree.map(lambda y: y * np.nan, x), "not all parameters are finit"),
        ("params", lambda x: {"params": {"actor": x["params"]["actor"]}}, "does not fit 0_config"),
        ("config", lambda _: {"params": {}}, "0_config.npy: unknown config key 'params'.* another"),
        ("config", lambda x: {**x, "NEW": 1}, "0_config.npy: unknown config key 'NEW'.* another"),
        ("config", lambda x: {**x, "ENV_NAME": "New-v9"}, "0_config.npy: unknown env.* another"),
        ("config", lambda x: {**x, "ALGORITHM": []}, "was trained by \\[\\], which is none of PPO"),
    ],
)
def test_a_file_of_something_else_is_named(file, change, message, folder, tmp_path):
    path = copy_of(folder, tmp_path) / f"0_{file}.npy"
    np.save(path, change(np.load(path, allow_pickle=True).item()))
    with pytest.raises(ConfigError, match=message) as error:
        evaluate.load_agent(tmp_path)
    assert "\n" not in str(error.value)


def test_parameters_of_another_precision_are_taken_as_float32(folder, tmp_path):
    path = copy_of(folder, tmp_path) / "0_params.npy"
    np.save(path, of_kind(np.float64)(np.load(path, allow_pickle=True).item()))
    evaluate.load_agent(tmp_path)
    (start,) = read_start(path, [5])
    assert {x.dtype for x in jax.tree.leaves(start)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("obs", "done", "message"),
    [
        (jnp.zeros((2, 4)), jnp.zeros(2, bool), r"obs must have the shape \(2, 3\), not \(2, 4\)"),
        (jnp.zeros(3), jnp.zeros(2, bool), r"obs must have the shape \(2, 3\), not \(3,\)"),
        (jnp.zeros((2, 3)), False, r"done must have the shape \(2,\), not \(\)"),
    ],
)
def test_an_observation_of_another_shape_is_named(obs, done, message, folder):
    agent = evaluate.load_agent(folder)
    with pytest.raises(ConfigError, match=message):
        agent.act(agent.initial_memory(2), obs, done, jax.random.key(0))


def test_files_that_do_not_fit_together_are_one_line(folder, tmp_path):
    for name in ("config", "params"):
        shutil.copy(folder / f"0_{name}.npy", tmp_path)
    config = np.load(tmp_path / "0_config.npy", allow_pickle=True).item()
    np.save(tmp_path / "0_config.npy", {**config, "num_layers": 3})
    with pytest.raises(ConfigError, match=r"0_params.npy does not fit 0_config.npy"):
        evaluate.load_agent(tmp_path)
    (tmp_path / "0_params.npy").write_bytes(b"something else")
    with pytest.raises(ConfigError, match=r"0_params.npy is cut off or not a run's file"):
        evaluate.load_agent(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage:"),
        (["nowhere"], "error: there is no <seed>_params.npy in nowhere"),
        (["LR=0.1"], "usage:"),
        (["nowhere", "EVAL_SEED=4294967295"], "error: EVAL_SEED must be from 0 to 4294967294"),
        (["nowhere", "EPISODES=1e18"], "error: EPISODES must be from 1 to 100000000, not"),
        (["nowhere", "POLICY=best"], "error: POLICY must be one of sampled, greedy, random"),
        (["nowhere", "seed=1.5"], "error: seed must be a whole number or None, not 1.5"),
        (["nowhere", "MAX_STEPS=0"], "error: MAX_STEPS must be at least 1"),
        (["nowhere", "EPISODES=0"], "error: EPISODES must be from 1 to 100000000, not 0"),
        (["nowhere", "EPISODE=1"], "error: unknown config key 'EPISODE'; did you mean EPISODES"),
    ],
)
def test_bad_input_is_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate_PPO_trXL.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        evaluate.main()
    assert exit.value.code.startswith(message)
    assert "\n" not in exit.value.code


@pytest.mark.parametrize(
    ("played", "drawn"), [(["train", "held_out"], "train"), (["held_out"], "held_out")]
)
def test_what_is_drawn_is_of_the_part_of_the_rulesets_played_first(played, drawn, monkeypatch):
    config = {"ENV_NAME": "x", "ENV_KWARGS": {"held_out": 0.1, "split": "train"}}
    agents = {"played": [], "drawn": []}
    for name, given in {
        "load_agent": Agent(
            None, None, config, None, lambda *_: SimpleNamespace(episodes_per_trial=2)
        ),
        "splits_to_play": played,
        **dict.fromkeys(["check_gif", "check_writable", "report", "plot_trials"]),
        "enough_episodes": 1000,
    }.items():
        monkeypatch.setattr(evaluate, name, lambda *_, given=given, **__: given)
    for name, kind in (("play", "played"), ("save_gif", "drawn")):

        def seen(agent, *_, kind=kind):
            agents[kind].append(agent.config["ENV_KWARGS"]["split"])
            return 0.0

        monkeypatch.setattr(evaluate, name, seen)
    asked = {"GIF": "a.gif", "PLOT": "a.png", "SPLIT": None}
    defaults = {name: key.default for name, key in evaluate.OPTIONS.items()}
    evaluate.evaluate("folder", defaults | asked)
    assert agents == {"played": played, "drawn": [drawn]}


@pytest.mark.parametrize(
    ("per_trial", "enough"), [(1, 1000), (2, 1000), (5, 1000), (6, 1200), (25, 2500)]
)
def test_unless_told_it_plays_a_thousand_or_of_trials_whole_hundreds(per_trial, enough):
    env = SimpleNamespace(episodes_per_trial=per_trial)
    agent = Agent(None, None, {}, None, lambda *_: env)
    assert evaluation.enough_episodes(agent) == enough


def test_trials_without_returns_by_episode_have_nothing_to_plot():
    toys = Path(__file__).with_name("toys.py")
    config = PPO.check({**SMALL, "ENV_NAME": f"{toys}:Quest"})
    agent = Agent(None, None, config, None, make_env)
    assert evaluate.splits_to_play(agent, {"SPLIT": None, "PLOT": None}) == ["train"]
    with pytest.raises(ConfigError, match="Quest has no metrics trial_return"):
        evaluate.splits_to_play(agent, {"SPLIT": None, "PLOT": "a.png"})


def test_a_broken_texture_file_of_craftax_is_not_read(tmp_path, monkeypatch, capsys):
    constants = importlib.import_module("craftax.craftax_classic.constants")
    (tmp_path / "cache.pbz2").write_bytes(b"")
    monkeypatch.setattr(constants, "TEXTURE_CACHE_FILE", str(tmp_path / "cache.pbz2"))
    constants.load_all_textures.cache_clear()
    craftax.textures.cache_clear()
    make_env(PPO.check({**SMALL, "ENV_NAME": "Craftax-Classic-Symbolic-v1"}), 1).renderer()
    assert capsys.readouterr().out == "making Craftax's textures ...\n"
    assert [path.name for path in tmp_path.iterdir()] == ["cache.pbz2"]
