"""Truncated backpropagation through time over long streams."""

# ruff: noqa: ARG002  # Lightning fixes the hooks' arguments

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from lightning_accel.arguments import check_integer
from lightning_accel.recurrent.carried_state import CarriedState, recurrent_layers, why_not_carried


class StatefulStreams(Callback):
    """Let every batch go on where the one before ended: BPTT(h; h') with h' the steps of a batch.

    While training, a `Recurrent`, `GraphRNN`, ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` layer that the model calls without
    a state gets the detached state in which its stream, a lane of the batch, ended one batch before; how it is called,
    by keyword or with packed sequences, does not matter. Of several calls in a batch each has streams of its own.
    Streams begin anew with each epoch and where the batch says so. The state is part of the checkpoint.

    Args:
        resets: Key of the batch (a mapping, or a tuple's index) under which a boolean tensor of shape (B,) says which
            streams begin anew with it; ``None`` if none does within an epoch.
        prefix_batches: Earlier batches that are run again before each one, so that gradients reach h = (1 +
            prefix_batches) h' steps back; 0 truncates at the batch. Gradients into the layers below end at the batch.

    Raises:
        TypeError: If ``prefix_batches`` is no integer, or ``resets`` neither text nor an integer.
        ValueError: If ``prefix_batches`` is negative, or in a step if the number of streams or of a layer's calls
            changes, or if a layer is called again in the backward (checkpointing).
        MisconfigurationException: When training starts, if the model has no such layer, a layer's state can not be
            carried (bidirectional, with clocks, no argument for a state), or the data is shuffled; in a step, if the
            optimizer runs it more than once (LBFGS).

    References:
        Williams, Peng, "An efficient gradient-based algorithm for on-line training of recurrent network trajectories",
        1990.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_accel import StatefulStreams
        >>> from lightning_accel.zoo import CharLM, CopyTask
        >>> off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
        >>> trainer = Trainer(max_epochs=1, limit_train_batches=4, accelerator="cpu", **dict.fromkeys(off, False),
        ...                   callbacks=[StatefulStreams()])
        >>> trainer.fit(CharLM(embedding_dim=8, hidden_size=8), CopyTask(delay=5, batch_size=4))
    """

    def __init__(self, *, resets: str | int | None = None, prefix_batches: int = 0) -> None:
        super().__init__()
        check_integer("prefix_batches", prefix_batches, at_least=0)
        if not isinstance(resets, str):
            check_integer("resets", resets, optional=True)
        self.resets, self.prefix_batches = resets, prefix_batches
        self._carried: dict[str, CarriedState] = {}
        self._saved: dict[str, Any] = {}
        self._resumed = False
        self._backwards = 0

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Stand before the layers."""
        self._leave()
        layers = recurrent_layers(pl_module)
        if not layers:
            raise MisconfigurationException(
                f"StatefulStreams found no layer whose state can be carried in {type(pl_module).__name__}: "
                "no Recurrent, nn.LSTM, nn.GRU or nn.RNN; remove the callback, or put the cell into a Recurrent."
            )
        reason = why_not_carried(pl_module)
        if reason is not None:
            raise MisconfigurationException(f"StatefulStreams can not carry a state: {reason}; remove the callback.")
        if _is_shuffled(trainer):
            raise MisconfigurationException(
                "StatefulStreams needs batches in the order of their streams, but the training data is shuffled; set "
                "`shuffle=False`."
            )
        self._carried = {name: CarriedState(layer, self.prefix_batches, name=name) for name, layer in layers.items()}
        if self._resumed:
            for name, state in self._saved.items():
                self._carried[name].restore(state)

    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Begin every stream anew, unless a resumed run goes on in the middle of an epoch."""
        if not self._resumed:
            for carried in self._carried.values():
                carried.begin()
        self._resumed = False

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Carry states in this step."""
        if batch_idx == 0:
            for carried in self._carried.values():
                carried.begin()
        self._backwards = 0
        resets = self._resets_of(batch)
        for carried in self._carried.values():
            carried.active, carried.resets = True, resets

    def on_before_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loss: Tensor) -> None:
        """Refuse optimizers that run a step more than once: the second run would go on where the first one ended."""
        self._backwards += 1
        if self._backwards > 1 and pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"StatefulStreams can not carry states through {type(trainer.optimizers[0]).__name__}, which runs its "
                "closure, and so the training step, more than once a batch; use another optimizer."
            )

    def on_train_batch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: Any) -> None:
        """Carry no state into validation."""
        for carried in self._carried.values():
            carried.finish()
        self._saved = {name: carried.state() for name, carried in self._carried.items()}

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Leave the layers as they were."""
        self._leave()

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Leave the layers as they were."""
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """Return what is carried."""
        return dict(self._saved)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was carried."""
        self._saved, self._resumed = dict(state_dict), bool(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to the running fit."""
        return self.__dict__ | {"_carried": {}}

    def _resets_of(self, batch: Any) -> Tensor | None:
        if self.resets is None:
            return None
        try:
            found = batch[self.resets] if isinstance(batch, Mapping) else batch[int(self.resets)]
        except (KeyError, IndexError, ValueError, TypeError):
            found = None
        if not isinstance(found, Tensor) or found.dtype is not torch.bool:
            raise ValueError(f"`resets={self.resets!r}` must lead to a boolean tensor of shape (B,) in every batch.")
        return found

    def _leave(self) -> None:
        for carried in self._carried.values():
            carried.remove()
        self._carried = {}


def _is_shuffled(trainer: "pl.Trainer") -> bool:
    """Tell whether a loader of the training data draws its samples in random order."""
    for loader in pytree.tree_leaves(trainer.train_dataloader):
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None) or getattr(loader, "sampler", None)
        if isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)):
            return True
        if isinstance(sampler, DistributedSampler) and sampler.shuffle:
            return True
    return False
