"""The program that a GPU would run, read without one: what an update launches, moves and computes.

    python benchmarks/gpu_program.py [SCRIPT] [KEY=VALUE ...] [--XLA_OPTION=VALUE ...]

XLA's CUDA plugin compiles ahead of time for a described device: neither a GPU nor a driver is
needed, but its packages are, in the environment that runs this, of `requirements.txt`'s JAX:

    pip install "jax[cuda13]==0.10.2"

Kernels and memory are those of the compiled program; products may be split otherwise on a real
device, where XLA also measures what is fastest (autotuning). Nothing was run, so that times are
predictions, from kernels at 2 to 4 microseconds each, bytes and operations at a device's rates.
Loops whose length the compiler does not know count once, but for the pool's that makes worlds,
which runs every WORLDS_EVERY steps. The last line is a JSON object.
"""

import importlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trxl.config import read_overrides
from trxl.errors import ConfigError
from trxl.training import Algorithm, make_init_and_update

from trainer_Muesli_trXL import MUESLI
from trainer_PPO_trXL import PPO

H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""A description of the device, as XLA reads it; from NVIDIA's data sheet."""

PARTS = (
    *("agent", "game", "worlds", "resets", "logging", "keys", "bootstrap", "statistics"),
    *("storage", "advantages", "gradients", "metrics"),
)
"""Names that `jax.named_scope` gives parts of an update; of nested ones the innermost counts."""

ELSE = "else"

NOT_LAUNCHED = {
    *("parameter", "get-tuple-element", "tuple", "constant", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier"),
}

WRITES = {"dynamic-update-slice": 1, "scatter": 2}
"""What writes into its first operand in place, and which operand it writes."""

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}

BANDWIDTH = {"H100": 3.3e12, "H200": 4.8e12}  # bytes per second
RATES = {"float32": 60e12, "TF32": 400e12, "bfloat16": 800e12}  # operations per second
LAUNCH_SECONDS = (2e-6, 4e-6)
WORLDS_EVERY = 19  # steps of Craftax with RESET_RATIO=16, whose episodes last some 300 steps


class Cost(NamedTuple):
    """What some kernels take."""

    launches: float = 0
    bytes: float = 0  # read and written
    operations: float = 0  # of matrix products, a multiplication and an addition as two

    def __add__(self, other: "Cost") -> "Cost":  # type: ignore[override]
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, number: float) -> "Cost":
        """So many times."""
        return Cost(*(number * x for x in self))


class Op(NamedTuple):
    """A line of a compiled program."""

    name: str
    kind: str
    shape: str
    operands: tuple[str, ...]
    line: str

    @property
    def part(self) -> str:
        """Of the update, by the scopes that it was traced in."""
        found = re.search(r'op_name="([^"]*)"', self.line)
        words = re.findall(r"\w+", found[1]) if found else []
        return next((word for word in reversed(words) if word in PARTS), ELSE)

    def called(self, what: str) -> str:
        """The computation that it calls as its `what`."""
        return re.search(rf"{what}=%?([\w.\-]+)", self.line)[1]  # type: ignore[index]

    @property
    def trips(self) -> int | None:
        """How often a loop runs, None where that is not known."""
        found = re.search(r'known_trip_count":\{"n":"(\d+)"', self.line)
        return int(found[1]) if found else None

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        named = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", self.line)
        if named:
            return named
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.line)
        return [name.strip().lstrip("%") for name in listed[1].split(",")]  # type: ignore[index]


def size_of(shape: str) -> int:
    """Bytes of a shape such as `f32[8,4]{1,0}`, or of a tuple of them."""
    total = 0
    for kind, sizes in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape):
        total += BYTES.get(kind, 4) * numbers(sizes)
    return total


def numbers(sizes: str) -> int:
    """The product of "8,4"."""
    return int(np.prod([int(x) for x in sizes.split(",") if x], dtype=np.int64))


class CompiledProgram:
    """A compiled program's text, cut into computations.

    Args:
      text: `compiled.as_text()`.
    """

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, Op]] = {}
        self.entry = ""
        current: dict[str, Op] = {}
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            head = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if head:
                current = self._computations[head[2]] = {}
                self.entry = head[2] if head[1] else self.entry
                continue
            found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\((.*)", line)
            if found:
                name, shape, kind, rest = found.groups()
                operands = tuple(re.findall(r"%([\w.\-]+)", rest.split(")")[0]))
                current[name] = Op(name, kind, shape, operands, line)

    def ops(self, computation: str) -> Iterator[Op]:
        """The lines of a computation."""
        yield from self._computations[computation].values()

    def loops(self, computation: str | None = None) -> Iterator[Op]:
        """The loops that stand in a computation itself, by default the entry."""
        for op in self.ops(computation or self.entry):
            if op.kind == "while":
                yield op

    def cost(self, computation: str, around: str = ELSE) -> dict[str, Cost]:
        """What running a computation takes, by part: the longer branch of a conditional.

        Args:
          around: the part of what nothing is known of, that of the loop around it.
        """
        total: dict[str, Cost] = {}
        for op in self.ops(computation):
            for part, cost in self._cost_of(op, computation).items():
                part = around if part == ELSE else part
                total[part] = total.get(part, Cost()) + cost
        return total

    def _cost_of(self, op: Op, computation: str) -> dict[str, Cost]:
        if op.kind == "while":
            body = self.cost(op.called("body"), op.part)
            condition = self.cost(op.called("condition"), op.part)
            trips = op.trips or (1 / WORLDS_EVERY if op.part == "worlds" else 1)
            return {
                part: (body.get(part, Cost()) + condition.get(part, Cost())).times(trips)
                for part in {*body, *condition}
            }
        if op.kind == "conditional":
            costs = [self.cost(branch, op.part) for branch in op.branches]
            return max(costs, key=lambda cost: total_of(cost).launches)
        if op.kind == "call":
            return self.cost(op.called("to_apply"), op.part)
        if op.kind in NOT_LAUNCHED:
            return {}
        cost = Cost(1, self._bytes(op, computation), self._operations(op, computation))
        return {op.part: cost}

    def _bytes(self, op: Op, computation: str) -> int:
        """What a kernel reads and writes; of an array that is sliced or written in place, that."""
        around = self._computations[computation]
        if op.kind != "fusion":
            return size_of(op.shape) + sum(
                size_of(around[x].shape) for x in op.operands if x in around
            )
        inside = self._computations[op.called("calls")]
        users: dict[str, list[Op]] = {}
        for inner in inside.values():
            for operand in inner.operands:
                users.setdefault(operand, []).append(inner)
        total = 0
        for inner in inside.values():
            if inner.kind == "parameter":
                total += sum_read(inner, users.get(inner.name, []))
        in_place = 0
        for inner in inside.values():
            if inner.kind in WRITES:
                written = inside[inner.operands[WRITES[inner.kind]]]
                in_place += max(0, size_of(inner.shape) - size_of(written.shape))
        return total + max(0, size_of(op.shape) - in_place)

    def _operations(self, op: Op, computation: str) -> int:
        if op.kind == "fusion":
            called = op.called("calls")
            return sum(self._operations(inner, called) for inner in self.ops(called))
        if op.kind != "dot":
            return 0
        left = self._computations[computation][op.operands[0]]
        sizes = [int(x) for x in re.search(r"\[([\d,]*)\]", left.shape)[1].split(",") if x]  # type: ignore[index]
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.line)
        inner = [sizes[int(i)] for i in contracted[1].split(",") if i] if contracted else []
        result = numbers(re.search(r"\[([\d,]*)\]", op.shape)[1])  # type: ignore[index]
        return 2 * result * int(np.prod(inner, dtype=np.int64))


def sum_read(parameter: Op, users: list[Op]) -> int:
    """Bytes that a fused kernel reads of what it is given."""
    if users and all(user.kind in ("dynamic-slice", "gather") for user in users):
        return sum(size_of(user.shape) for user in users)
    in_place = [user.kind in WRITES and user.operands[0] == parameter.name for user in users]
    return 0 if users and all(in_place) else size_of(parameter.shape)


def total_of(costs: dict[str, Cost]) -> Cost:
    """Of all parts together."""
    return sum(costs.values(), Cost())


def compiled_for(config: dict[str, Any], algorithm: Any, options: dict[str, Any] | None = None):
    """An update, compiled for the described device, and the seconds that took."""
    target = topologies.get_topology_desc("gpu", "cuda", target_config=H100, topology="1x1x1")
    placed = NamedSharding(Mesh(np.array(target.devices[:1]), ("x",)), PartitionSpec())
    on_gpu = mock.patch.object(jax, "default_backend", return_value="gpu")
    with jax.default_device(jax.devices("cpu")[0]), on_gpu:
        init, update = make_init_and_update(config, algorithm)
        if config["NUM_SEEDS"] > 1:
            init, update = jax.vmap(init), jax.vmap(update)
        keys = jax.vmap(jax.random.key)(np.arange(config["NUM_SEEDS"]))
        shapes = jax.eval_shape(init, keys if config["NUM_SEEDS"] > 1 else keys[0])
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), shapes)
    lowered = jax.jit(update, donate_argnums=0).lower(state)
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)
    return compiled, time.perf_counter() - start


ALGORITHMS = {
    "train_PPO_trXL.py": PPO,
    "train_PPO_trXL_pmap.py": PPO,
    "train_Muesli_trXL.py": MUESLI,
    "train_Muesli_trXL_pmap.py": MUESLI,
}


def read_script(arguments: list[str]) -> tuple[dict[str, Any], Algorithm]:
    """The checked config of an entry script with overrides, and its algorithm.

    Raises:
      ConfigError: it can't be run on one device.
    """
    script = "train_PPO_trXL_pmap.py"
    if arguments and arguments[0].endswith(".py"):
        script, *arguments = arguments
    if script not in ALGORITHMS:
        raise ConfigError(f"{script} is none of {', '.join(ALGORITHMS)}")
    algorithm = ALGORITHMS[script]
    config = importlib.import_module(script.removesuffix(".py")).config
    overrides = read_overrides(arguments, algorithm.keys)
    return algorithm.check({**config, **overrides}), algorithm


def main() -> None:
    """Prints the tables and the JSON line."""
    given = [argument for argument in sys.argv[1:] if argument.startswith("--")]
    named = dict(argument[2:].split("=", 1) for argument in given)
    options = {name: {"true": True, "false": False}.get(x, x) for name, x in named.items()}
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # of a driver
    jax.config.update("jax_platforms", "cuda,cpu")
    try:
        config, algorithm = read_script([a for a in sys.argv[1:] if a not in given])
    except ConfigError as error:
        sys.exit(f"error: {error}")
    compiled, seconds = compiled_for(config, algorithm, options)
    memory = compiled.memory_analysis()
    program = CompiledProgram(compiled.as_text())
    numbers = {
        "state_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "loops": [
            {"trips": op.trips, "parts": program.cost(op.called("body"))} for op in program.loops()
        ],
        "update": program.cost(program.entry),
    }
    print(
        f"{config['ENV_NAME']}, {config['NUM_ENVS']} environments, compiled in {seconds:.0f} s;"
        f" state {memory.argument_size_in_bytes / 1e6:,.0f} MB, temporaries"
        f" {memory.temp_size_in_bytes / 1e6:,.0f} MB\n"
    )
    for loop in numbers["loops"]:
        if total_of(loop["parts"]).launches > 20:
            print(table(f"a trip of the loop of {loop['trips']}", loop["parts"]))
    print(table("the whole update", numbers["update"]))
    print(prediction(config, total_of(numbers["update"])))
    print(json.dumps(numbers))


def table(title: str, costs: dict[str, Cost]) -> str:
    """Launches, bytes and operations by part."""
    lines = [f"| {title} | launches | MB | GFLOP |", "| --- | --- | --- | --- |"]
    rows = sorted(costs.items(), key=lambda item: -item[1].launches)
    for part, cost in [*rows, ("all", total_of(costs))]:
        moved, computed = cost.bytes / 1e6, cost.operations / 1e9
        lines.append(f"| {part} | {cost.launches:,.0f} | {moved:,.1f} | {computed:,.2f} |")
    return "\n".join(lines) + "\n"


def prediction(config: dict[str, Any], cost: Cost) -> str:
    """Seconds per update from launches, bytes and operations; steps per second if they add up."""
    steps = config["NUM_ENVS"] * config["NUM_STEPS"]
    launching = [cost.launches * seconds for seconds in LAUNCH_SECONDS]
    lines = [f"launches {launching[0]:.3f} to {launching[1]:.3f} s"]
    lines += [f"bytes on {name} {cost.bytes / rate:.3f} s" for name, rate in BANDWIDTH.items()]
    lines += [f"products in {name} {cost.operations / rate:.3f} s" for name, rate in RATES.items()]
    together = launching[0] + cost.bytes / BANDWIDTH["H200"] + cost.operations / RATES["TF32"]
    lines.append(f"together {steps / together:,.0f} steps/s on an H200 in TF32")
    return "; ".join(lines)


if __name__ == "__main__":
    main()
