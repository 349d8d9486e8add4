"""Errors explained in one line."""

import difflib
import os
import re
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """Config that can't be run. The message is one line that says what to change."""


@contextmanager
def told_of(what: str, hint: str = "") -> Iterator[None]:
    """Adds a start and a hint to the line of a `ConfigError`."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}{hint}") from error


def shortened(value: Any, length: int = 80) -> str:
    """Formats a value for an error message, in one line of at most `length` characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses integers of more than 4,300 digits
        text = "a number of thousands of digits"
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def shown_path(path: Path) -> str:
    """Returns a path for an error line, cut to 200 characters."""
    return " ".join(str(path)[:200].split("\n"))


def did_you_mean(word: Any, candidates: Iterable[Any]) -> str:
    """Returns a clause with the candidates close to `word`, empty if there are none."""
    by_lower_case = {str(candidate).lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(str(word).lower(), by_lower_case, n=4, cutoff=0.5)
    return f"; did you mean {' or '.join(by_lower_case[name] for name in close)}?" if close else ""


OUT_OF_MEMORY = (
    "the device's memory is full; lower NUM_ENVS, NUM_STEPS, WINDOW_MEM or the network's widths"
)


class RunError(Exception):
    """Error that ended a run. The message is one line, with the files to look at."""


def explained(
    error: Exception, folder: Path | None = None, progress: str = "", resume: str = ""
) -> str:
    """Explains an error in one line, and saves its traceback.

    Args:
      folder: of the run, for `error.txt`; None: a temporary file.
      progress: what was done before the error, if anything.
      resume: how to go on, if possible.
    """
    text = str(error)
    out_of_memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text
    line = out_of_memory_text(text) if out_of_memory else one_line(error)
    path = write_traceback(error, folder)
    where = f"the traceback is in {path}" if path else ""
    return "; ".join(filter(None, [": ".join(filter(None, [progress, line])), resume, where]))


def one_line(error: BaseException) -> str:
    """Returns the type, the message and the line of the user's file of an error, in one line."""
    kind, words = type(error).__name__, cause(str(error)).split()
    if not words and isinstance(error, NotImplementedError):  # name the method
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
"""Short messages for errors that JAX explains at length, by type."""


def bearable(text: str, length: int = 250) -> str:
    """Shortens a text to `length` characters: its first sentences, or its first words and dots."""
    text = text.rstrip(".")
    if len(text) <= length:
        return text
    end = text.rfind(". ", 0, length)
    return text[:end] if end > 0 else f"{text[: length - 4].rsplit(' ', 1)[0]} ..."


def out_of_memory_text(text: str) -> str:
    """Explains a failed allocation, with its size if the message has one."""
    size = re.search(r"allocat\w+ (\d+) bytes", text, re.IGNORECASE)
    asked = f"no {int(size[1]) / 1e9:.1f} GB more: " if size else ""
    return asked + OUT_OF_MEMORY


RAISED = re.compile(r"Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*(\S.*)")
"""Exception line of a traceback within a message, as errors in callbacks have."""


def cause(text: str) -> str:
    """Returns the exception line of the last traceback within a message, else the message."""
    return (RAISED.findall(text) or [text])[-1]


def write_traceback(error: Exception, folder: Path | None) -> Path | None:
    """Writes a traceback to the folder, else to a temporary file.

    Returns:
      the file; None if neither can be written.
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
