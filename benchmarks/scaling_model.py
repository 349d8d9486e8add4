"""Predicts the time of an update on many GPUs: `python benchmarks/scaling_model.py`.

Nothing is measured here. The numbers that go in stand at the top, with where they come from; put
your own in. An update on n GPUs takes

    fixed_s + (compute_s - fixed_s) * (environments of a GPU / envs)
    + gradient_steps * (time of an all-reduce of the gradients)

and an all-reduce first runs around the GPUs of a node, then around the nodes, each GPU through its
own network port with its share of the data: 2 (g - 1) / g * bytes / bandwidth + 2 (g - 1) hops
in a node of g, 2 (k - 1) / k * (bytes / g) / bandwidth + 2 log2(k) latencies between k nodes (the
cost of ring and tree algorithms, Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective
Communication Operations in MPICH").
"""

from math import ceil, log2
from typing import NamedTuple

GPUS_PER_NODE = 8
GPUS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)


class Machine(NamedTuple):
    """A kind of GPU in nodes of 8, and how fast it runs the published Craftax config alone."""

    name: str
    compute_s: float  # an update of `Run.envs` environments on one GPU
    fixed_s: float  # of it, what does not shrink with fewer environments
    node_bandwidth: float  # bytes/s of a GPU within its node, one direction
    network_bandwidth: float  # bytes/s of a GPU's network port, one direction
    hop_s: float = 3e-6  # latency between two GPUs of a node: an assumption
    network_latency_s: float = 15e-6  # latency between two nodes: an assumption


class Run(NamedTuple):
    """The published Craftax config; its bytes as `scaling.py` counts them."""

    envs: int = 1024
    steps: int = 128
    minibatches: int = 8
    gradient_steps: int = 32
    all_reduce_bytes: float = 0.0  # of a gradient step


RUN = Run(all_reduce_bytes=19_555_528)

# The published implementation's time for 1e9 steps on an A100, 6 h 30.
A100_SECONDS = 6.5 * 3600 / 1e9 * RUN.envs * RUN.steps
# What this project aims at on one H200. A goal, not a measurement.
GOAL_SECONDS = RUN.envs * RUN.steps / 280_000

# NVLink: 600 and 900 GB/s per GPU, both directions together (NVIDIA's data sheets of A100 and
# H100/H200). Network: one port per GPU, HDR InfiniBand of 200 Gb/s and NDR of 400 Gb/s (NVIDIA's
# data sheets of DGX A100 and DGX H100/H200).
A100 = Machine("A100, published speed", A100_SECONDS, 0.0, 300e9, 25e9)
H200 = Machine("H200, speed aimed at", GOAL_SECONDS, 0.0, 450e9, 50e9)
MACHINES = (
    A100,
    A100._replace(name="A100, published speed, 0.2 s of it fixed", fixed_s=0.2),
    H200,
    H200._replace(name="H200, speed aimed at, 0.1 s of it fixed", fixed_s=0.1),
)


def all_reduce_seconds(machine: Machine, size: float, gpus: int) -> float:
    """Seconds of an all-reduce of `size` bytes over so many GPUs, a power of 2."""
    in_node = min(gpus, GPUS_PER_NODE)
    nodes = gpus // in_node
    seconds = 2 * (in_node - 1) / in_node * size / machine.node_bandwidth
    seconds += 2 * (in_node - 1) * machine.hop_s
    seconds += 2 * (nodes - 1) / nodes * (size / in_node) / machine.network_bandwidth
    return seconds + 2 * ceil(log2(nodes)) * machine.network_latency_s


def update_seconds(machine: Machine, run: Run, gpus: int, envs: int) -> tuple[float, float]:
    """Seconds of computing and of exchanging in an update of `envs` environments on all GPUs."""
    scaled = (machine.compute_s - machine.fixed_s) * envs / gpus / run.envs
    exchange = run.gradient_steps * all_reduce_seconds(machine, run.all_reduce_bytes, gpus)
    return machine.fixed_s + scaled, exchange


def table(machine: Machine, run: Run) -> str:
    """Weak and strong scaling of a machine, as a table."""
    lines = [
        f"{machine.name}:",
        "",
        "| GPUs | weak: s per update | of it exchange | million steps/s | efficiency"
        " | strong: s per update | of it exchange | million steps/s | efficiency |",
        "| --- " * 9 + "|",
    ]
    one = run.envs * run.steps / machine.compute_s
    for gpus in GPUS:
        cells = []
        for envs in (run.envs * gpus, run.envs):
            if envs < gpus * run.minibatches:  # a minibatch needs an environment on every GPU
                cells += ["-"] * 4
                continue
            compute, exchange = update_seconds(machine, run, gpus, envs)
            sps = envs * run.steps / (compute + exchange)
            cells += [
                f"{compute + exchange:.3f}",
                f"{exchange:.3f}",
                f"{sps / 1e6:.2f}",
                f"{sps / one / gpus:.2f}",
            ]
        lines.append(f"| {gpus} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Prints a table for each machine."""
    print("\n\n".join(table(machine, RUN) for machine in MACHINES))


if __name__ == "__main__":
    main()
