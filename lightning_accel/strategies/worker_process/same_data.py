"""Workers that share out one order of the data must have the same data behind it."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset

from lightning_accel.async_sgd import ParameterStore

_SAMPLED = 256  # items of each tensor, array or list that are looked at; indices of a split are looked at as a whole
_DEPTH = 4  # datasets inside datasets
_KEY = "data"


def refuse_other_data(store: ParameterStore, dataset: Any) -> None:
    """Compare this worker's data with that of the worker which came first.

    Seeded random numbers are the same in all workers; a split that draws from `numpy.random.default_rng()` without a
    seed, or from the system, is another one in each, and some items would be trained on twice and others never.

    Raises:
        ValueError: If they differ.
    """
    mine = fingerprint(dataset).encode()
    if store.kv(_KEY, mine) != mine:
        raise ValueError(
            f"worker {store.worker} has other training data than the first worker: `setup` or the dataset draws random "
            "numbers that no seed rules (such as `numpy.random.default_rng()` without one). Seed them, so that every "
            "worker makes the same split."
        )


def fingerprint(dataset: Any) -> str:
    """Return what is the same for data that are the same, as far as they lie in memory.

    Looked at are the length, the indices of subsets, and tensors, arrays and lists that have one entry an item, up to
    four datasets deep; what is read when it is asked for (files) is not.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(dataset, _DEPTH):
        digest.update(part)
    return digest.hexdigest()


def _parts(dataset: Any, depth: int) -> Iterator[bytes]:
    try:
        length = len(dataset)
    except (TypeError, NotImplementedError):
        length = None
    yield f"{type(dataset).__qualname__} {length}".encode()
    if depth == 0 or length is None:
        return
    if isinstance(dataset, ConcatDataset):
        for inner in dataset.datasets:
            yield from _parts(inner, depth - 1)
        return
    for name, value in sorted(vars(dataset).items()) if hasattr(dataset, "__dict__") else ():
        if isinstance(value, Dataset):
            yield from _parts(value, depth - 1)
        elif name == "indices" and isinstance(value, Sequence):
            yield _indices(value)
        else:
            for column in value if isinstance(value, tuple) else (value,):  # such as `TensorDataset.tensors`
                yield from _column(column, length)


def _indices(value: Sequence[Any]) -> bytes:
    """Return what stands in an array of these; nothing of objects, which would be their addresses in this process."""
    try:
        found = np.asarray(value)
    except ValueError:  # rows of several lengths
        return b""
    return b"" if found.dtype.hasobject else found.tobytes()


def _column(column: Any, length: int) -> Iterator[bytes]:
    if length == 0 or not isinstance(column, (torch.Tensor, np.ndarray, list)):
        return
    if isinstance(column, list):
        if len(column) == length and all(isinstance(item, (int, float, str)) for item in column[:: _step(length)]):
            yield repr(column[:: _step(length)]).encode()
        return
    if not column.shape or column.shape[0] != length:
        return
    if isinstance(column, torch.Tensor):
        if column.layout == torch.strided and column.device.type == "cpu":
            yield column[:: _step(length)].detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif column.dtype != object:
        yield np.ascontiguousarray(column[:: _step(length)]).tobytes()


def _step(length: int) -> int:
    return max(1, length // _SAMPLED)
