"""The help texts of CPython as a character corpus."""

from importlib import import_module

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.zoo.arguments import check_integers
from lightning_accel.zoo.data.loading import ResumableLoader, evaluation_loader, training_loader

# The corpus differs between releases of Python; a fixed alphabet keeps models exchangeable. Token 96 is any other.
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
VOCAB_SIZE = len(ALPHABET) + 1


def encode(text: str) -> Tensor:
    """Return the tokens (characters,) int64 of ``text``; whatever is not printable ASCII becomes the last token."""
    index = {character: token for token, character in enumerate(ALPHABET)}
    return torch.tensor([index.get(character, VOCAB_SIZE - 1) for character in text], dtype=torch.int64)


def decode(tokens: Tensor) -> str:
    """Return the text of ``tokens`` (characters,); the last token reads as U+FFFD."""
    return "".join((ALPHABET + "\N{REPLACEMENT CHARACTER}")[token] for token in tokens.tolist())


class Topics(LightningDataModule):
    """About 460,000 characters of English and Python: the texts that ``help()`` shows; every CPython ships them.

    A batch is ``(tokens, next_tokens)``, both (batch, length) int64, from ``VOCAB_SIZE`` = 97 different ones. The
    first 90 % of the text train, the next 5 % validate, the last 5 % test. Windows do not overlap.

    Args:
        length: Characters a sequence.
        batch_size: Sequences a batch; the last, short batch of training is dropped.
        seed: Chooses the order of training.

    Raises:
        ValueError: If an argument is out of range.
        ModuleNotFoundError: In ``prepare_data``, on a Python that ships without ``pydoc_data``.
    """

    vocab_size = VOCAB_SIZE

    def __init__(self, *, length: int = 128, batch_size: int = 32, seed: int = 0) -> None:
        super().__init__()
        check_integers(1, length=length, batch_size=batch_size)
        check_integers(0, seed=seed)
        if length > 10_000:
            raise ValueError(f"`length` must be <= 10000 for 5 % of the text to hold two sequences, got {length}.")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.parts: list[TensorDataset] = []

    def prepare_data(self) -> None:
        """Check that the corpus is there.

        Raises:
            ModuleNotFoundError: If it is not.
        """
        try:
            import_module("pydoc_data.topics")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "This Python ships without `pydoc_data.topics`, the corpus of `data=topics`. Use a full CPython, or "
                "choose `data=copy`."
            ) from error

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002  # all stages come from one text
        """Encode and cut into windows; the second time, do nothing."""
        if self.parts:
            return
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
        tokens = encode("\n".join(topics[name] for name in sorted(topics)))
        val, test = int(0.9 * len(tokens)), int(0.95 * len(tokens))
        for text in (tokens[:val], tokens[val:test], tokens[test:]):
            windows = (len(text) - 1) // self.length
            x = text[: windows * self.length].view(windows, self.length)
            target = text[1 : windows * self.length + 1].view(windows, self.length)
            self.parts.append(TensorDataset(x, target))

    def train_dataloader(self) -> ResumableLoader:
        """Return the shuffled training batches."""
        return training_loader(self.parts[0], batch_size=self.batch_size, seed=self.seed)

    def val_dataloader(self) -> DataLoader:
        """Return the validation batches."""
        return evaluation_loader(self.parts[1], batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """Return the test batches."""
        return evaluation_loader(self.parts[2], batch_size=self.batch_size)
