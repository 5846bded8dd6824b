"""What layers read and a model returns on probes, and whether two models agree in it."""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_accel.projection.shrink.keep_state import keep_state
from lightning_accel.projection.shrink.nested import tensors_in, with_tensors
from lightning_accel.projection.shrink.probes import Inputs

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PRUNABLE = (nn.Linear, *CONVOLUTIONS)
_ROWS = 4096  # of a layer's input that are kept for a comparison
_SAME = 1e-6  # relative difference up to which a channel counts as constant
_INSIDE = 10.0  # times the tolerance of outputs is that of what layers read: some of it cancels later
_SMALLEST = 1e-3  # scale of what layers read, at least: differences of what is all but zero are rounding


@dataclass(frozen=True)
class Reading:
    """What one layer read in one call.

    Attributes:
        low: ``(channels,)``, the smallest value at any place of any sample.
        high: As ``low``, the largest.
        rows: ``(rows, channels)``, some of all places and samples.
    """

    low: Tensor
    high: Tensor
    rows: Tensor

    def constant(self) -> Tensor:
        """Return boolean ``(channels,)``: whether a channel is the same everywhere."""
        return self.high - self.low <= _SAME * torch.maximum(self.high.abs(), self.low.abs())


@dataclass(frozen=True)
class Run:
    """One forward pass.

    Attributes:
        outputs: All tensors of the output.
        readings: Of linear and convolution layers, by module name; not of those that were called twice.
        called: Names of all modules that were called.
    """

    outputs: list[Tensor]
    readings: Mapping[str, Reading]
    called: frozenset[str]


def forward(model: nn.Module, inputs: Inputs) -> object:
    """Call the model on copies of the inputs, without a trace: gradients are off unless it needs them itself."""
    args, kwargs = with_tensors(inputs, lambda x: x.detach().clone().requires_grad_(x.requires_grad))
    with keep_state(model):
        try:
            with torch.no_grad():
                return model(*args, **kwargs)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
    args, kwargs = with_tensors(inputs, lambda x: x.detach().clone().requires_grad_(x.requires_grad))
    with keep_state(model), torch.enable_grad():
        return model(*args, **kwargs)


def look(model: nn.Module, inputs: Inputs) -> Run:
    """Run ``model`` and note what its layers read."""
    readings: dict[str, Reading] = {}
    calls: dict[str, int] = {}
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        names.setdefault(module, name)

    def note(module: nn.Module, arguments: tuple[object, ...], named: dict[str, object]) -> None:
        name = names[module]
        calls[name] = calls.get(name, 0) + 1
        x = arguments[0] if arguments else named.get("input")
        if isinstance(module, PRUNABLE) and isinstance(x, Tensor) and x.numel() and x.is_floating_point():
            readings[name] = _reading(module, x.detach())

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in names if _can_be_hooked(module)]
    try:
        outputs = [x.detach().clone() for x in tensors_in(forward(model, inputs))]
    finally:
        for handle in handles:
            handle.remove()
    return Run(outputs, {n: r for n, r in readings.items() if calls[n] == 1}, frozenset(calls))


def idle_modules(model: nn.Module, inputs: Inputs, called: Set[str]) -> list[str]:
    """Return modules with parameters that take no part: they are not called, and no output depends on them."""
    args, kwargs = with_tensors(inputs, lambda x: x.detach().clone())
    owners = [(name, m) for name, m in model.named_modules() if name not in called and m._parameters]
    parameters = {p for _, m in owners for p in m._parameters.values() if p is not None and p.requires_grad}
    used: set[Tensor] = set()
    try:
        with keep_state(model), torch.enable_grad():
            outputs = [x.abs().sum() for x in tensors_in(model(*args, **kwargs)) if x.grad_fn is not None]
            if parameters and outputs:
                listed = list(parameters)
                found = torch.autograd.grad(outputs, listed, allow_unused=True)
                used = {p for p, gradient in zip(listed, found, strict=True) if gradient is not None}
    except Exception:  # of a model that can not be run with gradients: then what is not called counts as idle
        used = set()
    return [name for name, m in owners if not used & {p for p in m._parameters.values() if p is not None}]


def output_difference(before: Run, after: Run) -> float:
    """Return the largest difference of outputs, relative to the largest of each; infinite where shapes differ."""
    if len(before.outputs) != len(after.outputs):
        return math.inf
    return max([0.0, *(difference(a, b) for a, b in zip(before.outputs, after.outputs, strict=True))])


def reading_difference(before: Run, after: Run, gone: Mapping[str, Tensor]) -> tuple[str, float]:
    """Return the layer whose input differs most, and by how much.

    Args:
        before: Of the larger model.
        after: Of the smaller one.
        gone: Input channels that layers read no more, by module name.
    """
    worst = "", 0.0
    for name, was in before.readings.items():
        now = after.readings.get(name)
        if now is None:
            return name, math.inf
        rows = was.rows
        if name in gone:
            keep = torch.ones(rows.shape[1], dtype=torch.bool, device=rows.device)
            keep[gone[name].to(rows.device)] = False
            rows = rows[:, keep]
        off = difference(rows, now.rows, smallest=_SMALLEST) / _INSIDE
        if off > worst[1]:
            worst = name, off
    return worst


def difference(expected: Tensor, actual: Tensor, *, smallest: float = 0.0) -> float:
    """Return the largest difference of entries, relative to the largest finite entry of the first.

    Entries that are infinite or NaN must be so in both; integers and booleans must be equal.
    """
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return math.inf
    if not expected.numel():
        return 0.0
    if expected.is_complex():
        expected, actual = torch.view_as_real(expected), torch.view_as_real(actual)
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, actual) else math.inf
    actual = actual.to(expected.device)
    same = (expected == actual) | (expected.isnan() & actual.isnan())
    gap = (expected - actual).abs().masked_fill(same, 0.0)
    scale = expected.abs().masked_fill(~expected.isfinite(), 0.0).max()
    off = float(gap.max()) / max(float(scale), smallest, torch.finfo(expected.dtype).tiny)
    return off if math.isfinite(off) else math.inf


def channels_last(module: nn.Module, x: Tensor) -> Tensor:
    """View what a layer reads as ``(places, channels)``."""
    if isinstance(module, CONVOLUTIONS):
        x = x.movedim(-(module.weight.dim() - 1), -1)
    return x.reshape(-1, x.shape[-1])


def some_rows(rows: Tensor) -> Tensor:
    """Return all of a few rows, and some of many: the same of each tensor of that length."""
    if len(rows) <= _ROWS:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, _ROWS, device=rows.device, dtype=torch.float64).long()]


def constants(runs: Sequence[Run], name: str, own: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a layer reads in channels ``own``, and whether that is the same at every place of every probe."""
    values, steady = own.new_zeros(len(own), dtype=torch.float32), torch.ones_like(own, dtype=torch.bool)
    for i, run in enumerate(runs):
        reading = run.readings.get(name)
        if reading is None:
            return values, torch.zeros_like(steady)
        first = reading.rows[0, own.to(reading.rows.device)].cpu()
        if i == 0:
            values = first
        steady &= reading.constant().cpu()[own] & ((first - values).abs() <= _SAME * values.abs())
    return values, steady


def _reading(module: nn.Module, x: Tensor) -> Reading:
    rows = channels_last(module, x)
    return Reading(rows.amin(0), rows.amax(0), some_rows(rows).clone())


def _can_be_hooked(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule)
