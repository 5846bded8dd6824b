"""Synthetic tasks that need a memory of chosen length."""

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.zoo.arguments import check_integers
from lightning_accel.zoo.data.loading import ResumableLoader, evaluation_loader, training_loader
from lightning_accel.zoo.models.classification import IGNORED_TARGET


def in_order(x: Tensor, target: Tensor) -> list[TensorDataset]:
    """Return 80 % of the samples for training, 10 % for validation and 10 % for the test, in this order."""
    val, test = int(0.8 * len(x)), int(0.9 * len(x))
    return [TensorDataset(x[part], target[part]) for part in (slice(val), slice(val, test), slice(test, None))]


class AddingProblem(LightningDataModule):
    """Add the two marked ones of many random numbers.

    A batch is ``(x, target)``: x (batch, length, 2) float32 holds numbers from [0, 1) and marks, 1 at one step of each
    half and 0 else; target (batch,) float32 is the sum of the two marked numbers. Guessing 1 always has a mean squared
    error of 1/6.

    Args:
        length: Time steps.
        samples: Sequences in all: 80 % train, 10 % validate, 10 % test.
        batch_size: Sequences a batch; the last, short batch of training is dropped.
        seed: Chooses the sequences and the order of training.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Hochreiter, Schmidhuber, Long Short-Term Memory, Neural Computation 9 (1997), experiment 4. *Deviations*:
        numbers from [0, 1) and a plain sum, fixed length, one mark in each half.
    """

    in_features = 2

    def __init__(self, *, length: int = 50, samples: int = 10_000, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        check_integers(2, length=length)
        check_integers(10, samples=samples)
        check_integers(1, batch_size=batch_size)
        check_integers(0, seed=seed)
        self.length = length
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self.parts: list[TensorDataset] = []

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002  # all stages come from one draw
        """Draw the sequences; the second time, do nothing."""
        if self.parts:
            return
        generator = torch.Generator().manual_seed(self.seed)
        numbers = torch.rand(self.samples, self.length, generator=generator)
        marks = torch.zeros_like(numbers)
        half = self.length // 2
        for low, high in ((0, half), (half, self.length)):
            marks.scatter_(1, torch.randint(low, high, (self.samples, 1), generator=generator), 1.0)
        self.parts = in_order(torch.stack((numbers, marks), dim=-1), (numbers * marks).sum(dim=1))

    def train_dataloader(self) -> ResumableLoader:
        """Return the shuffled training batches."""
        return training_loader(self.parts[0], batch_size=self.batch_size, seed=self.seed)

    def val_dataloader(self) -> DataLoader:
        """Return the validation batches."""
        return evaluation_loader(self.parts[1], batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """Return the test batches."""
        return evaluation_loader(self.parts[2], batch_size=self.batch_size)


class CopyTask(LightningDataModule):
    """Repeat a string of symbols after a delay.

    A batch is ``(tokens, target)``, both (batch, 2 * string_length + delay) int64. The tokens are the string, blanks
    (0), and at the last blank the request (1), then blanks; the target is the string after the request and -100, which
    losses skip, before it. There are ``symbols + 2`` different tokens.

    Args:
        delay: Time steps between the string and its copy, the request included.
        string_length: Symbols to remember.
        symbols: Different symbols.
        samples: Sequences in all: 80 % train, 10 % validate, 10 % test.
        batch_size: Sequences a batch; the last, short batch of training is dropped.
        seed: Chooses the sequences and the order of training.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Hochreiter, Schmidhuber, Long Short-Term Memory, Neural Computation 9 (1997); Arjovsky, Shah, Bengio,
        arXiv:1511.06464, section 4.1. *Deviations*: only the copy counts in the loss.
    """

    def __init__(
        self,
        *,
        delay: int = 10,
        string_length: int = 5,
        symbols: int = 8,
        samples: int = 5_000,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_integers(1, delay=delay, string_length=string_length, batch_size=batch_size)
        check_integers(2, symbols=symbols)
        check_integers(10, samples=samples)
        check_integers(0, seed=seed)
        self.delay = delay
        self.string_length = string_length
        self.symbols = symbols
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self.parts: list[TensorDataset] = []

    @property
    def vocab_size(self) -> int:
        """Number of different tokens: the symbols, the blank and the request."""
        return self.symbols + 2

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002  # all stages come from one draw
        """Draw the sequences; the second time, do nothing."""
        if self.parts:
            return
        generator = torch.Generator().manual_seed(self.seed)
        string = torch.randint(2, self.symbols + 2, (self.samples, self.string_length), generator=generator)
        time = 2 * self.string_length + self.delay
        tokens = torch.zeros(self.samples, time, dtype=torch.int64)
        tokens[:, : self.string_length] = string
        tokens[:, self.string_length + self.delay - 1] = 1
        target = torch.full_like(tokens, IGNORED_TARGET)
        target[:, -self.string_length :] = string
        self.parts = in_order(tokens, target)

    def train_dataloader(self) -> ResumableLoader:
        """Return the shuffled training batches."""
        return training_loader(self.parts[0], batch_size=self.batch_size, seed=self.seed)

    def val_dataloader(self) -> DataLoader:
        """Return the validation batches."""
        return evaluation_loader(self.parts[1], batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """Return the test batches."""
        return evaluation_loader(self.parts[2], batch_size=self.batch_size)
