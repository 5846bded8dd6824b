"""Residual network for small images."""

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional

from lightning_accel.zoo.arguments import check_integers
from lightning_accel.zoo.models.classification import accuracies, check_images, classification_step
from lightning_accel.zoo.models.optimization import OptimizerName, ScheduleName, check_optimization, configure


class BasicBlock(nn.Module):
    """Add two 3x3 convolutions with batch norm to their input, which a 1x1 convolution adapts where the shape changes.

    Args:
        in_channels: Of the input.
        out_channels: Of the output.
        stride: Of the first convolution, in pixels.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in_channels, h, w) to (batch, out_channels, h / stride, w / stride)."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet18(LightningModule):
    """Classify images with a ResNet-18 whose stem is one 3x3 convolution, as is usual for 32x32 pixels.

    Args:
        num_classes: Outputs.
        channels: Of the images.
        image_size: Pixels a side, at least 8.
        width: Channels of the first stage; they double in each of the other three.
        lr: Learning rate after warm-up.
        optimizer: ``"sgd"`` has Nesterov momentum 0.9.
        weight_decay: Of every parameter.
        schedule: Of the learning rate, a step at a time, to 0 at the Trainer's last step unless ``"constant"``.
        warmup_steps: Optimizer steps of linear warm-up.

    Raises:
        ValueError: If an argument is out of range, or in ``forward`` if the batch has other images.

    References:
        He, Zhang, Ren, Sun, arXiv:1512.03385, table 1 and section 4.2. *Deviations*: stem of one 3x3 convolution
        without pooling; 1x1 convolutions in the shortcuts that change the shape.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        channels: int = 3,
        image_size: int = 32,
        width: int = 64,
        lr: float = 1e-3,
        optimizer: OptimizerName = "adam",
        weight_decay: float = 0.0,
        schedule: ScheduleName = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        check_integers(1, channels=channels, width=width)
        check_integers(2, num_classes=num_classes)
        check_integers(8, image_size=image_size)
        check_optimization(
            lr=lr, optimizer=optimizer, weight_decay=weight_decay, schedule=schedule, warmup_steps=warmup_steps
        )
        self.save_hyperparameters()
        self.channels = channels
        self.image_size = image_size
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages = []
        for stage in range(4):
            out_channels = width * 2**stage
            in_channels = width if stage == 0 else out_channels // 2
            first = BasicBlock(in_channels, out_channels, stride=1 if stage == 0 else 2)
            stages.append(nn.Sequential(first, BasicBlock(out_channels, out_channels, stride=1)))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(8 * width, num_classes)
        self.accuracy = accuracies(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, channels, image_size, image_size) to logits (batch, num_classes)."""
        check_images(x, self.channels, self.image_size)
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.mean(x, dim=(2, 3)))

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
