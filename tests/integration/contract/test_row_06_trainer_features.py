"""Row 6: the Trainer's features work with each accelerator; its neutral setting changes none of them."""

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from accelerators import ACCELERATORS, cases, slow_if_processes
from contract_models import ContractModule, loader
from contract_runs import assert_equal_modules, fit, trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging


@dataclass(frozen=True)
class Feature:
    name: str
    trainer: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Any] = field(default_factory=dict)
    before: tuple[type, ...] = ()
    after: tuple[type, ...] = ()
    compiled: bool = False


FEATURES = (
    Feature("bf16-mixed", trainer={"precision": "bf16-mixed"}),
    Feature("double", trainer={"precision": "64-true"}),
    Feature("accumulation across a phase border", trainer={"accumulate_grad_batches": 4}),
    Feature("clipping by norm", trainer={"gradient_clip_val": 0.1}),
    Feature("clipping by value", trainer={"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
    Feature("manual optimization", module={"optimization": "manual"}),
    Feature("two optimizers", module={"optimization": "two optimizers"}),
    Feature("schedule", module={"schedule": True}),
    Feature("sgd with momentum", module={"optimizer": "SGD"}),
    Feature("average before", before=(EMAWeightAveraging,)),
    Feature("average behind", after=(EMAWeightAveraging,)),
    Feature("stochastic average before", before=(WeightAveraging,)),
    Feature("compiled", compiled=True),
    Feature("limited steps", trainer={"max_steps": 15}),
)
# torch 2.13 looks at the gradients of non-leaves itself where a graph breaks
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
EVERY_PAIR = pytest.mark.parametrize(
    ("entry", "feature"),
    [
        pytest.param(e, f, id=f"{e.name}-{f.name}", marks=[pytest.mark.slow] if f.compiled else slow_if_processes(e))
        for e in ACCELERATORS
        for f in FEATURES
    ],
)


def run(entry, feature, folder, callbacks, strategy):
    module = ContractModule(entry.name, **feature.module)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="eager") if feature.compiled else module
    averages = [[kind() for kind in kinds] for kinds in (feature.before, feature.after)]
    callbacks = [*averages[0], *callbacks, *averages[1]]
    _, runner = fit(entry, folder, callbacks=callbacks, module=compiled, strategy=strategy, **feature.trainer)
    return module, runner


def supported(entry, feature):
    fits = feature.module.get("optimization", "automatic") in entry.optimizations
    return fits and feature.name not in entry.refused


@EVERY_PAIR
def test_neutral_setting_changes_nothing(entry, feature, tmp_path):
    plain, _ = run(entry, feature, tmp_path / "plain", [], "auto")
    if not supported(entry, feature):
        with pytest.raises(Exception, match=entry.optimization_refusal):
            run(entry, feature, tmp_path / "refused", entry.callbacks(), entry.strategy())
        return
    neutral, _ = run(entry, feature, tmp_path / "neutral", entry.neutral(), entry.neutral_strategy())
    assert_equal_modules(plain, neutral, tolerance=entry.neutral_tolerance)


@EVERY_PAIR
def test_accelerator_acts(entry, feature, tmp_path, caplog):
    if not supported(entry, feature):
        assert entry.optimization_refusal
        return
    module, runner = run(entry, feature, tmp_path, entry.callbacks(), entry.strategy())
    if feature.name in entry.left_alone:
        assert re.search(entry.left_alone[feature.name], caplog.text)
        plain, _ = run(entry, feature, tmp_path / "plain", [], "auto")
        assert_equal_modules(plain, module)
        return
    assert entry.acted(module)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    held = {id(p) for optimizer in runner.optimizers for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(parameter) for parameter in module.parameters()}
    started = ContractModule(entry.name, **feature.module)
    changed = [n for n, p in module.named_parameters() if n not in dict(started.named_parameters())]
    changed += [
        name
        for name, parameter in started.named_parameters()
        if name in dict(module.named_parameters()) and not torch.equal(parameter, module.get_parameter(name))
    ]
    assert set(changed) == {name for name, _ in module.named_parameters()}, "every parameter was trained"


@pytest.mark.parametrize("entry", cases())
def test_fast_dev_run(entry, tmp_path):
    module, runner = fit(entry, tmp_path, fast_dev_run=2, max_epochs=1)
    assert runner.global_step == 2
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


@pytest.mark.parametrize("entry", cases())
def test_two_fits_with_one_trainer_and_validate_before(entry, tmp_path):
    module = ContractModule(entry.name)
    runner = trainer(tmp_path, entry.callbacks(), max_epochs=entry.epochs, strategy=entry.strategy())
    runner.validate(module, loader(entry.data()), verbose=False)
    runner.fit(module, loader(entry.data()), loader(entry.data()))
    assert entry.acted(module)
    names = [name for name, _ in module.named_parameters()]
    runner.fit_loop.max_epochs = 2 * entry.epochs
    runner.fit(module, loader(entry.data()), loader(entry.data()))
    assert runner.current_epoch == 2 * entry.epochs
    assert [name for name, _ in module.named_parameters()] == names
    assert entry.acted(module)
    assert all(parameter.requires_grad for parameter in module.parameters())
