"""Opens the files of a run without running what a stranger may have put into them."""

import pickle
from pathlib import Path
from typing import IO, Any

import numpy as np

# What a pickle of NumPy arrays and scalars refers to, by NumPy's old and new names.
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
"""Keys and metrics of earlier versions, with their names of today."""

RENAMED_VALUES = {"EPISODE_END": {"hidden": "none", "beside": "append"}}
"""Values of keys, likewise."""


def with_new_names(content: dict[str, Any]) -> dict[str, Any]:
    """Returns a saved config or saved metrics with the names of today."""
    return {
        RENAMED.get(name, name): RENAMED_VALUES[name].get(x, x) if name in RENAMED_VALUES else x
        for name, x in content.items()
    }


class UnsafeFileError(ValueError):
    """A file that holds something else than NumPy arrays, numbers, strings and plain containers."""


JAX_ARRAY = ("jax._src.array", "_reconstruct_array")
"""What a pickled JAX array refers to."""


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
    """Loads a pickle of NumPy's or JAX's arrays in plain containers, as NumPy arrays.

    Raises:
      UnsafeFileError: it refers to anything else.
    """
    return _PlainUnpickler(file).load()


def load_results(path: str | Path) -> dict[str, Any]:
    """Loads the dict in one of a run's `.npy` files, with the names of today (`RENAMED`).

    Such a file holds a pickle, and `np.load(allow_pickle=True)` runs any code that it asks for.
    This reads the same files and refuses what is not plain data.

    Args:
      path: of a `<seed>_config.npy`, `<seed>_metrics.npy` or `<seed>_params.npy`.

    Raises:
      UnsafeFileError: the file refers to anything but NumPy's arrays, dtypes and scalars.
      ValueError: it is cut off, or holds no dict.
      OSError: it can't be read.
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
