"""Row 5: every pair of accelerators composes through Hydra, and all of them together."""

import itertools

import pytest
import torch
from accelerators import ACCELERATORS, by_name, slow_if_processes
from contract_models import ContractModule, classification_data, loader
from contract_runs import trainer
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

COMPOSED = tuple(entry for entry in ACCELERATORS if entry.conf or entry.strategy() != "auto")
PAIRS = [
    pytest.param((one.name, other.name), id=f"{one.name}-then-{other.name}", marks=slow_if_processes(one, other))
    for one, other in itertools.permutations(COMPOSED, 2)
]


def composed_callbacks(entries):
    names = list(dict.fromkeys(name for entry in entries for name in entry.conf))
    overrides = [override for entry in entries for override in entry.overrides]
    with initialize_config_module("lightning_accel.conf", version_base="1.3"):
        config = compose(overrides=[f"+callbacks=[{','.join(names)}]", *overrides] if names else [])
    return [instantiate(callback) for callback in config.get("callbacks", {}).values()]


def check_fit(entries, folder):
    module = ContractModule("everything")
    strategies = [strategy for entry in entries if (strategy := entry.strategy()) != "auto"]
    assert len(strategies) <= 1, "two strategies exclude each other by construction"
    settings = {"strategy": strategies[0]} if strategies else {}
    runner = trainer(folder, composed_callbacks(entries), max_epochs=3, **settings)
    runner.fit(module, loader(classification_data()), loader(classification_data()))
    assert runner.global_step == 18
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    for entry in entries:
        assert entry.acted(module), entry.name
    return module


@pytest.mark.parametrize("names", PAIRS)
def test_pair_composes(names, tmp_path):
    check_fit([by_name(name) for name in names], tmp_path)


@pytest.mark.slow
def test_all_together_compose(tmp_path):
    check_fit(COMPOSED, tmp_path)


def test_all_callbacks_together_compose(tmp_path):
    check_fit([entry for entry in COMPOSED if entry.strategy() == "auto"], tmp_path)
