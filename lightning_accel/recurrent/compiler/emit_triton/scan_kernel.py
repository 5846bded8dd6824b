"""The linear recurrence as Triton: every program runs a few elements through all steps."""

import torch
from torch import Tensor

from lightning_accel.recurrent.compiler.emit_triton import triton_code
from lightning_accel.recurrent.compiler.emit_triton.triton_expression import TYPES

_AHEAD = 8  # steps whose coefficients are read before the first of them is computed
_ELEMENTS = 128  # of a program


def scan_text(real: str) -> str:
    """Write the kernel for numbers of a type; reading ahead is written out, for stores lie between the reads else."""
    lines = [
        "def loop_scan(n, B, begin, end, p_first, p_h, t_h, p_a, t_a, p_b, t_b, REVERSE: tl.constexpr):",
        f"    k = tl.program_id(0) * {_ELEMENTS} + tl.arange(0, {_ELEMENTS})",
        "    here = k < B",
        f"    h = tl.load(p_first + k, mask=here, other=0).to({real})",
        f"    for step in tl.range(begin, end, {_AHEAD}, num_stages=1):",
    ]
    for i in range(_AHEAD):
        lines += [
            f"        s{i} = step + {i}",
            f"        w{i} = tl.full((), 0, tl.int64) + (n - 1 - s{i} if REVERSE else s{i})",
            f"        m{i} = here & (k * 0 + s{i} < n)",
            f"        a{i} = tl.load(p_a + w{i} * t_a + k, mask=m{i}, other=0)",
            f"        b{i} = tl.load(p_b + w{i} * t_b + k, mask=m{i}, other=0)",
        ]
    for i in range(_AHEAD):
        lines += [f"        h = a{i} * h + b{i}", f"        tl.store(p_h + w{i} * t_h + k, h, mask=m{i})"]
    return "\n".join(lines) + "\n"


def can_scan(*tensors: Tensor) -> bool:
    """Whether a kernel can compute the recurrence of these tensors, the first of which is written."""
    first = tensors[0]
    dense = all(t.dtype is first.dtype and t[0].is_contiguous() for t in tensors)
    return scan_refusal(first.device.type, first.dtype, dense=dense) is None


def scan_refusal(device: str, dtype: torch.dtype, *, dense: bool) -> str | None:
    """Return why no kernel computes a recurrence on a type of device; ``None`` if one can.

    Args:
        device: Type of the device.
        dtype: Of the numbers.
        dense: Whether each step lies densely in memory, and all tensors hold that type.
    """
    if device != "cuda":
        return f"there is no kernel for {device}"
    if dtype not in (torch.float32, torch.float64):
        return f"the kernel computes float32 and float64, not {dtype}"
    if not dense:
        return "the numbers of a step do not lie densely in memory"
    return triton_code.triton_refusal()


def scan_rows(h: Tensor, a: Tensor, b: Tensor, first: Tensor, *, reverse: bool) -> None:
    """Write ``h_t = a_t * h_{t-1} + b_t`` (with ``reverse``: ``h_{t+1}``) to ``h``; shapes (T, elements).

    Args:
        h: Result.
        a: Coefficients.
        b: Summands.
        first: State before the first step, shape (elements,).
        reverse: Whether time runs backwards.
    """
    interpreted = h.device.type == "cpu"
    kernel = triton_code.functions(scan_text(TYPES[h.dtype]), interpreted=interpreted)["loop_scan"]
    steps, elements = h.shape
    arguments = [steps, elements, 0, steps, first.contiguous(), h, h.stride(0), a, a.stride(0), b, b.stride(0)]
    grid = (-(-elements // _ELEMENTS), 1)
    triton_code.launch(kernel, grid, arguments, {"REVERSE": reverse})
