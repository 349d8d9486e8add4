"""What a run leaves on the disk: its folder, checkpoints, curves, results and plots."""

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from checkpoints import CurveFile, FullCheckpoints, LearnerCheckpoints, save_run_config
from config import ConfigError, num_updates
from environments import resolve_name
from multihost import check_shared, from_main, in_all, is_main, largest, say
from normalization import Moments
from program import Program
from tracking import NoTracker, make_tracker
from trainer_PPO_trXL import Metrics, RunnerState, TrainState

MUST_BE_FINITE = (
    *("total_loss", "actor_loss", "value_loss", "entropy", "approx_kl", "grad_norm"),
    "param_norm",
)
"""The metrics that are numbers as long as the agent is whole."""


class NotFiniteError(Exception):
    """A loss or a parameter is infinite or not a number."""


class Record:
    """What a run leaves on the disk while it goes: its folder, checkpoints, and curves.

    Args:
      config: checked; with RESUME the folder is that run's, else a fresh one.
      seeds: of the run.

    Raises:
      ConfigError: the folder can't be written, or there is nothing to resume in it.
    """

    def __init__(self, config: dict[str, Any], seeds: list[int]):
        self.resumed = config["RESUME"] is not None
        self.updates = 0
        self._config = config
        self.folder = Path(config["RESUME"] or from_main(lambda: str(fresh_folder(config))))
        try:
            check_shared(self.folder)
            self._full = FullCheckpoints(self.folder, config["KEEP_CHECKPOINTS"])
            self._learner = LearnerCheckpoints(self.folder, config["KEEP_CHECKPOINTS"])
            self.updates = largest(self.newest_checkpoint())
            self._check_updates()
            self._tracker, self._curves = in_all(lambda: self._open_files(seeds))
        except ConfigError:
            self.discard_if_empty()
            raise

    def _check_updates(self) -> None:
        if self.resumed and not self.updates:
            raise ConfigError(f"RESUME: {self.folder} has no whole checkpoint to go on from")
        if self.updates >= num_updates(self._config):
            raise ConfigError(
                f"RESUME: {self.folder} has done its {self.updates} updates; set a larger"
                " TOTAL_TIMESTEPS to go on"
            )

    def _open_files(self, seeds: list[int]) -> tuple[NoTracker, list[CurveFile]]:
        if not is_main():
            return NoTracker(), []
        tracker = make_tracker(self._config, self.folder, seeds)
        return tracker, [CurveFile(self.folder, seed, self.updates) for seed in seeds]

    def newest_checkpoint(self) -> int:
        """After how many updates the newest checkpoint was taken, 0 if there is none."""
        return max(self._full.newest() or 0, self._learner.newest() or 0)

    def first_state(self, program: Program) -> RunnerState:
        """The state that the run starts or goes on from; says so.

        Raises:
          ConfigError: the checkpoint is broken or of another run; the folder is left as it was.
        """
        state = in_all(lambda: self._restored(program)) if self.resumed else program.init()
        for curve in self._curves:
            curve.cut_off()
        if is_main():
            save_run_config(self.folder, self._config)
        return state

    def _restored(self, program: Program) -> RunnerState:
        say(f"going on after update {self.updates} of {self.folder}")
        if self._full.newest() == self.updates:
            return program.split(self._full.restore(program.joined_shapes()))
        state = program.join(program.init(stream=self.updates))
        learner = state.train_state
        (params, normalizer), opt_state = self._learner.restore(
            agent_of(learner), learner.opt_state
        )
        kept = "the optimiser's state is kept" if opt_state else "the optimiser starts afresh"
        say(f"a learner-only checkpoint: every environment starts a fresh episode, {kept}")
        learner = TrainState(
            params=params,
            opt_state=opt_state or learner.opt_state,
            updates=jnp.full_like(learner.updates, self.updates),
            normalizer=normalizer,
        )
        return program.split(state._replace(train_state=learner))

    def append(self, metrics: list[Metrics]) -> None:
        """Notes an update's metrics, one dict per seed.

        Raises:
          NotFiniteError: one of them shows that the update broke the agent.
        """
        self.updates += 1
        self._tracker.log(metrics)
        for curve, one_seed in zip(self._curves, metrics, strict=False):  # none but in process 0
            curve.append(one_seed)
        for one_seed in metrics:
            self._check_finite(one_seed)

    def _check_finite(self, metrics: Metrics) -> None:
        broken = [name for name in MUST_BE_FINITE if not np.isfinite(metrics[name])]
        if broken:
            name, newest = broken[0], self.newest_checkpoint()
            kept = f"the checkpoint of update {newest} is kept" if newest else "no checkpoint yet"
            raise NotFiniteError(
                f"{name} is {metrics[name]} after update {self.updates}; {kept} in {self.folder}"
            )

    def save_checkpoint(self, program: Program, state: RunnerState) -> None:
        """Writes the state of this update, and makes sure of the curve up to it before."""
        for curve in self._curves:
            curve.sync()
        kind = self._config["CHECKPOINT_KIND"]
        if kind == "full":
            self._full.save(self.updates, program.join(state))
        elif is_main():
            learner = program.learner(state)
            opt_state = learner.opt_state if kind == "learner" else None
            self._learner.save(self.updates, agent_of(learner), opt_state)

    def close(self) -> None:
        """Ends the live metrics and closes the files."""
        self._tracker.close()
        for curve in self._curves:
            curve.close()

    def curves(self) -> list[dict[str, np.ndarray]]:
        """For each seed the metrics of the whole run, {name: (updates,)}."""
        return [curve.read() for curve in self._curves]

    def discard_if_empty(self) -> None:
        """Removes the folder of a run that has not done anything yet."""
        if is_main() and not self.resumed and not self.updates:
            shutil.rmtree(self.folder, ignore_errors=True)


def agent_of(learner: TrainState) -> tuple[Any, dict[str, Moments]]:
    """What acting takes: the parameters, and the statistics that observations are normalised by."""
    return learner.params, learner.normalizer


def saved_params(learner: TrainState) -> dict[str, Any]:
    """What `<seed>_params.npy` holds: the parameters and, where there are any, the statistics."""
    if not learner.normalizer:
        return learner.params
    normalizer = {name: moments._asdict() for name, moments in learner.normalizer.items()}
    return {**learner.params, "normalizer": normalizer}


def fresh_folder(config: dict[str, Any]) -> Path:
    """Makes the run's folder, with a number behind its name where earlier runs took the name.

    Raises:
      ConfigError: it can't be made.
    """
    suite, name = resolve_name(config["ENV_NAME"])
    root = Path(config["RESULTS_DIR"] or f"results_{suite}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = root / (name if number == 1 else f"{name}_{number}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        raise ConfigError(
            f"can't write the results to {root}: {error.strerror}; set RESULTS_DIR to a folder"
            " that can be written"
        ) from error


def save_results(
    folder: Path,
    config: dict[str, Any],
    seeds: list[int],
    curves: list[dict[str, np.ndarray]],
    learners: list[TrainState],
) -> None:
    """Writes the files and plots of every seed."""
    for seed, curve, learner in zip(seeds, curves, learners, strict=True):
        own_config = {**config, "seed": seed, "NUM_SEEDS": 1}
        save_seed(folder, seed, own_config, curve, saved_params(learner))
    save_plot(folder, config, seeds, curves)


def save_seed(
    folder: Path, seed: int, config: dict[str, Any], curve: dict[str, np.ndarray], params: Any
) -> None:
    """Writes one seed's config, metrics and parameters, each an `.npy` file that holds a dict."""
    for name, content in (("config", config), ("metrics", curve), ("params", params)):
        write_whole(
            folder / f"{seed}_{name}.npy", lambda file, content=content: np.save(file, content)
        )


def write_whole(path: Path, write: Callable) -> None:
    """Calls `write` with a file that takes the name `path` only once it is complete."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        write(file)
    os.replace(partial, path)


def save_plot(
    folder: Path, config: dict[str, Any], seeds: list[int], curves: list[dict[str, np.ndarray]]
) -> None:
    """Draws every seed's return curve to return_<seed>.png, and of several seeds their mean."""
    for seed, curve in zip(seeds, curves, strict=True):
        plot_returns(folder / f"return_{seed}.png", config["ENV_NAME"], [curve], f"seed {seed}")
    if len(seeds) > 1:
        label = f"mean of {len(seeds)} seeds, and their standard deviation"
        name = f"return_{seeds[0]}_to_{seeds[-1]}.png"
        plot_returns(folder / name, config["ENV_NAME"], curves, label)


def plot_returns(path: Path, title: str, curves: list[dict[str, np.ndarray]], label: str) -> None:
    """Draws the mean return of the episodes that ended in each update, as it is, unsmoothed."""
    from matplotlib.figure import Figure

    # An update in which no episode ended has no return and takes no place in the curve.
    returns = np.ma.masked_invalid([curve["returned_episode_returns"] for curve in curves])
    mean, deviation = returns.mean(axis=0), returns.std(axis=0)
    ended = ~np.ma.getmaskarray(mean)
    mean, deviation = mean[ended], deviation[ended]
    env_steps = curves[0]["env_steps"][ended]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(env_steps, mean, label=label)
    if len(curves) > 1:
        axes.fill_between(env_steps, mean - deviation, mean + deviation, alpha=0.25)
    axes.set(title=title, xlabel="environment steps", ylabel="mean episode return")
    axes.grid(alpha=0.3)
    axes.legend()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))
