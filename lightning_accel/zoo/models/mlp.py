"""Multi-layer perceptron."""

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_accel.zoo.arguments import check_integers, check_numbers
from lightning_accel.zoo.models.classification import accuracies, check_features, classification_step
from lightning_accel.zoo.models.optimization import OptimizerName, ScheduleName, check_optimization, configure


class MLP(LightningModule):
    """Classify flattened images or feature vectors with ``depth`` hidden ReLU layers of ``width`` units.

    Args:
        in_features: Inputs a sample, flattened; by default ``channels * image_size**2``.
        num_classes: Outputs.
        channels: Of images; read only without ``in_features``.
        image_size: Pixels a side of images; read only without ``in_features``.
        width: Units of each hidden layer.
        depth: Hidden layers.
        dropout: Probability of zeroing a hidden unit, in [0, 1).
        lr: Learning rate after warm-up.
        optimizer: ``"sgd"`` has Nesterov momentum 0.9.
        weight_decay: Of every parameter.
        schedule: Of the learning rate, a step at a time, to 0 at the Trainer's last step unless ``"constant"``.
        warmup_steps: Optimizer steps of linear warm-up.

    Raises:
        ValueError: If an argument is out of range, or in ``forward`` if the batch has another number of features.
    """

    def __init__(
        self,
        *,
        in_features: int | None = None,
        num_classes: int = 10,
        channels: int = 1,
        image_size: int = 8,
        width: int = 1024,
        depth: int = 4,
        dropout: float = 0.0,
        lr: float = 1e-3,
        optimizer: OptimizerName = "adam",
        weight_decay: float = 0.0,
        schedule: ScheduleName = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        check_integers(1, channels=channels, image_size=image_size, width=width, depth=depth)
        check_integers(2, num_classes=num_classes)
        check_numbers(0.0, 1.0, dropout=dropout)
        check_optimization(
            lr=lr, optimizer=optimizer, weight_decay=weight_decay, schedule=schedule, warmup_steps=warmup_steps
        )
        if in_features is not None:
            check_integers(1, in_features=in_features)
        self.save_hyperparameters()
        self.in_features = channels * image_size**2 if in_features is None else in_features
        layers: list[nn.Module] = []
        fan_in = self.in_features
        for _ in range(depth):
            layers += [nn.Linear(fan_in, width), nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout else []
            fan_in = width
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(width, num_classes)
        self.accuracy = accuracies(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map samples (batch, ...) to logits (batch, num_classes)."""
        return self.head(self.hidden(check_features(x, self.in_features)))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the cross-entropy and log ``train/loss``."""
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
