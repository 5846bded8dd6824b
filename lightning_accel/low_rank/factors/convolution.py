"""Factored convolutions: a kernel to few channels and a 1x1 one, or 1x1, core, 1x1 (Tucker-2)."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # torch's own custom

from lightning_accel.low_rank.factors.factored import (
    DenseLayer,
    FactoredLayer,
    add_bias,
    check_sizes,
    is_low_rank,
    reset_factors,
)
from lightning_accel.low_rank.factors.pointwise import multiplies, pointwise

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class _FactoredConv(FactoredLayer):
    """What the two factored convolutions share: the settings of the dense layer and its padding."""

    own_attributes = (*FactoredLayer.own_attributes, "_padding_before", "_picks_positions")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        *,
        stride: Sequence[int] | None,
        padding: Sequence[int] | str,
        dilation: Sequence[int] | None,
        padding_mode: PaddingMode,
    ) -> None:
        super().__init__()
        dimensions = len(kernel_size)
        if dimensions not in (1, 2):
            raise ValueError(f"`kernel_size` must have 1 or 2 entries, got {dimensions}; keep other layers dense.")
        check_sizes(in_channels=in_channels, out_channels=out_channels)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = tuple(kernel_size)
        self.stride = tuple(stride) if stride is not None else (1,) * dimensions
        self.padding = padding if isinstance(padding, str) else tuple(padding)
        self.dilation = tuple(dilation) if dilation is not None else (1,) * dimensions
        self.padding_mode = padding_mode
        self._padding_before = _padding_for_pad(self.padding, self.kernel_size, self.dilation)
        self._picks_positions = math.prod(self.kernel_size) == 1 and not any(self._padding_before)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve with the dense layer's stride, padding and dilation."""
        padding: str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._padding_before, mode=self.padding_mode)
            padding = (0,) * len(self.kernel_size)
        if self._picks_positions and multiplies(x):
            picked = (
                x[..., :: self.stride[-1]] if len(self.stride) == 1 else x[..., :: self.stride[0], :: self.stride[1]]
            )
            return pointwise(picked.contiguous(), weight, bias)
        if len(self.kernel_size) == 1:
            return F.conv1d(x, weight, bias, self.stride, padding, self.dilation)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation)

    @property
    def ranks(self) -> tuple[int, ...]:
        """``(rank,)``, or ``(r1, r2)`` of a Tucker-2 layer: input and output channels of the core."""
        factor_in, core = self._parameters["factor_in"], self._parameters.get("core")
        assert factor_in is not None
        return (factor_in.shape[0],) if core is None else (core.shape[1], core.shape[0])

    @staticmethod
    def product(factors: Mapping[str, Tensor]) -> Tensor:
        """Multiply factors of this layer's shapes into the dense weight."""
        left, right = factors["factor_out"].flatten(1), factors["factor_in"].flatten(1)
        if "core" in factors:
            return torch.einsum("ob,ba...,ai->oi...", left, factors["core"], right)
        return (left @ right).view(left.shape[0], *factors["factor_in"].shape[1:])

    def dense_layer(self, weight: nn.Parameter) -> DenseLayer:
        """Return a dense layer of these settings with ``weight`` and this layer's bias and mode."""
        make = nn.Conv1d if len(self.kernel_size) == 1 else nn.Conv2d
        dense = make(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # type: ignore[arg-type]
            stride=self.stride,  # type: ignore[arg-type]
            padding=self.padding,  # type: ignore[arg-type]
            dilation=self.dilation,  # type: ignore[arg-type]
            padding_mode=self.padding_mode,
            bias=False,
            device="meta",
        )
        dense.weight, dense.bias = weight, self.bias
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """Show sizes, ranks and the dense layer's settings."""
        return (
            f"{self.in_channels}, {self.out_channels}, ranks={self.ranks}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, padding_mode={self.padding_mode}"
        )


class LowRankConv(_FactoredConv):
    """Apply a convolution (1-D or 2-D) as one to ``rank`` channels and a 1x1 convolution.

    Parameters: ``factor_in`` (rank, in, k[, k]), which carries stride, padding and dilation, ``factor_out``
    (out, rank, 1[, 1]), ``bias``.

    Args:
        in_channels: Channels of the input, >= 1.
        out_channels: Channels of the output, >= 1.
        kernel_size: Of the first convolution, 1 or 2 entries.
        rank: Channels in between, >= 1.
        stride: Of the dense layer, one entry a dimension.
        padding: Of the dense layer: one entry a dimension, ``"same"`` or ``"valid"``.
        dilation: Of the dense layer.
        padding_mode: As in `torch.nn.Conv2d`.
        bias: Whether a bias is added.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: If a size or the rank is below 1, or the kernel has other than 1 or 2 dimensions.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_accel.low_rank import LowRankConv, factorize
        >>> layer = factorize(nn.Conv2d(16, 32, 3, padding=1), (8,))
        >>> isinstance(layer, LowRankConv), layer(torch.randn(1, 16, 8, 8)).shape
        (True, torch.Size([1, 32, 8, 8]))
    """

    factor_names = ("factor_in", "factor_out")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        rank: int,
        *,
        stride: Sequence[int] | None = None,
        padding: Sequence[int] | str = "valid",
        dilation: Sequence[int] | None = None,
        padding_mode: PaddingMode = "zeros",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            padding_mode=padding_mode,
        )
        check_sizes(rank=rank)
        ones = (1,) * len(self.kernel_size)
        self.factor_in = nn.Parameter(torch.empty(rank, in_channels, *self.kernel_size, device=device, dtype=dtype))
        self.factor_out = nn.Parameter(torch.empty(out_channels, rank, *ones, device=device, dtype=dtype))
        add_bias(self, out_channels if bias else None, device, dtype)
        reset_factors(self, fan_in=in_channels * math.prod(self.kernel_size))

    @property
    def rank(self) -> int:
        """Rank of the product."""
        return self.factor_in.shape[0]

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Factor groups that take turns in freezing; the one whose weight gradient costs more stands first."""
        if self.in_channels * math.prod(self.kernel_size) > self.out_channels:
            return (("factor_in",), ("factor_out",))
        return (("factor_out",), ("factor_in",))

    def forward(self, input: Tensor) -> Tensor:
        """Map (batch, in, *spatial) to (batch, out, *spatial)."""
        if not is_low_rank(self):
            return type(self).forward(self, input)  # dense by now
        return pointwise(self._convolve(input, self.factor_in), self.factor_out, self.bias)


class TuckerConv(_FactoredConv):
    """Apply a k x k convolution (1-D or 2-D) as 1x1, k x k core, 1x1: the Tucker-2 form.

    Parameters: ``factor_in`` (r1, in, 1[, 1]), ``core`` (r2, r1, k[, k]), which carries stride, padding and dilation,
    ``factor_out`` (out, r2, 1[, 1]), ``bias``.

    Args:
        in_channels: Channels of the input, >= 1.
        out_channels: Channels of the output, >= 1.
        kernel_size: Of the core, 1 or 2 entries.
        ranks: ``(r1, r2)``: input and output channels of the core, >= 1.
        stride: Of the dense layer, one entry a dimension.
        padding: Of the dense layer: one entry a dimension, ``"same"`` or ``"valid"``.
        dilation: Of the dense layer.
        padding_mode: As in `torch.nn.Conv2d`.
        bias: Whether a bias is added.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: If a size or a rank is below 1, or the kernel has other than 1 or 2 dimensions.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_accel.low_rank import TuckerConv, factorize
        >>> layer = factorize(nn.Conv2d(16, 32, 3, padding=1), (4, 8))
        >>> isinstance(layer, TuckerConv), tuple(layer.core.shape)
        (True, (8, 4, 3, 3))
    """

    factor_names = ("factor_in", "core", "factor_out")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        ranks: tuple[int, int],
        *,
        stride: Sequence[int] | None = None,
        padding: Sequence[int] | str = "valid",
        dilation: Sequence[int] | None = None,
        padding_mode: PaddingMode = "zeros",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            padding_mode=padding_mode,
        )
        r1, r2 = ranks
        check_sizes(rank_in=r1, rank_out=r2)
        ones = (1,) * len(self.kernel_size)
        self.factor_in = nn.Parameter(torch.empty(r1, in_channels, *ones, device=device, dtype=dtype))
        self.core = nn.Parameter(torch.empty(r2, r1, *self.kernel_size, device=device, dtype=dtype))
        self.factor_out = nn.Parameter(torch.empty(out_channels, r2, *ones, device=device, dtype=dtype))
        add_bias(self, out_channels if bias else None, device, dtype)
        reset_factors(self, fan_in=in_channels * math.prod(self.kernel_size))

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Factor groups that take turns in freezing; the one whose weight gradients cost more stands first."""
        r1, r2 = self.ranks
        pointwise = self.in_channels * r1 * math.prod(self.stride) + self.out_channels * r2
        core = r1 * r2 * math.prod(self.kernel_size)
        groups = (("factor_in", "factor_out"), ("core",))
        return groups if pointwise > core else groups[::-1]

    def forward(self, input: Tensor) -> Tensor:
        """Map (batch, in, *spatial) to (batch, out, *spatial)."""
        if not is_low_rank(self):
            return type(self).forward(self, input)  # dense by now
        hidden = self._convolve(pointwise(input, self.factor_in), self.core)
        return pointwise(hidden, self.factor_out, self.bias)


def _padding_for_pad(padding: tuple[int, ...] | str, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Return padding as `F.pad` wants it: last dimension first, both sides (``same`` puts the odd one right)."""
    sides: list[tuple[int, int]] = []
    for axis, size in enumerate(kernel):
        if padding == "same":
            total = dilation[axis] * (size - 1)
            sides.append((total // 2, total - total // 2))
        elif isinstance(padding, str):
            sides.append((0, 0))
        else:
            sides.append((padding[axis], padding[axis]))
    return [width for side in reversed(sides) for width in side]
