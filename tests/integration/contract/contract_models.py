"""The module and the data every contract row trains: small, seeded, with an exactly resumable loader."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Literal

import pytorch_lightning
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.low_rank import LowRankLinear

Optimization = Literal["automatic", "manual", "two optimizers"]
FEATURES, CLASSES, BATCH, SAMPLES = 24, 3, 8, 48


class ContractBody:
    """Train a classifier; the network is looked up by the accelerator's name, so that a checkpoint rebuilds it.

    Args:
        network: Name of the table entry whose ``network`` is built, or one of `accelerators.network_of`.
        optimization: Automatic, manual with one optimizer, or manual with two (odd and even parameters).
        optimizer: Class of ``torch.optim``.
        schedule: Halve the learning rate every three steps.
    """

    def __init__(
        self,
        network: str,
        *,
        optimization: Optimization = "automatic",
        optimizer: str = "AdamW",
        schedule: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.network = importlib.import_module("accelerators").network_of(network)()
        self.automatic_optimization = optimization == "automatic"

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def _loss(self, batch: Any, name: str) -> Tensor:
        x, y = batch
        output = self(x)
        loss = cross_entropy(output, y)
        self._record(f"{name}/loss", loss)
        return loss

    @torch.compiler.disable  # torch 2.13 can not trace how `log` looks at the signature of a compiled step
    def _record(self, name: str, value: Tensor) -> None:
        self.log(name, value)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return self._loss(batch, "train")
        optimizers = self.optimizers(use_pl_optimizer=True)
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self._loss(batch, "train"))
        for optimizer in optimizers:
            optimizer.step()
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._loss(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._loss(batch, "test")

    def configure_optimizers(self) -> Any:
        kind = getattr(torch.optim, self.hparams["optimizer"])
        settings = {"lr": 1e-2, "weight_decay": 1e-2} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})
        parameters = list(self.parameters())
        if self.hparams["optimization"] == "two optimizers":
            return [kind(parameters[0::2], **settings), kind(parameters[1::2], **settings)]
        optimizer = kind(parameters, **settings)
        if not self.hparams["schedule"]:
            return optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ContractModule(ContractBody, LightningModule):
    """The module of ``lightning.pytorch``."""


class OtherContractModule(ContractBody, pytorch_lightning.LightningModule):
    """The same of the distribution ``pytorch_lightning``."""


class ResumableLoader(DataLoader):
    """Goes on behind the last batch after a resume: the loader with which a plain Trainer is exact."""

    _done = 0
    _resume_at = 0

    def __iter__(self) -> Iterator[Any]:
        skip, self._resume_at, self._done = self._resume_at, 0, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= skip:
                self._done = index + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self._done % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resume_at = state["done"]


def classification_data() -> TensorDataset:
    """Vectors with labels a linear rule gives."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(SAMPLES, FEATURES, generator=generator)
    return TensorDataset(x, x[:, :CLASSES].argmax(dim=1))


def image_data() -> TensorDataset:
    """One-channel 8 x 8 images, the label is the brightest of three corners."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(SAMPLES, 1, 8, 8, generator=generator)
    return TensorDataset(x, torch.stack([x[:, 0, 0, 0], x[:, 0, 0, 7], x[:, 0, 7, 0]], dim=1).argmax(dim=1))


def loader(data: TensorDataset, *, batch_size: int = BATCH) -> ResumableLoader:
    """Serve the data in order: rows compare runs bit for bit."""
    return ResumableLoader(data, batch_size=batch_size)


@torch.no_grad()
def give_decaying_spectra(network: nn.Module, *, decay: float = 0.6) -> nn.Module:
    """Give matrices and filters the quickly falling singular values of trained weights."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            flat = module.weight.flatten(1)
            u, s, v = torch.linalg.svd(flat, full_matrices=False)
            falling = s[0] * decay ** torch.arange(len(s), dtype=s.dtype)
            module.weight.copy_(((u * falling) @ v).view_as(module.weight))
    return network


def mlp() -> nn.Module:
    """Two hidden layers with weights that look trained."""
    layers = [nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, CLASSES)]
    return give_decaying_spectra(nn.Sequential(*layers))


def convolutional() -> nn.Module:
    """A k x k and a 1 x 1 convolution with batch norm in between, weights that look trained."""
    return give_decaying_spectra(
        nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, CLASSES),
        )
    )


def everything() -> nn.Module:
    """Something for every accelerator to act on at once: dense and low-rank layers, convolution, recurrence."""
    torch.manual_seed(0)
    return _Everything()


class _Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTMCell(4, 16)
        self.convolution = nn.Conv1d(16, 16, 3, padding=1)
        self.factored = LowRankLinear(16, 32, 4)
        self.dense = nn.Linear(32, 32)
        self.head = nn.Linear(32, CLASSES)
        give_decaying_spectra(self)

    def forward(self, x: Tensor) -> Tensor:
        state, hidden = None, []
        for step in x.unflatten(1, (-1, 4)).transpose(0, 1):
            state = self.recurrent(step, state)
            hidden.append(state[0])
        x = self.convolution(torch.stack(hidden, dim=2)).relu().mean(dim=2)
        return self.head(self.dense(self.factored(x).relu()).relu())


def loop_over_cell() -> nn.Module:
    """A Python loop over `nn.LSTMCell`, and a layer on its outputs."""
    return _LoopOverCell(feeds_back=False)


def decoder() -> nn.Module:
    """A loop that feeds its own output back, so that every step's result is needed before the next step."""
    return _LoopOverCell(feeds_back=True)


class _LoopOverCell(nn.Module):
    def __init__(self, *, feeds_back: bool) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.cell = nn.LSTMCell(4, 16)
        self.output = nn.Linear(16, 4)
        self.head = nn.Linear(4, CLASSES)
        self.feeds_back = feeds_back

    def forward(self, x: Tensor) -> Tensor:
        steps = self.encoder(x.unflatten(1, (-1, 4)).transpose(0, 1))
        state, y, hidden = None, torch.zeros_like(steps[0]), []
        for step in steps:
            state = self.cell(step + y if self.feeds_back else step, state)
            if self.feeds_back:
                y = self.output(state[0]).tanh()
            hidden.append(state[0])
        return self.head(self.output(torch.stack(hidden)).mean(0))


def embedding_only() -> nn.Module:
    """A network of a kind no accelerator here can act on: a lookup and no layer."""
    return _Lookup()


class _Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(FEATURES, CLASSES) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table
