"""Plays episodes with a saved agent: `python evaluate_PPO_trXL.py FOLDER [KEY=VALUE ...]`.

FOLDER is the folder of a run, such as results_craftax/1e7_steps/Craftax-Symbolic-v1, or its
`<seed>_params.npy`.
"""

import trxl  # noqa: F401  # isort: skip, first: handles Ctrl-C during the other imports

import os
import sys
from pathlib import Path
from typing import Any

import jax

from trxl.config import Key, check_values, defaults, expanded, key_lines, read_overrides
from trxl.errors import ConfigError
from trxl.runs import agent as agents
from trxl.runs.agent import Agent, random_agent
from trxl.runs.evaluation import MAX_STEPS, OF_A_TRIAL, enough_episodes, play, plot_trials, report
from trxl.runs.parameters import saved_seeds
from trxl.runs.pictures import check_attention, check_gif, check_writable, draw, record, save_gif
from trxl.runs.run import run_script
from trxl.training import Algorithm, Start, TrainState

from trainer_Muesli_trXL import MUESLI
from trainer_PPO_trXL import PPO

OPTIONS = {
    "seed": Key(None, "seed of the agent; None: all saved", type=int, low=0, high=2**32 - 1),
    "EPISODES": Key(
        None,
        "complete episodes; None: 1,000, or the smallest multiple of 100 trials that has as many",
        type=int,
        low=1,
        high=10**8,
    ),
    "POLICY": Key(
        "sampled",
        "`sampled`, `greedy`, or `random`: uniform over the actions",
        choices=("sampled", "greedy", "random"),
    ),
    "EVAL_SEED": Key(0, "seed of environments and sampled actions", low=0, high=2**32 - 2),
    "ENV_NAME": Key(
        None,
        "`<file.py>:<class>`, if the agent's environment is a file of your own",
        type=str,
    ),
    "GIF": Key("", "`<file>.gif` for an animation of one more episode or trial; empty: none"),
    "ATTENTION": Key(
        "",
        "`<file>.png` or `<file>.gif` for the attention in one more episode; empty: none",
    ),
    "SPLIT": Key(
        None,
        "split of the rulesets, `train` or `held_out`; None: as trained",
        type=str,
        choices=("train", "held_out"),
    ),
    "PLOT": Key(
        "",
        "`<file>.png` for the return by the episode's number in its trial, of both splits if any;"
        " empty: none",
    ),
    "TRIAL_MEMORY": Key(True, "whether memory lasts for a trial; False: reset after each episode"),
    "MAX_STEPS": Key(MAX_STEPS, "steps after which an episode counts as endless, an error", low=1),
}
"""Settings of the command line."""


ALGORITHMS = {algorithm.name: algorithm for algorithm in (PPO, MUESLI)}
"""Algorithms by the name in a saved config."""


def load_agent(
    folder: str | Path,
    seed: int | None = None,
    greedy: bool = False,
    algorithm: Algorithm | None = None,
    environment: str | None = None,
) -> Agent:
    """Loads the agent of a run.

    Args:
      folder: folder of the run, or its `<seed>_params.npy`.
      seed: seed of the agent; None: the lowest.
      greedy: take the most probable action instead of sampling.
      algorithm: algorithm of the run; None: the one of `ALGORITHMS` with the saved name.
      environment: `<file.py>:<class>`, if the agent's environment is a file. A run's files may be
        untrusted, so no other file is executed.

    Raises:
      ConfigError: the agent is missing, its files are broken or inconsistent, or `environment` does
        not name its environment's file.
    """
    return agents.load_agent(folder, ALGORITHMS, seed, greedy, algorithm, environment)


def make_agent(
    config: dict[str, Any],
    train_state: TrainState,
    greedy: bool = False,
    algorithm: Algorithm = PPO,
) -> Agent:
    """Makes an agent of the train state that `make_train` returned.

    Args:
      config: config of `make_train`.
      train_state: `out["runner_state"].train_state`, of one seed.
      greedy: take the most probable action instead of sampling.
      algorithm: algorithm of the run.

    Raises:
      ConfigError: the train state has another config's shapes, or is of several seeds.
    """
    params_of = algorithm.agent_params or algorithm.behaviour_params
    start = Start(params_of(train_state), train_state.normalizer)
    misfit = (
        "the train state does not fit the config; of several seeds take one, such as"
        " jax.tree.map(lambda x: x[0], train_state)"
    )
    return agents.make_agent(algorithm.check(config), start, algorithm, greedy, misfit)


def main() -> None:
    """Runs the script, see `start`."""
    run_script(start)


def start() -> None:
    """Reads the command line, and evaluates the agents of the chosen seeds."""
    arguments = sys.argv[1:]
    values = defaults(OPTIONS)
    if {"-h", "--help"} & set(arguments):
        print(f"usage: {sys.argv[0]} FOLDER [KEY=VALUE ...]\n\n{key_lines(OPTIONS, values)}")
        return
    folder = expanded(arguments[0]) if arguments else ""
    if not os.path.exists(folder) and (not folder or "=" in folder or folder.startswith("-")):
        sys.exit(f"usage: {sys.argv[0]} FOLDER {' '.join(f'{k}={v}' for k, v in values.items())}")
    chosen = check_values(read_overrides(arguments[1:], OPTIONS), OPTIONS)
    if chosen["seed"] is not None:
        evaluate(folder, chosen)
        return
    first, *others = saved_seeds(Path(folder))
    evaluate(folder, {**chosen, "seed": first})
    for seed in others:  # pictures show the first seed alone
        print()
        evaluate(folder, {**chosen, "seed": seed, "GIF": "", "PLOT": "", "ATTENTION": ""})


def evaluate(folder: str, chosen: dict[str, Any]) -> None:
    """Plays with the agent of a folder, and prints the report.

    Args:
      chosen: checked values of `OPTIONS`.

    Raises:
      ConfigError: an option does not suit the agent; as a rule before any episode is played.
    """
    greedy = chosen["POLICY"] == "greedy"
    agent = load_agent(folder, chosen["seed"], greedy, environment=chosen["ENV_NAME"])
    if chosen["POLICY"] == "random":
        agent = random_agent(agent)
    if not chosen["TRIAL_MEMORY"]:
        agent = agent._replace(config={**agent.config, "TRIAL_MEMORY": False})
    splits = {split: of_split(agent, split) for split in splits_to_play(agent, chosen)}
    agent = next(iter(splits.values()))  # for the pictures
    gif, plot, attention = (
        Path(chosen[key]) if chosen[key] else None for key in ("GIF", "PLOT", "ATTENTION")
    )
    if gif:
        check_gif(agent, gif)
    if plot:
        check_writable("PLOT", plot, ".png")
    if attention:
        if chosen["POLICY"] == "random":
            raise ConfigError("ATTENTION: random actions attend to nothing; leave POLICY out")
        check_attention(agent, attention)
    episodes = chosen["EPISODES"] or enough_episodes(agent)
    results = {}
    for split, player in splits.items():
        key = jax.random.key(chosen["EVAL_SEED"])
        results[split] = play(player, episodes, key, chosen["MAX_STEPS"])
        of = f" of the rulesets {split}" if len(splits) > 1 or chosen["SPLIT"] else ""
        name = agent.config["ENV_NAME"]
        who = f"{chosen['POLICY']} actions of seed {chosen['seed']}"
        print(f"{episodes} episodes of {name}{of}, {who}")
        print(report(agent.config, results[split]))
    if plot:
        plot_trials(plot, results)
        print(f"the return by the episode's number in its trial is drawn in {plot}")
    if gif:
        key = jax.random.key(chosen["EVAL_SEED"] + 1)
        total = save_gif(agent, gif, key, chosen["MAX_STEPS"])
        what = "a trial" if agent.environment().episodes_per_trial > 1 else "an episode"
        print(f"{what} with return {total:.1f} is in {gif}")
    if attention:
        key = jax.random.key(chosen["EVAL_SEED"] + 1)
        draw(attention, record(agent, key, chosen["MAX_STEPS"]))
        print(f"what an episode attends to is drawn in {attention}")


def splits_to_play(agent: Agent, chosen: dict[str, Any]) -> list[str]:
    """Returns the splits to play: SPLIT, with PLOT both, else the trained one.

    Raises:
      ConfigError: the agent's environment has no trials, no held-out rulesets, or no metrics to
        plot.
    """
    env = agent.environment()
    kwargs = agent.config["ENV_KWARGS"]
    if (chosen["SPLIT"] or chosen["PLOT"]) and env.episodes_per_trial == 1:
        raise ConfigError("SPLIT and PLOT are for trials of several episodes")
    if chosen["PLOT"] and f"{OF_A_TRIAL}1" not in env.episode_metrics:
        name = agent.config["ENV_NAME"]
        raise ConfigError(
            f"PLOT: {name} has no metrics {OF_A_TRIAL}1 ... among its episode_metrics"
        )
    if chosen["SPLIT"] == "held_out" and not kwargs.get("held_out"):
        raise ConfigError("SPLIT=held_out: the agent was trained on all rulesets (held_out is 0)")
    if chosen["PLOT"] and not chosen["SPLIT"] and kwargs.get("held_out"):
        return ["train", "held_out"]
    return [chosen["SPLIT"] or kwargs.get("split", "train")]


def of_split(agent: Agent, split: str) -> Agent:
    """Returns the agent with an environment of that split of the rulesets."""
    kwargs = agent.config["ENV_KWARGS"]
    if kwargs.get("split", "train") == split:
        return agent
    return agent._replace(config={**agent.config, "ENV_KWARGS": {**kwargs, "split": split}})


if __name__ == "__main__":
    main()
