"""Compare a schedule with the plain loop: outputs, final states and every gradient, absent ones included."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_accel.recurrent.cell_step import Step, run_loop
from lightning_accel.recurrent.compiler.trace import CannotScheduleError, TensorSpec
from lightning_accel.recurrent.exactness.private_copy import private_copy

# A schedule as the comparison calls it: ``run(module, xs, states)`` with the module whose weights it takes.
Run = Callable[[nn.Module, Sequence[Tensor], Sequence[Tensor]], tuple[list[Tensor], list[Tensor]]]

_STEPS = 5
# Largest difference from the plain loop, relative to the largest value of the same tensor. For half precision the
# distance of both from float32 counts instead.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4}
_EPSILONS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_NEGLIGIBLE = 1e-4  # of the largest value of all: below that a tensor is compared absolutely


def verify_in_float64(
    run: Run, module: nn.Module, step: Step, xs: Sequence[TensorSpec], states: Sequence[TensorSpec]
) -> None:
    """Compare on random numbers in float64.

    Args:
        run: The schedule of ``module``.
        module: The cell, in float64; a copy that may be used up.
        step: One step of it.
        xs: One step's inputs.
        states: One step's states.

    Raises:
        CannotScheduleError: If they differ by more than 1e-9 of the largest value.
    """
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.stack([s.example(generator) for _ in range(_STEPS)]) for s in xs]
    start = [s.example(generator) for s in states]
    for tensor in (*inputs, *start):
        tensor.requires_grad_(tensor.dtype.is_floating_point)
    with torch.enable_grad():
        expected = _results(lambda m, x, s: run_loop(step, m, x, s), module, inputs, start)
        actual = _results(run, module, inputs, start)
    _compare(actual, expected, None, 0.0)


def verify_call(run: Run, module: nn.Module, step: Step, xs: Sequence[Tensor], states: Sequence[Tensor]) -> None:
    """Compare on the first steps of a real call: its batch size, precision, autocast and wanted gradients.

    Neither the module nor the random state of the process sees anything of it: a copy of the module runs, on copies of
    the tensors.

    Raises:
        CannotScheduleError: If they differ by more than the precision explains.
    """
    inputs = [_leaf(x, x.detach()[:_STEPS].clone()) for x in xs]
    start = [_leaf(s, s.detach().clone()) for s in states]
    twin = private_copy(module)

    def loop(module: nn.Module, xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return run_loop(step, module, xs, states)

    expected = _results(loop, twin, inputs, start)
    actual = _results(run, twin, inputs, start)
    device = inputs[0].device.type
    rounded = {r.dtype for r in (*expected, *twin.parameters()) if r is not None}
    if torch.is_autocast_enabled(device):
        rounded.add(torch.get_autocast_dtype(device))
    epsilon = max((_EPSILONS[kind] for kind in rounded & _EPSILONS.keys()), default=0.0)
    reference = None
    if epsilon:
        wide = copy.deepcopy(twin).float()
        with torch.autocast(device, enabled=False):
            reference = _results(loop, wide, [_widened(x) for x in inputs], [_widened(s) for s in start])
    _compare(actual, expected, reference, epsilon)


def _leaf(like: Tensor, value: Tensor) -> Tensor:
    return value.requires_grad_(like.requires_grad)


def _widened(tensor: Tensor) -> Tensor:
    wide = tensor.detach().float() if tensor.dtype in _EPSILONS else tensor.detach()
    return wide.requires_grad_(tensor.requires_grad)


def _results(run: Run, module: nn.Module, xs: Sequence[Tensor], states: Sequence[Tensor]) -> list[Tensor | None]:
    """Return outputs, final states and gradients of a number that depends on all of them."""
    ys, last = run(module, xs, states)
    results = [*ys, *last]
    smooth = [r for r in results if r.requires_grad]
    leaves = [t for t in (*xs, *states, *module.parameters()) if t.requires_grad]
    gradients: Sequence[Tensor | None] = ()
    if smooth and leaves:
        total = sum((k + 1.0) * _wide(r).cos().sum() for k, r in enumerate(smooth))
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)  # type: ignore[arg-type]
    wants = torch.tensor([float(r.requires_grad) for r in results])
    return [wants, *(r.detach() for r in results), *gradients]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _EPSILONS else tensor


def _compare(
    actual: Sequence[Tensor | None],
    expected: Sequence[Tensor | None],
    reference: Sequence[Tensor | None] | None,
    epsilon: float,
) -> None:
    if len(actual) != len(expected):
        raise CannotScheduleError("it has other results than the plain loop; please report this cell.")
    present = [e for e in expected if e is not None and e.numel()]
    largest = max((_largest(e) for e in present), default=0.0)
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if a is None or e is None:
            if a is not e:
                raise CannotScheduleError("it has a gradient where the plain loop has none, or none where it has one.")
            continue
        if a.shape != e.shape or a.dtype != e.dtype:
            raise CannotScheduleError(
                f"its result is {tuple(a.shape)}, {a.dtype}, the plain loop's {tuple(e.shape)}, {e.dtype}."
            )
        if not e.numel():
            continue
        scale = max(_largest(e), _NEGLIGIBLE * largest, torch.finfo(torch.float32).tiny)
        error = _difference(a, e) / scale
        allowed = _TOLERANCES.get(e.dtype, 0.0)
        wide = reference[k] if reference is not None and e.is_floating_point() else None
        if wide is not None:
            error = _difference(a, wide) / scale
            allowed = 3.0 * _difference(e, wide) / scale + 4.0 * epsilon
        if not error <= allowed:
            raise CannotScheduleError(
                f"its result differs from the plain loop's by {error:.1e}; please report this cell."
            )


def _largest(tensor: Tensor) -> float:
    finite = tensor.double()
    return float(finite.where(finite.isfinite(), torch.zeros_like(finite)).abs().max())


def _difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference; equal infinities and NaN in both places are none."""
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    off = (a - b).abs().where(~same, torch.zeros_like(a))
    return float(off.max()) if not off.isnan().any() else float("inf")
