"""Live metrics in the files of TensorBoard and Weights & Biases."""

import struct
import sys
from types import ModuleType

import numpy as np
import pytest
from support import QUICK, run

from trxl.errors import ConfigError
from trxl.runs.tracking import make_tracker

CHAIN = {**QUICK, "ENV_KWARGS": {"memory_length": 3}, "TOTAL_TIMESTEPS": 192}


def test_tensorboard_reads_the_event_files(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run({**CHAIN, "TRACK": "tensorboard", "RESULTS_DIR": str(tmp_path)})
    folder = tmp_path / "MemoryChain-bsuite"
    events = EventAccumulator(str(folder / "tensorboard" / "0"))
    events.Reload()
    metrics = np.load(folder / "0_metrics.npy", allow_pickle=True).item()
    for name in ("total_loss", "returned_episode_returns"):
        logged = events.Tensors(name)
        assert [event.step for event in logged] == [64, 128, 192]
        values = [event.tensor_proto.float_val[0] for event in logged]
        np.testing.assert_allclose(values, metrics[name], rtol=1e-6)


@pytest.mark.slow
def test_wandb_writes_its_run_offline(tmp_path, monkeypatch):
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run({**CHAIN, "TRACK": "wandb", "RESULTS_DIR": str(tmp_path)})
    folder = tmp_path / "MemoryChain-bsuite"
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    rows = []
    for data in log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or item.nested_key[0]: item.value_json for item in items})
    assert [int(row["_step"]) for row in rows] == [64, 128, 192]
    metrics = np.load(folder / "0_metrics.npy", allow_pickle=True).item()
    losses = [float(row["total_loss"]) for row in rows]
    np.testing.assert_allclose(losses, metrics["total_loss"], rtol=1e-6)


def log_records(data):
    """Yields the records of a LevelDB log after wandb's 7-byte header.

    A record's parts are (crc, length, type, payload).
    """
    position, record = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # too short for a header
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full or last
            yield record
            record = b""


class Broken(ModuleType):
    """Package that raises on use, as tensorboard does with an incompatible protobuf."""

    def __getattr__(self, name):
        raise TypeError("Descriptors cannot be created directly.\nMore of it")


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_package_that_fails_at_the_start_is_one_line_and_leaves_no_folder(
    package, tmp_path, monkeypatch
):
    for name in (package, "tensorboard.summary"):
        monkeypatch.setitem(sys.modules, name, Broken(name))
    with pytest.raises(ConfigError, match=f"TRACK={package} can't start, leave it out: TypeError"):
        run({**CHAIN, "TRACK": package, "RESULTS_DIR": str(tmp_path)})
    assert not list(tmp_path.iterdir())


def test_event_files_that_cannot_be_written_are_one_line(tmp_path):
    (tmp_path / "tensorboard").touch()
    with pytest.raises(ConfigError, match="TRACK=tensorboard can't start, leave it out: "):
        make_tracker({"TRACK": "tensorboard"}, tmp_path, [0])


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_is_one_line_and_leaves_no_folder(package, tmp_path, monkeypatch):
    for name in (package, "tensorboard.summary"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        run({**CHAIN, "TRACK": package, "RESULTS_DIR": str(tmp_path)})
    assert not list(tmp_path.iterdir())
