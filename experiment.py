"""The host side of a run: the loop over jitted updates, the progress bar, the files, the plot."""

import itertools
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from tqdm import tqdm

from checkpoints import (
    CurveFile,
    FullCheckpoints,
    LearnerCheckpoints,
    resumed_config,
    save_run_config,
)
from config import ConfigError, check_config, num_updates, read_overrides
from environments import resolve_name
from tracking import make_tracker
from trainer_PPO_trXL import Metrics, RunnerState, TrainState, make_init_and_update

REPOSITORY = Path(__file__).resolve().parent

MUST_BE_FINITE = (
    *("total_loss", "actor_loss", "value_loss", "entropy", "approx_kl", "grad_norm"),
    "param_norm",
)
"""The metrics that are numbers as long as the agent is whole."""


def main(config: dict[str, Any], all_devices: bool = False) -> None:
    """What an entry script does: reads the overrides, trains, and writes the files of the run.

    Args:
      config: the script's settings; KEY=VALUE arguments of the command line override them.
      all_devices: trains on every device with `jax.pmap` instead of on one.

    Exits with one line and status 1 where the config can't be run, and with 128 + its number after
    a signal.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"usage: {sys.argv[0]} [KEY=VALUE ...]\n\nthe keys, with their values here:")
        print("\n".join(f"  {key}={value!r}" for key, value in check_config(config).items()))
        return
    enable_compilation_cache()
    try:
        overrides = read_overrides(sys.argv[1:])
        config = {**config, **overrides}
        if config.get("RESUME"):
            config = resumed_config(Path(config["RESUME"]), overrides)
        stopped_by = run(config, all_devices)
    except (ConfigError, NotFiniteError) as error:
        sys.exit(f"error: {error}")
    if stopped_by:
        sys.exit(128 + stopped_by)


def enable_compilation_cache() -> None:
    """Turns JAX's persistent compilation cache on, so that a second start is quick."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(REPOSITORY / ".jax_cache"))


def run(config: dict[str, Any], all_devices: bool = False) -> int | None:
    """Trains with a config and writes the files of the run, whole or after a signal.

    Returns:
      The number of the signal that stopped it, None where it ran to its end.

    Raises:
      ConfigError: the config can't be run or its results folder can't be written; nothing was
        compiled, and no folder is left behind.
      NotFiniteError: a loss or a parameter stopped being finite.
    """
    num_devices = jax.device_count() if all_devices else 1
    config = check_config(config, num_devices)
    if all_devices and config["NUM_SEEDS"] > 1:
        raise ConfigError(
            f"NUM_SEEDS = {config['NUM_SEEDS']} needs train_PPO_trXL.py: the pmap script"
            " spreads one seed over all devices"
        )
    program = Program(config, num_devices if all_devices else None)
    record = Record(config, program.seeds)
    with StopOnSignal(record) as stop:
        state = train(config, program, record, stop)
        record.close()
        curves = record.curves()
        params = program.per_seed(state.train_state.params)
        for seed, *results in zip(program.seeds, curves, params, strict=True):
            save_seed(record.folder, seed, {**config, "seed": seed, "NUM_SEEDS": 1}, *results)
        save_plot(record.folder, config, program.seeds, curves)
    print(summary(config, curves, stop.signal))
    print(f"saved to {record.folder}")
    if stop.signal:
        print(f"go on with RESUME={record.folder}")
    return stop.signal


class Program:
    """`init` and `update`, jitted for one seed, for several under vmap, or for devices under pmap.

    Args:
      config: checked.
      num_devices: for pmap; None for one device without it.
    """

    def __init__(self, config: dict[str, Any], num_devices: int | None):
        self.seeds = [config["seed"] + i for i in range(config["NUM_SEEDS"])]
        keys = jnp.stack([jax.random.key(seed) for seed in self.seeds])
        axis_name = "devices" if num_devices else None
        init, update = make_init_and_update(config, axis_name, num_devices)
        if num_devices:
            self._keys = jnp.repeat(keys, num_devices)
            self._init = jax.pmap(init, axis_name)
            self._update = jax.pmap(update, axis_name, donate_argnums=0)
        elif len(self.seeds) > 1:
            self._keys = keys
            self._init = jax.jit(jax.vmap(init))
            self._update = jax.jit(jax.vmap(update), donate_argnums=0)
        else:
            self._keys = keys[0]
            self._init = jax.jit(init)
            self._update = jax.jit(update, donate_argnums=0)
        self._num_devices = num_devices

    def init(self, stream: int = 0) -> RunnerState:
        """A first state; another `stream` has other environments and actions."""
        keys = self._keys
        if stream:
            keys = jnp.vectorize(jax.random.fold_in)(keys, stream)
        return jax.block_until_ready(self._init(keys))

    def compile(self, state: RunnerState) -> Callable:
        """The update, compiled for such a state."""
        return self._update.lower(state).compile()

    def join(self, state: RunnerState) -> RunnerState:
        """The state without the axis of the devices, the same however many they are."""
        if not self._num_devices:
            return state
        return jax.jit(join_devices, out_shardings=self._shardings())(state)

    def split(self, joined: RunnerState) -> RunnerState:
        """Undoes `join`, for the devices of this program."""
        if not self._num_devices:
            return joined
        by_device = NamedSharding(self._mesh(), PartitionSpec("devices"))
        split = jax.jit(partial(split_devices, self._num_devices), out_shardings=by_device)
        return split(joined)

    def joined_shapes(self) -> RunnerState:
        """A joined state as a tree of `jax.ShapeDtypeStruct`, which say where each leaf goes."""
        shapes = jax.eval_shape(self._init, self._keys)
        if not self._num_devices:
            return with_sharding(shapes, SingleDeviceSharding(jax.devices()[0]))
        joined = jax.eval_shape(join_devices, shapes)
        return RunnerState(*map(with_sharding, joined, self._shardings()))

    def per_seed(self, tree: Any) -> list[Any]:
        """A tree of the state or the metrics as one tree of NumPy arrays for each seed."""
        tree = jax.device_get(tree)
        if not self._num_devices and len(self.seeds) == 1:
            return [tree]
        return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(len(self.seeds))]

    def _mesh(self) -> Mesh:
        return Mesh(np.array(jax.devices()), ("devices",))

    def _shardings(self) -> RunnerState:
        """Where each part of a joined state is: everywhere, or its rows spread over the devices."""
        everywhere = NamedSharding(self._mesh(), PartitionSpec())
        rows = NamedSharding(self._mesh(), PartitionSpec("devices"))
        parts = dict.fromkeys(RunnerState._fields, rows)
        return RunnerState(**{**parts, "train_state": everywhere, "permutation_key": everywhere})


def join_devices(state: RunnerState) -> RunnerState:
    """(devices, B, ...) to (devices * B, ...), and what all devices have alike once."""
    joined = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), state)
    first = jax.tree.map(lambda x: x[0], (state.train_state, state.permutation_key))
    return joined._replace(train_state=first[0], permutation_key=first[1])


def split_devices(num_devices: int, joined: RunnerState) -> RunnerState:
    """Undoes `join_devices`."""

    def repeat(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (num_devices, *x.shape))

    alike = {name: getattr(joined, name) for name in ("train_state", "permutation_key")}
    rows = joined._replace(**dict.fromkeys(alike))
    state = jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), rows)
    return state._replace(**jax.tree.map(repeat, alike))


def with_sharding(shapes: Any, sharding: Sharding) -> Any:
    """A tree of `jax.ShapeDtypeStruct`, placed."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


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
        self.folder = Path(config["RESUME"]) if self.resumed else fresh_folder(config)
        self._config = config
        self._full = FullCheckpoints(self.folder, config["KEEP_CHECKPOINTS"])
        self._learner = LearnerCheckpoints(self.folder, config["KEEP_CHECKPOINTS"])
        self.updates = self.newest_checkpoint()
        if self.resumed and not self.updates:
            raise ConfigError(f"RESUME: {self.folder} has no whole checkpoint to go on from")
        if self.updates >= num_updates(config):
            raise ConfigError(
                f"RESUME: {self.folder} has done its {self.updates} updates; set a larger"
                " TOTAL_TIMESTEPS to go on"
            )
        try:
            self._tracker = make_tracker(config, self.folder, seeds)
        except ConfigError:
            self.discard_if_empty()
            raise
        self._curves = [CurveFile(self.folder, seed, self.updates) for seed in seeds]

    def newest_checkpoint(self) -> int:
        """After how many updates the newest checkpoint was taken, 0 if there is none."""
        return max(self._full.newest() or 0, self._learner.newest() or 0)

    def first_state(self, program: Program) -> RunnerState:
        """The state that the run starts or goes on from; says so.

        Raises:
          ConfigError: the checkpoint is broken or of another run; the folder is left as it was.
        """
        state = self._restored(program) if self.resumed else program.init()
        for curve in self._curves:
            curve.cut_off()
        save_run_config(self.folder, self._config)
        return state

    def _restored(self, program: Program) -> RunnerState:
        print(f"going on after update {self.updates} of {self.folder}")
        if self._full.newest() == self.updates:
            return program.split(self._full.restore(program.joined_shapes()))
        state = program.join(program.init(stream=self.updates))
        params, opt_state = self._learner.restore(
            state.train_state.params, state.train_state.opt_state
        )
        kept = "the optimiser's state is kept" if opt_state else "the optimiser starts afresh"
        print(f"a learner-only checkpoint: every environment starts a fresh episode, {kept}")
        opt_state = opt_state or state.train_state.opt_state
        updates = jnp.full_like(state.train_state.updates, self.updates)
        return program.split(state._replace(train_state=TrainState(params, opt_state, updates)))

    def append(self, metrics: list[Metrics]) -> None:
        """Notes an update's metrics, one dict per seed.

        Raises:
          NotFiniteError: one of them shows that the update broke the agent.
        """
        self.updates += 1
        self._tracker.log(metrics)
        for curve, one_seed in zip(self._curves, metrics, strict=True):
            curve.append(one_seed)
            broken = [name for name in MUST_BE_FINITE if not np.isfinite(one_seed[name])]
            if broken:
                name, newest = broken[0], self.newest_checkpoint()
                kept = (
                    f"the checkpoint of update {newest} is kept" if newest else "no checkpoint yet"
                )
                raise NotFiniteError(
                    f"{name} is {one_seed[name]} after update {self.updates}; {kept} in"
                    f" {self.folder}"
                )

    def save_checkpoint(self, program: Program, state: RunnerState) -> None:
        """Writes the state of this update, and makes sure of the curve up to it before."""
        for curve in self._curves:
            curve.sync()
        if self._config["CHECKPOINT_KIND"] == "full":
            self._full.save(self.updates, program.join(state))
        else:
            learner = jax.device_get(program.join(state).train_state)
            opt_state = learner.opt_state if self._config["CHECKPOINT_KIND"] == "learner" else None
            self._learner.save(self.updates, learner.params, opt_state)

    def close(self) -> None:
        """Ends the live metrics."""
        self._tracker.close()

    def curves(self) -> list[dict[str, np.ndarray]]:
        """For each seed the metrics of the whole run, {name: (updates,)}."""
        return [curve.read() for curve in self._curves]

    def discard_if_empty(self) -> None:
        """Removes the folder of a run that has not done anything yet."""
        if not self.updates:
            shutil.rmtree(self.folder, ignore_errors=True)


class StopOnSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to stop; the second ends the process.

    `signal` is the number of the signal that asked, or None. Before `training` is set there is
    nothing to save, so the first one ends the process too.
    """

    def __init__(self, record: Record):
        self._record = record
        self.signal = None
        self.training = False

    def __enter__(self):
        signals = (signal.SIGINT, signal.SIGTERM)
        self._previous = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: Any) -> None:
        if self.signal or not self.training:
            tqdm.write("stopped at once", file=sys.stderr)
            self._record.discard_if_empty()
            # XLA's threads may be at work for minutes yet; an orderly exit would wait for them.
            os._exit(128 + number)
        self.signal = number
        tqdm.write("stopping after this update (once more to quit at once)", file=sys.stderr)


def train(
    config: dict[str, Any], program: Program, record: Record, stop: StopOnSignal
) -> RunnerState:
    """Runs the updates, with a bar, until they are done or a signal asks to stop.

    Returns:
      the last state; its checkpoint is written, and the metrics are in the record.
    """
    steps_per_update = config["NUM_STEPS"] * config["NUM_ENVS"]
    # JAX works in a thread of its own: while it compiles or waits for the device, the main thread
    # can still take signals.
    worker = ThreadPoolExecutor(1)
    print(f"compiling for {jax.devices()[0].device_kind} (tens of seconds the first time) ...")
    start = time.perf_counter()
    state = worker.submit(record.first_state, program).result()
    update = worker.submit(program.compile, state).result()
    print(f"compiled in {time.perf_counter() - start:.1f} s")

    stop.training = True
    newest_return = np.nan
    interval = 0.1 if sys.stderr.isatty() else 30
    total = num_updates(config)
    with tqdm(total=total, initial=record.updates, unit="update", mininterval=interval) as bar:
        while record.updates < total and not stop.signal:
            start = time.perf_counter()
            state, metrics = update(state)
            metrics = worker.submit(program.per_seed, metrics).result()
            steps_per_second = steps_per_update / (time.perf_counter() - start)
            extra = {
                "steps_per_second": steps_per_second,
                "env_steps": (record.updates + 1) * steps_per_update,
            }
            record.append([one_seed | extra for one_seed in metrics])
            if record.updates % config["CHECKPOINT_EVERY"] == 0:
                record.save_checkpoint(program, state)
            returns = [one_seed["returned_episode_returns"] for one_seed in metrics]
            newest_return = np.nanmean(returns) if np.any(np.isfinite(returns)) else newest_return
            bar.set_postfix_str(
                f"{steps_per_second:,.0f} steps/s, return {newest_return:.2f}", refresh=False
            )
            bar.update()
    record.save_checkpoint(program, state)
    return state


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


def summary(
    config: dict[str, Any], curves: list[dict[str, np.ndarray]], stopped_by: int | None
) -> str:
    """One line on how the run went."""
    done, total = len(curves[0]["env_steps"]), num_updates(config)
    tenth = max(1, done // 10)
    returns = np.array([curve["returned_episode_returns"][-tenth:] for curve in curves])
    result = f"{np.nanmean(returns):.4f}" if np.any(np.isfinite(returns)) else "none ended"
    how = f"stopped after {done} of {total} updates" if stopped_by else f"{total} updates"
    return f"{how}; mean return over the last {tenth}: {result}"
