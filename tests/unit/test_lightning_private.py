"""Canaries: every private attribute of Lightning that we touch still means what it meant, in both distributions."""

import inspect
import pickle
from importlib import import_module

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_accel import lightning_private
from lightning_accel.cli import factory

DISTRIBUTIONS = ("lightning.pytorch", "pytorch_lightning")


@pytest.fixture(params=DISTRIBUTIONS)
def pl(request):
    return import_module(request.param)


def boring(pl):
    return import_module(f"{pl.__name__}.demos.boring_classes").BoringModel()


def trainer_of(pl, *callbacks, **settings):
    given = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "limit_train_batches": 3,
        "limit_val_batches": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **(given | settings))


def acting(pl, **hooks):
    """Return a callback whose hooks are these functions of the Trainer."""
    methods = {name: lambda self, trainer, *_, do=do: do(trainer) for name, do in hooks.items()}
    return type("Acting", (pl.Callback,), methods)()


def test_trainers_show_their_callbacks_and_logging_period(pl):
    timer = pl.callbacks.Timer()
    trainer = trainer_of(pl, timer, log_every_n_steps=7)
    assert timer in lightning_private.callbacks_of(trainer)
    assert lightning_private.logging_period(trainer) == 7


def test_callbacks_in_callbacks_are_found(pl):
    wrapper, timer = pl.Callback(), pl.callbacks.Timer()
    wrapper.held = {"a": [timer], "b": timer}
    wrapper.more = [timer]
    found = lightning_private.every_callback(trainer_of(pl, wrapper))
    assert wrapper in found
    assert found.count(timer) == 1


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_weight_averaging_keeps_its_copy_where_we_look(pl, name):
    averaging = (
        pl.callbacks.EMAWeightAveraging()
        if name.startswith("EMA")
        else pl.callbacks.StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    )
    seen = []
    look = acting(pl, on_train_batch_start=lambda trainer: seen.extend(lightning_private.averaged_modules(trainer)))
    model = boring(pl)
    trainer_of(pl, averaging, look, max_epochs=2).fit(model)
    assert seen
    assert {type(copy) for copy in seen} == {type(model)}
    assert all(copy is not model for copy in seen)


def test_pruning_tells_what_it_has_chosen(pl):
    model = boring(pl)
    pruning = pl.callbacks.ModelPruning("l1_unstructured", parameters_to_prune=[(model.layer, "weight")], amount=0.5)
    seen = []
    look = acting(pl, on_fit_start=lambda trainer: seen.append(lightning_private.pruned_layers(trainer, model)))
    trainer_of(pl, pruning, look).fit(model)
    assert seen == [{"layer"}]


def test_finetuning_finds_renamed_parameters(pl):
    class Finetuning(pl.callbacks.BaseFinetuning):
        def freeze_before_training(self, pl_module):
            pass

        def finetune_function(self, pl_module, epoch, optimizer):
            pass

    finetuning = Finetuning()
    trainer = trainer_of(pl, finetuning)
    trainer.fit(boring(pl))
    (groups,) = finetuning.state_dict()["internal_optimizer_metadata"].values()
    assert groups[0]["params"] == ["layer.weight", "layer.bias"]
    lightning_private.rename_in_finetuning(trainer, {"layer.weight": ("layer.a", "layer.b")})
    (groups,) = finetuning.state_dict()["internal_optimizer_metadata"].values()
    assert groups[0]["params"] == ["layer.a", "layer.b", "layer.bias"]


def test_a_factory_of_callbacks_sees_what_the_new_trainer_was_given(pl, monkeypatch):
    seen = []
    monkeypatch.setattr(factory, "callbacks", lambda: seen.extend(lightning_private.callbacks_of_new_trainer()) or [])
    timer = pl.callbacks.Timer()
    trainer_of(pl, timer)
    assert timer in seen
    assert lightning_private.callbacks_of_new_trainer() == []


def test_checkpoint_callbacks_tell_their_period(pl, tmp_path):
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3)
    assert lightning_private.checkpoint_periods(trainer_of(pl, checkpoint, enable_checkpointing=True)) == [3]


def test_moving_averages_can_be_pickled_after_help(pl):
    averaging = pl.callbacks.EMAWeightAveraging(decay=0.75)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(averaging)
    lightning_private.make_averages_picklable(trainer_of(pl, averaging))
    copy = pickle.loads(pickle.dumps(averaging))
    assert any(isinstance(value, lightning_private.MovingAverage) for value in copy._kwargs.values())
    averages = AveragedModel(nn.Linear(1, 1, bias=False), **copy._kwargs)
    start = averages.module.weight.detach().clone()
    averages.update_parameters(averages.module)
    averages.update_parameters(moved := nn.Linear(1, 1, bias=False))
    torch.testing.assert_close(averages.module.weight, 0.75 * start + 0.25 * moved.weight)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_launcher_is_made_of_the_parts_we_use(distribution):
    parts = lightning_private.launcher_module(distribution)
    state = parts._GlobalStateSnapshot.capture()
    state.restore()
    assert list(inspect.signature(parts._WorkerOutput).parameters) == [
        *("best_model_path", "weights_path", "trainer_state", "trainer_results", "extra"),
    ]
    assert callable(parts._check_missing_main_guard)
    methods = ("launch", "get_extra_results", "update_main_process_results", "_recover_results_in_main_process", "kill")
    assert all(callable(getattr(parts._MultiProcessingLauncher, name)) for name in methods)


def test_a_strategy_takes_a_launcher_and_hides_it(pl):
    strategy = pl.strategies.SingleDeviceStrategy()
    launcher = object()
    lightning_private.attach_launcher(strategy, launcher)
    assert strategy.launcher is launcher
    with lightning_private.without_launcher(strategy):
        assert strategy.launcher is None
    assert strategy.launcher is launcher


def test_data_are_prepared_as_the_trainer_does(pl):
    prepared = []
    model = boring(pl)
    model.prepare_data = lambda: prepared.append("module")
    again = acting(
        pl, on_fit_start=lambda trainer: prepared.append("here") or lightning_private.prepare_data_of(trainer)
    )
    trainer_of(pl, again).fit(model)
    assert prepared == ["module", "here", "module"]


@pytest.mark.parametrize("asked", [True, False])
def test_synchronized_batch_norm_is_seen(pl, asked):
    trainer = trainer_of(pl, strategy="ddp", devices=2, sync_batchnorm=asked)
    assert lightning_private.sync_batch_norm_requested(trainer.strategy) == asked


@pytest.mark.parametrize("automatic", [True, False])
def test_steps_of_others_count(pl, automatic):
    model = boring(pl)
    model.automatic_optimization = automatic
    if not automatic:
        model.training_step = lambda batch, batch_idx: model.optimizers().step(lambda: model.layer(batch).sum())
        model.on_train_epoch_end = lambda: None
    count = acting(pl, on_train_start=lambda trainer: lightning_private.count_steps_of_others(trainer, 5))
    trainer = trainer_of(pl, count)
    trainer.fit(model)
    assert trainer.global_step == 3 + 5


def test_an_epoch_ends_where_its_data_end(pl):
    seen = []

    def lengthen(trainer):
        lightning_private.expect_uncertain_end(trainer, workers=2)
        assert lightning_private.looks_ahead(trainer)
        lightning_private.restart_fetching(trainer)

    model = boring(pl)
    model.train_dataloader = lambda: torch.utils.data.DataLoader(torch.ones(5, 32))  # more than the epoch's length
    look = acting(pl, on_train_start=lengthen, on_train_batch_end=lambda trainer: seen.append(trainer.is_last_batch))
    trainer_of(pl, look).fit(model)
    assert seen == [False] * 4 + [True]


def test_a_fit_goes_to_a_later_epoch(pl):
    seen = []
    go = acting(
        pl,
        on_train_start=lambda trainer: lightning_private.go_to_epoch(trainer, 2),
        on_train_batch_start=lambda trainer: seen.append(trainer.current_epoch),
    )
    trainer_of(pl, go, max_epochs=4).fit(boring(pl))
    assert seen == [2] * 3 + [3] * 3


def test_loops_stand_in_a_later_epoch(pl):
    trainer = trainer_of(pl, max_epochs=4)
    trainer.fit_loop.epoch_progress.increment_ready()
    lightning_private.go_into_epoch(trainer, 2, batches=3)
    assert trainer.current_epoch == 2
    assert trainer.fit_loop.epoch_loop.total_batch_idx == 2 * 3 - 1


def test_validation_runs_once_more(pl):
    seen = []
    model = boring(pl)
    model.on_validation_epoch_end = lambda: seen.append("validated")

    def validate(trainer):
        lightning_private.validate_once_more(trainer)
        seen.append(trainer.training)

    trainer_of(pl, acting(pl, on_train_end=validate), num_sanity_val_steps=0).fit(model)
    assert seen == ["validated", "validated", True]


def test_progress_of_another_process_comes_back(pl):
    whole = trainer_of(pl, max_epochs=2)
    whole.fit(boring(pl))
    other = trainer_of(pl, max_epochs=2)
    lightning_private.bring_back_progress(other, whole.fit_loop.state_dict())
    assert (other.current_epoch, other.global_step) == (whole.current_epoch, whole.global_step) == (2, 6)
    other.fit_loop.max_epochs = 3
    other.fit(boring(pl))
    assert (other.current_epoch, other.global_step) == (3, 9)


def test_a_csv_logger_goes_on_with_a_file(pl, tmp_path):
    first = pl.loggers.CSVLogger(tmp_path, version=0)
    first.log_metrics({"a": 1.0}, step=0)
    first.save()
    second = pl.loggers.CSVLogger(tmp_path, version=0)
    lightning_private.keep_written_metrics(second)
    second.log_metrics({"a": 2.0}, step=1)
    second.save()
    assert (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().split() == ["a,step", "1.0,0", "2.0,1"]


def test_a_compiled_module_shows_itself_plain_for_a_while(pl):
    plain = boring(pl)
    module = pl.utilities.compile.from_compiled(torch.compile(plain, backend="eager"))
    compiled = module.__dict__["training_step"]
    assert lightning_private.has_compiled_parts(module)
    with lightning_private.uncompiled(module) as compile_like:
        assert "training_step" not in module.__dict__
        assert not lightning_private.has_compiled_parts(module)
        assert compile_like(lambda x: x + 1)(torch.ones(())) == 2
    assert module.__dict__["training_step"] is compiled
    with lightning_private.uncompiled(boring(pl)) as compile_like:
        assert compile_like is None


def test_compiled_layers_are_seen():
    assert not lightning_private.has_compiled_parts(nn.Sequential(nn.Linear(1, 1)))
    assert lightning_private.has_compiled_parts(nn.Sequential(torch.compile(nn.Linear(1, 1), backend="eager")))
    layer = nn.Linear(1, 1)
    layer.compile(backend="eager")
    assert lightning_private.has_compiled_parts(nn.Sequential(layer))


def test_checkpoints_are_trusted_as_lightning_trusts_them(pl, tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"x": torch.ones(2)}, "odd": pl.callbacks.Timer()}, path)
    assert lightning_private.load_checkpoint_file(path, None, False)["state_dict"]["x"].sum() == 2
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        lightning_private.load_checkpoint_file(path, None, True)


def test_the_name_of_the_argument_that_holds_hyperparameters(pl):
    class Named(pl.LightningModule):
        def __init__(self, conf):
            super().__init__()
            self.save_hyperparameters(conf)

    assert lightning_private.hparams_name(Named({"a": 1})) == "conf"
    assert lightning_private.hparams_name(boring(pl)) == "kwargs"


@pytest.mark.parametrize("closure", [None, lambda: torch.ones(())])
def test_an_optimizer_of_a_copied_step_updates_through_what_stands_in_for_a_strategy(closure):
    class Stands:
        def optimizer_step(self, optimizer, closure, **kwargs):
            self.seen = optimizer
            return optimizer.step(closure, **kwargs)

    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    inner, stands = torch.optim.SGD([weight], lr=0.5), Stands()
    wrapped = lightning_private.wrapped_optimizer(inner, stands)
    assert isinstance(wrapped, torch.optim.SGD)
    assert wrapped.optimizer is inner
    wrapped.step(closure)
    assert stands.seen is inner
    assert weight.tolist() == [0.5, 0.5]


def test_a_module_finds_its_mesh(pl):
    module, mesh = boring(pl), object()
    assert module.device_mesh is None
    lightning_private.give_device_mesh(module, mesh)
    assert module.device_mesh is mesh


def test_a_fit_of_a_tuner_is_told_from_others(pl):
    seen = []

    class Notes(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            seen.append(lightning_private.only_tunes(trainer))

    trainer = trainer_of(pl, Notes())
    module = boring(pl)
    module.lr = 0.1
    import_module(f"{pl.__name__}.tuner").Tuner(trainer).lr_find(
        module, num_training=2, early_stop_threshold=None, update_attr=False
    )
    trainer.fit(module)
    assert seen == [True, False]


def test_every_function_of_the_fence_has_a_canary():
    text = inspect.getsource(inspect.getmodule(test_every_function_of_the_fence_has_a_canary))
    made = [name for name in lightning_private.__all__ if callable(getattr(lightning_private, name))]
    assert [name for name in made if f"lightning_private.{name}" not in text] == [
        "held_callbacks",  # what `every_callback` is made of
    ]
