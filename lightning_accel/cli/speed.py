"""How fast training alone is, in samples and batches a second."""

import time
import warnings
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from typing_extensions import override

from lightning_accel.measure import synchronize


class Speed(Callback):
    """Count training batches, samples and the seconds spent on them, validation not included.

    Samples are counted where Lightning can read a batch's size; otherwise ``samples`` is ``None``.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.batches = 0
        self.samples: int | None = 0
        self._since: float | None = None

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._go(pl_module.device)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        self.batches += 1
        if self.samples is None:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a guess is no count
                self.samples += extract_batch_size(batch)
        except (MisconfigurationException, UserWarning, RecursionError):
            self.samples = None

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._halt(pl_module.device)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.training or trainer.validating or trainer.state.fn == "fit":
            self._go(pl_module.device)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._halt(pl_module.device)

    def _go(self, device: torch.device) -> None:
        synchronize(device)
        self._since = time.perf_counter()

    def _halt(self, device: torch.device) -> None:
        if self._since is not None:
            synchronize(device)
            self.seconds += time.perf_counter() - self._since
            self._since = None
