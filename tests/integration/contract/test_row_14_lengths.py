"""Row 14: fits that end by the clock, or whose data have no length, train as plain ones do."""

import pytest
import torch
from accelerators import cases
from contract_models import ContractModule, loader
from contract_runs import assert_equal_modules, fit, trainer
from torch.utils.data import DataLoader, IterableDataset

BATCHES_PER_EPOCH = 6


class Stream(IterableDataset):
    """The samples, without a length."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        yield from self.data


def fit_stream(entry, folder, callbacks, strategy, **settings):
    torch.manual_seed(1)
    module = ContractModule(entry.name)
    runner = trainer(folder, callbacks, strategy=strategy, **settings)
    runner.fit(module, DataLoader(Stream(entry.data()), batch_size=8), loader(entry.data()))
    return module, runner


@pytest.mark.parametrize("limit", [{"max_epochs": 4}, {"max_steps": 24}], ids=str)
@pytest.mark.parametrize("entry", cases())
def test_data_without_a_length(entry, limit, tmp_path):
    module, runner = fit_stream(entry, tmp_path, entry.callbacks(), entry.strategy(), **limit)
    assert runner.global_step == 4 * BATCHES_PER_EPOCH
    assert entry.acted(module)
    plain, _ = fit_stream(entry, tmp_path / "plain", [], "auto", **limit)
    neutral, _ = fit_stream(entry, tmp_path / "neutral", entry.neutral(), entry.neutral_strategy(), **limit)
    assert_equal_modules(plain, neutral, tolerance=entry.neutral_tolerance)


@pytest.mark.parametrize("entry", cases())
def test_time_limit_that_does_not_bind_changes_nothing(entry, tmp_path):
    expected, _ = fit(entry, tmp_path)
    module, runner = fit(entry, tmp_path / "timed", max_time={"hours": 1})
    assert entry.acted(module)
    assert runner.global_step == entry.epochs * BATCHES_PER_EPOCH
    assert_equal_modules(expected, module, tolerance=1e-6)  # schedules chosen by a clock differ by rounding


@pytest.mark.parametrize("entry", cases(lambda entry: entry.strategy() == "auto"))
def test_time_limit_ends_the_fit(entry, tmp_path):
    module, runner = fit(entry, tmp_path, max_epochs=-1, max_time={"seconds": 1})
    assert runner.global_step > 0
    assert entry.acted(module)
    assert all(parameter.requires_grad for parameter in module.parameters())


LIMITS = ({"overfit_batches": 2}, {"limit_train_batches": 3}, {"val_check_interval": 2}, {"max_steps": 15})


@pytest.mark.parametrize("settings", LIMITS, ids=str)
@pytest.mark.parametrize("entry", cases())
def test_limits_of_the_trainer(entry, settings, tmp_path):
    module, _ = fit(entry, tmp_path, max_epochs=8, **settings)
    assert entry.acted(module)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
