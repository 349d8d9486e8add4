"""All that a GPU by the minute is asked, in parts: `python benchmarks/gpu.py part=1 [out=FOLDER]`.

1. Whether it is right there: network against the NumPy oracle, the ratio before the first gradient
   step, in float32, TF32 and bfloat16, and a resumed run against one that was not stopped.
2. Steps per second of environment, rollout and update, by environments, network and precision.
3. A profile of an update: kernels, gaps, launches per environment step.
4. Craftax with the published config, on from where an earlier call stopped, or from the folder of
   a run with a learner-only checkpoint, `from=FOLDER`.

A call takes at most `minutes=8`, and measures only what is named like `only=PATTERN`, a regular
expression. With `at_once=N`, N measurements compile beside each other on the host's cores, and are
timed one after the other; compiling takes most of the time of all parts but the last. They share
the device's memory, of which 8,192 environments take 24 GB and their compilation more. What it
measured is in FOLDER/results.jsonl at once; called again, a part goes on with what is missing.
Every measurement is a process of its own, so that one that fails takes nothing with it. Part 4
leaves checkpoints of parameters and optimiser in files of at most 15 MB in FOLDER/craftax, and its
curve. The table is printed last, also by `part=0` alone.
`tiny=1` is all of it in sizes for a CPU. Needs what training needs, nothing else.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
MEASURES = REPOSITORY / "benchmarks" / "gpu_measures.py"
sys.path.insert(0, str(REPOSITORY))

from benchmarks.gpu_measures import TINY  # noqa: E402

PRECISIONS = {
    "float32": {"JAX_DEFAULT_MATMUL_PRECISION": "highest"},
    "TF32": {"JAX_DEFAULT_MATMUL_PRECISION": "tensorfloat32"},
    "bfloat16": {},
}
"""Environment variables of a measurement, by how matrix products are computed."""

DEFAULTS = {"JAX_TRACEBACK_FILTERING": "off"}
"""Of all, where it is not set; the last line of a traceback is then what went wrong."""

ARGUMENTS = {"part", "out", "minutes", "tiny", "from", "only", "at_once"}


class Measurement(NamedTuple):
    """One line of the results."""

    part: int
    kind: str
    precision: str
    changes: dict[str, Any]  # of the published config

    @property
    def name(self) -> str:
        """What it is called in the results."""
        changes = ", ".join(f"{key}={value}" for key, value in self.changes.items())
        return " ".join(filter(None, [self.kind, self.precision, changes]))


def measurements(tiny: bool) -> Iterator[Measurement]:
    """All there is to measure but the training, in order of worth."""
    sizes = {"NUM_ENVS": TINY["NUM_ENVS"]} if tiny else {}
    for kind, precision in product(("oracle", "ratio"), PRECISIONS):
        yield Measurement(1, kind, precision, {})
    yield Measurement(1, "resume", "float32", sizes)
    environments = (4, 8) if tiny else (1024, 4096, 8192)
    for number in environments:
        yield Measurement(2, "environment", "TF32", {"NUM_ENVS": number})
    for number, kind in product(environments, ("update", "rollout")):
        for precision, network in product(("TF32", "bfloat16", "float32"), ("published", "wide")):
            yield Measurement(2, kind, precision, {"NUM_ENVS": number, "NETWORK": network})
    for number in environments[:: len(environments) - 1]:
        yield Measurement(3, "profile", "TF32", {"NUM_ENVS": number})


def main() -> None:
    """Reads the command line, and measures what is missing."""
    given = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    if given.keys() - ARGUMENTS or not all("=" in argument for argument in sys.argv[1:]):
        sys.exit(f"error: {' '.join(sys.argv[1:])}: give {', '.join(sorted(ARGUMENTS))} a value")
    out = Path(given.get("out", "gpu_results"))
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * float(given.get("minutes", 8))
    tiny, part = bool(int(given.get("tiny", 0))), given.get("part", "0")
    if part == "4":
        train(out, end, tiny, given.get("from"))
    elif part in ("1", "2", "3"):
        wanted = [
            m for m in missing(out, int(part), tiny) if re.search(given.get("only", ""), m.name)
        ]
        if not all(take_all(wanted, out, end, tiny, int(given.get("at_once", 1)))):
            print("the time is over; call it again to go on", flush=True)
    elif part != "0":
        sys.exit(f"error: part={part} is none of 1 to 4")
    print(table(out))


# ------------------------------------------------------------------ taking measurements


def results(out: Path) -> list[dict[str, Any]]:
    """What there is, the newest of each name; a line that a kill cut off is none."""
    found = {}
    path = out / "results.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["name"]] = row
    return list(found.values())


def missing(out: Path, part: int, tiny: bool) -> list[Measurement]:
    """What a part has not measured yet, or failed to."""
    done = {row["name"] for row in results(out) if "error" not in row}
    return [m for m in measurements(tiny) if m.part == part and m.name not in done]


def take_all(
    wanted: list[Measurement], out: Path, end: float, tiny: bool, at_once: int
) -> list[bool]:
    """Measures what is wanted, `at_once` beside each other; for which there was time."""
    lock = out / "preparing"
    lock.touch()
    together = {"PREPARING": str(lock), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    variables = together if at_once > 1 else {}
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda m: take(m, out, end, tiny, variables), wanted))


def take(
    measurement: Measurement, out: Path, end: float, tiny: bool, variables: dict[str, str]
) -> bool:
    """Measures in a process of its own and notes it; whether there was time for it."""
    left = end - time.monotonic()
    if left <= 0:
        return False
    print(measurement.name, "...", flush=True)
    config = {**(TINY if tiny else {}), **measurement.changes}
    if measurement.precision == "bfloat16":
        config["COMPUTE_DTYPE"] = "bfloat16"
    asked = {"kind": measurement.kind, "precision": measurement.precision, "config": config}
    variables = variables | PRECISIONS[measurement.precision] | of_kind(measurement.kind)
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, MEASURES, json.dumps(asked)],
            env={
                **DEFAULTS,
                "JAX_COMPILATION_CACHE_DIR": str(out / "cache"),
                **os.environ,
                **variables,
            },
            capture_output=True,
            text=True,
            timeout=left,
        )
    except subprocess.TimeoutExpired:
        return False
    row = {"name": measurement.name, **measurement._asdict()}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        row["error"] = lines[-1][:300] if lines else f"status {done.returncode}"
        print("  failed:", row["error"], flush=True)
    else:
        row |= json.loads(done.stdout.splitlines()[-1])
    row["seconds"] = round(time.perf_counter() - start, 1)
    with open(out / "results.jsonl", "a+b") as file:
        # Behind a line that a kill cut off, on a line of its own.
        file.seek(max(0, file.tell() - 1))
        cut_off = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * cut_off + json.dumps(row).encode() + b"\n")
    return True


def of_kind(kind: str) -> dict[str, str]:
    """Environment variables that a kind of measurement needs."""
    if kind != "resume":
        return {}
    flags = os.environ.get("XLA_FLAGS", "")
    return {"XLA_FLAGS": f"{flags} --xla_gpu_deterministic_ops=true".strip()}


# ------------------------------------------------------------------ training


def train(out: Path, end: float, tiny: bool, start_from: str | None) -> None:
    """Trains the published Craftax config until the time is over, and stops it with SIGTERM."""
    root = out / "craftax"
    folders = sorted(root.glob("*/run.json"))
    changes = {"CHECKPOINT_KIND": "learner", "CHECKPOINT_EVERY": 200, "KEEP_CHECKPOINTS": 1}
    changes |= TINY if tiny else {}
    resumed = folders[0].parent if folders else start_from
    if resumed:
        arguments = [f"RESUME={resumed}", "CHECKPOINT_KIND=learner"]
    else:
        arguments = [f"{name}={value}" for name, value in changes.items()]
        arguments.append(f"RESULTS_DIR={root}")
    script = REPOSITORY / "train_PPO_trXL_pmap.py"
    process = subprocess.Popen([sys.executable, script, *arguments])
    try:
        process.wait(timeout=max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.wait()


# ------------------------------------------------------------------ the table


def table(out: Path) -> str:
    """All results in Markdown."""
    rows = results(out)
    parts = [tests_table(rows), speeds_table(rows), profiles(rows), curve(out)]
    return "\n\n".join(part for part in parts if part)


def of_kinds(rows: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    """The results of these kinds that did not fail."""
    return [row for row in rows if row["kind"] in kinds and "error" not in row]


def tests_table(rows: list[dict[str, Any]]) -> str:
    """Part 1."""
    lines = ["| test | largest error | tolerance | |", "| --- | --- | --- | --- |"]
    for row in of_kinds(rows, "oracle", "ratio", "resume"):
        verdict = "passed" if row["passed"] else "FAILED"
        error = f"{row['largest_error']:.2g}"
        lines.append(f"| {row['name']} | {error} | {row['tolerance']:g} | {verdict} |")
    return "\n".join(lines) if len(lines) > 2 else ""


SPEEDS = ("environment", "rollout", "update")


def speeds_table(rows: list[dict[str, Any]]) -> str:
    """Part 2: the environment alone, and how much of its speed a training has."""
    rows = of_kinds(rows, *SPEEDS)
    alone = {
        row["changes"]["NUM_ENVS"]: row["steps_per_second"]
        for row in rows
        if row["kind"] == "environment"
    }
    lines = ["| steps/s | | of the environment's |", "| --- " * 3 + "|"]
    for row in rows:
        speed, most = row["steps_per_second"], alone.get(row["changes"]["NUM_ENVS"])
        lines.append(f"| {row['name']} | {speed:,.0f} | {f'{speed / most:.3f}' if most else ''} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def profiles(rows: list[dict[str, Any]]) -> str:
    """Part 3."""
    texts = []
    for row in of_kinds(rows, "profile"):
        lines = [
            f"{row['name']}: {row['launches_per_rollout_step']:,.0f} launches per rollout step,"
            f" {100 * row['idle_share']:.0f} % of the time idle\n",
            "| kernel | ms | launches | gap before, ms |",
            "| --- | --- | --- | --- |",
        ]
        for name, (milliseconds, count) in row["kernels_ms"].items():
            gap = row["gaps_before_ms"].get(name, "")
            lines.append(f"| {name} | {milliseconds:,.3f} | {count} | {gap} |")
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def curve(out: Path) -> str:
    """Part 4: returns at ten places of what was trained."""
    paths = sorted(out.glob("craftax/*/*_metrics.jsonl"))
    rows = [json.loads(line) for line in paths[0].read_text().splitlines()] if paths else []
    if not rows:
        return ""
    lines = ["| env_steps | return | steps/s |", "| --- | --- | --- |"]
    for row in rows[:: -(-len(rows) // 10)] + rows[-1:]:
        speed, returns = row["steps_per_second"], row["returned_episode_returns"]
        mean = "" if returns is None else f"{returns:.3f}"
        lines.append(f"| {row['env_steps']:,} | {mean} | {speed:,.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
