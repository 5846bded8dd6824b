"""Splitting in-memory samples, and the optional scikit-learn that some of them come from."""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor


def sklearn_datasets() -> ModuleType:
    """Return ``sklearn.datasets``.

    Raises:
        ModuleNotFoundError: Naming the extra to install.
    """
    try:
        return import_module("sklearn.datasets")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "These data come with scikit-learn, which is not installed: "
            '`pip install "lightning-accel[examples]"`, or choose `data=topics`, `data=adding` or `data=copy`.'
        ) from error


def split(target: Tensor, *, val_fraction: float, test_fraction: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sample indices for training, validation and test, with every class in proportion.

    Args:
        target: Class indices (samples,).
        val_fraction: Part of each class for validation, rounded to whole samples.
        test_fraction: Part of each class for the test.
        seed: Chooses the split; equal seeds give equal splits on every platform.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for label in target.unique():
        members = (target == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        num_val, num_test = round(val_fraction * len(members)), round(test_fraction * len(members))
        sizes = [len(members) - num_val - num_test, num_val, num_test]
        for part, indices in zip(parts, members.split(sizes), strict=True):
            part.append(indices)
    train, val, test = (torch.cat(part).sort().values for part in parts)
    return train, val, test
