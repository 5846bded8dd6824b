"""Regression of a number on a sequence."""

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional

from lightning_accel.zoo.arguments import check_integers, check_numbers
from lightning_accel.zoo.models.classification import Stage, log_stage
from lightning_accel.zoo.models.optimization import OptimizerName, ScheduleName, check_optimization, configure
from lightning_accel.zoo.models.recurrent_layers import CellName, RecurrentLayers


class RecurrentRegressor(LightningModule):
    """Predict one number from the last output of recurrent layers, under the mean squared error.

    Logs ``train/loss``, ``val/loss`` and ``test/loss``, and as accuracy the part of predictions within ``tolerance``.

    Args:
        in_features: Features a time step.
        cell: ``"lstm"`` (``nn.LSTM``), or a Python loop over ``"lstm_cell"`` (``nn.LSTMCell``), ``"peephole"``,
            ``"layer_norm"`` or ``"min_gru"``.
        hidden_size: Features of each layer's state.
        layers: Recurrent layers.
        tolerance: Largest absolute error of a prediction that counts as right, in units of the target.
        lr: Learning rate after warm-up.
        optimizer: ``"sgd"`` has Nesterov momentum 0.9.
        weight_decay: Of every parameter.
        schedule: Of the learning rate, a step at a time, to 0 at the Trainer's last step unless ``"constant"``.
        warmup_steps: Optimizer steps of linear warm-up.

    Raises:
        ValueError: If an argument is out of range, or in ``forward`` if the batch does not hold such sequences.
    """

    def __init__(
        self,
        *,
        in_features: int = 2,
        cell: CellName = "lstm",
        hidden_size: int = 64,
        layers: int = 1,
        tolerance: float = 0.04,
        lr: float = 5e-3,
        optimizer: OptimizerName = "adam",
        weight_decay: float = 0.0,
        schedule: ScheduleName = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        check_integers(1, in_features=in_features)
        check_numbers(0.0, above=True, tolerance=tolerance)
        check_optimization(
            lr=lr, optimizer=optimizer, weight_decay=weight_decay, schedule=schedule, warmup_steps=warmup_steps
        )
        self.save_hyperparameters()
        self.in_features = in_features
        self.tolerance = tolerance
        self.recurrent = RecurrentLayers(cell, in_features, hidden_size, layers)
        self.head = nn.Linear(hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map sequences (batch, time, in_features) to predictions (batch,)."""
        if not torch.is_floating_point(x) or x.ndim != 3 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"`x` must be floating-point of shape (batch, time, {self.in_features}), got {x.dtype} of shape "
                f"{tuple(x.shape)}. Choose data of sequences, `data=adding`."
            )
        return self.head(self.recurrent(x.transpose(0, 1))[-1]).squeeze(-1)

    def _step(self, batch: tuple[Tensor, Tensor], stage: Stage) -> Tensor:
        x, target = batch
        prediction = self(x)
        loss = functional.mse_loss(prediction, target)
        log_stage(self, stage, loss, len(target))
        if stage != "train":
            right = (prediction - target).abs().le(self.tolerance).float().mean()
            self.log(f"{stage}/accuracy", right, prog_bar=True, batch_size=len(target), sync_dist=True)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean squared error and log ``train/loss``."""
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log ``val/loss`` and ``val/accuracy``."""
        self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log ``test/loss`` and ``test/accuracy``."""
        self._step(batch, "test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and, if one was chosen, the schedule."""
        return configure(self)
