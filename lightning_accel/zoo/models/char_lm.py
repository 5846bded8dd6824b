"""Character language model with a choice of recurrent cells."""

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_accel.zoo.arguments import check_integers
from lightning_accel.zoo.models.classification import accuracies, classification_step
from lightning_accel.zoo.models.optimization import OptimizerName, ScheduleName, check_optimization, configure
from lightning_accel.zoo.models.recurrent_layers import CellName, RecurrentLayers


class CharLM(LightningModule):
    """Predict the next token at every position of a sequence.

    Targets of -100 count neither in the loss nor in the accuracy, as in the copy task.

    Args:
        vocab_size: Number of different tokens.
        cell: ``"lstm"`` (``nn.LSTM``), or a Python loop over ``"lstm_cell"`` (``nn.LSTMCell``), ``"peephole"``,
            ``"layer_norm"`` or ``"min_gru"``.
        embedding_dim: Features of a token.
        hidden_size: Features of each layer's state.
        layers: Recurrent layers.
        lr: Learning rate after warm-up.
        optimizer: ``"sgd"`` has Nesterov momentum 0.9.
        weight_decay: Of every parameter.
        schedule: Of the learning rate, a step at a time, to 0 at the Trainer's last step unless ``"constant"``.
        warmup_steps: Optimizer steps of linear warm-up.

    Raises:
        ValueError: If an argument is out of range, or in ``forward`` if the batch does not hold tokens, or in
            ``setup`` if the data have more different tokens.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 97,
        cell: CellName = "lstm",
        embedding_dim: int = 128,
        hidden_size: int = 256,
        layers: int = 1,
        lr: float = 3e-3,
        optimizer: OptimizerName = "adam",
        weight_decay: float = 0.0,
        schedule: ScheduleName = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        check_integers(2, vocab_size=vocab_size)
        check_integers(1, embedding_dim=embedding_dim)
        check_optimization(
            lr=lr, optimizer=optimizer, weight_decay=weight_decay, schedule=schedule, warmup_steps=warmup_steps
        )
        self.save_hyperparameters()
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.recurrent = RecurrentLayers(cell, embedding_dim, hidden_size, layers)
        self.head = nn.Linear(hidden_size, vocab_size)
        self.accuracy = accuracies(vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, time), integers below ``vocab_size``, to logits (batch, time, vocab_size)."""
        if tokens.dtype != torch.int64 or tokens.ndim != 2:
            raise ValueError(
                f"`tokens` must be int64 of shape (batch, time), got {tokens.dtype} of shape {tuple(tokens.shape)}. "
                "Choose data of tokens, `data=topics` or `data=copy`."
            )
        x = self.embedding(tokens).transpose(0, 1)
        return self.head(self.recurrent(x)).transpose(0, 1)

    def setup(self, stage: str) -> None:  # noqa: ARG002  # holds for every stage
        """Check that the data have no more tokens than the model.

        Raises:
            ValueError: If the Trainer's DataModule names a larger ``vocab_size``.
        """
        needed = getattr(getattr(self.trainer, "datamodule", None), "vocab_size", 0)
        if needed > self.vocab_size:
            raise ValueError(
                f"`vocab_size` must be >= {needed}, the number of different tokens in the data, got {self.vocab_size}. "
                f"Set `model.vocab_size={needed}`."
            )

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the cross-entropy in nats a token and log ``train/loss``."""
        return classification_step(self, batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log ``val/loss`` and ``val/accuracy``."""
        classification_step(self, batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log ``test/loss`` and ``test/accuracy``."""
        classification_step(self, batch, "test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and, if one was chosen, the schedule."""
        return configure(self)
