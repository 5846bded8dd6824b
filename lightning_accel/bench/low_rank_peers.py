"""The published rule that the low-rank suite is compared with."""

import copy
import math

import torch
from torch import nn

from lightning_accel.low_rank import eligible_layers
from lightning_accel.low_rank.decompose import swap

_MIN_CHANNELS, _MIN_FEATURES = 256, 256
_LATENT_CHANNELS, _LATENT_FEATURES = 0.25, 128


def mac_guarded(model: nn.Module) -> tuple[nn.Module, float]:
    """Return a copy factorized by the published rule of Composer's Factorize with its defaults, and its mean energy.

    Linear layers of at least 256 features on both sides get 128 latent features; convolutions of at least 256 channels
    on both sides become a k x k convolution to a quarter of the channels and a 1x1 convolution. A layer is replaced
    only if that lowers its multiply-adds; nothing is measured. Written anew from the rule's documentation.

    Returns:
        The model, and the mean retained energy over all layers that could be factored (1 for those left dense).
    """
    changed = copy.deepcopy(model)
    layers, _ = eligible_layers(changed)
    energies: list[float] = []
    for name, dense in layers.items():
        out, fan_in, *kernel = dense.weight.shape
        linear = isinstance(dense, nn.Linear)
        rank = _LATENT_FEATURES if linear else int(_LATENT_CHANNELS * min(out, fan_in))
        columns = fan_in * math.prod(kernel)
        large = min(out, fan_in) >= (_MIN_FEATURES if linear else _MIN_CHANNELS)
        if isinstance(dense, nn.Conv1d) or not large or rank * (out + columns) >= out * columns:
            energies.append(1.0)
            continue
        with torch.no_grad():
            left, values, right = torch.linalg.svd(dense.weight.flatten(1), full_matrices=False)
        energies.append(float(values[:rank].square().sum() / values.square().sum()))
        first, second = _pair(dense, rank)
        root = values[:rank].sqrt()
        with torch.no_grad():
            first.weight.copy_((root[:, None] * right[:rank]).view_as(first.weight))
            second.weight.copy_((left[:, :rank] * root).view_as(second.weight))
        second.bias = dense._parameters["bias"]
        swap(changed, name, nn.Sequential(first, second))
    return changed, sum(energies) / len(energies)


def _pair(dense: nn.Linear | nn.Conv1d | nn.Conv2d, rank: int) -> tuple[nn.Linear | nn.Conv2d, nn.Linear | nn.Conv2d]:
    device, dtype = dense.weight.device, dense.weight.dtype
    if isinstance(dense, nn.Linear):
        return (
            nn.Linear(dense.in_features, rank, bias=False, device=device, dtype=dtype),
            nn.Linear(rank, dense.out_features, bias=False, device=device, dtype=dtype),
        )
    assert isinstance(dense, nn.Conv2d)
    first = nn.Conv2d(
        dense.in_channels,
        rank,
        dense.kernel_size,  # type: ignore[arg-type]
        stride=dense.stride,  # type: ignore[arg-type]
        padding=dense.padding,  # type: ignore[arg-type]
        dilation=dense.dilation,  # type: ignore[arg-type]
        bias=False,
        device=device,
        dtype=dtype,
    )
    return first, nn.Conv2d(rank, dense.out_channels, 1, bias=False, device=device, dtype=dtype)


def weight_parameters(model: nn.Module) -> int:
    """Count the parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
