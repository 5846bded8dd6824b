"""The linear recurrence ``h_t = a_t * h_{t-1} + b_t`` as a work-efficient scan."""

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from lightning_accel.machine.c_functions import REALS, MachineCode, refusal
from lightning_accel.machine.toolchain import CannotCompileError
from lightning_accel.recurrent.compiler.emit_triton import scan_kernel
from lightning_accel.recurrent.exactness.plain_modes import surroundings

_STRETCH_ELEMENTS = 2**17
_COMPILED_ELEMENTS = 2**15
# `B` is the number of elements of a step.
_TEXT = """
#define ROW(name, k) real *const name = (real *)at[3 * k]; const int64_t t_##name = at[3 * k + 1];
void scan(int64_t n, int64_t B, const int64_t *at, product_t call) {
    ROW(h, 0) ROW(a, 1) ROW(b, 2) ROW(first, 3)
    for (int64_t t = 0; t < n; ++t) {
        const real *before = t ? h + (t - 1) * t_h : first, *at_ = a + t * t_a, *bt = b + t * t_b;
        real *ht = h + t * t_h;
#pragma omp simd
        for (int64_t k = 0; k < B; ++k) ht[k] = at_[k] * before[k] + bt[k];
    }
}
void scan_back(int64_t n, int64_t B, const int64_t *at, product_t call) {
    ROW(h, 0) ROW(a, 1) ROW(b, 2) ROW(first, 3)
    for (int64_t t = n - 1; t >= 0; --t) {
        const real *after = t < n - 1 ? h + (t + 1) * t_h : first, *at_ = a + t * t_a, *bt = b + t * t_b;
        real *ht = h + t * t_h;
#pragma omp simd
        for (int64_t k = 0; k < B; ++k) ht[k] = at_[k] * after[k] + bt[k];
    }
}
void scan_gradients(int64_t n, int64_t B, const int64_t *at, product_t call) {
    ROW(db, 0) ROW(da, 1) ROW(a, 2) ROW(g, 3) ROW(h, 4)
    for (int64_t t = n - 2; t >= 0; --t) {
        const real *after = db + (t + 1) * t_db, *at_ = a + (t + 1) * t_a, *gt = g + t * t_g, *ht = h + t * t_h;
        real *dbt = db + t * t_db, *dat = da + (t + 1) * t_da;
#pragma omp simd
        for (int64_t k = 0; k < B; ++k) {
            dbt[k] = at_[k] * after[k] + gt[k];
            dat[k] = after[k] * ht[k];
        }
    }
}
"""


def linear_scan(a: Tensor, b: Tensor, h0: Tensor | None = None) -> Tensor:
    """Compute ``h_t = a_t * h_{t-1} + b_t`` for all t, differentiable twice and more.

    Args:
        a: Coefficients, shape (T, ...), T >= 1; real or complex.
        b: Summands, shape of ``a``.
        h0: State before the first step, shape of ``a[0]``; zeros by default.

    Returns:
        All states, shape of ``a``. Where infinities or products of coefficients beyond the range of the type occur,
        they are those of the plain recurrence, step by step.

    Raises:
        ValueError: If ``a`` and ``b`` differ in shape, have no step, or ``h0`` is not of the shape of a step.

    References:
        Blelloch, "Prefix sums and their applications", 1990. *Deviations*: two levels of about sqrt(T) steps each
        instead of log2(T) levels: on CPUs the number of calls and of passes over memory counts, not the depth.

    Complexity:
        O(T) products in about 4 sqrt(T) calls; one host synchronization without machine code, to look for infinities.
        On CUDA with Triton one kernel, step by step, without any.

    Example:
        >>> import torch
        >>> from lightning_accel.recurrent import linear_scan
        >>> linear_scan(torch.full((4, 1), 0.5), torch.ones(4, 1)).flatten()
        tensor([1.0000, 1.5000, 1.7500, 1.8750])
    """
    if a.shape != b.shape or not len(a):
        raise ValueError(f"`a` and `b` must be of one shape (T >= 1, ...), got {tuple(a.shape)} and {tuple(b.shape)}.")
    if h0 is not None and h0.shape != a.shape[1:]:
        raise ValueError(f"`h0` must be of the shape of a step, {tuple(a.shape[1:])}, got {tuple(h0.shape)}.")
    dtype = torch.result_type(a, b)
    if h0 is not None:
        dtype = torch.promote_types(dtype, h0.dtype)
    start = torch.zeros_like(a[0], dtype=dtype) if h0 is None else h0
    tensors = [a, b, start]
    if torch.compiler.is_compiling() or surroundings() is not None or any(map(_is_unusual, tensors)):
        return _step_by_step(a, b, start)
    half = dtype in (torch.float16, torch.bfloat16)  # summed in float32: products of many coefficients need it
    scanned: Tensor = _LinearScan.apply(*(t.to(torch.float32 if half else dtype) for t in tensors))
    return scanned.to(dtype)


def _is_unusual(tensor: Tensor) -> bool:
    unusual = type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided
    return unusual or tensor.device.type == "meta" or not (tensor.is_floating_point() or tensor.is_complex())


def _step_by_step(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    states = []
    for a_t, b_t in zip(a.unbind(0), b.unbind(0), strict=True):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
        h = torch.empty_like(b, memory_format=torch.contiguous_format)
        scan_into(h, a, b, reverse=False, start=h0)
        ctx.save_for_backward(a, h, h0)
        return h

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, h, h0 = ctx.saved_tensors
        (gradient,) = gradients
        if torch.is_grad_enabled():  # to be differentiated again: the same in differentiable operations
            following = torch.cat([a[1:].conj(), torch.zeros_like(a[:1])]).flip(0)
            d_b = _LinearScan.apply(following.resolve_conj(), gradient.flip(0), torch.zeros_like(h0)).flip(0)
            before = torch.cat([h0[None], h[:-1]])
            return d_b * before.conj(), d_b, d_b[0] * a[0].conj()
        d_b, d_a = torch.empty_like(h), torch.empty_like(h)
        d_b[-1].copy_(gradient[-1])
        if len(a) > 1:
            machine = _machine(h, a, gradient)
            if machine is not None:
                blocks = (d_b, d_a, a, gradient, h)
                machine.run("scan_gradients", len(a), h[0].numel(), [_flat(v) for v in blocks], [])
            else:
                following = a[1:].conj().resolve_conj()
                scan_into(d_b[:-1], following, gradient[:-1], reverse=True, start=gradient[-1])
                torch.mul(d_b[1:], h[:-1].conj(), out=d_a[1:])
        torch.mul(d_b[0], h0.conj(), out=d_a[0])
        return d_a, d_b, d_b[0] * a[0].conj()


def scan_into(h: Tensor, a: Tensor, b: Tensor, *, reverse: bool, start: Tensor | None = None) -> None:
    """Write ``h_t = a_t * h_{t-1} + b_t`` (with ``reverse``: ``h_{t+1}``) to ``h``; shapes (T, ...).

    Machine code does it step by step where there is a compiler and enough to do. Otherwise stretches of time that fit
    the cache follow each other, so that no memory of the size of ``a`` is needed.
    """
    if scan_kernel.can_scan(h, a, b):
        first = torch.zeros_like(h[0]) if start is None else start
        scan_kernel.scan_rows(_flat(h), _flat(a), _flat(b), first.reshape(-1), reverse=reverse)
        return
    machine = _machine(h, a, b)
    if machine is not None:
        first = torch.zeros_like(h[0]) if start is None else start.contiguous()
        name = "scan_back" if reverse else "scan"
        machine.run(name, len(a), h[0].numel(), [_flat(v) for v in (h, a, b)], [first.view(1, -1)])
        return
    first = torch.zeros_like(h[0]) if start is None else start.clone()
    if not _scan_in_stretches(h, a, b, reverse=reverse, start=first):
        rows = list(zip(h.unbind(0), a.unbind(0), b.unbind(0), strict=True))
        for h_t, a_t, b_t in reversed(rows) if reverse else rows:
            first = torch.addcmul(b_t, a_t, first, out=h_t)


def _scan_in_stretches(h: Tensor, a: Tensor, b: Tensor, *, reverse: bool, start: Tensor) -> bool:
    """Write the states; return whether they are those of the recurrence.

    A product of coefficients may be infinite or vanish where the state itself does neither.
    """
    steps = len(a)
    stretch = max(16, min(steps, _STRETCH_ELEMENTS // max(1, a[0].numel())))
    products = torch.empty((stretch, *a.shape[1:]), dtype=a.dtype, device=a.device)
    ranges = [(begin, min(begin + stretch, steps)) for begin in range(0, steps, stretch)]
    for begin, end in reversed(ranges) if reverse else ranges:
        start = _scan_stretch(
            h[begin:end], a[begin:end], b[begin:end], products[: end - begin], reverse=reverse, start=start
        )
    largest = h.abs().max() if h.numel() else torch.zeros(())
    # what underflows is below the least normal number times the largest state
    return bool(largest < 1.0 / torch.finfo(h.dtype).tiny ** 0.5)


def _machine(*tensors: Tensor) -> MachineCode | None:
    """Return machine code for these tensors, of which the first is written; small ones are not worth a compiler."""
    first = tensors[0]
    dense = first[0].is_contiguous() and all(t.dtype is first.dtype for t in tensors)
    if first.device.type != "cpu" or first.dtype not in REALS or first.numel() < _COMPILED_ELEMENTS or not dense:
        return None
    return _compiled(first.dtype)


@functools.cache
def _compiled(dtype: torch.dtype) -> MachineCode | None:
    try:
        return MachineCode(_TEXT, dtype) if refusal() is None else None
    except CannotCompileError:  # the compiler stopped working; chunks give the same
        return None


def _flat(tensor: Tensor) -> Tensor:
    """View steps as rows: shape (T, elements)."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]


def _scan_stretch(h: Tensor, a: Tensor, b: Tensor, products: Tensor, *, reverse: bool, start: Tensor) -> Tensor:
    """Advance chunks of about sqrt(T) steps together, then add what each takes over; return the last state."""
    steps = len(a)
    length = max(1, round(steps**0.5))
    chunks = steps // length
    body, shape = chunks * length, a.shape[1:]
    inside = slice(steps - body, steps) if reverse else slice(0, body)
    outside = slice(0, steps - body) if reverse else slice(body, steps)
    hc, ac, bc = (v[inside].unflatten(0, (chunks, length)) for v in (h, a, b))
    factors = products[:body].view(length, chunks, *shape)
    order = list(range(length))[:: -1 if reverse else 1]
    hs, as_, bs, fs = hc.unbind(1), ac.unbind(1), bc.unbind(1), factors.unbind(0)
    hs[order[0]].copy_(bs[order[0]])
    fs[order[0]].copy_(as_[order[0]])
    for previous, k in itertools.pairwise(order):
        torch.addcmul(bs[k], as_[k], hs[previous], out=hs[k])
        torch.mul(as_[k], fs[previous], out=fs[k])
    carried = torch.zeros((chunks, *shape), dtype=a.dtype, device=a.device)
    ends, whole, takes = hs[order[-1]].unbind(0), fs[order[-1]].unbind(0), carried.unbind(0)
    sequence = list(range(chunks))[:: -1 if reverse else 1]
    takes[sequence[0]].copy_(start)
    for previous, k in itertools.pairwise(sequence):
        torch.addcmul(ends[previous], whole[previous], takes[previous], out=takes[k])
    hc.transpose(0, 1).addcmul_(factors, carried[None])
    last = hc[sequence[-1], order[-1]]
    for h_t, a_t, b_t in _steps(h[outside], a[outside], b[outside], reverse=reverse):
        torch.addcmul(b_t, a_t, last, out=h_t)
        last = h_t
    return last


def _steps(*parts: Tensor, reverse: bool) -> Any:
    rows = list(zip(*(p.unbind(0) for p in parts), strict=True))
    return rows[::-1] if reverse else rows
