"""Signals that stop a run, which saves first, and output that a run outlives."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from trxl.runs.processes import largest, warn_main

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Closed(Protocol):
    """A folder of a run or a search, which is closed before the process ends."""

    def close(self) -> None: ...

    def discard_if_empty(self) -> None: ...


class StopOnSignal:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a request to stop; the second ends it all.

    SIGHUP comes when the terminal goes; under nohup it is left alone, and Windows has none.

    `signal` is the number of the signal to stop for, or None. Of several processes all must stop
    after the same update, whichever got it: they `agree`. Before `training` is set there is nothing
    to save, so the first one ends the process too, as soon as there is a record to close.
    """

    def __init__(self):
        self._record: Closed | None = None
        self._own = 0
        self.signal = None
        self.training = False

    def watch(self, record: Closed) -> None:
        """Closes this record before the process ends, or now if it is to end."""
        self._record = record
        if self._own:
            self._quit(self._own)

    def agree(self) -> None:
        """Sets `signal` to what any of the processes got; all of them call it after an update."""
        self.signal = largest(self._own) or None
        if self.signal and not self._own:
            warn_main("stopping: another process was asked to")

    def __enter__(self):
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in (getattr(signal, name, None) for name in SIGNALS)
            if number and signal.getsignal(number) != signal.SIG_IGN  # nohup's wish
        }
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: Any) -> None:
        again, self._own = self._own, self._own or number
        if again:
            self._quit(number, patient=False)
        elif self._record is None:
            return  # half made: `watch` will close it
        elif not self.training:
            self._quit(number)
        else:
            warn_main("stopping after this update (once more to quit at once)")

    def _quit(self, number: int, patient: bool = True) -> None:
        """Ends the process; closing the record may wait for the receiver of live metrics."""
        warn_main("stopped at once")
        if self._record:
            (self._record.close if patient else self._record.discard_if_empty)()
        # XLA's threads may be at work for minutes yet; an orderly exit would wait for them.
        os._exit(128 + number)


class LastingStream:
    """A text stream that, once it can't be written any more, takes everything to nowhere."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the text if that can be done, with escapes for what the encoding lacks."""
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            return self.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError):
            self._lose()
            return len(text)

    def flush(self) -> None:
        """Flushes if that can be done."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._lose()

    def _lose(self) -> None:
        """Python would fail once more at its end, over what it could not flush."""
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):
            pass  # it has no descriptor, or is closed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Makes standard output and error lasting."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (LastingStream(stream) for stream in before)  # type: ignore
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before
