"""From its import on Ctrl-C ends a script of this repository at once, without a traceback.

Python's own handler raises KeyboardInterrupt wherever it is, in the middle of an import say, whose
`except` may swallow it. A run has a handler of its own as soon as there is something to save,
`host.signals`.
"""

import signal
import sys
from pathlib import Path

script = getattr(sys.modules["__main__"], "__file__", None)
of_this_repository = script and Path(script).resolve().parent == Path(__file__).resolve().parents[1]
ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # a shell's wish for a job behind it
if of_this_repository and not ignored:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
