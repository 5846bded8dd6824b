"""Small convolutional network."""

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_accel.zoo.arguments import check_integers, check_numbers
from lightning_accel.zoo.models.classification import accuracies, check_images, classification_step
from lightning_accel.zoo.models.optimization import OptimizerName, ScheduleName, check_optimization, configure


class CNN(LightningModule):
    """Classify images with two 3x3 convolutions, one 2x2 pooling and a hidden layer; 138,698 parameters by default.

    Args:
        num_classes: Outputs.
        channels: Of the images.
        image_size: Pixels a side, even.
        width: Channels of the first convolution; the second has twice as many.
        hidden: Units of the hidden layer.
        dropout: Probability of zeroing an input of the two last layers, in [0, 1).
        lr: Learning rate after warm-up.
        optimizer: ``"sgd"`` has Nesterov momentum 0.9.
        weight_decay: Of every parameter.
        schedule: Of the learning rate, a step at a time, to 0 at the Trainer's last step unless ``"constant"``.
        warmup_steps: Optimizer steps of linear warm-up.

    Raises:
        ValueError: If an argument is out of range, or in ``forward`` if the batch has other images.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        channels: int = 1,
        image_size: int = 8,
        width: int = 16,
        hidden: int = 256,
        dropout: float = 0.0,
        lr: float = 1e-3,
        optimizer: OptimizerName = "adam",
        weight_decay: float = 0.0,
        schedule: ScheduleName = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        check_integers(1, channels=channels, width=width, hidden=hidden)
        check_integers(2, num_classes=num_classes, image_size=image_size)
        if image_size % 2:
            raise ValueError(f"`image_size` must be even for the 2x2 pooling, got {image_size}.")
        check_numbers(0.0, 1.0, dropout=dropout)
        check_optimization(
            lr=lr, optimizer=optimizer, weight_decay=weight_decay, schedule=schedule, warmup_steps=warmup_steps
        )
        self.save_hyperparameters()
        self.channels = channels
        self.image_size = image_size
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(2 * width * (image_size // 2) ** 2, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )
        self.accuracy = accuracies(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, channels, image_size, image_size) to logits (batch, num_classes)."""
        check_images(x, self.channels, self.image_size)
        return self.head(self.features(x))

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
