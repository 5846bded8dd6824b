"""Models of the sizes that people train on GPUs, for `lightning_accel.bench.suites.gpu`."""

from torch import Tensor, nn

from lightning_accel.zoo.models.vit import ViT


class Bottleneck(nn.Module):
    """Three convolutions, the middle one 3x3, added to their input.

    Args:
        channels: Of the input.
        width: Of the middle; the output has four times as many.
        stride: Of the middle.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.shortcut = nn.Sequential()
        if channels != out or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.last = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, channels, height, width)."""
        summed: Tensor = self.last(self.body(x) + self.shortcut(x))
        return summed


def resnet50(blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> nn.Module:
    """Return a ResNet-50, or with fewer blocks and channels a small one of its kind.

    References:
        He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", arXiv:1512.03385.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    channels = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            layers.append(Bottleneck(channels, width * 2**stage, 2 if block == 0 < stage else 1))
            channels = 4 * width * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def vit_small(depth: int = 12, image_size: int = 224) -> nn.Module:
    """Return a ViT-S/16, or a shallower one.

    References:
        Touvron et al., "Training data-efficient image transformers", arXiv:2012.12877.
    """
    return ViT(num_classes=1000, image_size=image_size, patch_size=16, dim=384, depth=depth, heads=6)
