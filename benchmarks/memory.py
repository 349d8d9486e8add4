"""What an update needs on its device: `python benchmarks/memory.py [SCRIPT] [KEY=VALUE ...]`.

SCRIPT and the overrides are those of throughput.py. Nothing runs: the update is compiled for the
first device, and XLA's own analysis of it is printed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

from benchmarks.throughput import memory_bytes, read_config
from trxl.errors import ConfigError
from trxl.training import make_init_and_update

from trainer_PPO_trXL import PPO


def main() -> None:
    """Prints the analysis, in MB."""
    try:
        init, update = make_init_and_update(read_config(sys.argv[1:]), PPO)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    state = jax.eval_shape(init, jax.random.key(0))
    compiled = jax.jit(update, donate_argnums=0).lower(state).compile()
    analysis = compiled.memory_analysis()
    parts = {
        "the state of the run (donated: updated in place)": analysis.argument_size_in_bytes,
        "temporaries: trajectory, batch, activations": analysis.temp_size_in_bytes,
        "all": memory_bytes(compiled),
    }
    for name, size in parts.items():
        print(f"{size / 1e6:10,.0f} MB  {name}")


if __name__ == "__main__":
    main()
