"""Vectors of features: real ones and synthetic ones."""

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.zoo.arguments import check_integers, check_numbers
from lightning_accel.zoo.data.loading import ResumableLoader, evaluation_loader, training_loader
from lightning_accel.zoo.data.splits import sklearn_datasets, split


def standardized_parts(x: Tensor, target: Tensor, seed: int) -> list[TensorDataset]:
    """Return training (70 %), validation (10 %) and test (20 %) samples, scaled by the training samples' statistics.

    Args:
        x: (samples, features).
        target: Class indices (samples,); every part gets its share of each class.
        seed: Chooses the split.
    """
    parts = split(target, val_fraction=0.1, test_fraction=0.2, seed=seed)
    mean, std = x[parts[0]].mean(dim=0), x[parts[0]].std(dim=0)
    x = (x - mean) / std.clamp_min(1e-12)
    return [TensorDataset(x[part], target[part]) for part in parts]


class BreastCancer(LightningDataModule):
    """569 breast tumours described by 30 measured features, benign or malignant; no download.

    A batch is ``(x, target)``: x (batch, 30) float32, standardized on the training samples, target (batch,) int64, 0
    for malignant and 1 for benign.

    Args:
        batch_size: Samples a batch; the last, short batch of training is dropped.
        seed: Chooses the split and the order of training.

    Raises:
        ValueError: If an argument is out of range.
        ModuleNotFoundError: In ``prepare_data``, without scikit-learn.

    References:
        W. Wolberg, O. Mangasarian, N. Street, W. Street, Breast Cancer Wisconsin (Diagnostic), UCI Machine Learning
        Repository.
    """

    in_features = 30
    num_classes = 2

    def __init__(self, *, batch_size: int = 32, seed: int = 0) -> None:
        super().__init__()
        check_integers(1, batch_size=batch_size)
        check_integers(0, seed=seed)
        self.batch_size = batch_size
        self.seed = seed
        self.parts: list[TensorDataset] = []

    def prepare_data(self) -> None:
        """Check that scikit-learn is there."""
        sklearn_datasets()

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002  # all stages come from one table
        """Load, split and standardize; the second time, do nothing."""
        if not self.parts:
            x, target = sklearn_datasets().load_breast_cancer(return_X_y=True)
            x = torch.tensor(x, dtype=torch.float64)
            parts = standardized_parts(x, torch.tensor(target, dtype=torch.int64), self.seed)
            self.parts = [TensorDataset(part.tensors[0].float(), part.tensors[1]) for part in parts]

    def train_dataloader(self) -> ResumableLoader:
        """Return the shuffled training batches."""
        return training_loader(self.parts[0], batch_size=self.batch_size, seed=self.seed)

    def val_dataloader(self) -> DataLoader:
        """Return the validation batches."""
        return evaluation_loader(self.parts[1], batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """Return the test batches."""
        return evaluation_loader(self.parts[2], batch_size=self.batch_size)


class Classification(LightningDataModule):
    """Gaussian clusters in a few of many features: scikit-learn's ``make_classification`` with known informative ones.

    A stand-in for gene panels, where few of many measured features matter. A batch is ``(x, target)``: x (batch,
    features) float32, standardized on the training samples, target (batch,) int64. After ``setup``, ``informative``
    holds the sorted column indices of the informative features.

    Args:
        samples: Samples in all.
        features: Features of a sample.
        informative: Features that the class depends on; every other is noise.
        classes: Classes, with one cluster each, equally frequent.
        class_sep: Distance between the clusters, in half sides of their hypercube.
        label_noise: Part of the samples that get a random class, in [0, 1).
        batch_size: Samples a batch; the last, short batch of training is dropped.
        seed: Chooses the samples, the split and the order of training.

    Raises:
        ValueError: If an argument is out of range.
        ModuleNotFoundError: In ``prepare_data``, without scikit-learn.

    References:
        I. Guyon, Design of experiments for the NIPS 2003 variable selection benchmark.
    """

    def __init__(
        self,
        *,
        samples: int = 1000,
        features: int = 1000,
        informative: int = 64,
        classes: int = 2,
        class_sep: float = 1.0,
        label_noise: float = 0.01,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_integers(1, features=features, informative=informative, batch_size=batch_size)
        check_integers(2, classes=classes)
        check_integers(20 * classes, samples=samples)
        check_integers(0, seed=seed)
        check_numbers(0.0, above=True, class_sep=class_sep)
        check_numbers(0.0, 1.0, label_noise=label_noise)
        if informative > features:
            raise ValueError(f"`informative` must be <= `features` = {features}, got {informative}.")
        if 2 ** min(informative, 32) < classes:
            raise ValueError(
                f"`informative` must be >= {(classes - 1).bit_length()} to hold {classes} clusters at the corners of a "
                f"hypercube, got {informative}."
            )
        self.samples = samples
        self.features = features
        self.num_informative = informative
        self.classes = classes
        self.class_sep = class_sep
        self.label_noise = label_noise
        self.batch_size = batch_size
        self.seed = seed
        self.informative = torch.empty(0, dtype=torch.int64)
        self.parts: list[TensorDataset] = []

    def prepare_data(self) -> None:
        """Check that scikit-learn is there."""
        sklearn_datasets()

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002  # all stages come from one draw
        """Draw, permute the columns, split and standardize; the second time, do nothing."""
        if self.parts:
            return
        x, target = sklearn_datasets().make_classification(
            n_samples=self.samples,
            n_features=self.features,
            n_informative=self.num_informative,
            n_redundant=0,
            n_classes=self.classes,
            n_clusters_per_class=1,
            class_sep=self.class_sep,
            flip_y=self.label_noise,
            shuffle=False,  # leaves the informative columns in front, where they are known
            random_state=self.seed,
        )
        order = torch.randperm(self.features, generator=torch.Generator().manual_seed(self.seed))
        self.informative = (order < self.num_informative).nonzero().flatten()
        x = torch.tensor(x, dtype=torch.float32)[:, order]
        self.parts = standardized_parts(x, torch.tensor(target, dtype=torch.int64), self.seed)

    def train_dataloader(self) -> ResumableLoader:
        """Return the shuffled training batches."""
        return training_loader(self.parts[0], batch_size=self.batch_size, seed=self.seed)

    def val_dataloader(self) -> DataLoader:
        """Return the validation batches."""
        return evaluation_loader(self.parts[1], batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """Return the test batches."""
        return evaluation_loader(self.parts[2], batch_size=self.batch_size)
