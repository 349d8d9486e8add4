"""Signals that stop a run after saving, and output streams that can't fail."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from trxl.runs.processes import largest, warn_main

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Closed(Protocol):
    """Folder of a run or a search, which is closed before the process ends."""

    def close(self) -> None: ...

    def discard_if_empty(self) -> None: ...


class StopOnSignal:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a request to stop; a second one exits.

    SIGHUP, sent when a terminal closes, is ignored under nohup. Windows has no SIGHUP.

    `signal` is the number of the signal to stop for, or None. All processes must stop after the
    same update, so they `agree` on it. Before `training` is set, the first signal exits, once there
    is a record to close.
    """

    def __init__(self):
        self._record: Closed | None = None
        self._own = 0
        self.signal = None
        self.training = False

    def watch(self, record: Closed) -> None:
        """Sets the record to close on exit; exits now if a signal is pending."""
        self._record = record
        if self._own:
            self._quit(self._own)

    def agree(self) -> None:
        """Sets `signal` to that of any process; all processes call it after each update."""
        self.signal = largest(self._own) or None
        if self.signal and not self._own:
            warn_main("stopping: another process was asked to")

    def __enter__(self):
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in (getattr(signal, name, None) for name in SIGNALS)
            if number and signal.getsignal(number) != signal.SIG_IGN  # as under nohup
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
            return  # the record is not complete yet; `watch` exits
        elif not self.training:
            self._quit(number)
        else:
            warn_main("stopping after this update (once more to quit at once)")

    def _quit(self, number: int, patient: bool = True) -> None:
        """Exits. If patient, waits until live metrics are sent."""
        warn_main("stopped at once")
        if self._record:
            (self._record.close if patient else self._record.discard_if_empty)()
        # A normal exit would wait for XLA's threads, possibly for minutes.
        os._exit(128 + number)


class LastingStream:
    """Text stream that discards its output once writing fails."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the text if possible, escaping characters that the encoding lacks."""
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            return self.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError):
            self._lose()
            return len(text)

    def flush(self) -> None:
        """Flushes if possible."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._lose()

    def _lose(self) -> None:
        """Redirects the stream to `os.devnull`, since Python would fail to flush it at exit."""
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):
            pass  # no descriptor, or closed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Replaces standard output and error by `LastingStream`."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (LastingStream(stream) for stream in before)  # type: ignore
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before
