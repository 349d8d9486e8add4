"""Virtual devices for the tests of pmap, and settings that make the compiler quick."""

import gc
import os
from pathlib import Path

if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

# A program of the tests takes longer to compile than to run. What it computes stays the same.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".jax_cache")
)

# Tracing makes many objects that stay, and the collector would look at all of them again and again.
gc.set_threshold(100_000, 50, 50)
