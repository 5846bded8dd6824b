"""Compression of pushes: what of a gradient goes over the wire, and how the rest is kept for the next push."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_accel.arguments import check_choice, check_number

CompressionName = Literal["none", "fp16", "int8", "topk"]
COMPRESSIONS: tuple[str, ...] = get_args(CompressionName)


@dataclass(frozen=True)
class Compression:
    """Write a gradient into raw bytes and read it back.

    ``none`` keeps every bit. ``fp16`` rounds to half precision (saturating). ``int8`` rounds to 255 levels of the
    largest magnitude. ``topk`` keeps the largest ``kept`` of the elements, by magnitude, with their places.

    Args:
        name: One of `COMPRESSIONS`.
        kept: Fraction of the elements that ``topk`` keeps, in (0, 1].

    Raises:
        ValueError: If ``name`` is unknown or ``kept`` out of range.

    Example:
        >>> from lightning_accel.async_sgd import Compression
        >>> Compression("topk", kept=0.01).kept
        0.01
    """

    name: CompressionName = "none"
    kept: float = 0.01

    def __post_init__(self) -> None:
        check_choice("compression", self.name, COMPRESSIONS)
        check_number("kept", self.kept, above=0.0, at_most=1.0)

    def nbytes(self, numel: int, dtype: torch.dtype) -> int:
        """Return how many bytes the gradient of a tensor of ``numel`` elements takes."""
        if self.name == "fp16":
            return 2 * numel
        if self.name == "int8":
            return 8 + numel
        if self.name == "topk":
            return 8 * self._count(numel) + dtype.itemsize * self._count(numel)
        return numel * dtype.itemsize

    def write(self, gradient: Tensor, area: Tensor) -> None:
        """Encode ``gradient`` (any shape) into ``area`` (uint8, ``nbytes`` long)."""
        flat = gradient.detach().reshape(-1)
        if self.name == "none":
            area.view(flat.dtype).copy_(flat)
        elif self.name == "fp16":
            area.view(torch.float16).copy_(flat.clamp(-65504.0, 65504.0))
        elif self.name == "int8":
            scale = flat.abs().amax().double().cpu() / 127.0 if flat.numel() else torch.tensor(0.0)
            area[:8].view(torch.float64).copy_(scale)
            levels = (flat / scale.to(flat)).round_() if scale > 0 else flat
            area[8:].view(torch.int8).copy_(levels)
        else:
            count = self._count(flat.numel())
            places = flat.abs().topk(count, sorted=False).indices
            area[: 8 * count].view(torch.int64).copy_(places)
            area[8 * count :].view(flat.dtype).copy_(flat[places])

    def read(self, area: Tensor, *, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Decode ``area`` into a tensor of the given shape; with ``none`` it is a view of ``area``, no copy."""
        if self.name == "none":
            return area.view(dtype).view(shape)
        if self.name == "fp16":
            return area.view(torch.float16).to(dtype).view(shape)
        if self.name == "int8":
            return area[8:].view(torch.int8).to(dtype).mul_(float(area[:8].view(torch.float64))).view(shape)
        count = self._count(math.prod(shape))
        dense = torch.zeros(math.prod(shape), dtype=dtype)
        dense[area[: 8 * count].view(torch.int64)] = area[8 * count :].view(dtype)
        return dense.view(shape)

    def _count(self, numel: int) -> int:
        return max(1, math.ceil(self.kept * numel)) if numel else 0


class ErrorFeedback:
    """Add to each gradient what compression took from the earlier ones of the same tensor.

    ``write`` sends ``C(g + e)`` and keeps ``e = (g + e) - C(g + e)``, so that nothing is lost, only late.

    References:
        Karimireddy et al., arXiv:1901.09847, algorithm 2.
    """

    def __init__(self, compression: Compression) -> None:
        self._compression = compression
        self._errors: dict[int, Tensor] = {}

    def write(self, key: int, gradient: Tensor, area: Tensor) -> None:
        """Encode the gradient of tensor number ``key`` into ``area``."""
        if self._compression.name == "none":
            self._compression.write(gradient, area)
            return
        host = gradient.detach().to("cpu", copy=True)
        if key in self._errors:
            host += self._errors[key]
        self._compression.write(host, area)
        self._errors[key] = host - self._compression.read(area, shape=host.shape, dtype=host.dtype)

    def sent(self, key: int, gradient: Tensor) -> Tensor:
        """Return what arrives of the gradient of tensor number ``key``: the same as if it was written and read."""
        area = torch.empty(self._compression.nbytes(gradient.numel(), gradient.dtype), dtype=torch.uint8)
        self.write(key, gradient, area)
        return self._compression.read(area, shape=gradient.shape, dtype=gradient.dtype)
