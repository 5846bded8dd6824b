"""The linear recurrence ``h_t = a_t * h_{t-1} + b_t`` as a work-efficient scan."""

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from lightning_accel.machine_code.c_functions import REALS, MachineCode, refusal

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
        a: Coefficients, shape (T, ...), T >= 1.
        b: Summands, shape of ``a``.
        h0: State before the first step, shape of ``a[0]``; zeros by default.

    Returns:
        All states, shape of ``a``.

    Raises:
        ValueError: If ``a`` and ``b`` differ in shape, or have no step.

    References:
        Blelloch, "Prefix sums and their applications", 1990. *Deviations*: two levels of about sqrt(T) steps each
        instead of log2(T) levels: on CPUs the number of calls and of passes over memory counts, not the depth.

    Complexity:
        O(T) products in about 4 sqrt(T) calls; no host synchronization.
    """
    if a.shape != b.shape or not len(a):
        raise ValueError(f"`a` and `b` must be of one shape (T >= 1, ...), got {tuple(a.shape)} and {tuple(b.shape)}.")
    if h0 is not None:
        b = torch.cat([torch.addcmul(b[:1], a[:1], h0[None]), b[1:]])
    scanned: Tensor = _LinearScan.apply(a, b)
    return scanned


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        h = torch.empty_like(b)
        scan_into(h, a, b, reverse=False)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors
        (gradient,) = gradients
        if torch.is_grad_enabled():  # to be differentiated again: the same in differentiable operations
            following = torch.cat([a[1:], torch.zeros_like(a[:1])]).flip(0)
            d_b = _LinearScan.apply(following, gradient.flip(0)).flip(0)
            return torch.cat([torch.zeros_like(a[:1]), d_b[1:] * h[:-1]]), d_b
        d_b, d_a = torch.empty_like(h), torch.empty_like(h)
        d_a[0].zero_()
        d_b[-1].copy_(gradient[-1])
        if len(a) > 1:
            machine = _machine(h, a, gradient)
            if machine is not None:
                blocks = (d_b, d_a, a, gradient, h)
                machine.run("scan_gradients", len(a), h[0].numel(), [_flat(v) for v in blocks], [])
                return d_a, d_b
            scan_into(d_b[:-1], a[1:], gradient[:-1], reverse=True, start=gradient[-1])
            torch.mul(d_b[1:], h[:-1], out=d_a[1:])
        return d_a, d_b


def scan_into(h: Tensor, a: Tensor, b: Tensor, *, reverse: bool, start: Tensor | None = None) -> None:
    """Write ``h_t = a_t * h_{t-1} + b_t`` (with ``reverse``: ``h_{t+1}``) to ``h``; shapes (T, ...).

    Machine code does it step by step where there is a compiler and enough to do. Otherwise stretches of time that fit
    the cache follow each other, so that no memory of the size of ``a`` is needed.
    """
    machine = _machine(h, a, b)
    if machine is not None:
        first = torch.zeros_like(h[0]) if start is None else start.contiguous()
        name = "scan_back" if reverse else "scan"
        machine.run(name, len(a), h[0].numel(), [_flat(v) for v in (h, a, b)], [first.view(1, -1)])
        return
    steps = len(a)
    stretch = max(16, min(steps, _STRETCH_ELEMENTS // max(1, a[0].numel())))
    products = torch.empty((stretch, *a.shape[1:]), dtype=a.dtype, device=a.device)
    cuts = [(begin, min(begin + stretch, steps)) for begin in range(0, steps, stretch)]
    for begin, end in reversed(cuts) if reverse else cuts:
        start = _scan_stretch(
            h[begin:end], a[begin:end], b[begin:end], products[: end - begin], reverse=reverse, start=start
        )


def _machine(*tensors: Tensor) -> MachineCode | None:
    """Return machine code for these tensors, of which the first is written; small ones are not worth a compiler."""
    first = tensors[0]
    dense = first[0].is_contiguous() and all(t.dtype is first.dtype for t in tensors)
    if first.device.type != "cpu" or first.dtype not in REALS or first.numel() < _COMPILED_ELEMENTS or not dense:
        return None
    return _compiled(first.dtype)


@functools.cache
def _compiled(dtype: torch.dtype) -> MachineCode | None:
    return MachineCode(_TEXT, dtype) if refusal() is None else None


def _flat(tensor: Tensor) -> Tensor:
    """View steps as rows: shape (T, elements)."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]


def _scan_stretch(h: Tensor, a: Tensor, b: Tensor, products: Tensor, *, reverse: bool, start: Tensor | None) -> Tensor:
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
    if start is not None:
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
