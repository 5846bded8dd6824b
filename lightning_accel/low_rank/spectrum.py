"""Tell trained weights from random ones by their singular values."""

import torch
from torch import nn

from lightning_accel.low_rank.eligibility import eligible_layers, lazy

_CROP = 192  # rows and columns that are looked at: enough to tell, milliseconds to compute
_MARGIN = 1.15


@torch.no_grad()
def looks_untrained(model: nn.Module) -> bool:
    r"""Say whether no weight that could be factored has a singular value beyond those of independent entries.

    The largest singular value of an m x n matrix of independent entries of variance s^2 is close to
    ``s (sqrt(m) + sqrt(n))``, whatever their distribution; training soon lifts some out of that bulk. Decomposing
    random weights throws away what training has yet to need: at a quarter of the rank they keep about 62 % of their
    energy.

    Args:
        model: Not changed. Without layers that can be factored the answer is False, as it is for weights that are zero
            or not finite; where there are only lazy ones, whose weights are still to be drawn, it is True.

    References:
        Marchenko, Pastur, 1967 (the edge of the bulk); Baik, Ben Arous, Peche, math/0403022 (values that leave it).
    """
    layers, skipped = eligible_layers(model)
    edges = [edge for layer in layers.values() if (edge := _edge(layer.weight)) is not None]
    return max(edges) < _MARGIN if edges else not layers and lazy(skipped)


def _edge(weight: torch.Tensor) -> float | None:
    """Return the largest singular value over that of independent entries; None where there is nothing to tell."""
    crop = weight.detach().flatten(1)[:_CROP, :_CROP].float().cpu()
    scale = float(crop.square().mean().sqrt())
    if min(crop.shape) < 4 or not bool(torch.isfinite(crop).all()) or scale == 0.0:
        return None
    rows, columns = crop.shape
    return float(torch.linalg.svdvals(crop)[0]) / (scale * (rows**0.5 + columns**0.5))
