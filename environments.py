"""`make_env`: from an environment's name to a batched environment that resets itself."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from config import ConfigError, did_you_mean
from spaces import Box, Discrete, MultiDiscrete
from suites import making, one_line, registered
from wrappers import (
    AgentRows,
    AutoReset,
    LogEpisodes,
    OptimisticReset,
    PreviousActionReward,
    SingleEnvironment,
    WorldPool,
)

__all__ = ["Box", "Discrete", "MultiDiscrete", "SingleEnvironment", "make_env", "resolve_name"]

ADAPTERS = {
    "gymnax": "suites:GymnaxAdapter",
    "craftax": "suites:CraftaxAdapter",
    "brax": "suites:BraxAdapter",
    "jumanji": "suites:JumanjiAdapter",
    "navix": "suites:NavixAdapter",
    "xminigrid": "xland:make_adapter",
    "jaxmarl": "multiagent:JaxMARLAdapter",
}
"""Where each suite's adapter is; importing it does not import the suite."""


def _each(pattern: str, parts: str) -> list[str]:
    return [pattern.format(part) for part in parts.split()]


NAMES = {
    "gymnax": [
        *("Acrobot-v1", "CartPole-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1"),
        *_each("{}-MinAtar", "Asterix Breakout Freeway Seaquest SpaceInvaders"),
        *_each("{}-bsuite", "Catch DeepSea DiscountingChain MNISTBandit MemoryChain SimpleBandit"),
        *_each("{}-bsuite", "UmbrellaChain"),
        *_each(
            "{}-misc", "BernoulliBandit FourRooms FrozenLake GaussianBandit MetaMaze PointRobot"
        ),
        *_each("{}-misc", "Pong Reacher Swimmer"),
    ],
    "craftax": ["Craftax-Symbolic-v1", "Craftax-Classic-Symbolic-v1"],
    "brax": [
        *("ant", "fast", "halfcheetah", "hopper", "humanoid", "humanoidstandup", "pusher"),
        *("inverted_double_pendulum", "inverted_pendulum", "reacher", "swimmer", "walker2d"),
    ],
    "jumanji": [
        *_each("{}-v0", "Cleaner FlatPack JobShop LevelBasedForaging MMST Maze Minesweeper"),
        *_each("{}-v0", "MultiCVRP RobotWarehouse RubiksCube RubiksCube-partly-scrambled"),
        *_each("{}-v0", "SearchAndRescue SlidingTilePuzzle Sokoban Sudoku Sudoku-very-easy Tetris"),
        *_each("{}-v1", "CVRP Game2048 GraphColoring Knapsack PacMan Snake TSP"),
        *("BinPack-v2", "Connector-v3"),
    ],
    "navix": [
        *_each("Navix-Empty-{}-v0", "5x5 6x6 8x8 16x16"),
        *_each("Navix-Empty-Random-{}-v0", "5x5 6x6 8x8 16x16"),
        *_each("Navix-DoorKey-{}-v0", "5x5 6x6 8x8 16x16"),
        *_each("Navix-DoorKey-Random-{}-v0", "5x5 6x6 8x8 16x16"),
        *_each("Navix-KeyCorridor{}-v0", "S3R1 S3R2 S3R3 S4R3 S5R3 S6R3"),
        *_each("Navix-LavaGap{}-v0", "S5 S6 S7"),
        *_each("Navix-SimpleCrossing{}-v0", "S9N1 S9N2 S9N3 S11N5"),
        *_each("Navix-Dynamic-Obstacles-{}-v0", "5x5 6x6 8x8 16x16 5x5-Random 6x6-Random"),
        *_each("Navix-GoToDoor-{}-v0", "5x5 6x6 8x8"),
        *("Navix-FourRooms-v0", "Navix-DistShift1-v0", "Navix-DistShift2-v0"),
    ],
    "xminigrid": [
        *_each("XLand-MiniGrid-R1-{0}x{0}", "9 11 13 15 17"),
        *_each("XLand-MiniGrid-R2-{0}x{0}", "9 11 13 15 17"),
        *_each("XLand-MiniGrid-R4-{0}x{0}", "9 11 13 15 17"),
        *_each("XLand-MiniGrid-R6-{0}x{0}", "13 17 19"),
        *_each("XLand-MiniGrid-R9-{0}x{0}", "16 19 25"),
        *_each("MiniGrid-DoorKey-{0}x{0}", "5 6 8 16"),
        *_each("MiniGrid-Empty-{0}x{0}", "5 6 8 16"),
        *_each("MiniGrid-EmptyRandom-{0}x{0}", "5 6 8 16"),
        *_each("MiniGrid-MemoryS{}", "8 16 32 64 128"),
        *_each("MiniGrid-{}", "BlockedUnlockPickUp FourRooms LockedRoom Playground Unlock"),
        "MiniGrid-UnlockPickUp",
    ],
    "jaxmarl": [
        *_each("MPE_simple_{}_v3", "adversary crypto push reference spread tag world_comm"),
        *("MPE_simple_v3", "MPE_simple_facmac_v1", "MPE_simple_speaker_listener_v4"),
        *_each("MPE_simple_facmac_{}v1", "3a_ 6a_ 9a_"),
        *("SMAX", "HeuristicEnemySMAX", "LearnedPolicyEnemySMAX", "switch_riddle", "hanabi"),
        *("ant_4x2", "halfcheetah_6x1", "hopper_3x1", "humanoid_9|8", "walker2d_2x3"),
        *("overcooked", "overcooked_v2", "storm", "storm_2p", "storm_np", "coin_game", "jaxnav"),
        *_each("JaxRobotarium_{}", "navigation discovery material_transport warehouse"),
        *_each("JaxRobotarium_{}", "arctic_transport foraging rware predator_prey"),
    ],
}
"""The suites' registered environments, so that a bare name is found without importing any suite."""

CRAFTAX_SPELLINGS = {"craftax": NAMES["craftax"][0], **{n.lower(): n for n in NAMES["craftax"]}}


def make_env(config: dict[str, Any], num_envs: int):
    """Makes the batched environment of a checked config.

    Args:
      config: of it `ENV_NAME`, `ENV_KWARGS`, `BOOTSTRAP_TRUNCATED`, `PREV_ACTION_REWARD`,
        `RESET_STRATEGY` and `RESET_RATIO` are used.
      num_envs: how many environments run here: NUM_ENVS, or one device's share.

    Returns:
      An environment as the head of wrappers.py describes it, with the attributes of a
      `SingleEnvironment` and `num_rows`, B: `num_envs`, or as many times the agents.

    Raises:
      ConfigError: an unknown environment, one that can't be made or has actions of no supported
        kind, an unknown name in ENV_KWARGS.
    """
    env = make_single_env(config["ENV_NAME"], config["ENV_KWARGS"])
    if config["BOOTSTRAP_TRUNCATED"] is not None:
        env.can_truncate = config["BOOTSTRAP_TRUNCATED"]
    strategy = config["RESET_STRATEGY"] or env.default_reset_strategy
    if strategy == "auto":
        env = AutoReset(env, num_envs)
    elif type(env).next_episode is not SingleEnvironment.next_episode:
        raise ConfigError(
            f"{config['ENV_NAME']} has episodes that build on the one before, which takes"
            f" RESET_STRATEGY=auto, not {strategy}"
        )
    elif strategy == "optimistic":
        env = OptimisticReset(env, num_envs, config["RESET_RATIO"])
    else:
        env = WorldPool(env, num_envs, max(1, num_envs // config["RESET_RATIO"]))
    env = LogEpisodes(env)
    if env.num_agents is not None:
        env = AgentRows(env)
    previous = config["PREV_ACTION_REWARD"]
    if env.previous_action_reward if previous is None else previous:
        env = PreviousActionReward(env)
    return env


def make_single_env(name: str, env_kwargs: dict[str, Any]) -> SingleEnvironment:
    """A suite's environment through its adapter, or one's own."""
    if ":" in name:
        return make_own(name, env_kwargs)
    suite, full_name = resolve_name(name)
    module, _, adapter = ADAPTERS[suite].partition(":")
    return getattr(importlib.import_module(module), adapter)(full_name, env_kwargs)


def resolve_name(name: str) -> tuple[str, str]:
    """The suite and the full name of an environment; of one's own the file's name and the class.

    Args:
      name: `<suite>/<name>`, or the bare name where only one suite has it, or `<file.py>:<class>`.

    Raises:
      ConfigError: there is none of that name, or several, or it is one of pixels; names candidates.
    """
    if ":" in name:
        path, _, class_name = name.rpartition(":")
        return Path(path).stem, class_name
    suite, slash, bare = name.rpartition("/")
    if slash and suite not in NAMES:
        raise ConfigError(
            f"unknown suite {suite!r} in {name!r}; there are {', '.join(NAMES)}, and"
            " <file.py>:<class> for an environment of your own"
        )
    if bare.lower().startswith("craftax") and "pixels" in bare.lower():
        raise ConfigError(
            f"{name} observes pixels, which this network has no encoder for: its input is a flat"
            " vector; use the same game's Symbolic variant"
        )
    bare = CRAFTAX_SPELLINGS.get(bare.lower(), bare)
    having = [s for s in ([suite] if slash else NAMES) if bare in NAMES[s]]
    if slash and not having and bare in registered(suite):
        having = [suite]  # registered by hand, or by a later version of the suite
    if len(having) == 1:
        return having[0], bare
    if having:
        candidates = " or ".join(f"{s}/{bare}" for s in having)
        raise ConfigError(f"several suites have {bare!r}; say {candidates}")
    known = NAMES[suite] if slash else [n for names in NAMES.values() for n in names]
    raise ConfigError(f"unknown environment {name!r}{did_you_mean(bare, known)}")


def make_own(name: str, env_kwargs: dict[str, Any]) -> SingleEnvironment:
    """An environment of the user's own: an object of `<file.py>:<class>`, made with ENV_KWARGS.

    Raises:
      ConfigError: there is no such file or class, or it can't be made.
    """
    path, _, class_name = name.rpartition(":")
    if not Path(path).is_file():
        raise ConfigError(f"ENV_NAME={name}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(
            f"ENV_NAME={name}: {path} can't be imported: {one_line(error)}"
        ) from error
    own_class = getattr(module, class_name, None)
    if not (isinstance(own_class, type) and issubclass(own_class, SingleEnvironment)):
        raise ConfigError(f"ENV_NAME={name}: {path} has no SingleEnvironment {class_name}")
    return making(name, env_kwargs)(lambda: own_class(**env_kwargs))
