"""Handwritten digits of scikit-learn as images."""

import math

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.zoo.arguments import check_integers, check_numbers
from lightning_accel.zoo.data.loading import ResumableLoader, evaluation_loader, training_loader
from lightning_accel.zoo.data.splits import sklearn_datasets, split

# Of the 1,797 original 8x8 images, scaled to [0, 1].
PIXEL_MEAN, PIXEL_STD = 0.3053, 0.3761

# How far a copy is turned (degrees), sheared, scaled (up and down) and shifted (sides of the image), at most.
TURN, SHEAR, SCALE, SHIFT = 15.0, 0.2, 0.15, 0.1


class Digits(LightningDataModule):
    """1,797 handwritten digits, 8x8 grey values, in ten classes; no download.

    A batch is ``(x, target)``: x (batch, channels, image_size, image_size) float32 with mean 0 and standard deviation
    1 before upsampling, target (batch,) int64. Every class is split in proportion.

    Args:
        image_size: Pixels a side; above 8 the images are upsampled bilinearly.
        channels: Copies of the grey value: 1 or 3.
        copies: Images of each digit, in all three parts: the original, and others that are turned, sheared, scaled and
            shifted at random. More make the task harder and accuracies finer.
        distortion: How far the others may be moved, >= 0. At 1 they are turned by up to 15 degrees, sheared by a fifth,
            scaled by 15 % and shifted by a tenth of the image.
        val_fraction: Part of the digits to validate with, in (0, 0.5).
        test_fraction: Part of the digits to test with, in (0, 0.5); the rest is for training.
        batch_size: Samples a batch; the last, short batch of training is dropped.
        seed: Chooses the split, the distortions and the order of training.

    Raises:
        ValueError: If an argument is out of range.
        ModuleNotFoundError: In ``prepare_data``, without scikit-learn.

    References:
        E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository.
    """

    num_classes = 10

    def __init__(
        self,
        *,
        image_size: int = 8,
        channels: int = 1,
        copies: int = 1,
        distortion: float = 1.0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_integers(8, image_size=image_size)
        check_integers(1, copies=copies, batch_size=batch_size)
        check_integers(0, seed=seed)
        check_numbers(0.0, distortion=distortion)
        check_numbers(0.0, 0.5, above=True, val_fraction=val_fraction, test_fraction=test_fraction)
        if channels not in (1, 3):
            raise ValueError(f"`channels` must be 1 or 3, got {channels!r}.")
        self.image_size = image_size
        self.channels = channels
        self.copies = copies
        self.distortion = distortion
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.batch_size = batch_size
        self.seed = seed
        self.parts: list[TensorDataset] = []

    def prepare_data(self) -> None:
        """Check that scikit-learn is there."""
        sklearn_datasets()

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002  # all stages come from one file
        """Load, upsample and split; the second time, do nothing."""
        if self.parts:
            return
        pixels, labels = sklearn_datasets().load_digits(return_X_y=True)
        x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8).div(16)
        x = x.sub(PIXEL_MEAN).div(PIXEL_STD)
        if self.image_size != 8:
            x = functional.interpolate(x, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False)
        x = x.repeat(1, self.channels, 1, 1)
        target = torch.tensor(labels, dtype=torch.int64)
        parts = split(target, val_fraction=self.val_fraction, test_fraction=self.test_fraction, seed=self.seed)
        # All images of a digit are in one part, or the others would be known from training.
        images = [x, *(distort(x, self.distortion, seed=self.seed * 1009 + copy) for copy in range(1, self.copies))]
        self.parts = [
            TensorDataset(torch.cat([image[part] for image in images]), target[part].repeat(self.copies))
            for part in parts
        ]

    def train_dataloader(self) -> ResumableLoader:
        """Return the shuffled training batches."""
        return training_loader(self.parts[0], batch_size=self.batch_size, seed=self.seed)

    def val_dataloader(self) -> DataLoader:
        """Return the validation batches."""
        return evaluation_loader(self.parts[1], batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """Return the test batches."""
        return evaluation_loader(self.parts[2], batch_size=self.batch_size)


def distort(x: Tensor, strength: float, *, seed: int) -> Tensor:
    """Turn, shear, scale and shift each normalized image (images, channels, height, width) in its own random way."""
    generator = torch.Generator().manual_seed(seed)
    turn, shear, wide, high, right, down = torch.rand(6, len(x), generator=generator).mul(2).sub(1).mul(strength)
    angle = turn * math.radians(TURN)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).reshape(-1, 2, 2)
    skew = torch.eye(2).repeat(len(x), 1, 1)
    skew[:, 0, 1] = SHEAR * shear
    stretch = torch.diag_embed(1 + SCALE * torch.stack([wide, high], dim=1))
    shift = 2 * SHIFT * torch.stack([right, down], dim=1)  # grid_sample's images have sides of length 2
    affine = torch.cat([rotation @ skew @ stretch, shift[:, :, None]], dim=2)
    grid = functional.affine_grid(affine, list(x.shape), align_corners=False)
    paper = -PIXEL_MEAN / PIXEL_STD  # of an empty pixel; `grid_sample` puts 0 beyond the border
    return functional.grid_sample(x - paper, grid, align_corners=False) + paper
