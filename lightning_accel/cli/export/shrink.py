"""What ``export`` does about groups of zeros, and how fast the model was before and is after."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_accel.cli.errors import UsageError
from lightning_accel.measure import compare_paired, time_interleaved
from lightning_accel.projection import Shrunk
from lightning_accel.projection.shrink import shrink
from lightning_accel.projection.training.targets import find_targets

ZERO_GROUPS = (None, "remove", "keep")
_ROUNDS = 15  # timed forward passes of each model


def check_zero_groups(zero_groups: str | None, file_format: str) -> None:
    """Refuse a setting that is out of range, or that the format can not hold.

    Raises:
        UsageError: If so.
    """
    if zero_groups not in ZERO_GROUPS:
        raise UsageError(f"`zero_groups` must be remove, keep or null, got {zero_groups}.")
    if zero_groups == "remove" and file_format == "checkpoint":
        raise UsageError(
            "A plain checkpoint has the shapes of its class: zero_groups=remove needs format=torch_export or onnx, "
            "which hold the smaller computation, too."
        )


def remove_zero_groups(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    zero_groups: str | None,
    file_format: str,
    say: Callable[[str], None],
) -> Shrunk | None:
    """Shrink a copy of ``model``; ``None`` where there is nothing to remove, or it is to stay.

    Args:
        model: In ``eval`` mode.
        args: Of its ``forward``.
        kwargs: Named ones.
        zero_groups: ``"remove"``, ``"keep"``, or ``None`` to remove where the format can hold it.
        file_format: To be written.
        say: Gets what was done, a line a call.

    Raises:
        UsageError: If groups are to be removed and torch-pruning is not installed.
    """
    rows, columns = (_zero_groups(model, dim) for dim in (0, 1))
    if not rows and not columns:
        return None
    found = f"{rows:,} zero rows and {columns:,} zero columns of weights"
    if zero_groups == "keep" or file_format == "checkpoint":
        why = "zero_groups=keep" if zero_groups == "keep" else "format=torch_export or onnx removes them"
        say(f"{found} stay: {why}.")
        return None
    try:
        small = shrink(model, args, example_kwargs=kwargs)
    except ImportError as error:
        if zero_groups == "remove":
            raise UsageError(str(error)) from None
        say(f"{found} stay: {error}")
        return None
    gone = small.parameters_before - small.parameters_after
    say(f"{found}: {gone:,} parameters removed.")
    if small.features is not None:
        say(f"It reads {len(small.features):,} of {small.features_before:,} input features.")
    for layer, why in small.left.items():
        say(f"{layer} keeps its zeros: {why}.")
    return small


def write_kept(small: Shrunk, path: Path) -> None:
    """Write as JSON which channels and input features are left, by their indices in the original model."""
    kept = {name: index.tolist() for name, index in small.kept.items()}
    features = None if small.features is None else small.features.tolist()
    text = json.dumps({"input_features": features, "output_channels": kept, "left": small.left})
    path.write_text(text + "\n", encoding="utf-8")


def report_speed(before: Callable[..., object], after: Callable[..., object], inputs: tuple[Any, ...]) -> str:
    """Time both in turns and say how fast a forward pass was and is."""
    with torch.inference_mode():
        times = time_interleaved(
            {"before": lambda: before(*inputs), "after": lambda: after(*inputs)}, rounds=_ROUNDS, warmup=3
        )
    ratio = compare_paired(times["before"], times["after"])
    was, now = (1e3 * sorted(times[name])[_ROUNDS // 2] for name in ("before", "after"))
    sizes = {x.shape[0] for x in inputs if isinstance(x, torch.Tensor) and x.dim()}
    batch = f" of {sizes.pop()} samples" if len(sizes) == 1 else ""
    return (
        f"A forward pass{batch} took {was:.3g} ms and takes {now:.3g} ms here: {ratio.median:.2f} times as fast "
        f"[{ratio.low:.2f}, {ratio.high:.2f}], {ratio.verdict}."
    )


def _zero_groups(model: nn.Module, dim: int) -> int:
    weights = (t.view() for t in find_targets(model))
    return sum(int((w == 0).transpose(0, dim).flatten(1).all(1).sum()) for w in weights)
