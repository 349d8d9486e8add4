"""Suites beyond Gymnax and Craftax equal their own APIs through the wrappers.

They are in requirements-envs.txt. A suite that is not installed is skipped
unless ALL_SUITES is set.
"""

import importlib
import importlib.util
import os
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import QUICK, save_untrained

from trxl.distributions import sample_uniformly
from trxl.environments import suites
from trxl.errors import ConfigError
from trxl.spaces import Box, Discrete, MultiDiscrete, mask_size, obs_space, unpack_obs
from trxl.training import collect, make_init_and_update

import trainer_PPO_trXL as trainer
from evaluate_PPO_trXL import load_agent, play, random_agent
from trainer_PPO_trXL import PPO
from transformerXL import make_network
from wrappers import make_env

pytestmark = pytest.mark.slow

STEPS = 300
PACKAGES = ("brax", "jaxmarl", "jumanji", "navix", "xminigrid")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def suite(name):
    """Returns a mark that skips a test if the suite is not installed, unless ALL_SUITES is set."""
    missing = name in MISSING and not os.environ.get("ALL_SUITES")
    return pytest.mark.skipif(missing, reason=f"{name} is not installed")


def cases(*marks, **by_suite):
    """Returns parameters (name, ENV_KWARGS) with their suite's mark, and more marks."""
    return [
        pytest.param(f"{name}/{env}", kwargs, marks=[suite(name), *marks], id=f"{name}/{env}")
        for name, envs in by_suite.items()
        for env, kwargs in envs.items()
    ]


@pytest.fixture(scope="session", autouse=True)
def quiet_suites():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def ruleset_file(tmp_path_factory):
    """Writes two rulesets: stand beside the ball, or beside the square."""
    path = tmp_path_factory.mktemp("rulesets") / "two_goals.bz2"
    constants = importlib.import_module("xminigrid.core.constants")
    goals = importlib.import_module("xminigrid.core.goals")
    rules = importlib.import_module("xminigrid.core.rules")
    tiles, colors = constants.Tiles, constants.Colors
    objects = jnp.stack(
        [
            constants.TILES_REGISTRY[tiles.BALL, colors.RED],
            constants.TILES_REGISTRY[tiles.SQUARE, colors.BLUE],
        ]
    )
    content = {
        "goals": jnp.stack([goals.AgentNearGoal(tile=tile).encode() for tile in objects]),
        "rules": jnp.tile(rules.EmptyRule().encode()[None, None], (2, 1, 1)),
        "init_tiles": jnp.tile(objects[None], (2, 1, 1)),
        "num_rules": jnp.zeros(2, jnp.uint8),
    }
    importlib.import_module("xminigrid.benchmarks").save_bz2_pickle(content, str(path))
    return str(path)


def make(name, num_envs=2, **changes):
    return make_env(PPO.check({"ENV_NAME": name, "NUM_MINIBATCHES": 1, **changes}), num_envs)


def start(name, env_kwargs, **changes):
    """Returns config, environment, network, first state and the jitted rollout."""
    names = {"ENV_NAME": name, "ENV_KWARGS": env_kwargs, "TOTAL_TIMESTEPS": 1e6}
    config = PPO.check({**QUICK, **names, **changes})
    env = make_env(config, config["NUM_ENVS"])
    network = make_network(config, env.action_space, obs_space(env))
    state = make_init_and_update(config, PPO)[0](jax.random.key(0))
    roll = jax.jit(lambda state: collect(config, env, network, PPO, state))
    return config, env, network, state, roll


def record(env, steps=STEPS):
    """Plays random legal actions: keys, obs (T+1, B, .), actions, rewards, dones, infos (T, B)."""

    def run(keys):
        obs, state = env.reset(keys[0])

        def step(carry, keys):
            obs, state = carry
            action = sample_uniformly(env.action_space, obs, keys)
            next_obs, state, reward, done, info = env.step(keys, state, action)
            return (next_obs, state), (next_obs, action, reward, done, info)

        _, (later, *rest) = jax.lax.scan(step, (obs, state), keys[1:])
        return jnp.concatenate([obs[None], later]), *rest

    keys = jax.random.split(jax.random.key(7), (steps + 1, env.num_rows))
    return keys, *jax.device_get(jax.jit(run)(keys))


class OwnBrax:
    def __init__(self, name, kwargs):
        envs = importlib.import_module("brax.envs")
        self.env = envs.create(name, auto_reset=False, **kwargs)

    def reset(self, key):
        state = self.env.reset(key)
        return state.obs, state

    def step(self, key, state, action):
        state = self.env.step(state, action)
        truncated = state.info["truncation"] > 0
        return state.obs, state, state.reward, (state.done > 0) & ~truncated, truncated


class OwnJumanji:
    def __init__(self, name, kwargs):
        self.env = importlib.import_module("jumanji").make(name, **kwargs)

    def observe(self, timestep):
        """Returns the mask, then bool arrays, then the others, in the order of Jumanji's fields."""
        fields = timestep.observation._asdict()
        if isinstance(self.env, importlib.import_module("jumanji").environments.TSP):
            city = fields["position"]
            one_hot = jax.nn.one_hot(city, 20, dtype=bool)
            fields["position"] = one_hot, fields["coordinates"][city]
        parts = [fields.pop("action_mask")] if "action_mask" in fields else []
        rest = jax.tree.leaves(list(fields.values()))
        parts += [x for x in rest if x.dtype == bool] + [x for x in rest if x.dtype != bool]
        return jnp.concatenate([x.reshape(-1).astype(jnp.float32) for x in parts])

    def reset(self, key):
        state, timestep = self.env.reset(key)
        return self.observe(timestep), state

    def step(self, key, state, action):
        mask_shape = self.env.observation_spec.generate_value().action_mask.shape
        choices = self.env.action_spec.shape
        if choices and not action.shape:  # one action encodes a combination of choices
            action = jnp.array(jnp.unravel_index(action, mask_shape))
        state, timestep = self.env.step(state, action)
        ends = timestep.step_type == 2
        alive = jnp.max(timestep.discount) > 0
        return (
            *(self.observe(timestep), state, jnp.sum(timestep.reward)),
            *(ends & ~alive, ends & alive),
        )


class OwnNavix:
    def __init__(self, name, kwargs):
        self.env = importlib.import_module("navix").make(name, **kwargs)

    def reset(self, key):
        timestep = self.env.reset(key)
        return timestep.observation.ravel().astype(jnp.float32), timestep

    def step(self, key, timestep, action):
        new = self.env.step(timestep, action)
        ends = new.step_type == 2, new.step_type == 1
        return new.observation.ravel().astype(jnp.float32), new, new.reward, *ends


class OwnXMiniGrid:
    def __init__(self, name, kwargs):
        self.env, self.params = importlib.import_module("xminigrid").make(name, **kwargs)

    def observe(self, timestep):
        picture = timestep.observation
        direction = timestep.state.agent.direction
        tiles = picture[..., 0, None] == jnp.arange(13)
        colors = picture[..., 1, None] == jnp.arange(12)
        parts = [tiles.ravel(), colors.ravel(), direction == jnp.arange(4)]
        return jnp.concatenate(parts).astype(jnp.float32)

    def reset(self, key):
        timestep = self.env.reset(self.params, key)
        return self.observe(timestep), timestep

    def step(self, key, timestep, action):
        new = self.env.step(self.params, timestep, action)
        terminated = new.last() & (new.discount == 0)
        return self.observe(new), new, new.reward, terminated, new.last() & ~terminated


class OwnJaxMARL:
    def __init__(self, name, kwargs):
        scenarios = importlib.import_module("jaxmarl.environments.smax.smax_env")
        kwargs = {key: scenarios.map_name_to_scenario(value) for key, value in kwargs.items()}
        self.env = importlib.import_module("jaxmarl").make(name, **kwargs)

    def observe(self, obs, state):
        longest = max(obs[agent].size for agent in self.env.agents)
        rows = []
        for index, agent in enumerate(self.env.agents):
            row = jnp.zeros(longest).at[: obs[agent].size].set(obs[agent].ravel())
            row = jnp.append(row, jnp.arange(self.env.num_agents) == index)
            rows.append(jnp.concatenate([self.legal(agent, state), row]))
        return jnp.stack(rows)

    def legal(self, agent, state):
        sizes = {a: self.env.action_space(a).n for a in self.env.agents}
        try:
            return self.env.get_avail_actions(state)[agent].astype(jnp.float32)
        except NotImplementedError:
            if len(set(sizes.values())) == 1:
                return jnp.zeros(0)
            return (jnp.arange(max(sizes.values())) < sizes[agent]).astype(jnp.float32)

    def reset(self, key):
        obs, state = self.env.reset(key)
        return self.observe(obs, state), state

    def step(self, key, state, action):
        actions = dict(zip(self.env.agents, action, strict=True))
        obs, state, reward, done, _ = self.env.step_env(key, state, actions)
        reward = jnp.stack([reward[agent] for agent in self.env.agents])
        return self.observe(obs, state), state, reward, done["__all__"], jnp.bool_(False)


OWN = {
    "brax": OwnBrax,
    "jumanji": OwnJumanji,
    "navix": OwnNavix,
    "xminigrid": OwnXMiniGrid,
    "jaxmarl": OwnJaxMARL,
}

REPLAYED = cases(
    jumanji={"Snake-v1": {}, "Minesweeper-v0": {}, "TSP-v1": {}},
    navix={"Navix-LavaGapS5-v0": {}},
    xminigrid={"MiniGrid-MemoryS16": {}},
    jaxmarl={"MPE_simple_speaker_listener_v4": {}},
) + cases(
    pytest.mark.weekly,
    brax={"inverted_pendulum": {"episode_length": 12, "backend": "spring"}},
    jumanji={"LevelBasedForaging-v0": {}, "Game2048-v1": {}},
    navix={"Navix-DoorKey-5x5-v0": {"max_steps": 250}},
    xminigrid={"MiniGrid-EmptyRandom-5x5": {"max_steps": 40}},
    jaxmarl={"HeuristicEnemySMAX": {"scenario": "3m"}},
)


@pytest.mark.parametrize(("name", "env_kwargs"), REPLAYED)
def test_it_replays_as_through_the_suites_own_api_up_to_the_first_reset(name, env_kwargs):
    """Observations, rewards and ends equal the suite's, the final observation included."""
    env = make(name, ENV_KWARGS=env_kwargs)
    keys, obs, actions, reward, done, info = record(env)
    agents = env.num_agents or 1
    suite_name, _, bare = name.partition("/")
    own = OWN[suite_name](bare, env_kwargs)

    def run(keys, actions):
        first, state = own.reset(keys[0])

        def step(state, inputs):
            # A step's key is split as in Gymnax.
            obs, state, *rest = own.step(jax.random.split(inputs[0])[0], state, inputs[1])
            return state, (obs, *rest)

        _, rest = jax.lax.scan(step, state, (keys[1:], actions))
        return first, *rest

    by_env = actions.reshape(STEPS, 2, agents, *actions.shape[2:])
    by_env = by_env[:, :, 0] if env.num_agents is None else by_env
    run = jax.jit(jax.vmap(run, in_axes=(1, 1)))
    first, *rest = jax.device_get(run(keys[:, ::agents], by_env))
    assert np.isfinite(reward).all()
    ended = 0
    for b in range(2):
        rows = slice(b * agents, (b + 1) * agents)
        expected_obs, expected_reward, terminated, truncated = (x[b] for x in rest)
        ends = terminated | truncated
        end = int(np.argmax(ends)) if ends.any() else STEPS
        tolerance = {"rtol": 1e-5, "atol": 1e-5}
        expected_first = first[b].reshape(agents, -1)
        np.testing.assert_allclose(obs[0, rows], expected_first, **tolerance)
        shape = (STEPS, agents, -1)
        expected_obs = expected_obs.reshape(shape)
        np.testing.assert_allclose(obs[1 : end + 1, rows], expected_obs[:end], **tolerance)
        np.testing.assert_allclose(
            reward[: end + 1, rows], expected_reward.reshape(STEPS, -1)[: end + 1], **tolerance
        )
        assert not done[:end, rows].any()
        if end < STEPS:
            ended += 1
            assert done[end, rows].all()
            assert (info["terminated"][end, rows] == terminated[end]).all()
            assert (info["truncated"][end, rows] == truncated[end]).all()
            assert (info["returned_episode_lengths"][end, rows] == end + 1).all()
            if env.can_truncate:
                final = info["final_observation"][end, rows]
                np.testing.assert_allclose(final, expected_obs[end], **tolerance)
    # Snake masks only crashes, so a random agent may take longer.
    assert ended or bare == "Snake-v1"
    binary = obs[..., : env.num_binary]
    assert np.isin(binary, [0, 1]).all()


TRAINED = cases(jumanji={"JobShop-v0": {}}) + cases(
    pytest.mark.weekly,
    brax={"inverted_pendulum": {"backend": "spring"}},
    navix={"Navix-DoorKey-5x5-v0": {"observation_fn": "categorical"}},
    jaxmarl={"MPE_simple_world_comm_v3": {"action_type": "Continuous"}},
)


@pytest.mark.parametrize(("name", "env_kwargs"), TRAINED)
def test_two_updates_have_finite_losses(name, env_kwargs):
    config = {**QUICK, "ENV_NAME": name, "ENV_KWARGS": env_kwargs, "TOTAL_TIMESTEPS": 128}
    metrics = jax.jit(trainer.make_train(config))(jax.random.key(0))["metrics"]
    for metric in ("total_loss", "value_loss", "entropy", "grad_norm", "param_norm"):
        assert metrics[metric].shape == (2,)
        assert np.isfinite(metrics[metric]).all(), metric


@pytest.mark.parametrize(
    ("name", "env_kwargs"),
    cases(jumanji={"Game2048-v1": {}})
    + cases(pytest.mark.weekly, jaxmarl={"HeuristicEnemySMAX": {"scenario": "3m"}}),
)
def test_no_action_of_a_hundred_thousand_is_illegal_and_the_loss_uses_the_same_mask(
    name, env_kwargs
):
    config, env, network, state, roll = start(name, env_kwargs, NUM_ENVS=64, NUM_STEPS=400)
    steps, forbidden = 0, 0.0
    while steps < 100_000:
        state, collected = roll(state)
        trajectory = collected.trajectory
        obs = unpack_obs(trajectory.obs, obs_space(env))
        mask = np.asarray(obs[..., : mask_size(env.action_space)])
        taken = np.take_along_axis(mask, np.asarray(trajectory.action)[..., None], axis=-1)
        assert (taken == 1).all()
        forbidden += (mask == 0).mean()
        steps += trajectory.action.size
    assert forbidden > 0
    advantage = trainer.generalized_advantages(collected, 0.99, 0.8)
    batch = trainer.make_batch(config, collected, advantage)
    policy, _ = network.apply(
        state.train_state.params,
        *(batch.obs, batch.memory, batch.reach, config["WINDOW_GRAD"]),
        method="unroll_windows",
    )
    np.testing.assert_allclose(policy.log_prob(batch.action), batch.log_prob, atol=1e-4)


@pytest.mark.weekly
@suite("jaxmarl")
def test_dead_units_are_out_until_their_teams_episode_ends():
    name, env_kwargs = "jaxmarl/HeuristicEnemySMAX", {"scenario": "3m"}
    *_, state, roll = start(name, env_kwargs, NUM_ENVS=8, NUM_STEPS=128)
    trajectory = roll(state)[1].trajectory
    active, done = np.asarray(trajectory.active), np.asarray(trajectory.done)
    assert 0.3 < active.mean() < 0.95
    # No agent returns within an episode; all return at its end.
    assert not (active[1:] & ~active[:-1] & ~done[:-1]).any()
    assert active[1:][done[:-1]].all()
    by_team = done.reshape(128, 8, 3)
    assert (by_team == by_team[:, :, :1]).all()
    reach = np.asarray(trajectory.reach)
    assert (reach[1:][done[:-1]] == 0).all()
    assert (reach[1:][~done[:-1]] > 0).all()
    # An episode is logged once, not per agent.
    assert trajectory.returned_episode.sum() == by_team[:, :, 0].sum()


def trials(ruleset_file, **changes):
    env_kwargs = {"benchmark": ruleset_file, "episodes_per_trial": 3, "max_steps": 15}
    changes = {"EPISODE_END": "none", "num_envs": 8} | changes
    return make("xminigrid/XLand-MiniGrid-R1-9x9", ENV_KWARGS=env_kwargs, **changes)


@suite("xminigrid")
def test_a_trial_keeps_its_ruleset_over_its_episodes_and_memory_ends_with_it(ruleset_file):
    env = trials(ruleset_file)

    def run(keys):
        obs, state = env.reset(keys[0])

        def step(carry, keys):
            obs, state = carry
            action = sample_uniformly(env.action_space, obs, keys)
            next_obs, state, reward, done, info = env.step(keys, state, action)
            trial = env.single_states(state)
            return (next_obs, state), (
                *(next_obs, action, reward, done, info, trial.ruleset.goal[:, 1], trial.episode),
            )

        return jax.lax.scan(step, (obs, state), keys[1:])[1]

    keys = jax.random.split(jax.random.key(3), (STEPS + 1, 8))
    obs, action, reward, done, info, goal, episode = jax.device_get(jax.jit(run)(keys))
    boundary = info["memory_boundary"]
    assert done.sum() > 100
    assert len(np.unique(goal)) == 2
    for b in range(8):
        ends = np.flatnonzero(done[:, b])
        np.testing.assert_array_equal(np.flatnonzero(boundary[:, b]), ends[2::3])
        np.testing.assert_array_equal(episode[ends, b], np.arange(1, len(ends) + 1) % 3)
        changes = np.flatnonzero(np.diff(goal[:, b])) + 1
        assert set(changes) <= set(ends[2::3])
    # A return is logged under its episode's number alone.
    names = [f"trial_return/episode_{i}" for i in (1, 2, 3)]
    assert set(names) < set(env.episode_metrics)
    by_number = np.stack([info[name] for name in names])
    number = (episode[done] - 1) % 3
    np.testing.assert_array_equal(np.argmin(np.isnan(by_number[:, done]), axis=0), number)
    assert (np.isnan(by_number[:, done]).sum(axis=0) == 2).all()
    given = np.nanmax(by_number[:, done], axis=0)
    np.testing.assert_allclose(given, info["returned_episode_returns"][done])
    # The previous action and reward survive an episode's end, not the trial's.
    encoded, last = obs[..., :6], obs[..., -1]
    np.testing.assert_array_equal(encoded[~boundary], np.eye(6)[action[~boundary]])
    np.testing.assert_array_equal(last[~boundary], reward[~boundary])
    assert (encoded[boundary] == 0).all()
    assert (last[boundary] == 0).all()
    np.testing.assert_array_equal(obs[..., -2], done)  # whether the step is an episode's first
    final = info["final_observation"]
    np.testing.assert_array_equal(final[..., :6], np.eye(6)[action])
    np.testing.assert_array_equal(final[..., -1], reward)
    assert (final[..., -2] == 0).all()


@suite("xminigrid")
@pytest.mark.parametrize("level", [0, 1])
def test_the_growing_corridor_is_minigrids_memory_task_in_its_width(level):
    GrowingCorridor = importlib.import_module("results_xminigrid.growing_corridor").GrowingCorridor
    env = GrowingCorridor(widths=(8, 16), streak=2)
    own = env.tasks[level]

    def play(key):
        keys = jax.random.split(key, 320)
        obs, theirs = own.reset(key)
        mine, state = env.start(key, jnp.int32(level), jnp.int32(0))

        def step(carry, key):
            action = jax.random.categorical(key, jnp.array([1.5, 0.5, 0.5, -9, -9, -9]))
            obs, theirs, *rest, _ = own.step(key, carry[0], action)
            mine, state, *others, _ = env.step(key, carry[1], action)
            return (theirs, state), ((obs, *rest), (mine, *others))

        _, seen = jax.lax.scan(step, (theirs, state), keys)
        return [(obs, mine), *zip(*seen, strict=True)]

    for expected, found in jax.jit(jax.vmap(play))(jax.random.split(jax.random.key(0), 16)):
        np.testing.assert_array_equal(expected, found)


@suite("xminigrid")
def test_the_corridor_grows_after_successes_in_a_row():
    GrowingCorridor = importlib.import_module("results_xminigrid.growing_corridor").GrowingCorridor
    env = GrowingCorridor(widths=(8, 16, 32), streak=2)
    next_episode = jax.jit(env.next_episode)
    _, state = env.reset(jax.random.key(0))
    levels = []
    for reward in (1, 1, 1, 0, 1, 0, 0, 1, 1, 1, 1):
        level, streak, timestep = state
        timestep = timestep.replace(reward=jnp.float32(reward))
        _, state = next_episode(jax.random.key(1), (level, streak, timestep))
        levels.append(int(state[0]))
    assert levels == [0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2]


@suite("jaxmarl")
def test_a_team_is_evaluated_by_its_episodes(tmp_path):
    save_untrained(tmp_path, ENV_NAME="jaxmarl/switch_riddle")
    for agent in (load_agent(tmp_path), random_agent(load_agent(tmp_path))):
        results = play(agent, 24, jax.random.key(0))
        assert results["returned_episode_returns"].shape == (24,)


class Attack:
    """Pickle that runs a shell command when it is loaded."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return os.system, (f"touch {self._path}",)


@suite("jaxmarl")
def test_a_folder_of_maps_cannot_run_code(tmp_path):
    with open(tmp_path / "map_buffer_0", "wb") as file:
        pickle.dump(Attack(tmp_path / "ran"), file)
    maps = {"map_size": (7, 7), "dir_path": str(tmp_path)}
    with pytest.raises(ConfigError, match="Grid-Buffer, which can run any code"):
        make("jaxmarl/jaxnav", ENV_KWARGS={"map_id": "Grid-Buffer", "map_params": maps})
    assert not (tmp_path / "ran").exists()


@suite("xminigrid")
def test_a_file_of_rulesets_cannot_run_code(tmp_path):
    import bz2

    path = tmp_path / "attack.bz2"
    with bz2.open(path, "wb") as file:
        pickle.dump({"goals": Attack(tmp_path / "ran")}, file)
    with pytest.raises(ConfigError, match=r"attack.bz2 is not a file of rulesets: .*system"):
        trials(str(path))
    assert not (tmp_path / "ran").exists()
    path.write_bytes(b"something else")
    with pytest.raises(ConfigError, match=r"attack.bz2 is not a file of rulesets"):
        trials(str(path))


@suite("xminigrid")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ENV_KWARGS": {}}, "needs rulesets.*trivial-21k"),
        ({"ENV_KWARGS": {"benchmark": "trivial"}}, "'trivial' is neither"),
        ({"ENV_KWARGS": {"viewsize": 3}}, "needs rulesets"),
        ({"RESET_STRATEGY": "pool"}, "RESET_STRATEGY=auto"),
        ({"MIRRORS": True}, "names its `mirrors`"),
        ({"ENV_KWARGS": {"benchmark": None, "view_sise": 3}}, "'view_sise'.*view_size"),
        ({"ENV_KWARGS": {"benchmark": None, "episodes_per_trial": 0}}, "episodes_per_trial must"),
    ],
)
def test_what_a_trial_cannot_be_made_of_is_one_line(changes, message, ruleset_file):
    env_kwargs = changes.get("ENV_KWARGS", {"benchmark": None})
    if "benchmark" in env_kwargs and env_kwargs["benchmark"] is None:
        env_kwargs = {**env_kwargs, "benchmark": ruleset_file}
    with pytest.raises(ConfigError, match=message) as error:
        make("XLand-MiniGrid-R1-9x9", **{**changes, "ENV_KWARGS": env_kwargs})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=suite("jumanji")) for name in ("TSP-v1", "Knapsack-v1")]
)
def test_an_environment_can_be_made_within_a_trace(name):
    def offset_action_space(offset):
        return offset + make(f"jumanji/{name}").action_space.n

    assert jax.jit(offset_action_space)(1.0) == 1.0 + make(f"jumanji/{name}").action_space.n


@pytest.mark.parametrize(
    ("name", "env_kwargs", "message"),
    [
        pytest.param(*case, marks=suite(case[0].partition("/")[0]))
        for case in [
            ("brax/ant", {"backends": "spring"}, "has no 'backends'.*episode_length.*backend"),
            ("brax/ant", {"backend": "magic"}, "can't be made with.*magic"),
            ("brax/Ant", {}, "unknown environment.*did you mean ant"),
            ("jumanji/Snake-v1", {"rows": 5}, "has no 'rows'.*num_rows"),
            ("jumanji/Snake-v0", {}, "did you mean Snake-v1"),
            ("navix/Navix-Empty-5x5-v0", {"observation_fn": "symbolik"}, "did you mean symbolic"),
            ("navix/Navix-Empty-5x5-v0", {"steps": 5}, "has no 'steps'.*max_steps"),
            ("jaxmarl/HeuristicEnemySMAX", {"scenario": "3n"}, "scenario is '3n'; did you mean 3m"),
            ("jaxmarl/overcooked", {"layout": "room"}, "layout is 'room'.*cramped_room"),
            ("jaxmarl/LearnedPolicyEnemySMAX", {}, "can't be made: TypeError"),
        ]
    ],
)
def test_wrong_env_kwargs_are_one_line_that_helps(name, env_kwargs, message):
    with pytest.raises(ConfigError, match=message) as error:
        make(name, ENV_KWARGS=env_kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["gymnax", *(pytest.param(name, marks=suite(name)) for name in PACKAGES)]
)
def test_the_names_are_those_that_the_suite_registers(name):
    assert sorted(suites()[name].NAMES) == sorted(set(suites()[name].registered()))


@pytest.mark.parametrize(
    ("name", "space"),
    [
        pytest.param(
            *("brax/ant", Box((-1.0,) * 8, (1.0,) * 8)), marks=[suite("brax"), pytest.mark.weekly]
        )
    ]
    + [
        pytest.param(name, space, marks=suite(name.partition("/")[0]))
        for name, space in [
            ("jumanji/JobShop-v0", MultiDiscrete((21,) * 10, masked=True)),
            ("jumanji/Minesweeper-v0", Discrete(100, masked=True)),
            ("jumanji/RubiksCube-v0", MultiDiscrete((6, 1, 3))),
            ("jumanji/MultiCVRP-v0", MultiDiscrete((21, 21), masked=True)),
            ("jumanji/SearchAndRescue-v0", Box((-1.0,) * 4, (1.0,) * 4)),
            ("navix/Navix-FourRooms-v0", Discrete(7)),
            ("xminigrid/MiniGrid-MemoryS128", Discrete(6)),
            ("jaxmarl/MPE_simple_spread_v3", Discrete(5)),
            ("jaxmarl/MPE_simple_speaker_listener_v4", Discrete(5, masked=True)),
            ("jaxmarl/humanoid_9|8", Box((-1.0,) * 9, (1.0,) * 9, masked=True)),
        ]
    ],
)
def test_action_spaces(name, space):
    """Action spaces are as listed, and a traced step keeps the state's shapes."""
    env = make(name)
    assert env.action_space == space
    keys = jax.random.split(jax.random.key(0), env.num_rows)
    obs, state = jax.eval_shape(env.reset, keys)
    assert obs.shape == (env.num_rows, env.obs_size)
    action = jax.eval_shape(lambda obs, keys: sample_uniformly(space, obs, keys), obs, keys)
    next_obs, next_state, reward, done, _ = jax.eval_shape(env.step, keys, state, action)
    assert next_obs == obs
    assert jax.tree.map(jnp.shape, next_state) == jax.tree.map(jnp.shape, state)
    assert (reward.dtype, done.dtype) == (jnp.float32, bool)
