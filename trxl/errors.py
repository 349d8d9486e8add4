"""Errors in one line: what a config must change, and what nothing foresaw."""

import difflib
import os
import re
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol


class ConfigError(ValueError):
    """A config that cannot be run. Its message is one line that says what to change."""


@contextmanager
def told_of(what: str, hint: str = "") -> Iterator[None]:
    """Begins the line of a `ConfigError` with what it is of, and ends it with a hint."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}{hint}") from error


def shortened(value: Any, length: int = 80) -> str:
    """A value as an error line shows it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of more than 4,300 digits
        text = "a number of thousands of digits"
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def shown_path(path: Path) -> str:
    """A path as an error line shows it, cut where it is long."""
    return " ".join(str(path)[:200].split("\n"))


def did_you_mean(word: Any, candidates: Iterable[Any]) -> str:
    """A clause that names the candidates close to `word`, empty where there are none."""
    by_lower_case = {str(candidate).lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(str(word).lower(), by_lower_case, n=4, cutoff=0.5)
    return f"; did you mean {' or '.join(by_lower_case[name] for name in close)}?" if close else ""


OUT_OF_MEMORY = (
    "the device's memory is full; lower NUM_ENVS, NUM_STEPS, WINDOW_MEM or the network's widths"
)


class RunError(Exception):
    """A run that ended by an error; its message is one line that says where what is."""


class Saved(Protocol):
    """The part of a record that `explained` reads."""

    folder: Path
    updates: int

    def newest_checkpoint(self) -> int: ...


def explained(error: Exception, record: Saved | None = None) -> str:
    """Explains an error in one line; the traceback goes to `error.txt` in the run's folder.

    Without a run that has done something, that file is a temporary one.
    """
    text = str(error)
    out_of_memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text
    parts = [out_of_memory_text(text) if out_of_memory else one_line(error)]
    folder = None
    if record and record.updates:
        folder = record.folder
        parts[0] = f"after update {record.updates}: {parts[0]}"
        newest = record.newest_checkpoint()
        if newest:
            parts.append(f"RESUME={record.folder} goes on from update {newest}")
    path = write_traceback(error, folder)
    if path:
        parts.append(f"the traceback is in {path}")
    return "; ".join(parts)


def one_line(error: BaseException) -> str:
    """Returns an error's kind and message in one line, and where the user's own file raised it."""
    kind, words = type(error).__name__, cause(str(error)).split()
    if not words and isinstance(error, NotImplementedError):  # of which method
        words = [traceback.extract_tb(error.__traceback__)[-1].name]
    message = TRACED.get(kind) or bearable(" ".join(words))
    lines = [
        f" in line {line} of {Path(frame.f_code.co_filename).name}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").startswith(f"{OWN_PACKAGE}.")
    ]
    return (f"{kind}: {message}" if message else kind) + "".join(lines[-1:])


OWN_PACKAGE = "own_environment"
"""The package that a user's own files are imported into."""

A_BRANCH = "Python branches on a value that JAX traces; use jnp.where or jax.lax.cond"

TRACED = {
    "TracerBoolConversionError": A_BRANCH,
    "TracerIntegerConversionError": "Python counts or indexes with a value that JAX traces; use"
    " jnp or jax.lax",
    "ConcretizationTypeError": "Python needs a value that JAX traces; use jnp or jax.lax",
    "TracerArrayConversionError": "NumPy gets an array that JAX traces; use jnp",
}
"""What JAX says in a page, by the kind of its error."""


def bearable(text: str, length: int = 250) -> str:
    """Returns a text of at most this length: its first sentences, or its first words and dots."""
    text = text.rstrip(".")
    if len(text) <= length:
        return text
    end = text.rfind(". ", 0, length)
    return text[:end] if end > 0 else f"{text[: length - 4].rsplit(' ', 1)[0]} ..."


def out_of_memory_text(text: str) -> str:
    """Explains a failed allocation, with its size where the message has one."""
    size = re.search(r"allocat\w+ (\d+) bytes", text, re.IGNORECASE)
    asked = f"no {int(size[1]) / 1e9:.1f} GB more: " if size else ""
    return asked + OUT_OF_MEMORY


RAISED = re.compile(r"Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*(\S.*)")
"""The exception's line of a traceback within a message, as that of an error in a callback."""


def cause(text: str) -> str:
    """Returns what was raised by the last traceback within a message, else the message."""
    return (RAISED.findall(text) or [text])[-1]


def write_traceback(error: Exception, folder: Path | None) -> Path | None:
    """Writes it to the folder, else to a temporary file.

    Returns:
      the file, None where no disk takes it.
    """
    text = "".join(traceback.format_exception(error))
    for place in (folder, Path(tempfile.gettempdir())):
        if place is None:
            continue
        path = place / ("error.txt" if place == folder else f"error_{os.getpid()}.txt")
        try:
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            return path
        except OSError:
            continue
    return None
