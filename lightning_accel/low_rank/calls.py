"""What a layer gets to see in a real batch: input shapes, types and second moments, learnt by hooks."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

RunBatch = Callable[[Any], object]
"""Runs one real batch through the model it is given; what it returns is ignored."""


@dataclass(frozen=True)
class LayerCall:
    """How a layer is called.

    Attributes:
        shape: Of the input.
        dtype: Of the input, before autocast.
        needs_grad: Whether the input asks for a gradient; the first layer's does not.
        autocast: Type that autocast computes in, or None.
        channels_last: Whether the input lies in channels-last order.
        calls: How often the layer ran in the batch.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    needs_grad: bool
    autocast: torch.dtype | None
    channels_last: bool
    calls: int


def record_calls(model: nn.Module, layers: Mapping[str, nn.Module], run_batch: RunBatch) -> dict[str, LayerCall]:
    """Run one batch and return how each layer was called; layers that never ran are missing.

    A layer that sees several shapes is represented by the one that makes up most of its input. Hooks are removed
    afterwards; whatever else the batch changes is for the caller to protect (`lightning_accel.measure.undisturbed`).
    """
    seen: defaultdict[str, Counter[LayerCall]] = defaultdict(Counter)

    def note(name: str, x: Tensor) -> None:
        device = x.device.type
        call = LayerCall(
            shape=tuple(x.shape),
            dtype=x.dtype,
            needs_grad=x.requires_grad if torch.is_grad_enabled() else True,
            autocast=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
            channels_last=x.dim() == 4 and not x.is_contiguous() and _is_channels_last(x),
            calls=1,
        )
        seen[name][call] += 1

    _run_hooked(model, layers, run_batch, note)
    result: dict[str, LayerCall] = {}
    for name, counter in seen.items():
        main = max(counter, key=lambda call: counter[call] * torch.Size(call.shape).numel())
        result[name] = LayerCall(
            main.shape, main.dtype, main.needs_grad, main.autocast, main.channels_last, counter.total()
        )
    return result


def input_second_moments(
    model: nn.Module, layers: Mapping[str, nn.Module], run_batch: RunBatch, *, shrink: bool = False
) -> dict[str, Tensor]:
    """Return the mean of ``x x^T`` over the inputs (or input channels) of each layer that ran, (in, in), float64.

    For a convolution the mean runs over batch and positions of the input. Call ``run_batch`` on several batches by
    looping inside it.

    Args:
        model: Runs in ``run_batch``.
        layers: Name to layer of ``model``.
        run_batch: Runs one batch or several.
        shrink: Return an estimate for inputs that were not seen, too: of fewer rows than channels the mean knows
            nothing in most directions, and what is decomposed by it forgets them. It is drawn towards a multiple of the
            identity, the more the fewer rows there are (oracle-approximating shrinkage, Chen, Wiesel, Eldar, Hero,
            IEEE Transactions on Signal Processing 58(10), 2010). *Deviation*: rows are counted as independent,
            and no mean is taken off.
    """
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()

    def note(name: str, x: Tensor) -> None:
        layer, channels = layers[name], -1
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            channels = 1 if x.dim() == layer.weight.dim() else 0  # a convolution also takes input without a batch
        rows = x.detach().movedim(channels, -1).flatten(0, -2).double()
        sums[name] = sums.get(name, 0.0) + rows.T @ rows
        counts[name] += rows.shape[0]

    _run_hooked(model, layers, run_batch, note)
    moments = {name: total / max(1, counts[name]) for name, total in sums.items()}
    return {name: _shrunk(moment, counts[name]) for name, moment in moments.items()} if shrink else moments


def _shrunk(moment: Tensor, rows: int) -> Tensor:
    """Return the second moment (p, p) of ``rows`` rows, drawn towards the identity times its mean eigenvalue."""
    p = moment.shape[0]
    trace, squares = float(moment.trace()), float(moment.square().sum())
    spread = squares - trace**2 / p  # how far it is from a multiple of the identity
    if rows == 0 or spread <= 0.0 or not math.isfinite(spread):
        return moment
    share = min(1.0, ((1.0 - 2.0 / p) * squares + trace**2) / ((rows + 1.0 - 2.0 / p) * spread))
    target = torch.eye(p, dtype=moment.dtype, device=moment.device) * (trace / p)
    return moment.lerp(target, share)


def _run_hooked(
    model: nn.Module, layers: Mapping[str, nn.Module], run_batch: RunBatch, note: Callable[[str, Tensor], None]
) -> None:
    def hook_for(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input")
            if isinstance(x, Tensor) and x.is_floating_point():
                note(name, x)

        return hook

    handles = [layer.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        run_batch(model)
    finally:
        for handle in handles:
            handle.remove()


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)
