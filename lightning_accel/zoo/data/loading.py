"""Loaders that repeat: the order is a function of seed and epoch, and a checkpoint remembers the place in it."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler, TensorDataset


class EpochSampler(Sampler[int]):
    """Shuffle ``range(size)`` in an order that depends on ``seed`` and the epoch only.

    Lightning and Fabric call ``set_epoch`` before each epoch; a plain loop has to. So a resumed run sees the order of
    the uninterrupted one, and two arms of a comparison see the same batches, whatever else draws random numbers.

    Args:
        size: Number of samples.
        seed: Any integer >= 0.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of ``epoch``."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # Mixed by multiplication with a large odd number: seed 0 epoch 1 is not seed 1 epoch 0.
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + self.epoch) % 2**63)
        yield from torch.randperm(self.size, generator=generator).tolist()

    def __len__(self) -> int:
        return self.size


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` that goes on in the middle of an epoch after a resume.

    Lightning stores the state of any loader that has ``state_dict``. Constructor and behaviour are otherwise those of
    ``DataLoader``; the samples before the resumed place are read and dropped.
    """

    # On the class, for Lightning makes a second instance with another sampler for distributed runs.
    _epoch = 0
    _batches = 0
    _resume: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator has no `_reset`, which no one calls
        self._epoch = getattr(self.sampler, "epoch", 0)
        self._batches = 0
        if self._resume is not None:
            epoch, batches = self._resume
            self._resume = None
            # A checkpoint of a finished epoch names an epoch that is not run again.
            self._batches = batches if epoch == self._epoch else 0
        for batch in islice(super().__iter__(), self._batches, None):
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches handed out."""
        return {"epoch": self._epoch, "batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the batches of ``state_dict`` if its epoch is iterated next."""
        self._resume = state_dict["epoch"], state_dict["batches"]


def training_loader(dataset: TensorDataset, *, batch_size: int, seed: int) -> ResumableLoader:
    """Return a shuffling loader whose last, short batch is dropped unless it is the only one."""
    return ResumableLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(len(dataset), seed),
        drop_last=len(dataset) >= batch_size,
        num_workers=0,
    )


def evaluation_loader(dataset: TensorDataset, *, batch_size: int) -> DataLoader[Any]:
    """Return a loader of every sample in order."""
    return DataLoader(dataset, batch_size=batch_size, shuffle=False, num_workers=0)
