"""`make_env`: from an environment's name to a batched environment that resets itself.

A suite is one file of this folder, and whatever file has `NAMES` is one. None imports its suite
before it has to. A suite's file holds:

- `NAMES`, its registered environments, so that a bare name is found without importing any suite;
- `registered()`, the names that the installed suite knows;
- `make(name, env_kwargs)`, a `SingleEnvironment`;
- `full_name(name)`, where names have other spellings: what the name stands for.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import jax

from config import ConfigError, did_you_mean, shortened
from environments.adapting import check_numbers, making
from environments.checks import check_environment
from environments.own import file_and_class, is_own, located, make_own, named_by_user
from resets import AutoReset, BatchedReset, OptimisticReset, WorldPool
from spaces import Box, Discrete, MultiDiscrete
from trials import EndBeside, ForgottenEpisodes, ShownEnd
from wrappers import AgentRows, LogEpisodes, PreviousActionReward, SingleEnvironment, Wrapper

__all__ = [
    "Box",
    "Discrete",
    "MultiDiscrete",
    "SingleEnvironment",
    "is_own",
    "located",
    "make_env",
    "make_own",
    "named_by_user",
    "resolve_name",
    "suites",
]


def make_env(config: dict[str, Any], num_envs: int):
    """Makes the batched environment of a checked config.

    Args:
      config: of it `ENV_NAME`, `ENV_KWARGS`, `BOOTSTRAP_TRUNCATED`, `EPISODE_END`,
        `TRIAL_MEMORY`, `PREV_ACTION_REWARD`, `RESET_STRATEGY` and `RESET_RATIO` are used.
      num_envs: how many environments run here: NUM_ENVS, or one device's share.

    Returns:
      An environment as the head of wrappers.py describes it, with the attributes of a
      `SingleEnvironment` and `num_rows`, B: `num_envs`, or as many times the agents.

    Raises:
      ConfigError: an unknown environment, one that can't be made or has actions of no supported
        kind, an unknown name in ENV_KWARGS.
    """
    make = making(config["ENV_NAME"], config["ENV_KWARGS"])
    # A suite is imported where it is first used; its constants must not be of a trace then.
    with jax.ensure_compile_time_eval():
        return make(lambda: _make_env(config, num_envs))


def _make_env(config: dict[str, Any], num_envs: int) -> Wrapper:
    single = make_single_env(config["ENV_NAME"], config["ENV_KWARGS"])
    if config["BOOTSTRAP_TRUNCATED"] is not None:
        single.can_truncate = config["BOOTSTRAP_TRUNCATED"]
    of_trials = single.episodes_per_trial > 1
    if of_trials and config["EPISODE_END"] == "step" and config["TRIAL_MEMORY"]:
        single = ShownEnd(single)
    env: Wrapper = LogEpisodes(with_resets(single, config, num_envs))
    if of_trials and not config["TRIAL_MEMORY"]:
        env = ForgottenEpisodes(env)
    if env.num_agents is not None:
        env = AgentRows(env)
    if of_trials and config["EPISODE_END"] == "beside":
        env = EndBeside(env)
    previous = config["PREV_ACTION_REWARD"]
    if env.previous_action_reward if previous is None else previous:
        env = PreviousActionReward(env)
    return env


def with_resets(single: SingleEnvironment, config: dict[str, Any], num_envs: int) -> BatchedReset:
    """The environment in a batch that resets itself by the config's strategy.

    Raises:
      ConfigError: the strategy is not for this environment, or not for so many.
    """
    strategy, ratio = (
        config["RESET_STRATEGY"] or single.default_reset_strategy,
        config["RESET_RATIO"],
    )
    if strategy == "auto":
        return AutoReset(single, num_envs)
    if type(single).next_episode is not SingleEnvironment.next_episode:
        raise ConfigError(
            f"{config['ENV_NAME']} has episodes that build on the one before, which takes"
            f" RESET_STRATEGY=auto, not {strategy}"
        )
    if strategy == "pool":
        return WorldPool(single, num_envs, max(1, num_envs // ratio))
    if num_envs % ratio:
        raise ConfigError(
            "RESET_RATIO must divide the number of environments with RESET_STRATEGY=optimistic:"
            f" {ratio} does not divide {num_envs}"
        )
    return OptimisticReset(single, num_envs, ratio)


def make_single_env(name: str, env_kwargs: dict[str, Any]) -> SingleEnvironment:
    """A suite's environment through its adapter, or one's own."""
    if is_own(name):
        return make_own(name, env_kwargs)
    suite, full_name = resolve_name(name)
    check_numbers(env_kwargs)
    env = suites()[suite].make(full_name, env_kwargs)
    if env_kwargs:
        check_environment(f"{full_name} with {shortened(env_kwargs)}", env)
    return env


def suites() -> dict[str, ModuleType]:
    """The suites' files in this folder, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "NAMES")}


def resolve_name(name: str) -> tuple[str, str]:
    """The suite and the full name of an environment; of one's own the file's name and the class.

    Args:
      name: `<suite>/<name>`, or the bare name where only one suite has it, or `<file.py>:<class>`.

    Raises:
      ConfigError: there is none of that name, or several, or it is one of pixels; names candidates.
    """
    if is_own(name):
        path, class_name = file_and_class(name)
        return path.stem, class_name
    every = suites()
    suite, slash, bare = name.rpartition("/")
    if slash and suite not in every:
        raise ConfigError(
            f"unknown suite {shortened(suite)} in {shortened(name)}; there are"
            f" {', '.join(every)}, and <file.py>:<class> for an environment of your own"
        )
    asked = {suite: every[suite]} if slash else every
    full = {s: getattr(module, "full_name", str)(bare) for s, module in asked.items()}
    having = [s for s, module in asked.items() if full[s] in module.NAMES]
    if slash and not having and full[suite] in asked[suite].registered():
        having = [suite]  # registered by hand, or by a later version of the suite
    if len(having) == 1:
        return having[0], full[having[0]]
    if having:
        candidates = " or ".join(f"{s}/{bare}" for s in having)
        raise ConfigError(f"several suites have {shortened(bare)}; say {candidates}")
    known = [n for module in asked.values() for n in module.NAMES]
    raise ConfigError(f"unknown environment {shortened(name)}{did_you_mean(bare, known)}")
