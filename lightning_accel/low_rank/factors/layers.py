"""Factored layers: a linear map or a convolution as a chain of thinner ones.

Every layer names its factors (``factor_in``, ``core``, ``factor_out``), so that a state dict alone tells the structure.
A factor with ``requires_grad=False`` costs no weight gradient: autograd asks the kernels only for what is needed.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # torch's own custom

from lightning_accel.low_rank.factors.convolution import LowRankConv, TuckerConv
from lightning_accel.low_rank.factors.factored import (
    DenseLayer,
    FactoredLayer,
    add_bias,
    check_sizes,
    is_low_rank,
    reset_factors,
)

__all__ = ["LOW_RANK_TYPES", "LowRankConv", "LowRankLayer", "LowRankLinear", "TuckerConv"]


class LowRankLinear(FactoredLayer):
    """Apply ``y = U (V x) + b``, the product ``U V`` standing for a dense weight of rank at most ``rank``.

    Parameters: ``factor_in`` V of shape (rank, in_features), ``factor_out`` U of shape (out_features, rank), ``bias``.
    New layers are initialized so that the product is as large as `torch.nn.Linear` would make the dense weight.

    Args:
        in_features: Length of the last dimension of the input, >= 1.
        out_features: Length of the last dimension of the output, >= 1.
        rank: Columns of U and rows of V, >= 1.
        bias: Whether a bias is added.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: If a size or the rank is below 1.

    Example:
        >>> import torch
        >>> from lightning_accel.low_rank import LowRankLinear
        >>> layer = LowRankLinear(64, 32, 8)
        >>> layer(torch.randn(5, 64)).shape
        torch.Size([5, 32])
    """

    factor_names = ("factor_in", "factor_out")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(in_features=in_features, out_features=out_features, rank=rank)
        self.in_features = in_features
        self.out_features = out_features
        self.factor_in = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.factor_out = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        add_bias(self, out_features if bias else None, device, dtype)
        reset_factors(self, fan_in=in_features)

    @property
    def rank(self) -> int:
        """Rank of the product."""
        return self.factor_in.shape[0]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank as a tuple, alike for all factored layers."""
        return (self.rank,)

    @staticmethod
    def product(factors: Mapping[str, Tensor]) -> Tensor:
        """Multiply factors of this layer's shapes into the dense weight."""
        return factors["factor_out"] @ factors["factor_in"]

    def dense_layer(self, weight: nn.Parameter) -> DenseLayer:
        """Return a dense layer with ``weight`` and this layer's bias and mode."""
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight = weight
        dense.register_parameter("bias", self.bias)
        return dense.train(self.training)

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Factor groups that take turns in freezing; the one whose weight gradient costs more stands first."""
        if self.in_features > self.out_features:
            return (("factor_in",), ("factor_out",))
        return (("factor_out",), ("factor_in",))

    def forward(self, input: Tensor) -> Tensor:
        """Map (*, in_features) to (*, out_features)."""
        if not is_low_rank(self):
            return type(self).forward(self, input)  # dense by now
        return F.linear(F.linear(input, self.factor_in), self.factor_out, self.bias)

    def extra_repr(self) -> str:
        """Show sizes and rank."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


LOW_RANK_TYPES = (LowRankLinear, LowRankConv, TuckerConv)
LowRankLayer = LowRankLinear | LowRankConv | TuckerConv
