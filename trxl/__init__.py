"""Transformer-XL agents in JAX: the package behind the scripts, trainers and wrappers of the root.

The import makes Ctrl-C end a script of this repository without a traceback. Python's own handler
raises KeyboardInterrupt, which an `except` within an import may swallow. Runs install their own
handler later, `trxl.runs.interruption`.

Streams that the shell closed (`>&-`), which are None in Python, are replaced by `os.devnull`.
"""

import os
import signal
import sys
from pathlib import Path

_script = getattr(sys.modules["__main__"], "__file__", None)
_ours = _script and Path(_script).resolve().parent == Path(__file__).resolve().parents[1]
_ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # set by shells for background jobs
if _ours and not _ignored:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

for _name in ("stdout", "stderr"):
    if getattr(sys, _name) is None:
        setattr(sys, _name, open(os.devnull, "w"))  # noqa: SIM115, open until the process ends
