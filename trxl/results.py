"""Loading of a run's files without executing code from untrusted files."""

import pickle
from pathlib import Path
from typing import IO, Any

import numpy as np

# Names in pickles of NumPy arrays and scalars, of old and new NumPy.
ALLOWED = {
    *(("numpy", name) for name in ("ndarray", "dtype")),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in [
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        ]
    ),
}


RENAMED = {
    "RETURN_DECAY": "POPART_DECAY",
    "TARGET_RATE": "TARGET_EMA_RATE",
    "episodes": "num_episodes",
    "importance": "importance_weight",
    "deviation": "advantage_std",
    "value_error": "value_mse",
}
"""Old and current names of keys and metrics."""

RENAMED_VALUES = {"EPISODE_END": {"hidden": "none", "beside": "append"}}
"""Old and current values of keys."""


def with_new_names(content: dict[str, Any]) -> dict[str, Any]:
    """Renames the keys of a saved config or of saved metrics, see `RENAMED`."""
    return {
        RENAMED.get(name, name): RENAMED_VALUES[name].get(x, x) if name in RENAMED_VALUES else x
        for name, x in content.items()
    }


class UnsafeFileError(ValueError):
    """Error of a file with other objects than NumPy arrays, numbers, strings and containers."""


JAX_ARRAY = ("jax._src.array", "_reconstruct_array")
"""Name in pickles of JAX arrays."""


def _reconstruct_as_numpy(function: Any, arguments: Any, state: Any, _: Any) -> np.ndarray:
    array = function(*arguments)
    array.__setstate__(state)
    return array


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == JAX_ARRAY:
            return _reconstruct_as_numpy
        if (module, name) not in ALLOWED:
            raise UnsafeFileError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def unpickle_arrays(file: IO[bytes]) -> Any:
    """Unpickles containers of NumPy and JAX arrays, as NumPy arrays.

    Raises:
      UnsafeFileError: the pickle refers to anything else.
    """
    return _PlainUnpickler(file).load()


def load_results(path: str | Path) -> dict[str, Any]:
    """Loads the dict in a `.npy` file of a run, with current names (`RENAMED`).

    The file holds a pickle. `np.load(allow_pickle=True)` would execute any code in it; this
    function refuses everything but plain data.

    Args:
      path: a `<seed>_config.npy`, `<seed>_metrics.npy` or `<seed>_params.npy`.

    Raises:
      UnsafeFileError: the file refers to other objects than arrays, dtypes and scalars.
      ValueError: the file is truncated, or holds no dict.
      OSError: the file can't be read.
    """
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read_header = getattr(np.lib.format, "read_array_header_{}_{}".format(*version))
            shape, _, dtype = read_header(file)
            content = unpickle_arrays(file) if dtype.hasobject else None
        except UnsafeFileError as error:
            raise UnsafeFileError(f"{path} is not a run's file: {error}") from None
        except Exception as error:  # a broken pickle raises almost anything
            raise ValueError(f"{path} is cut off or not a run's file: {error}") from error
    if not (isinstance(content, np.ndarray) and shape == () and isinstance(content.item(), dict)):
        raise ValueError(f"{path} is not a run's file: it holds no dict")
    return with_new_names(content.item())
