"""Runs of the contract: one way to make a Trainer, to fit, and to compare what came out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerators import Accelerator
from contract_models import ContractModule, loader
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Witness(Callback):
    """Sees of every run, in each batch, what an accelerator can not say of itself.

    What it has seen is its state, since a strategy may train in other processes and bring callbacks' states back.

    Attributes:
        rested: Names of parameters that a step of the last fit gave no gradient because they were frozen, at any time.
    """

    def __init__(self) -> None:
        self.rested: set[str] = set()
        self._frozen_before: set[str] = set()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.rested = set()  # what a checkpoint tells of another fit is no evidence of this one
        self._frozen_before = {name for name, p in pl_module.named_parameters() if not p.requires_grad}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        resting = {name for name, p in pl_module.named_parameters() if not p.requires_grad}
        self.rested |= resting - self._frozen_before

    def state_dict(self) -> dict[str, Any]:
        return {"rested": sorted(self.rested)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rested = set(state_dict["rested"])


def trainer(root: Path, callbacks: Sequence[Callback], **settings: Any) -> Trainer:
    """Make a quiet CPU Trainer; it checkpoints only where a `ModelCheckpoint` is among the callbacks."""
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    settings = {**QUIET, "default_root_dir": root, "enable_checkpointing": checkpoints} | settings
    return Trainer(callbacks=[*callbacks, Witness()], **settings)


def fit(
    entry: Accelerator,
    root: Path,
    *,
    callbacks: Sequence[Callback] | None = None,
    module: LightningModule | None = None,
    ckpt_path: Path | str | None = None,
    **settings: Any,
) -> tuple[LightningModule, Trainer]:
    """Fit the entry's network with its callbacks (or the given ones); return the module and the Trainer."""
    chosen = entry.callbacks() if callbacks is None else callbacks
    module = ContractModule(entry.name) if module is None else module
    settings = {"max_epochs": entry.epochs, "strategy": entry.strategy()} | settings
    runner = trainer(root, chosen, **settings)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        # every run here saves or reads states with the loops' own progress, which torch's safe loader does not know
        warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided.*")
        runner.fit(module, loader(entry.data()), loader(entry.data()), ckpt_path=ckpt_path)
    return module, runner


def assert_equal_modules(expected: LightningModule, actual: LightningModule, *, tolerance: float = 0.0) -> None:
    """Compare parameters and buffers by name."""
    _assert_equal(dict(expected.state_dict()), dict(actual.state_dict()), tolerance, "state_dict")


def assert_equal_optimizers(expected: Trainer, actual: Trainer, *, tolerance: float = 0.0) -> None:
    """Compare the states of all optimizers and schedulers."""
    assert len(expected.optimizers) == len(actual.optimizers)
    for index, (one, other) in enumerate(zip(expected.optimizers, actual.optimizers, strict=True)):
        _assert_equal(one.state_dict(), other.state_dict(), tolerance, f"optimizer {index}")
    for one, other in zip(expected.lr_scheduler_configs, actual.lr_scheduler_configs, strict=True):
        assert one.scheduler.state_dict()["_last_lr"] == other.scheduler.state_dict()["_last_lr"]


def _assert_equal(expected: Any, actual: Any, tolerance: float, where: str) -> None:
    assert type(expected) is type(actual), where
    if isinstance(expected, Tensor):
        assert expected.shape == actual.shape, where
        if tolerance:
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(expected, actual), f"{where}: off by {(expected - actual).abs().max()}"
    elif isinstance(expected, dict):
        assert list(expected) == list(actual), where
        for key, value in expected.items():
            _assert_equal(value, actual[key], tolerance, f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(expected) == len(actual), where
        for index, (one, other) in enumerate(zip(expected, actual, strict=True)):
            _assert_equal(one, other, tolerance, f"{where}[{index}]")
    else:
        assert expected == actual, f"{where}: {expected} != {actual}"
