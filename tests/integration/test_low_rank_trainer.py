"""Rank quantization and sequential freezing under Trainers of every kind, and beside Lightning's own callbacks."""

import logging
import subprocess
import sys
import warnings

import pytest
import pytorch_lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from low_rank_models import BATCHES, CLASSES, FEATURES, Classifier, batches, look_trained, train
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_accel.callbacks import RankQuantization, SequentialFreezing
from lightning_accel.callbacks.rank_quantization import decision as _decision
from lightning_accel.callbacks.rank_quantization import reasons
from lightning_accel.callbacks.rank_quantization.progress import Progress, Remaining
from lightning_accel.low_rank import decompose, low_rank_layers, make_plan

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*`dataloader_iter`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def keep(**settings):
    defaults = {"ratio": 2.0, "method": "fixed", "when": "setup", "on_loss": "keep", "exclude": ["net.6"]}
    return RankQuantization(**defaults | settings)


def equal_states(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


class Stream(IterableDataset):
    """Six batches of eight, without a length."""

    def __iter__(self):
        yield from batches().dataset


def fit_stream(module, callbacks, root, **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        callbacks=callbacks, default_root_dir=root, accelerator="cpu", enable_model_summary=False, **quiet | settings
    )
    trainer.fit(module, DataLoader(Stream(), batch_size=8))
    return trainer


class Watch(Callback):
    """What is certain to remain, and what remains at most, as seen before each batch; and what came in fact."""

    def __init__(self):
        self.progress, self.seen = Progress(), []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.progress.note_batch(trainer)
        self.seen.append(self.progress.remaining(trainer))


# --- how much remains ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "module"),
    [
        ({"epochs": 2}, {}),
        ({"epochs": 3, "limit_train_batches": 4}, {}),
        ({"epochs": 2, "overfit_batches": 3}, {}),
        ({"epochs": 2, "val_check_interval": 2}, {}),
        ({"epochs": -1, "max_steps": 9}, {}),
        ({"epochs": 2, "max_steps": 100}, {}),
        ({"epochs": 3, "accumulate_grad_batches": 3}, {}),
        ({"epochs": -1, "max_steps": 4, "accumulate_grad_batches": 3}, {}),
        ({"epochs": -1, "max_steps": 5, "accumulate_grad_batches": 4}, {}),
        ({"epochs": -1, "max_steps": 7}, {"manual": True}),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) or "automatic",
)
def test_what_remains_is_what_then_comes(settings, module, tmp_path):
    watch = Watch()
    train(Classifier(**module), [watch], tmp_path, **settings)
    count = len(watch.seen)
    assert watch.seen == [Remaining(count - index, count - index) for index in range(count)]


def test_accumulation_that_falls_leaves_no_fewer_batches_than_counted_on(tmp_path):
    watch = Watch()
    schedule = GradientAccumulationScheduler({0: 3, 1: 1})
    train(Classifier(), [watch, schedule], tmp_path, epochs=-1, max_steps=10)
    assert all(found.batches <= len(watch.seen) - index for index, found in enumerate(watch.seen))


def test_without_a_length_as_much_is_counted_on_as_was_trained(tmp_path):
    watch = Watch()
    fit_stream(Classifier(), [watch], tmp_path, max_epochs=3)
    first = [Remaining(index, float("inf")) for index in range(BATCHES)]
    later = [Remaining(12 - index, 12 - index) for index in range(12)]
    assert watch.seen == first + later, "the first epoch tells the length of the others"


def test_without_any_limit_as_much_is_counted_on_as_was_trained(tmp_path):
    class Ends(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    watch = Watch()
    train(Classifier(), [watch, Ends()], tmp_path, epochs=-1)
    assert watch.seen == [Remaining(index, float("inf")) for index in range(12)]


@pytest.mark.parametrize("beside", [{"epochs": -1}, {"epochs": 2}])
def test_a_limit_of_time_counts_once_a_batch_is_timed(beside, tmp_path):
    watch = Watch()
    timer = Timer(duration={"seconds": 3600})
    train(Classifier(), [watch, timer], tmp_path, **beside, limit_train_batches=100, max_steps=12)
    assert [found.batches for found in watch.seen[:4]] == [0, 1, 2, 3]
    assert all(found.batches == found.at_most <= 12 for found in watch.seen[5:]), "an hour is far away"

    watch, hurried = Watch(), Timer(duration={"seconds": 0.5})
    train(Classifier(), [watch, hurried], tmp_path, epochs=-1)
    assert watch.seen[6].at_most < float("inf")
    assert watch.seen[-1].at_most < watch.seen[6].at_most + len(watch.seen)


def test_short_time_leaves_the_run_alone(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(_decision, "decide_by_steps", lambda *_: pytest.fail("nothing is to be tried"))
    module, callback = Classifier(), RankQuantization(when="setup")
    with caplog.at_level(logging.INFO):
        train(module, [callback], tmp_path, epochs=-1, max_time={"seconds": 0.3})
    assert not low_rank_layers(module)
    assert "steps remain, and finding out whether low rank pays takes" in callback.plan.reason
    assert caplog.text.count("RankQuantization:") == caplog.text.count(callback.plan.reason) > 0


def test_data_without_a_length_are_left_alone_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(_decision, "decide_by_steps", lambda *_: pytest.fail("nothing is to be tried"))
    for settings in ({"max_epochs": 3}, {"max_epochs": 1}):
        module, plain = Classifier(), Classifier()
        callback = RankQuantization(when="setup")
        torch.manual_seed(1)
        fit_stream(module, [callback, SequentialFreezing()], tmp_path, **settings)
        torch.manual_seed(1)
        fit_stream(plain, [], tmp_path, **settings)
        for one, other in zip(module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0.2, atol=0.2)  # the steps draw from unseeded generators, too
        assert "steps remain" in callback.plan.reason or "nothing told how long" in callback.plan.reason


def test_long_data_without_a_length_are_tried_once_enough_was_trained(tmp_path, monkeypatch):
    tried = []

    def decide(terms, *_):
        tried.append((terms.trainer.global_step, terms.remaining))
        return _decision.dense(reasons.ALL_UNFIT)

    monkeypatch.setattr(_decision, "decide_by_steps", decide)
    callback = RankQuantization(when="setup", max_overhead=8.0)
    fit_stream(Classifier(), [callback], tmp_path, max_epochs=1)
    assert tried == [(3, 3)], "22 steps of trials are at most 8 times 3"
    assert callback.structure_state() == "dense"


# --- what draws, prunes, finetunes and tunes beside it ------------------------------------------------------------


class DrawsItself(Classifier):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("ranks", ["planned", "judged by layers"])
def test_steps_that_draw_their_batches_train(ranks, tmp_path):
    module = DrawsItself()
    plan = make_plan(module, None, ratio=2.0, method="fixed") if ranks == "planned" else None
    callback = RankQuantization(plan=plan, when="setup") if plan is not None else keep()
    trainer = train(module, [callback, SequentialFreezing()], tmp_path)
    assert trainer.global_step == 2 * BATCHES
    assert low_rank_layers(module)
    assert "sequential_freezing/group" in trainer.callback_metrics
    assert all(parameter.requires_grad for parameter in module.parameters())


class Tuned(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 32))
        self.net = nn.Sequential(nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, CLASSES))
        look_trained(self)
        self.lr = 0.01

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(self.backbone(batch[0])), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], self.lr)


@pytest.mark.parametrize("order", ["before", "behind"])
@pytest.mark.parametrize("when", ["setup", 1])
@pytest.mark.parametrize("freezing", [False, True])
def test_finetuning_resumes_as_uninterrupted(order, when, freezing, tmp_path):
    def callbacks():
        pair = [keep(when=when, exclude=[]), BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False)]
        rest = [SequentialFreezing()] if freezing else []
        return [*(pair if order == "before" else pair[::-1]), *rest]

    whole = Tuned()
    train(whole, callbacks(), tmp_path, epochs=4)
    assert {"backbone.0", "net.1"} <= set(low_rank_layers(whole))
    for epochs in (1, 2):
        first, resumed = Tuned(), Tuned()
        stopped = train(first, callbacks(), tmp_path, epochs=epochs)
        stopped.save_checkpoint(tmp_path / "stopped.ckpt")
        trainer = train(resumed, callbacks(), tmp_path, epochs=4, ckpt_path=tmp_path / "stopped.ckpt")
        assert equal_states(whole.state_dict(), resumed.state_dict()), epochs
        held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        assert held == {id(p) for p in resumed.parameters()}


def pruning(**settings):
    defaults = {"parameter_names": ["weight"], "amount": 0.5, "use_lottery_ticket_hypothesis": False}
    return ModelPruning("l1_unstructured", **defaults | settings)


@pytest.mark.parametrize("order", ["before", "behind"])
@pytest.mark.parametrize("when", ["setup", 1, 2])
@pytest.mark.parametrize("permanent", [True, False])
def test_pruned_layers_stay_dense_and_are_pruned(order, when, permanent, tmp_path):
    module, callback = Classifier(), keep(when=when)
    pair = [callback, pruning(make_pruning_permanent=permanent)]
    train(module, pair if order == "before" else pair[::-1], tmp_path, epochs=3)
    assert not low_rank_layers(module)
    assert "no layer can be factored" in callback.plan.reason
    for layer in (module.net[0], module.net[4], module.net[6]):
        assert float((layer.weight == 0).float().mean()) > 0.45


def test_layers_that_are_not_pruned_become_low_rank(tmp_path):
    module = Classifier()
    train(module, [keep(), pruning(parameters_to_prune=[(module.net[0], "weight")])], tmp_path, epochs=2)
    assert set(low_rank_layers(module)) == {"net.4"}
    assert float((module.net[0].weight == 0).float().mean()) > 0.45


def test_given_plan_leaves_pruned_layers_dense(tmp_path):
    module = Classifier()
    plan = make_plan(module, None, ratio=2.0, method="fixed")
    callback = RankQuantization(plan=plan)
    train(module, [callback, pruning(parameters_to_prune=[(module.net[0], "weight")])], tmp_path, epochs=2)
    assert set(low_rank_layers(module)) == {"net.4", "net.6"}
    assert "a pruning callback holds its weight" in {layer.reason for layer in callback.plan.layers}


@pytest.mark.parametrize("order", ["before", "behind"])
def test_learning_rate_finder_beside_it(order, tmp_path):
    finder = LearningRateFinder(num_training_steps=4, attr_name="lr", update_attr=True)
    pair = [keep(exclude=[]), finder]
    module = Tuned()
    trainer = train(module, pair if order == "before" else pair[::-1], tmp_path, epochs=2, enable_checkpointing=True)
    assert {"backbone.0", "net.1"} <= set(low_rank_layers(module))
    assert trainer.global_step == 2 * BATCHES
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}


@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
def test_tuner_before_two_fits(search, tmp_path):
    module = Tuned()
    module.batch_size = 8
    module.train_dataloader = lambda: batches(module.batch_size)
    callbacks = [keep(exclude=[]), SequentialFreezing()]
    trainer = Trainer(
        max_epochs=2,
        callbacks=callbacks,
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    if search == "lr_find":
        Tuner(trainer).lr_find(module, num_training=4, attr_name="lr")
    else:
        Tuner(trainer).scale_batch_size(module, max_trials=1, steps_per_trial=1)
    assert equal_states(before, module.state_dict()), "searching leaves the module as it was"
    module.load_state_dict(before)
    trainer.fit(module)
    assert {"backbone.0", "net.1"} <= set(low_rank_layers(module))
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert all(p.requires_grad for p in module.parameters())


# --- resuming and ending ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 6, 7])
@pytest.mark.parametrize("when", ["setup", 1])
def test_run_judged_by_layers_resumes_as_uninterrupted(step, when, tmp_path):
    every = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, resumed = Classifier(noisy=False), Classifier(noisy=False)
    for module in (whole, resumed):
        module.not_to_be_copied = (number for number in range(3))
    train(whole, [keep(when=when), every], tmp_path, epochs=3, enable_checkpointing=True)
    # the loader begins anew in the middle of an epoch: whole epochs are compared, and what was decided
    train(resumed, [keep(when=when)], tmp_path, epochs=3, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert set(low_rank_layers(whole)) == set(low_rank_layers(resumed)) == {"net.0", "net.4"}
    saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=False)["state_dict"]
    assert ("net.0.factor_in" in saved) == (step >= (1 if when == "setup" else 7)), (
        "the watched step decides as it ends"
    )
    if step == BATCHES:
        assert equal_states(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("problem", [RuntimeError("on purpose"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("at", [1, 2, 6])
def test_an_end_in_the_middle_leaves_no_trace(problem, at, tmp_path):
    class Breaks(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.trainer.global_step == at:
                raise problem
            return loss

    module = Breaks(manual=True)
    with pytest.raises(BaseException):  # noqa: B017, PT011  # Ctrl-C ends as Lightning ends it
        train(module, [keep(), SequentialFreezing()], tmp_path)
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not any(layer._forward_pre_hooks for layer in module.modules())
    module.load_state_dict(module.state_dict())
    module.load_state_dict(Classifier().state_dict())
    assert not low_rank_layers(module), "the module follows what it loads, as before"


def test_new_fit_of_the_adaptive_mode_begins_anew(tmp_path):
    callback = SequentialFreezing(mode="adaptive", threshold=10.0, window_steps=1)
    for _ in range(2):
        module = Classifier()
        decompose(module, make_plan(module, None, ratio=2.0, method="fixed", include=["net.4"]))
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        train(module, [callback], tmp_path, epochs=1)
        assert all(not torch.equal(before[name], p) for name, p in module.named_parameters())


# --- the last phase -----------------------------------------------------------------------------------------------


class Phases(Callback):
    def __init__(self):
        self.rested = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.rested.append(any(not p.requires_grad for p in pl_module.parameters()))


def low_rank_classifier(**settings):
    module = Classifier(**settings)
    decompose(module, make_plan(module, None, ratio=2.0, method="fixed", include=["net.0", "net.4"]))
    return module


@pytest.mark.parametrize(
    ("freezing", "trainer", "free"),
    [
        ({"period_steps": 2, "final_trainable": 3}, {"epochs": 2}, 3),
        ({"period_steps": 2, "final_trainable": 3}, {"epochs": -1, "max_steps": 9}, 3),
        ({"period_steps": 2, "final_trainable": 3}, {"epochs": 2, "max_steps": 100}, 3),
        ({"period_steps": 2, "final_trainable": 3}, {"epochs": 9, "max_steps": 9}, 3),
        ({"final_trainable": 1}, {"epochs": 3}, BATCHES),
        ({"final_trainable": 1}, {"epochs": 9, "max_steps": 2 * BATCHES}, BATCHES),
        ({"final_trainable": 1}, {"epochs": -1, "max_steps": 2 * BATCHES - 3}, BATCHES - 3),
        ({"period_steps": 1, "final_trainable": 2}, {"epochs": 2, "accumulate_grad_batches": 3}, 6),
    ],
)
def test_nothing_rests_at_the_end_whatever_ends_training(freezing, trainer, free, tmp_path):
    phases = Phases()
    train(low_rank_classifier(), [SequentialFreezing(**freezing), phases], tmp_path, **trainer)
    assert phases.rested == [True] * (len(phases.rested) - free) + [False] * free


def test_last_phase_with_a_scheduler_of_accumulation(tmp_path):
    phases = Phases()
    callbacks = [SequentialFreezing(period_steps=1, final_trainable=2), GradientAccumulationScheduler({1: 3}), phases]
    train(low_rank_classifier(), callbacks, tmp_path, epochs=2)
    assert phases.rested == [True] * BATCHES + [False] * BATCHES


@pytest.mark.parametrize(
    ("freezing", "trainer", "module", "message"),
    [
        ({"period_steps": 2}, {"max_epochs": 2}, {}, "training data have no length.*Set the Trainer's max_steps"),
        ({}, {"max_steps": 9}, {}, "training data have no length.*Set the Trainer's max_epochs"),
        ({"period_steps": 2}, {"max_epochs": 2}, {"manual": True}, "manual optimization can not be counted.*max_steps"),
        ({}, {"max_epochs": -1}, {}, "there is neither max_epochs nor max_steps"),
    ],
)
def test_a_last_phase_whose_beginning_nobody_knows_is_refused(freezing, trainer, module, message, tmp_path):
    with pytest.raises(MisconfigurationException, match=message):
        fit_stream(
            low_rank_classifier(**module), [SequentialFreezing(final_trainable=1, **freezing)], tmp_path, **trainer
        )


def test_data_without_a_length_have_a_last_phase_by_max_steps(tmp_path):
    phases = Phases()
    callbacks = [SequentialFreezing(period_steps=2, final_trainable=2), phases]
    fit_stream(low_rank_classifier(), callbacks, tmp_path, max_steps=9)
    assert phases.rested == [True] * 7 + [False] * 2


def test_a_limit_of_time_before_the_last_phase_is_said(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(low_rank_classifier(), [SequentialFreezing(final_trainable=1)], tmp_path, max_time={"hours": 1})
    assert any("a limit of time may end training before its phase" in str(warning.message) for warning in caught)


# --- what is seen -------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
import {package} as pl
from torch.utils.data import DataLoader, TensorDataset
from lightning_accel import RankQuantization, SequentialFreezing

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
    def training_step(self, batch, _):
        return self.net(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

callbacks = [RankQuantization({settings}), SequentialFreezing()]
data = DataLoader(TensorDataset(torch.randn(16, 8)), 4)
pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
           enable_progress_bar=False, enable_model_summary=False).fit(Net(), data)
"""


@pytest.mark.slow
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ("", ["RankQuantization: the model stays dense: 4 steps remain", "SequentialFreezing: steps aside"]),
        (
            "method='fixed', when='setup', on_loss='keep'",
            ["RankQuantization: 2 layers are low rank now (net.0, net.2)", "SequentialFreezing: the factors of 2"],
        ),
    ],
)
def test_a_script_without_logging_sees_one_line_an_accelerator(package, settings, lines, tmp_path):
    code = SCRIPT.format(package=package, settings=settings)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if "RankQ" in line or "SequentialF" in line]
    assert len(said) == len(lines), said
    for line, expected in zip(said, lines, strict=True):
        assert line.startswith(expected), line


def test_loggers_get_the_decision_and_its_numbers(tmp_path, monkeypatch):
    from lightning_accel.callbacks.rank_quantization import step_times

    monkeypatch.setattr(
        step_times,
        "time_interleaved",
        lambda calls, *, rounds, **_: {name: [8.0 if name == "dense" else 4.0] * rounds for name in calls},
    )
    logger = CSVLogger(tmp_path)
    callback = RankQuantization(ratio=2.0, method="fixed", when="setup", max_overhead=100.0, exclude=["net.6"])
    train(Classifier(), [callback, SequentialFreezing()], tmp_path, logger=logger)
    header, *rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    row = next(dict(zip(header.split(","), r.split(","), strict=True)) for r in rows if "8000.0" in r)
    assert float(row["rank_quantization/low_rank"]) == 2.0
    assert float(row["rank_quantization/step_ms_dense"]) == 8000.0
    assert float(row["rank_quantization/step_ms_low_rank"]) < 8000.0
    assert float(row["rank_quantization/speedup"]) > 1.0
    assert "sequential_freezing/layers" in header
    assert "a whole step takes" in callback.plan.reason


def test_both_distributions_speak_through_their_own_logger(tmp_path, caplog):
    class Other(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(FEATURES, 32), nn.Linear(32, CLASSES))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with caplog.at_level(logging.INFO):
        pytorch_lightning.Trainer(
            max_epochs=1, accelerator="cpu", callbacks=[keep(plan=None, when=3)], default_root_dir=tmp_path, **quiet
        ).fit(Other(), batches())
    said = [record.name for record in caplog.records if record.getMessage().startswith("RankQuantization:")]
    assert said == ["pytorch_lightning.lightning_accel"]
