"""Progress bar of a run."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from trxl.runs.processes import is_main


class Progress:
    """Progress bar of updates with speed and newest return; in files a line every few seconds.

    Args:
      total: updates of the run.
      done: updates already done.
    """

    def __init__(self, total: int, done: int):
        self._return = float("nan")
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="update",
            mininterval=0.1 if sys.stderr.isatty() else 5,
            disable=not is_main(),
        )

    def advance(self, steps_per_second: float, returns: Sequence[Any]) -> None:
        """Advances by an update; if all returns are NaN, the previous return stays."""
        if np.any(np.isfinite(returns)):
            self._return = float(np.nanmean(returns))
        self._bar.set_postfix_str(
            f"{steps_per_second:,.0f} steps/s, return {self._return:.2f}", refresh=False
        )
        self._bar.update()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()
