"""Virtual devices for the tests of pmap, and settings that make the compiler quick."""

import ctypes
import gc
import os
import signal
from importlib.metadata import version
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def add_flags(*flags):
    """To those of XLA, which processes that a test starts inherit."""
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()


if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    add_flags("--xla_force_host_platform_device_count=8")

# A program of the tests takes longer to compile than to run. What it computes stays the same.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if version("jaxlib").startswith("0.10."):  # another version may not know it, and ends
    add_flags("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
# All tests, and the processes that they start, share what was compiled, however small it is.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Else every process that a test starts compiles all that it imports anew, half of its start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# What a shell runs in the background ignores Ctrl-C, and under nohup a terminal that goes; so would
# what a test starts to interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tracing makes many objects that stay, and the collector would look at all of them again and again.
gc.set_threshold(100_000, 50, 50)


MOST_RESIDENT = 2e9
"""Bytes of a worker, from which on it frees its compiled programs; all of them take 6 GB."""


def resident_bytes():
    """Returns the memory of this process, 0 where there is no Linux to say it."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def bounded_memory():
    """Keeps a worker below 3 GB."""
    yield
    if resident_bytes() > MOST_RESIDENT:
        import jax  # not before the settings above

        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what is freed


def pytest_configure(config):
    """Warnings of what our own modules call are errors; the suites' imports warn by themselves."""
    for module in own_modules():
        config.addinivalue_line("filterwarnings", f"error:::{module}")


def own_modules():
    """The names of all modules of the project but its tests."""
    paths = [*REPOSITORY.glob("*.py")]
    for folder in ("benchmarks", "experiments", "trxl"):
        paths += (REPOSITORY / folder).rglob("*.py")
    names = (".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in paths)
    return sorted(name.removesuffix(".__init__") for name in names)
