"""Live metrics in Weights & Biases or TensorBoard: what `TRACK` asks for.

Neither package is needed, or imported, unless it is asked for.
"""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trxl.errors import ConfigError, one_line
from trxl.runs.processes import warn_main


class NoTracker:
    """Sends nothing anywhere."""

    def log(self, metrics: list[dict[str, Any]]) -> None:
        """Takes an update's metrics, one dict per seed; those that are not finite are left out."""

    def close(self) -> None:
        """Sends what is still waiting."""


class TensorBoardTracker(NoTracker):
    """Event files in the run's `tensorboard/<seed>`, over environment steps."""

    def __init__(self, folder: Path, seeds: list[int]):
        from tensorboard.summary import Writer

        self._writers = [Writer(str(folder / "tensorboard" / str(seed))) for seed in seeds]

    def log(self, metrics: list[dict[str, Any]]) -> None:
        for writer, one_seed in zip(self._writers, metrics, strict=True):
            for name, value in finite(one_seed).items():
                writer.add_scalar(name, value, step=one_seed["env_steps"])
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


class WandbTracker(NoTracker):
    """A run in Weights & Biases; several seeds share it, as `seed_<seed>/<metric>`.

    A resumed run goes on with the same one, whose id stands in the folder's `wandb_id`. WANDB_MODE,
    WANDB_PROJECT and its other variables work as always.
    """

    def __init__(self, folder: Path, seeds: list[int], config: dict[str, Any]):
        import wandb

        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self._prefixes = [f"seed_{seed}/" if len(seeds) > 1 else "" for seed in seeds]
        self._run = wandb.init(
            name=folder.name, id=id_file.read_text(), resume="allow", dir=folder, config=config
        )

    def log(self, metrics: list[dict[str, Any]]) -> None:
        row = {
            prefix + name: value
            for prefix, one_seed in zip(self._prefixes, metrics, strict=True)
            for name, value in finite(one_seed).items()
        }
        self._run.log(row, step=int(metrics[0]["env_steps"]))

    def close(self) -> None:
        self._run.finish()


class CarefulTracker(NoTracker):
    """A tracker that is given up, with one line, when it fails; the run goes on without."""

    def __init__(self, tracker: NoTracker):
        self._tracker = tracker

    def log(self, metrics: list[dict[str, Any]]) -> None:
        self._try(lambda: self._tracker.log(metrics))

    def close(self) -> None:
        self._try(self._tracker.close)

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # of a package that is not ours
            warn_main(f"TRACK: no more metrics are sent ({one_line(error)}); the run goes on")
            self._tracker = NoTracker()


def make_tracker(config: dict[str, Any], folder: Path, seeds: list[int]) -> NoTracker:
    """The tracker that a checked config asks for.

    Raises:
      ConfigError: it can't start, before anything is compiled.
    """
    name = config["TRACK"]
    try:
        match name:
            case "wandb":
                return CarefulTracker(WandbTracker(folder, seeds, config))
            case "tensorboard":
                return CarefulTracker(TensorBoardTracker(folder, seeds))
    except ImportError as error:
        raise ConfigError(
            f"TRACK={name} needs it: pip install {name} ({one_line(error)})"
        ) from error
    except (Exception, SystemExit) as error:  # of a package that is not ours
        raise ConfigError(f"TRACK={name} can't start, leave it out: {one_line(error)}") from error
    return NoTracker()


def finite(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if np.isfinite(value)}
