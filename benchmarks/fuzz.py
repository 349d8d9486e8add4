"""Wrong input, made at random: `python benchmarks/fuzz.py [how many] [first seed]`.

Every case is a command line, and what lies on the disk before it: settings, arguments of
environments, files of a run, classes of one's own, most of them wrong. It is handled well where it
ends in one line that says what to change, in no folder, and in no file changed; or where it is
accepted, which is: the update can be traced. All others are printed, with what makes them again.
"""

import contextlib
import io
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.wrong_input import SMALL, Case, cases  # noqa: E402
from trxl.runs import memory_check  # noqa: E402
from trxl.runs.compiled import Program  # noqa: E402
from trxl.runs.run import run  # noqa: E402

import evaluate_PPO_trXL as evaluate  # noqa: E402
from trainer_PPO_trXL import PPO  # noqa: E402

MEMORY = 2 * 10**8
"""Bytes that the device is said to have, so that no case takes long."""

LONGEST = 500
"""Characters of a line that is still one to read."""


class AcceptedError(BaseException):
    """Stands for a run that would begin now; nothing catches it."""


def attempt(case: Case, folder: Path) -> str:
    """Runs a case: "accepted", "one line", or what is wrong with how it ended."""
    case.prepare(folder)
    before = files_of(folder)
    output = io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        mock.patch.object(sys, "argv", ["script.py", *case.arguments]),
        mock.patch.object(memory_check, "device_memory", return_value=MEMORY),
        mock.patch.object(Program, "init", traced_init),
        mock.patch.object(Program, "compile", trace_and_accept),
        mock.patch.object(evaluate, "play", accept),
    ):
        try:
            case.script()
            verdict = "accepted"  # --help, say
        except AcceptedError:
            return "accepted"
        except SystemExit as error:
            verdict = judge(error.code)
        except BaseException as error:  # that is what is looked for
            verdict = f"raises {type(error).__name__}: {str(error)[:200]}"
    if verdict == "one line" and "Traceback" in output.getvalue():
        return f"prints a traceback: {output.getvalue()[-300:]}"
    changed = {path for path, content in files_of(folder).items() if before.get(path) != content}
    gone = before.keys() - files_of(folder).keys()
    return f"changes {changed | gone}" if changed | gone else verdict


def judge(code: Any) -> str:
    """What to think of an exit."""
    if not isinstance(code, str):
        return f"exits with {code!r}" if code else "accepted"
    if "the traceback is in" in code:
        return f"did not foresee: {code[:300]}"
    if len(code.splitlines()) > 1 or not code.startswith(("error: ", "usage: ")):
        return f"no line: {code[:300]!r}"
    return "one line" if len(code) <= LONGEST else f"too long: {code[:100]} ..."


def files_of(folder: Path) -> dict[Path, bytes]:
    """Every file and folder with its content; locks, which go with their process, left out."""
    return {
        path: path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if path.name not in ("lock", "__pycache__") and path.suffix != ".pyc"
    }


def traced_init(self: Program, stream: int = 0) -> Any:
    del stream
    return jax.eval_shape(self._init, self._keys, self._start)


def trace_and_accept(self: Program, state: Any) -> None:
    jax.eval_shape(self._update, state)
    accept()


def accept(*_: Any) -> None:
    raise AcceptedError


def fuzz(count: int, first_seed: int) -> tuple[Counter, list[str]]:
    """Tries so many cases.

    Returns:
      how often each (kind, verdict) was there, "bad" for all that are; and a text on each of those.
    """
    counts: Counter = Counter()
    bad = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run({**SMALL, "RESULTS_DIR": str(root / "finished")}, PPO)
        generator = cases(root / "finished" / SMALL["ENV_NAME"], first_seed)
        for _, (seed, case) in zip(tqdm(range(count), mininterval=5), generator, strict=False):
            folder = root / "case"
            folder.mkdir()
            verdict = attempt(case, folder)
            shutil.rmtree(folder)
            good = verdict in ("accepted", "one line")
            counts[case.kind, verdict if good else "bad"] += 1
            if not good:
                bad.append(f"seed {seed}, {case.kind}, {case.arguments}: {verdict}")
    return counts, bad


if __name__ == "__main__":
    how_many = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    first = int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time())
    counts, bad = fuzz(how_many, first)
    print("\n".join(bad))
    print("| kind | one line | accepted | bad |\n| --- | --- | --- | --- |")
    for kind in sorted({kind for kind, _ in counts}):
        row = [str(counts[kind, verdict]) for verdict in ("one line", "accepted", "bad")]
        print(f"| {kind} | {' | '.join(row)} |")
    sys.exit(bool(bad))
