"""Configs: accepted values, and one line per mistake that says what to change."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import OWN_ENVIRONMENT

import trxl.config
from trxl.config import SETTINGS, check_values, num_updates, of_saved_run, read_overrides
from trxl.environments import make_single_env
from trxl.errors import ConfigError
from trxl.runs.run import resolve_config
from trxl.search import main as search

import train_Muesli_trXL
import train_PPO_trXL
import train_PPO_trXL_pmap
from evaluate_PPO_trXL import load_agent
from trainer_Muesli_trXL import MUESLI
from trainer_PPO_trXL import PPO, make_train


def test_the_pmap_script_has_the_published_craftax_config():
    config = PPO.check(train_PPO_trXL_pmap.config, num_devices=8)
    published = {
        **{"LR": 2e-4, "NUM_ENVS": 1024, "NUM_STEPS": 128, "TOTAL_TIMESTEPS": 10**9},
        **{"UPDATE_EPOCHS": 4, "NUM_MINIBATCHES": 8, "GAMMA": 0.999, "GAE_LAMBDA": 0.8},
        **{"CLIP_EPS": 0.2, "ENT_COEF": 0.002, "VF_COEF": 0.5, "MAX_GRAD_NORM": 1.0},
        **{"ACTIVATION": "relu", "ANNEAL_LR": True, "qkv_features": 256, "EMBED_SIZE": 256},
        **{"hidden_layers": 256, "num_heads": 8, "num_layers": 2, "WINDOW_MEM": 128},
        **{"WINDOW_GRAD": 64, "gating": True, "gating_bias": 2.0},
    }
    assert published.items() <= config.items()
    assert num_updates(config) == 7629


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("NUM_ENVS=32", 32),
        ("TOTAL_TIMESTEPS=1e6", 1_000_000),
        ("TOTAL_TIMESTEPS=2_000_000", 2_000_000),
        ("LR=3e-4", 3e-4),
        ("LR=1", 1.0),
        ("ANNEAL_LR=false", False),
        ("ENV_NAME=CartPole-v1", "CartPole-v1"),
        ("BOOTSTRAP_TRUNCATED=None", None),
        ("BOOTSTRAP_TRUNCATED=True", True),
        ("ENV_KWARGS={'memory_length': 20}", {"memory_length": 20}),
        ('ENV_KWARGS={"always_diamond": false}', {"always_diamond": False}),
        ("RESULTS_DIR=a=b", "a=b"),
    ],
)
def test_an_override_is_read_by_its_keys_type(argument, value):
    config = PPO.check({"NUM_MINIBATCHES": 1, **read_overrides([argument], PPO.keys)})
    key = argument.partition("=")[0]
    assert config[key] == value
    assert type(config[key]) is type(value)


WRONG = [
    ({"NUM_ENV": 4}, "did you mean NUM_ENVS"),
    ({"learning_rate": 4}, "unknown config key 'learning_rate'"),
    ({"NUM_ENVS": 4.5}, "NUM_ENVS must be a whole number, not 4.5"),
    ({"NUM_ENVS": "4"}, "NUM_ENVS must be a whole number, not '4'"),
    ({"NUM_ENVS": True}, "NUM_ENVS must be a whole number, not True"),
    ({"NUM_ENVS": 0}, "NUM_ENVS must be at least 1, not 0"),
    ({"LR": "fast"}, "LR must be a number, not 'fast'"),
    ({"LR": float("nan")}, "LR must be a number, not nan"),
    ({"LR": -1e-3}, "LR must be at least 0"),
    ({"LR": np.ones(2)}, "LR must be a number"),
    ({"GAMMA": 1.5}, "GAMMA must be from 0 to 1, not 1.5"),
    ({"gating": 1}, "gating must be True or False, not 1"),
    ({"ENV_KWARGS": "a"}, "ENV_KWARGS must be a dict"),
    ({"ENV_NAME": None}, "ENV_NAME must be a text, not None"),
    ({"ACTIVATION": "gelu"}, "ACTIVATION must be one of relu, tanh, not 'gelu'"),
    ({"RESET_STRATEGY": "never"}, "RESET_STRATEGY must be one of auto, optimistic, pool"),
    ({"VALUE_BINS": 1}, "VALUE_BINS must be from 2 to 1000000, not 1"),
    (
        {"VALUE_BINS": 51, "NORMALIZE_VALUE": False},
        "VALUE_BINS=51 needs NORMALIZE_VALUE=True, not False",
    ),
    ({"VALUE_BINS": 51, "CLIP_VALUE": True}, "VALUE_BINS=51 needs CLIP_VALUE=False, not True"),
    ({"num_heads": 3}, "num_heads must divide qkv_features: 3 does not divide 64"),
    ({"EMBED_SIZE": 33}, "must divide EMBED_SIZE: 2 does not divide 33"),
    ({"WINDOW_GRAD": 50}, "WINDOW_GRAD must divide NUM_STEPS: 50 does not divide 64"),
    ({"NUM_MINIBATCHES": 7}, "NUM_MINIBATCHES must divide NUM_ENVS: 7 does not divide 64"),
    ({"TOTAL_TIMESTEPS": 100}, "TOTAL_TIMESTEPS = 100 is less than one rollout"),
    (
        {"RESET_STRATEGY": "optimistic", "RESET_RATIO": 24},
        "RESET_RATIO must divide NUM_ENVS: 24 does not divide 64",
    ),
    ({"seed": -1}, "seed must be from 0"),
    ({"WINDOW_MEM": -1}, "WINDOW_MEM must be at least 0"),
    (None, "a config must be a dict of keys and values, not None"),
    ([("LR", 1e-3)], "a config must be a dict of keys and values, not [('LR', 0.001)]"),
    (SimpleNamespace(LR=1e-3), "a config must be a dict of keys and values, not namespace"),
    ({3: 4}, "unknown config key 3"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(changes) for changes, _ in WRONG])
def test_a_wrong_config_is_one_line_that_says_what_to_change(changes, message):
    with pytest.raises(ConfigError) as error:
        PPO.check(changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("NUM_ENVS", "'NUM_ENVS' is not of the form KEY=VALUE; put quotes around a value with sp"),
        ("NUMENVS=3", "did you mean NUM_ENVS"),
        ("NUM_ENVS=many", "NUM_ENVS=many is not a whole number"),
        ("ENV_KWARGS={oops", "ENV_KWARGS={oops is not a dict"),
        ("gating=yes", "gating=yes is not True or False"),
        ("@" + "x" * 400, "no settings '@xxx"),
        ("@muesli-memory-s8", "@muesli-memory-s8: unknown config key 'REWARD_COEF'"),
        ("@muesli-memory-s8", "@muesli-... is for train_Muesli_trXL.py, or search_trXL.py with"),
    ],
)
def test_a_wrong_argument_is_one_line_that_says_what_to_change(argument, message):
    with pytest.raises(ConfigError) as error:
        read_overrides([argument], PPO.keys)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ENV_KWARGS={'a: 1}", "No closing quotation"),
        (b"# \xe9", "'utf-8' codec can't decode"),
        (b"LR = 1e-3", "'LR' is not of the form KEY=VALUE; put quotes"),
        (b"ENV_KWARGS={'a': 1}", "'1}' is not of the form KEY=VALUE; put quotes"),
        (b"LEARNING=1", "unknown config key 'LEARNING'.*; @muesli-... is .* others are for PPO$"),
    ],
)
def test_settings_of_ones_own_are_named_where_they_are_wrong(
    content, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(trxl.config, "SETTINGS", tmp_path)
    (tmp_path / "own.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=f"^@own: {message}"):
        read_overrides(["@own"], PPO.keys)
    (tmp_path / "own.txt").write_text("\ufeff# as Windows writes it\r\nLR=1\r\n", "utf-8")
    assert read_overrides(["@own"], PPO.keys) == {"LR": 1}


@pytest.mark.parametrize("name", ["NUM_ENVS", "TOTAL_TIMESTEPS", "gating", "ENV_KWARGS"])
def test_what_shapes_the_program_is_not_swept_by_vmap(name):
    def train(value):
        given = {"memory_length": value} if name == "ENV_KWARGS" else value
        return make_train({name: given})(jax.random.key(0))

    with pytest.raises(ConfigError, match=f"{name} shapes the program, so jax.vmap can't sweep it"):
        jax.vmap(train)(jnp.arange(2))


def test_of_what_is_swept_each_run_has_one_number():
    with pytest.raises(ConfigError, match="LR must be a number, not VmapTracer"):
        jax.vmap(lambda rate: make_train({"LR": rate})(jax.random.key(0)))(jnp.ones((2, 3)))


def test_a_home_folder_is_found_in_every_key_that_is_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.py").write_text(OWN_ENVIRONMENT)
    paths = [name for name, key in PPO.keys.items() if key.kind is str and not key.choices]
    assert {"RESULTS_DIR", "RESUME", "PARAMS", "ENV_NAME"} <= set(paths)
    for given in ("~/a", "$HOME/a", "${HOME}/a"):  # quoted, or from a settings file
        checked = check_values(read_overrides([f"{x}={given}" for x in paths], PPO.keys), PPO.keys)
        assert {checked[name] for name in paths} == {f"{tmp_path}/a"}
    assert make_single_env("~/own.py:Corridor", {}).obs_size == 1
    for home in ("~", "$HOME"):
        with pytest.raises(ConfigError, match=f"no run in {tmp_path}/nowhere"):
            resolve_config({}, {"RESUME": f"{home}/nowhere"}, PPO)
        with pytest.raises(ConfigError, match=f"no search in {tmp_path}/nowhere"):
            search.start({}, {}, [f"RESUME={home}/nowhere"])
        with pytest.raises(ConfigError, match=f"_params.npy in {tmp_path}/nowhere"):
            load_agent(f"{home}/nowhere")


@pytest.mark.parametrize("path", sorted(SETTINGS.glob("*four-corners.txt")), ids=lambda x: x.stem)
def test_a_file_that_settings_name_is_found_from_anywhere(path, tmp_path, monkeypatch):
    pytest.importorskip("xminigrid")
    monkeypatch.chdir(tmp_path)
    keys = MUESLI.keys if path.stem.startswith("muesli-") else PPO.keys
    given = read_overrides([f"@{path.stem}"], keys)
    env = make_single_env(given["ENV_NAME"], given["ENV_KWARGS"])
    assert env.episodes_per_trial == 6


def test_devices_must_divide_the_environments_and_their_shares_the_minibatches():
    with pytest.raises(ConfigError, match="the number of devices must divide NUM_ENVS"):
        PPO.check({}, num_devices=3)
    with pytest.raises(ConfigError, match="NUM_MINIBATCHES must divide NUM_ENVS / 16 devices"):
        PPO.check({"NUM_MINIBATCHES": 8}, num_devices=16)


@pytest.mark.parametrize("number", [np.int64(8), np.float32(8), np.array(8)])
def test_numpys_numbers_are_numbers(number):
    assert PPO.check({"num_heads": number})["num_heads"] == 8


@pytest.mark.parametrize("path", sorted(SETTINGS.glob("*.txt")), ids=lambda path: path.stem)
def test_settings_are_read_and_can_be_run_and_overridden(path):
    learner, script = PPO, train_PPO_trXL
    if path.stem.startswith("muesli-"):
        learner, script = MUESLI, train_Muesli_trXL
    given = read_overrides([f"@{path.stem}", "seed=7"], learner.keys)
    assert learner.check({**script.config, **given})["seed"] == 7
    assert len(given) > 5


@pytest.mark.parametrize(
    "overrides",
    [{}, {"NUM_STEPS": 32}, {"NUM_STEPS": 7, "NUM_ENVS": 12}, {"WINDOW_GRAD": 16, "LR": 1e-3}],
)
def test_a_script_and_make_train_with_the_same_overrides_train_the_same_agent(overrides):
    for algorithm, script in ((PPO, train_PPO_trXL), (MUESLI, train_Muesli_trXL)):
        assert algorithm.check({**script.config, **overrides}) == algorithm.check(overrides)


def test_what_was_not_set_follows_what_was():
    def derived(algorithm=PPO, devices=1, **given):
        config = algorithm.check(given, devices)
        return [config[name] for name in ("WINDOW_GRAD", "WINDOW_MEM", "NUM_MINIBATCHES")]

    assert derived() == [32, 32, 8]
    assert derived(NUM_STEPS=32) == [16, 16, 8]
    assert derived(NUM_STEPS=7, NUM_ENVS=12) == [7, 7, 6]
    assert derived(WINDOW_GRAD=8) == [8, 8, 8]
    assert derived(WINDOW_MEM=0, NUM_MINIBATCHES=1) == [32, 0, 1]
    assert derived(NUM_ENVS=24, devices=4) == [32, 32, 6]
    assert derived(MUESLI, NUM_ENVS=48) == [32, 32, 24]
    assert derived(MEMORY="gru")[1] == 1


def test_a_config_that_was_saved_before_a_key_was_there_means_what_it_did():
    saved = {"EPISODE_END": "step", "LR": 1.0}
    before = {"NORMALIZE_VALUE": False, "ADVANTAGE_FLOOR": 0}
    assert of_saved_run(saved, PPO.keys) == before | saved
    assert of_saved_run({}, MUESLI.keys) == {"EPISODE_END": "none", "ADVANTAGE_FLOOR": 0}
