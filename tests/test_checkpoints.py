"""Checkpoints and metric files on disk: pruning, kills while writing, foreign names."""

import json
import os
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trxl.errors import ConfigError
from trxl.runs.checkpoints import Checkpoints
from trxl.runs.metrics import CurveFile


def checkpoints_in(folder):
    """Returns a run's checkpoints, a function that saves one, and their folder."""
    checkpoints = Checkpoints(folder, 2)
    save = lambda updates: checkpoints.save(updates, {"x": jnp.arange(8.0)})  # noqa: E731
    return checkpoints, save, folder / "checkpoints"


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        checkpoints, save, root = checkpoints_in(tmp_path)
        for updates in (2, 4, 6, 8):
            save(updates)
            assert checkpoints.newest() == updates
    assert names_in(root) == ["6", "8"]


class KilledError(BaseException):
    """Stand-in for the end of the process."""


def test_a_kill_while_one_is_pruned_leaves_nothing_half_empty_that_counts_as_whole(
    tmp_path, monkeypatch
):
    _, save, root = checkpoints_in(tmp_path)
    save(1)
    save(2)

    def remove_a_file_and_die(path, *_, **__):
        next(file for file in Path(path).rglob("*") if file.is_file()).unlink()
        raise KilledError

    monkeypatch.setattr(shutil, "rmtree", remove_a_file_and_die)
    with pytest.raises(KilledError):
        save(3)
    monkeypatch.undo()
    assert [name for name in names_in(root) if name.isdigit()] == ["2", "3"]
    assert len(names_in(root)) == 3  # the rest of the first, renamed

    (root / "7.orbax-checkpoint-tmp").mkdir()  # left by a kill while writing
    (root / "3_of_mine").mkdir()  # moved by a user
    (root / "9").mkdir()
    checkpoints, save, _ = checkpoints_in(tmp_path)
    assert checkpoints.newest() == 3
    save(4)
    save(9)
    assert checkpoints.newest() == 9
    assert names_in(root) == ["3_of_mine", "4", "9"]


def test_a_kill_while_one_is_written_leaves_none(tmp_path, monkeypatch):
    checkpoints, save, root = checkpoints_in(tmp_path)
    save(1)

    def die(*_, **__):
        raise KilledError

    monkeypatch.setattr("orbax.checkpoint.path.atomicity.AtomicRenameTemporaryPath.finalize", die)
    with pytest.raises(KilledError):
        save(2)
    monkeypatch.undo()
    assert checkpoints.newest() == 1
    assert len(names_in(root)) == 2
    save(2)
    assert names_in(root) == ["1", "2"]


def test_where_no_room_can_be_reserved_a_checkpoint_is_written_without(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    checkpoints, save, _ = checkpoints_in(tmp_path)
    save(1)
    assert checkpoints.all() == [1]


def test_a_broken_checkpoint_is_one_line(tmp_path, capfd):
    checkpoints, save, root = checkpoints_in(tmp_path)
    save(1)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {"x": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}
    np.testing.assert_array_equal(checkpoints.restore(1, shapes)["x"], np.arange(8.0))
    shorter = {"x": jax.ShapeDtypeStruct((7,), jnp.float32, sharding=sharding)}
    with pytest.raises(
        ConfigError, match=r"environment or version \(ValueError: x: \(8,\) there, \(7,\) here"
    ):
        checkpoints.restore(1, shorter)
    for file in (root / "1").rglob("d/*"):
        file.write_bytes(b"")
    with pytest.raises(
        ConfigError, match="is broken, or of another run, environment or version"
    ) as error:
        checkpoints.restore(1, shapes)
    assert "\n" not in str(error.value)
    assert "Traceback" not in capfd.readouterr().err


def test_a_curve_has_the_names_of_all_updates_and_nan_where_one_is_absent(tmp_path):
    curve = CurveFile(tmp_path, 0, 0)
    curve.append({"loss": np.float32(0.5), "old": np.int32(1), "episodes": np.int32(3)})
    curve.append({"loss": np.float32(0.25), "new": np.float32(2.5), "episodes": np.int32(4)})
    read = curve.read()
    np.testing.assert_array_equal(read["loss"], [0.5, 0.25])
    np.testing.assert_array_equal(read["old"], [1, np.nan])
    np.testing.assert_array_equal(read["new"], [np.nan, 2.5])
    kinds = {name: column.dtype.kind for name, column in read.items()}
    assert kinds == {"loss": "f", "old": "f", "new": "f", "episodes": "i"}


def test_a_curve_goes_on_after_the_checkpoints_updates(tmp_path):
    curve = CurveFile(tmp_path, 0, 0)
    values = np.float32([0.1, np.nan, 1e-30, 3.0])
    for i, value in enumerate(values):
        curve.append({"loss": value, "episodes": np.int32(i)})
    with open(tmp_path / "0_metrics.jsonl", "a") as file:
        file.write('{"loss": 0.')  # a half-written line
    resumed = CurveFile(tmp_path, 0, 3)
    resumed.cut_off()
    resumed.append({"loss": np.float32(0.7), "episodes": np.int32(9)})
    read = resumed.read()
    np.testing.assert_array_equal(read["loss"], np.float32([*values[:3], 0.7]))
    np.testing.assert_array_equal(read["episodes"], [0, 1, 2, 9])
    lines = (tmp_path / "0_metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["episodes"] for line in lines] == [0, 1, 2, 9]
    with pytest.raises(ConfigError, match="has 4 lines, not one for each update"):
        CurveFile(tmp_path, 0, 5)
