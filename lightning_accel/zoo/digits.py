"""Handwritten digits of scikit-learn as images."""

import torch
from lightning.pytorch import LightningDataModule
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.zoo.arguments import check_integers
from lightning_accel.zoo.loading import ResumableLoader, evaluation_loader, training_loader
from lightning_accel.zoo.splits import sklearn_datasets, split

# Of the 1,797 original 8x8 images, scaled to [0, 1].
PIXEL_MEAN, PIXEL_STD = 0.3053, 0.3761


class Digits(LightningDataModule):
    """1,797 handwritten digits, 8x8 grey values, in ten classes; no download.

    A batch is ``(x, target)``: x (batch, channels, image_size, image_size) float32 with mean 0 and standard deviation
    1 before upsampling, target (batch,) int64. 70 % train, 10 % validate, 20 % test, every class in proportion.

    Args:
        image_size: Pixels a side; above 8 the images are upsampled bilinearly.
        channels: Copies of the grey value: 1 or 3.
        batch_size: Samples a batch; the last, short batch of training is dropped.
        seed: Chooses the split and the order of training.

    Raises:
        ValueError: If an argument is out of range.
        ModuleNotFoundError: In ``prepare_data``, without scikit-learn.

    References:
        E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository.
    """

    num_classes = 10

    def __init__(self, *, image_size: int = 8, channels: int = 1, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        check_integers(8, image_size=image_size)
        check_integers(1, batch_size=batch_size)
        check_integers(0, seed=seed)
        if channels not in (1, 3):
            raise ValueError(f"`channels` must be 1 or 3, got {channels!r}.")
        self.image_size = image_size
        self.channels = channels
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
        images, labels = sklearn_datasets().load_digits(return_X_y=True)
        x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8).div(16)
        x = x.sub(PIXEL_MEAN).div(PIXEL_STD)
        if self.image_size != 8:
            x = functional.interpolate(x, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False)
        x = x.repeat(1, self.channels, 1, 1)
        target = torch.tensor(labels, dtype=torch.int64)
        parts = split(target, val_fraction=0.1, test_fraction=0.2, seed=self.seed)
        self.parts = [TensorDataset(x[part], target[part]) for part in parts]

    def train_dataloader(self) -> ResumableLoader:
        """Return the shuffled training batches."""
        return training_loader(self.parts[0], batch_size=self.batch_size, seed=self.seed)

    def val_dataloader(self) -> DataLoader:
        """Return the validation batches."""
        return evaluation_loader(self.parts[1], batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """Return the test batches."""
        return evaluation_loader(self.parts[2], batch_size=self.batch_size)
