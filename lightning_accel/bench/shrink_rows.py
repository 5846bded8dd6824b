"""Models with zero rows against the same models after `shrink`: parameters and time of inference."""

import copy
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from lightning_accel.evidence.rows import BenchRow
from lightning_accel.measure import compare_paired, time_interleaved
from lightning_accel.projection import Shrunk, project_l1inf, radius_for_sparsity
from lightning_accel.projection.shrink import shrink
from lightning_accel.projection.training.targets import find_targets
from lightning_accel.zoo.models.autoencoder import SupervisedAutoencoder
from lightning_accel.zoo.models.mlp import MLP
from lightning_accel.zoo.models.resnet import ResNet18
from lightning_accel.zoo.models.vit import ViT

_TARGETS = {0.5: 2.0, 0.9: 5.0}  # of the MLP


def shrink_rows(*, width: int, pairs: int, device: str, clock: Callable[[], float]) -> Iterator[BenchRow]:
    """Yield a row for each model of the zoo and each part of zero rows.

    Args:
        width: Hidden units a layer of the MLP.
        pairs: Timed forward passes of each model.
        device: To run on.
        clock: Returns seconds.
    """
    cases: tuple[tuple[str, Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]], ...] = (
        (f"MLP width {width}, batch 256", lambda: MLP(in_features=64, width=width), (256, 64), ("head",)),
        ("ResNet-18 width 64, 32x32, batch 16", ResNet18, (16, 3, 32, 32), ("fc",)),
        ("ViT d384, batch 16", ViT, (16, 3, 32, 32), ("head",)),
        (
            "autoencoder 1000-100-2-100-1000, batch 256",
            lambda: SupervisedAutoencoder(in_features=1_000),
            (256, 1_000),
            ("encoder.2", "decoder.2"),
        ),
    )
    for case, make, shape, outputs in cases:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        torch.manual_seed(0)
        model = make().to(device).eval()
        for sparsity, target in _TARGETS.items():
            sparse = with_zero_rows(model, sparsity, outputs)
            small = shrink(sparse, x)
            variant, baseline = f"shrunk, {sparsity:.0%} zero rows", "with zeros"
            with torch.inference_mode():
                seconds = time_interleaved(
                    {baseline: partial(sparse, x), variant: partial(small.model, x)},
                    rounds=pairs,
                    warmup=2,
                    device=device,
                    clock=clock,
                )
            yield BenchRow(
                suite="projection",
                case=f"{case}, inference",
                variant=variant,
                baseline=baseline,
                ratio=compare_paired(seconds[baseline], seconds[variant]),
                seconds={name: statistics.median(values) for name, values in seconds.items()},
                target=target if isinstance(model, MLP) else None,
                note=describe(small),
            )


def with_zero_rows(model: nn.Module, sparsity: float, outputs: tuple[str, ...]) -> nn.Module:
    """Return a copy of ``model`` whose layers, except ``outputs``, were projected to a fraction of zero rows."""
    sparse = copy.deepcopy(model)
    for found in find_targets(sparse):
        if found.name.removesuffix(".weight") not in outputs:
            weight: Tensor = found.view()
            project_l1inf(weight, radius_for_sparsity(weight, sparsity), out=weight)
    return sparse


def describe(small: Shrunk) -> str:
    """Say what was removed, and how far the outputs are off."""
    return (
        f"{small.parameters_before:,} -> {small.parameters_after:,} parameters; outputs differ by "
        f"{small.largest_difference:.0e}"
    )
