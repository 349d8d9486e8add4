"""Transformer-XL agents in JAX: what the scripts, trainers and wrappers of the root are built on.

Importing it makes Ctrl-C end a script of this repository without a traceback, before JAX is loaded.
Python's own handler raises KeyboardInterrupt wherever the script is, say in an import, whose
`except` may swallow it. A run has a handler of its own once there is something to save,
`trxl.runs.interruption`.

A stream that the shell closed, as `>&-` does, is replaced by one to nowhere: Python has None there.
"""

import os
import signal
import sys
from pathlib import Path

_script = getattr(sys.modules["__main__"], "__file__", None)
_ours = _script and Path(_script).resolve().parent == Path(__file__).resolve().parents[1]
_ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # a shell's wish for a job behind it
if _ours and not _ignored:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

for _name in ("stdout", "stderr"):
    if getattr(sys, _name) is None:
        setattr(sys, _name, open(os.devnull, "w"))  # noqa: SIM115, as long as the process
