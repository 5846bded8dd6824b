"""The linear recurrence ``h_t = a_t * h_{t-1} + b_t`` as a work-efficient scan."""

import itertools
from typing import Any

import torch
from torch import Tensor

_STRETCH_ELEMENTS = 2**17


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
        d_b = torch.empty_like(h)
        d_b[-1].copy_(gradient[-1])
        if len(a) > 1:
            scan_into(d_b[:-1], a[1:], gradient[:-1], reverse=True, start=gradient[-1])
        d_a = torch.empty_like(a)
        d_a[0].zero_()
        torch.mul(d_b[1:], h[:-1], out=d_a[1:])
        return d_a, d_b


def scan_into(h: Tensor, a: Tensor, b: Tensor, *, reverse: bool, start: Tensor | None = None) -> None:
    """Write ``h_t = a_t * h_{t-1} + b_t`` (with ``reverse``: ``h_{t+1}``) to ``h``; shapes (T, ...).

    Stretches of time that fit the cache follow each other, so that no memory of the size of ``a`` is needed.
    """
    steps = len(a)
    stretch = max(16, min(steps, _STRETCH_ELEMENTS // max(1, a[0].numel())))
    products = torch.empty((stretch, *a.shape[1:]), dtype=a.dtype, device=a.device)
    cuts = [(begin, min(begin + stretch, steps)) for begin in range(0, steps, stretch)]
    for begin, end in reversed(cuts) if reverse else cuts:
        start = _scan_stretch(
            h[begin:end], a[begin:end], b[begin:end], products[: end - begin], reverse=reverse, start=start
        )


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
