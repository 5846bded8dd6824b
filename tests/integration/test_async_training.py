"""The asynchronous strategy in real fits: one worker is plain training, several see all the data once."""

import csv
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from async_modules import (
    QUICK,
    Adversaries,
    Clamped,
    Classifier,
    DiesAtTheEnd,
    DiesOnce,
    Gathering,
    Grouped,
    LeavesMoreThanAnEpoch,
    Synchronized,
    TwoLoaders,
    WaitForAll,
    equal,
    fit,
    loader,
    seeded,
)
from async_other_distribution import Other, fit_other
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import AsyncSGDStrategy
from lightning_accel.async_sgd import WorkerFailedError
from lightning_accel.zoo import CNN, Digits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("plain", None), {"gradient_clip_val": 0.1}),
        (("momentum", "onecycle"), {"gradient_clip_val": 0.1}),
        (("nesterov", None), {"accumulate_grad_batches": 3}),
        (("adamw", "plateau"), {}),
    ],
    ids=str,
)
def test_one_worker_equals_plain_training_bit_for_bit(tmp_path, arguments, options):
    plain, ours = seeded(Classifier, *arguments), seeded(Classifier, *arguments)
    expected = fit(tmp_path, "auto", plain, **options)
    actual = fit(tmp_path, "async_sgd", ours, **options)
    assert equal(plain, ours) == []
    assert actual.global_step == expected.global_step
    assert actual.current_epoch == expected.current_epoch
    assert {k: float(v) for k, v in actual.callback_metrics.items()} == {
        k: float(v) for k, v in expected.callback_metrics.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["onecycle", "plateau"])
@pytest.mark.parametrize("optimizer", ["plain", "momentum", "nesterov", "adamw"])
def test_one_worker_equals_plain_training_with_clipping_accumulation_and_schedules(tmp_path, optimizer, schedule):
    options = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 3, "epochs": 3}
    plain, ours = seeded(Classifier, optimizer, schedule), seeded(Classifier, optimizer, schedule)
    expected = fit(tmp_path, "auto", plain, **options)
    actual = fit(tmp_path, "async_sgd", ours, **options)
    assert equal(plain, ours) == []
    assert actual.global_step == expected.global_step
    one, other = expected.optimizers[0].state_dict(), actual.optimizers[0].state_dict()
    assert one["param_groups"] == other["param_groups"]  # the rate that the schedule ended with
    assert one["state"].keys() == other["state"].keys()
    for place, state in one["state"].items():
        for name, value in state.items():
            same = torch.equal(value, other["state"][place][name]) if torch.is_tensor(value) else value is None
            assert same, (place, name)


def test_one_worker_equals_plain_training_with_two_optimizers_by_hand(tmp_path):
    plain, ours = seeded(Adversaries), seeded(Adversaries)
    expected = fit(tmp_path, "auto", plain, validate=False)
    actual = fit(tmp_path, "async_sgd", ours, validate=False)
    assert equal(plain, ours) == []
    assert actual.global_step == expected.global_step == 32


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_what_step_hooks_make_of_parameters_reaches_the_server(tmp_path, devices):
    plain, ours = seeded(Classifier, "momentum"), seeded(Classifier, "momentum")
    options = {"callbacks": [Clamped()]}
    fit(tmp_path, "auto", plain, **options)
    fit(tmp_path, "async_sgd", ours, devices=devices, **options)
    assert max(float(p.detach().abs().max()) for p in ours.parameters()) == pytest.approx(0.05)
    if devices == 1:
        assert equal(plain, ours) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # resumed without the callbacks, on purpose
def test_two_workers_share_the_data_validate_stop_and_checkpoint_together(tmp_path):
    notes = tmp_path / "notes"
    module = seeded(Classifier, "momentum", "onecycle", notes=str(notes))
    best = ModelCheckpoint(tmp_path / "best", monitor="val/loss", save_last=True)
    stop = EarlyStopping("val/loss", patience=0, min_delta=1e6)  # stops after the second validation
    trainer = fit(
        tmp_path,
        AsyncSGDStrategy(**QUICK),
        module,
        devices=2,
        epochs=5,
        callbacks=[WaitForAll(2), best, stop],
        enable_checkpointing=True,
    )
    assert trainer.callback_metrics["val/count"] == 32
    assert trainer.current_epoch == 2
    lines = [line.split() for line in notes.read_text(encoding="utf-8").splitlines()]
    first = Counter(int(i) for epoch, _, *indices in lines for i in indices if epoch == "0")
    assert first == Counter(range(64))
    assert len({pid for epoch, pid, *_ in lines if epoch == "0"}) == 2
    assert trainer.strategy.statistics.worker_pushes[0] > 0
    assert trainer.strategy.statistics.worker_pushes[1] > 0
    # an ordinary checkpoint: a plain Trainer loads it, tests it, and resumes from it
    again = Classifier.load_from_checkpoint(best.best_model_path)
    plain = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    found = plain.validate(again, loader_of_validation(), verbose=False)[0]
    assert found["val/loss"] == pytest.approx(float(best.best_model_score), abs=1e-6)
    resumed = fit(tmp_path, "auto", seeded(Classifier, "momentum"), epochs=3, ckpt=best.last_model_path)
    assert resumed.current_epoch == 3
    # and with another number of workers
    resumed = fit(tmp_path, "async_sgd", seeded(Classifier, "momentum"), epochs=3, ckpt=best.last_model_path)
    assert resumed.current_epoch == 3


@pytest.mark.slow
@pytest.mark.parametrize("validate", ["coordinator", "pause"])
def test_validation_under_asynchrony_is_a_plain_validation_of_the_same_weights_on_all_data(tmp_path, validate):
    digits = Digits()
    last = ModelCheckpoint(tmp_path / "last", filename="{epoch}", save_top_k=-1)
    options = {"devices": 2, "epochs": 2, "callbacks": [WaitForAll(2), last], "enable_checkpointing": True}
    trainer = fit(tmp_path, AsyncSGDStrategy(validate=validate, **QUICK), seeded(CNN), data=digits, **options)
    plain = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    found = plain.validate(CNN.load_from_checkpoint(tmp_path / "last" / "epoch=1.ckpt"), digits, verbose=False)[0]
    assert {name: float(trainer.callback_metrics[name]) for name in found} == found
    assert 100 * found["val/accuracy"] != pytest.approx(10, abs=2), "it has learned something"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")  # as any plain run says
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # resumed without the callbacks, on purpose
def test_a_checkpoint_of_four_workers_resumes_on_two_on_one_and_in_a_plain_trainer(tmp_path):
    every = ModelCheckpoint(tmp_path / "every", every_n_train_steps=80, save_top_k=-1, filename="{step}")
    strategy = AsyncSGDStrategy(deterministic_replay=True, **QUICK)
    module = seeded(Classifier, "momentum", "onecycle")
    options = {"callbacks": [WaitForAll(4), every], "enable_checkpointing": True}
    trainer = fit(tmp_path, strategy, module, devices=4, size=512, **options)
    assert {entry.worker for entry in strategy.ending.log} == {0, 1, 2, 3}
    assert trainer.global_step == 128
    middle = tmp_path / "every" / "step=80.ckpt"  # in the second epoch
    (state,) = torch.load(middle, weights_only=True)["async_sgd"]["epochs"]
    done, units = state["done"], state["units"]
    assert len(done) >= 80 - 64
    for target, devices in (("async_sgd", 2), ("async_sgd", 1), ("auto", 1)):
        notes = tmp_path / f"{target} {devices}"
        resumed = seeded(Classifier, "momentum", "onecycle")
        resumed.notes = str(notes)
        again = fit(tmp_path, target, resumed, devices=devices, ckpt=middle, size=512)
        assert again.current_epoch == 2
        assert again.global_step == 80 + 64 - len(done)
        assert all(torch.isfinite(value).all() for value in resumed.state_dict().values())
        indices = [int(i) for line in notes.read_text(encoding="utf-8").splitlines() for i in line.split()[2:]]
        assert len(indices) == 512 - 8 * len(done), "what is left of the epoch"
        if target == "async_sgd":
            assert sorted(indices) == sorted(set(range(512)) - {i for unit in done for i in units[unit]})


@pytest.mark.slow
def test_the_coordinator_warms_up_and_cools_down_alone(tmp_path):
    strategy = AsyncSGDStrategy(
        deterministic_replay=True, warm_start_steps=5, cooldown_steps=4, staleness="none", **QUICK
    )
    fit(tmp_path, strategy, seeded(Classifier, "momentum"), devices=2, epochs=3, size=128)
    log = strategy.ending.log
    assert len(log) == 48
    assert {entry.worker for entry in log[:5]} == {0}
    assert {entry.worker for entry in log if entry.leases[0] in [(2, i) for i in range(12, 16)]} == {0}
    assert all(entry.base_version == entry.version - 1 for entry in log[:5])


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_recomputed_statistics_are_those_of_the_parameters_that_are_validated_and_returned(tmp_path, devices):
    x, y = loader(8).dataset.x, loader(8).dataset.y
    # one and the same batch, whoever trains it
    alike = TensorDataset(x.repeat(12, 1), y.repeat(12), torch.arange(8).repeat(12))
    module = seeded(Classifier, "momentum")
    trainer = fit(
        tmp_path,
        AsyncSGDStrategy(buffers="recompute", **QUICK),
        module,
        devices=devices,
        data=DataLoader(alike, batch_size=8),
        callbacks=[WaitForAll(devices)],
    )
    assert trainer.global_step == 24
    with torch.no_grad():
        hidden = module.net[0](x)
    assert torch.allclose(module.net[1].running_mean, hidden.mean(0), atol=1e-6)
    assert torch.allclose(module.net[1].running_var, hidden.var(0), rtol=1e-5)
    assert not torch.allclose(seeded(Classifier).net[0](x).mean(0), hidden.mean(0), atol=1e-3), "it has learnt"
    validated = float(trainer.callback_metrics["val/loss"])
    (again,) = trainer.validate(module, loader_of_validation(), verbose=False)
    assert again["val/loss"] == pytest.approx(validated, rel=1e-5)


@pytest.mark.slow
def test_metrics_in_a_file_survive_a_test_in_this_process_and_a_new_coordinator(tmp_path):
    logger = CSVLogger(tmp_path, name="logs", version="all", flush_logs_every_n_steps=1)
    module = seeded(Classifier, "momentum")
    trainer = fit(
        tmp_path,
        AsyncSGDStrategy(**QUICK),
        module,
        devices=2,
        epochs=3,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[WaitForAll(2), DiesOnce(str(tmp_path / "died"), 0, epoch=1)],
    )
    trainer.test(module, loader_of_validation(), verbose=False)
    with open(tmp_path / "logs" / "all" / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    epochs = [row["epoch"] for row in rows if row["val/loss"]]
    assert "0" in epochs, "what the first coordinator wrote"
    assert "2" in epochs, "what the second one wrote"
    assert epochs[-1] == "3", "what the test in this process wrote"


def loader_of_validation():
    return loader(32, shuffle=False)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1], ids=["coordinator", "worker"])
def test_a_killed_worker_loses_no_batch_and_the_run_ends_validated(tmp_path, rank):
    notes = tmp_path / "notes"
    best = ModelCheckpoint(tmp_path / "best", monitor="val/loss")
    trainer = fit(
        tmp_path,
        AsyncSGDStrategy(deterministic_replay=True, **QUICK),
        seeded(Classifier, "momentum", "plateau", notes=str(notes)),
        devices=2,
        callbacks=[WaitForAll(2), DiesOnce(str(tmp_path / "died"), rank), best],
        enable_checkpointing=True,
    )
    assert trainer.strategy.statistics.restarts == 1
    leases = Counter(lease for entry in trainer.strategy.ending.log for lease in entry.leases)
    assert leases == Counter((epoch, i) for epoch in range(2) for i in range(8))
    assert trainer.callback_metrics["val/count"] == 32
    assert best.best_model_path


@pytest.mark.slow
def test_a_worker_that_takes_over_with_more_batches_than_the_epoch_has_trains_on_all_and_validates(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="val/loss")
    trainer = fit(
        tmp_path,
        AsyncSGDStrategy(deterministic_replay=True, **QUICK),
        seeded(Classifier, "momentum", "plateau"),
        devices=2,
        callbacks=[WaitForAll(2), LeavesMoreThanAnEpoch(), best],
        enable_checkpointing=True,
    )
    leases = Counter(lease for entry in trainer.strategy.ending.log for lease in entry.leases)
    assert leases == Counter((epoch, i) for epoch in range(2) for i in range(8))
    assert trainer.callback_metrics["val/count"] == 32
    assert best.best_model_path


@pytest.mark.slow
def test_a_run_resumed_in_the_middle_of_an_epoch_reads_what_is_left(tmp_path):
    saved = ModelCheckpoint(tmp_path / "every", every_n_train_steps=5, save_top_k=-1)
    module = seeded(Classifier, "momentum", dropout=0.0)
    fit(tmp_path, "async_sgd", module, callbacks=[saved], enable_checkpointing=True)
    middle = tmp_path / "every" / "epoch=0-step=5.ckpt"
    checkpoint = torch.load(middle, weights_only=True)
    assert len(checkpoint["async_sgd"]["epochs"][0]["done"]) == 5
    resumed = seeded(Classifier, "momentum", dropout=0.0)
    notes = tmp_path / "notes"
    resumed.notes = str(notes)
    fit(tmp_path, "async_sgd", resumed, epochs=1, ckpt=middle)
    done = {i for unit in checkpoint["async_sgd"]["epochs"][0]["done"] for i in units(checkpoint)[unit]}
    lines = notes.read_text(encoding="utf-8").splitlines()
    seen = [int(i) for line in lines for i in line.split()[2:]]
    assert sorted(seen) == sorted(set(range(64)) - done)
    first_epoch = torch.load(tmp_path / "every" / "epoch=1-step=10.ckpt", weights_only=True)
    assert first_epoch["global_step"] == 10


def units(checkpoint):
    return checkpoint["async_sgd"]["epochs"][0]["units"]


@pytest.mark.parametrize(
    ("build", "options", "match"),
    [
        (lambda: Classifier("lbfgs"), {}, "LBFGS evaluates the loss several times"),
        (lambda: Classifier(), {"sync_batchnorm": True}, "synchronized batch norm waits for all workers"),
        (Synchronized, {}, r"synchronized batch norm waits for all workers .*\(net.1\)"),
        (Grouped, {}, "a default process group exists"),
        (Gathering, {}, "`all_gather` in training waits for all workers"),
    ],
    ids=["lbfgs", "sync_batchnorm", "a synchronized layer", "process group", "collective"],
)
def test_what_can_not_work_is_refused(tmp_path, build, options, match):
    with pytest.raises(WorkerFailedError, match=match) as caught:
        fit(tmp_path, "async_sgd", build(), **options)
    assert isinstance(caught.value.__cause__, (ValueError, RuntimeError, MisconfigurationException))


@pytest.mark.slow
def test_several_loaders_are_refused_with_several_workers(tmp_path):
    with pytest.raises(WorkerFailedError, match="several workers share out one DataLoader"):
        fit(tmp_path, "async_sgd", TwoLoaders(), devices=2, data={"a": loader(), "b": loader()})
    with pytest.raises(WorkerFailedError, match="Tensor is no torch DataLoader"):
        fit(tmp_path, "async_sgd", Classifier(), devices=2, data=[torch.zeros(3)])


@pytest.mark.slow
def test_several_loaders_and_one_worker_are_plain_training(tmp_path):
    plain, ours = seeded(TwoLoaders), seeded(TwoLoaders)
    fit(tmp_path, "auto", plain, data={"a": loader(), "b": loader()})
    fit(tmp_path, "async_sgd", ours, data={"a": loader(), "b": loader()})
    assert equal(plain, ours) == []


@pytest.mark.slow
def test_two_fits_with_one_trainer_are_two_plain_fits(tmp_path):
    def twice(strategy):
        module = seeded(Classifier, "momentum")
        trainer = fit(tmp_path, strategy, module, epochs=1)
        torch.manual_seed(2)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, loader(), loader_of_validation())
        return module, trainer

    plain, expected = twice("auto")
    ours, actual = twice("async_sgd")
    assert equal(plain, ours) == []
    assert (actual.current_epoch, actual.global_step) == (expected.current_epoch, expected.global_step) == (2, 16)


@pytest.mark.slow
def test_the_server_snapshots_and_logs_while_training(tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    options = {"epochs": 1, "logger": logger, "log_every_n_steps": 4}
    fit(tmp_path, AsyncSGDStrategy(snapshot_every_n_steps=3, **QUICK), seeded(Classifier), **options)
    header = next(tmp_path.rglob("metrics.csv")).read_text(encoding="utf-8").splitlines()[0].split(",")
    wanted = {"staleness_mean", "staleness_p95", "updates_per_second", "live_workers", "dropped", "pull_milliseconds"}
    assert {f"async_sgd/{name}" for name in wanted} <= set(header)
    checkpoint = torch.load(tmp_path / "async_sgd.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
    assert len(checkpoint["async_sgd"]["epochs"][0]["done"]) == 6


@pytest.mark.slow
def test_a_coordinator_that_dies_with_the_result_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(RuntimeError, match="the coordinator died when training was over"):
        fit(tmp_path, "async_sgd", Classifier(), devices=2, epochs=1, callbacks=[WaitForAll(2), DiesAtTheEnd()])


@pytest.mark.slow
@pytest.mark.parametrize("live", ["live", "silent"])
def test_an_interrupted_run_ends_with_all_its_processes_and_leaves_nothing(tmp_path, live):
    pipe, shared = tmp_path / "pipe", set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    os.mkfifo(pipe)
    script = Path(__file__).with_name("async_interrupted.py")
    command = [sys.executable, "-W", "ignore", str(script), str(pipe), live]
    with open(tmp_path / "out", "w+", encoding="utf-8") as out:
        run = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            workers: set[int] = set()
            while len(workers) < 2:  # opening the pipe waits for a writer; pytest's timeout is the deadline
                workers |= {int(line) for line in pipe.read_text(encoding="utf-8").split()}
            os.killpg(run.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
            code = run.wait(timeout=120)
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
        out.seek(0)
        said = out.read()
    assert code != 0, said
    assert "KeyboardInterrupt" in said
    assert "Traceback" not in said, said
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    if shared:
        assert {name for name in os.listdir("/dev/shm") if "lightning" in name or "torch" in name} <= shared


@pytest.mark.slow
def test_the_other_distribution_trains_alike(tmp_path):
    plain, ours = seeded(Other), seeded(Other)
    fit_other(tmp_path, "auto", plain)
    fit_other(tmp_path, "async_sgd", ours)
    assert equal(plain, ours) == []


def test_evaluation_runs_here_and_on_all_data(tmp_path):
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="async_sgd", logger=False, enable_progress_bar=False, barebones=False
    )
    found = trainer.validate(Classifier(), loader_of_validation(), verbose=False)[0]
    assert found["val/count"] == 32


SCRIPT = """

from {distribution}.strategies import StrategyRegistry
assert "async_sgd" in StrategyRegistry
strategy = StrategyRegistry.get("async_sgd")
from {distribution}.strategies import Strategy
assert isinstance(strategy, Strategy), type(strategy).__mro__
import {distribution} as pl
pl.Trainer(strategy="async_sgd", accelerator="cpu", devices=2, logger=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
def test_the_name_is_known_to_both_distributions_whatever_is_imported_first(order):
    imports = ["import lightning_accel", "import lightning.pytorch, pytorch_lightning"]
    script = "\n".join(imports if order == "before" else imports[::-1])
    script += "".join(SCRIPT.format(distribution=name) for name in ("lightning.pytorch", "pytorch_lightning"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
