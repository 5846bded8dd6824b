"""Every logger of the configuration holds the same numbers, those of the accelerators included."""

import csv
import json
import struct
from collections import defaultdict
from pathlib import Path

import mlflow
import pytest
from cli_calls import SMALL, call
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

pytestmark = [  # what MLflow and W&B say to themselves is not ours to mend
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
]


def from_csv(folder):
    found = defaultdict(dict)
    with (folder / "csv" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for name, value in row.items():
                if value:
                    found[name][step] = float(value)
    return found


def from_tensorboard(folder):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    names = set(events.Tags()["scalars"]) - {"hp_metric"}  # its own, for the table of hyperparameters
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in names}


def from_mlflow(folder):
    client = mlflow.MlflowClient(tracking_uri="sqlite:///outputs/mlflow.db")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert len(runs) == 2
    run = sorted(runs, key=lambda each: each.info.start_time)[int(folder.name)]
    return {
        name: {point.step: point.value for point in client.get_metric_history(run.info.run_id, name)}
        for name in run.data.metrics
    }


def records(data):
    """Yield what a file of W&B holds: records in blocks of 32 KiB, as in LevelDB's log, behind a header of 7 bytes."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def from_wandb(folder):
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    found = defaultdict(dict)
    for data in records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        step = row.pop("trainer/global_step", None)
        for name, value in row.items():
            if step is not None and not name.startswith("_"):
                found[name][step] = value
    return found


def test_all_loggers_hold_the_same_numbers_for_each_job_of_a_sweep(monkeypatch):
    for name, value in {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    small = [word for word in SMALL if not word.startswith("model.width")]
    words = ["model.width=256", "callbacks=[rank_quantization,sequential_freezing]", "+trainer.log_every_n_steps=1"]
    words += ["callbacks.rank_quantization.when=1", "callbacks.rank_quantization.on_loss=keep"]
    words += ["logger=[csv,tensorboard,mlflow,wandb]", "logger.wandb.offline=true", "optimized_metric=val/accuracy"]
    assert call("train", "-m", "seed=1,2", *small, *words) == 0
    jobs = sorted(path.parent for path in Path("outputs").rglob("metrics.json"))
    assert [job.name for job in jobs] == ["0", "1"]
    losses = []
    for folder in jobs:
        expected = from_csv(folder)
        assert {"train/loss", "val/accuracy", "test/accuracy"} <= set(expected)
        assert any("rank_quantization" in name for name in expected)
        for read in (from_tensorboard, from_mlflow, from_wandb):
            found = read(folder)
            assert set(found) == set(expected), read.__name__
            for name, points in expected.items():
                assert found[name] == pytest.approx(points, rel=1e-5), (read.__name__, name)
        losses.append(expected["train/loss"])
    assert losses[0] != losses[1]
