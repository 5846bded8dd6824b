"""Row 13: Lightning's callbacks that freeze, prune, average, time, tune and stop work beside each accelerator."""

import pytest
import torch
from accelerators import ACCELERATORS, cases, slow_if_processes
from contract_models import ContractModule, loader
from contract_runs import assert_equal_modules, fit, trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
    pytest.mark.filterwarnings("ignore:.*The provided params to be frozen already exist"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
]


class Thaws(BaseFinetuning):
    """Frozen until epoch 1: a layer in the middle."""

    def freeze_before_training(self, pl_module):
        self.freeze(self.layer(pl_module))

    def finetune_function(self, pl_module, current_epoch, optimizer):
        if current_epoch == 1:
            self.unfreeze_and_add_param_group(self.layer(pl_module), optimizer)

    def layer(self, pl_module):
        layers = [m for m in pl_module.network.modules() if m._parameters]
        return layers[len(layers) // 2]


class OnlyTrainable(ContractModule):
    """Gives its optimizer what is trainable, as finetuning asks for."""

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


BESIDE = {
    "timer": lambda: Timer(duration={"hours": 1}),
    "accumulation": lambda: GradientAccumulationScheduler({0: 2, 2: 1}),
    "stochastic average": lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2),
}
EVERY_PAIR = [
    pytest.param(entry, name, id=f"{entry.name}-{name}", marks=slow_if_processes(entry))
    for entry in ACCELERATORS
    for name in BESIDE
    if entry.strategy() == "auto"
]


@pytest.mark.parametrize(("entry", "beside"), EVERY_PAIR)
@pytest.mark.parametrize("order", ["before", "behind"])
def test_both_act(entry, beside, order, tmp_path):
    other = BESIDE[beside]()
    callbacks = [other, *entry.callbacks()] if order == "before" else [*entry.callbacks(), other]
    module, _ = fit(entry, tmp_path, callbacks=callbacks)
    assert entry.acted(module)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


@pytest.mark.parametrize("order", ["before", "behind"])
@pytest.mark.parametrize("entry", cases(lambda entry: entry.strategy() == "auto"))
def test_pruning_of_one_layer_and_the_accelerator_act(entry, order, tmp_path):
    module = ContractModule(entry.name)
    pruned = next(m for m in module.network.modules() if isinstance(m._parameters.get("bias"), torch.Tensor))
    pruning = ModelPruning("l1_unstructured", [(pruned, "bias")], amount=0.25, use_lottery_ticket_hypothesis=False)
    callbacks = [pruning, *entry.callbacks()] if order == "before" else [*entry.callbacks(), pruning]
    fit(entry, tmp_path, callbacks=callbacks, module=module)
    assert entry.acted(module)
    assert any(layer is pruned for layer in module.modules()), "what is pruned is still there"
    assert (pruned.bias == 0).any()


@pytest.mark.parametrize("order", ["before", "behind"])
@pytest.mark.parametrize("entry", cases(lambda entry: entry.strategy() == "auto"))
def test_finetuning_thaws_and_resumes(entry, order, tmp_path):
    def callbacks():
        return [Thaws(), *entry.callbacks()] if order == "before" else [*entry.callbacks(), Thaws()]

    every = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, _ = fit(entry, tmp_path / "whole", callbacks=[*callbacks(), every], module=OnlyTrainable(entry.name))
    assert all(parameter.requires_grad for parameter in whole.parameters())
    resumed = OnlyTrainable(entry.name)
    _, runner = fit(entry, tmp_path / "on", callbacks=callbacks(), module=resumed, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert entry.acted(resumed)
    assert_equal_modules(whole, resumed)
    held = {id(p) for group in runner.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in resumed.parameters()}


@pytest.mark.parametrize("order", ["before", "behind"])
@pytest.mark.parametrize("entry", cases(lambda entry: entry.strategy() == "auto"))
def test_what_is_saved_after_an_averaged_fit_is_what_the_module_has(entry, order, tmp_path):
    average = EMAWeightAveraging(decay=0.5)
    callbacks = [average, *entry.callbacks()] if order == "before" else [*entry.callbacks(), average]
    module, runner = fit(entry, tmp_path, callbacks=callbacks)
    assert entry.acted(module)
    runner.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=False)["state_dict"]
    for name, value in module.state_dict().items():
        assert torch.equal(saved[name], value), name


@pytest.mark.parametrize("entry", cases(lambda entry: entry.strategy() == "auto"))
def test_tuner_leaves_the_module_as_it_was_and_the_fit_acts(entry, tmp_path):
    from lightning.pytorch.tuner import Tuner

    module = ContractModule(entry.name)
    module.lr = 1e-2
    before = {name: value.clone() for name, value in module.state_dict().items()}
    runner = trainer(tmp_path, entry.callbacks(), max_epochs=entry.epochs)
    data = loader(entry.data())
    Tuner(runner).lr_find(module, data, data, num_training=4, update_attr=False)
    after = module.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in module.parameters())
    runner.fit(module, data, data)
    assert entry.acted(module)


@pytest.mark.parametrize("entry", cases(lambda entry: entry.strategy() == "auto"))
def test_search_for_a_rate_within_the_fit(entry, tmp_path):
    module = ContractModule(entry.name)
    module.lr = 1e-2
    finder = LearningRateFinder(num_training_steps=4, update_attr=False)
    fit(entry, tmp_path, callbacks=[*entry.callbacks(), finder], module=module)
    assert entry.acted(module)
    assert module.trainer.global_step == entry.epochs * 6
