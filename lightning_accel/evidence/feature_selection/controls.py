"""Controls of the study: the same training with masks that no projection has chosen."""

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

Ranking = Literal["magnitude", "random"]


class RankedColumns(Callback):
    """Keep some columns of a weight, rewind all weights to their initial values and train on, as the projections do.

    Args:
        parameter: Name of the weight whose columns are the features.
        sparsity: Fraction of the columns to clear, in [0, 1].
        retrain_epoch: Epoch (from 0) that begins with the choice.
        ranking: ``"magnitude"`` keeps the columns of the largest l2 norms; ``"random"`` any.
        seed: Of the random choice.
    """

    def __init__(self, parameter: str, sparsity: float, retrain_epoch: int, ranking: Ranking, seed: int) -> None:
        self.parameter, self.sparsity, self.retrain_epoch = parameter, sparsity, retrain_epoch
        self.ranking, self.seed = ranking, seed
        self._initial: dict[str, Tensor] = {}
        self._cleared: Tensor | None = None
        self._handles: list[Any] = []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the initial values."""
        self._initial = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the columns, rewind, and keep the others cleared after every step from here on."""
        if trainer.current_epoch != self.retrain_epoch:
            return
        weight = pl_module.get_parameter(self.parameter)
        self._cleared = self._choose(weight.detach())
        pl_module.load_state_dict(self._initial)
        self._clear(weight)
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._clear(weight)))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear no more."""
        self._stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Clear no more."""
        self._stop()

    def _choose(self, weight: Tensor) -> Tensor:
        columns = weight.shape[1]
        if self.ranking == "random":
            order = torch.randperm(columns, generator=torch.Generator().manual_seed(self.seed)).to(weight.device)
        else:
            order = torch.linalg.vector_norm(weight, dim=0).argsort()
        return order[: round(self.sparsity * columns)]

    @torch.no_grad()
    def _clear(self, weight: Tensor) -> None:
        if self._cleared is not None:
            weight[:, self._cleared] = 0.0

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
