"""Virtual devices for the pmap tests, and settings that shorten compilation."""

import ctypes
import gc
import os
import signal
from importlib.metadata import version
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def add_flags(*flags):
    """Adds to XLA_FLAGS, which processes started by tests inherit."""
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()


if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    add_flags("--xla_force_host_platform_device_count=8")

# Test programs take longer to compile than to run. Results stay the same.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if version("jaxlib").startswith("0.10."):  # other versions may exit on unknown flags
    add_flags("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
# Tests and the processes that they start share compiled programs, small ones included.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Without bytecode, compiling imports takes half of every process's start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Background jobs of a shell ignore Ctrl-C, and jobs under nohup ignore SIGHUP. What a test
# starts to interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tracing makes many long-lived objects, which the collector would scan again and again.
gc.set_threshold(100_000, 50, 50)


MOST_RESIDENT = 2.5e9
"""Bytes above which a worker frees its compiled programs; all of them take 6 GB."""


def resident_bytes():
    """Returns this process's memory in bytes, 0 outside Linux."""
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
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory


def pytest_configure(config):
    """Turns warnings of our own modules' calls into errors, not those of the suites' imports."""
    for module in own_modules():
        config.addinivalue_line("filterwarnings", f"error:::{module}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks weekly tests as slow too, before `-m` selects."""
    for item in items:
        if item.get_closest_marker("weekly"):
            item.add_marker(pytest.mark.slow)


def own_modules():
    """Returns the names of all modules of the project but its tests."""
    paths = [*REPOSITORY.glob("*.py")]
    for folder in ("benchmarks", "experiments", "trxl"):
        paths += (REPOSITORY / folder).rglob("*.py")
    names = (".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in paths)
    return sorted(name.removesuffix(".__init__") for name in names)
