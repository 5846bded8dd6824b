"""Tell trained weights from random ones by their singular values."""

import statistics

import torch
from torch import Tensor, nn

from lightning_accel.low_rank.eligibility import eligible_layers

_CROP = 192  # rows and columns that are looked at: enough to tell, milliseconds to compute
_MARGIN = 1.1


@torch.no_grad()
def looks_untrained(model: nn.Module) -> bool:
    """Say whether the weights that could be factored keep hardly more energy than random ones at a quarter of the rank.

    Independent entries keep about 62 % (square matrices), whatever their variance; trained weights have a few large
    singular values and keep more. Decomposing random weights throws information away that training has yet to need.

    Args:
        model: Not changed. Without layers that can be factored the answer is False.

    References:
        The share is that of the Marchenko-Pastur law, taken here from a random matrix of the same shape.
    """
    layers, _ = eligible_layers(model)
    generator = torch.Generator().manual_seed(0)
    gains = []
    for layer in layers.values():
        crop = layer.weight.detach().flatten(1)[:_CROP, :_CROP].float().cpu()
        if min(crop.shape) >= 4 and bool(torch.isfinite(crop).all()):
            noise = torch.randn(crop.shape, generator=generator)
            gains.append(_energy_of_quarter(crop) / _energy_of_quarter(noise))
    return bool(gains) and statistics.median(gains) < _MARGIN


def _energy_of_quarter(matrix: Tensor) -> float:
    squares = torch.linalg.svdvals(matrix).square()
    total = float(squares.sum())
    return float(squares[: max(1, len(squares) // 4)].sum()) / total if total > 0.0 else 1.0
