"""Live metrics in Weights & Biases or TensorBoard, chosen by `TRACK`.

Neither package is imported otherwise.
"""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trxl.errors import ConfigError, one_line
from trxl.runs.processes import warn_main


class NoTracker:
    """Tracker that sends nothing, the interface of trackers."""

    def log(self, metrics: list[dict[str, Any]]) -> None:
        """Sends an update's metrics, one dict per seed, if finite."""

    def close(self) -> None:
        """Sends buffered metrics, and closes the tracker."""


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
    """Run in Weights & Biases; several seeds share it, as `seed_<seed>/<metric>`.

    A resumed run continues it, by the id in the folder's `wandb_id`. WANDB_MODE, WANDB_PROJECT and
    other variables apply.
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
    """Tracker that is dropped with one warning when it fails."""

    def __init__(self, tracker: NoTracker):
        self._tracker = tracker

    def log(self, metrics: list[dict[str, Any]]) -> None:
        self._try(lambda: self._tracker.log(metrics))

    def close(self) -> None:
        self._try(self._tracker.close)

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # packages may raise anything
            warn_main(f"TRACK: no more metrics are sent ({one_line(error)}); the run goes on")
            self._tracker = NoTracker()


def make_tracker(config: dict[str, Any], folder: Path, seeds: list[int]) -> NoTracker:
    """Makes the tracker of a checked config.

    Raises:
      ConfigError: the tracker can't start.
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
    except (Exception, SystemExit) as error:  # packages may raise anything
        raise ConfigError(f"TRACK={name} can't start, leave it out: {one_line(error)}") from error
    return NoTracker()


def finite(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if np.isfinite(value)}
