"""Config of a run in `run.json`, and its overrides in a resumed run."""

import json
import os
from pathlib import Path
from typing import Any

from trxl.config import of_saved_run
from trxl.environments import is_own, named_by_user, resolve_name
from trxl.errors import ConfigError, shortened, shown_path, told_of
from trxl.results import with_new_names
from trxl.training import Algorithm


def save_run_config(folder: Path, config: dict[str, Any]) -> None:
    """Writes the config that `resumed_config` reads."""
    partial = folder / "run.json.partial"
    partial.write_text(json.dumps(as_saved({**config, "RESUME": None}), indent=1))
    os.replace(partial, folder / "run.json")


def as_saved(value: Any) -> Any:
    """Converts a value to JSON's types; tuples and NumPy arrays become lists.

    Raises:
      ConfigError: a part can't be converted.
    """

    def plain(x: Any) -> Any:
        if hasattr(x, "tolist"):  # an array or scalar of NumPy or JAX
            return x.tolist()
        raise ConfigError(
            f"{shortened(x)} can't be saved with the run; use numbers, texts, lists and dicts"
        )

    try:
        return json.loads(json.dumps(value, default=plain))
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{shortened(value)} can't be saved with the run: {error}") from error


def resumed_config(folder: Path, overrides: dict[str, Any], algorithm: Algorithm) -> dict[str, Any]:
    """Returns the config of the run in `folder`, with the overrides of the command line.

    Raises:
      ConfigError: there is no run, it is of another algorithm, an override is not resumable, or the
        environment is a file that the overrides don't name.
    """
    saved = read_run_config(folder)
    trained_by = saved.pop("ALGORITHM", "PPO")
    if trained_by != algorithm.name:
        raise ConfigError(
            f"RESUME: {folder} was trained by {str(trained_by)[:80]}, and this script trains"
            f" {algorithm.name}"
        )
    saved = check_saved(saved, algorithm, f"RESUME: {folder / 'run.json'}")
    if overrides.get("PARAMS") is not None:
        raise ConfigError("RESUME: the run goes on from its own parameters; leave PARAMS out")
    asked = algorithm.check({**saved, **overrides})
    given = asked["ENV_NAME"] if "ENV_NAME" in overrides else None
    with told_of("RESUME"):
        saved["ENV_NAME"] = named_by_user(saved["ENV_NAME"], given, "ENV_NAME={}")
    changed = [
        name
        for name, key in algorithm.keys.items()
        if not key.resumable and as_saved(asked[name]) != saved[name]
    ]
    if changed:
        was = ", ".join(f"{key} = {shortened(saved[key])}" for key in changed)
        raise ConfigError(f"RESUME: {', '.join(changed)} can't change; the run has {was}")
    return asked


def check_saved(saved: dict[str, Any], algorithm: Algorithm, where: str) -> dict[str, Any]:
    """Returns a saved config, complete and checked.

    Args:
      where: its file, which a message begins with.

    Raises:
      ConfigError: it is none of this version's and these suites'.
    """
    with told_of(where, "; is it another version's?"):
        config = algorithm.check(of_saved_run(saved, algorithm.keys))
        resolve_name(config["ENV_NAME"])
    return config


def how_to_go_on(folder: Path, env_name: str) -> str:
    """Returns the line that says how to resume; the user's own file must be named again."""
    return f"go on with RESUME={folder}" + (f" ENV_NAME={env_name}" if is_own(env_name) else "")


def read_run_config(folder: Path) -> dict[str, Any]:
    """Reads the config of `save_run_config`.

    Raises:
      ConfigError: the file is missing or broken.
    """
    path = folder / "run.json"
    if os.path.isdir(folder) and not path.exists() and any(folder.glob("*_params.npy")):
        raise ConfigError(
            f"RESUME: {folder} has results but no run.json and no checkpoint; PARAMS={folder}"
            " starts a new run from its parameters"
        )
    return with_new_names(read_json(path, "run"))


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Reads the dict in a file of a run or a search.

    Args:
      what: is in its folder: a run or a search.

    Raises:
      ConfigError: there is none, or it is broken.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        where = shown_path(path.parent)
        raise ConfigError(f"RESUME: no {what} in {where}: {path.name}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"RESUME: {path} is broken: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"RESUME: {path} is broken: it holds no dict but {shortened(content)}")
    return content
