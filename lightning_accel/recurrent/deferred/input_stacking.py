"""Join the inputs of a loop's steps to one tensor, without a copy where they are parts of one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def stack_inputs(inputs: Sequence[Tensor], whole_output: Callable[[Sequence[Tensor]], Tensor | None]) -> Tensor:
    """Return the steps' inputs as one tensor of shape (T, ...).

    Slices ``x[t]`` are recognised by their memory; their base goes into the graph instead of them, which also spares
    the backward of T slices, each of which would make a gradient as large as ``x``.

    Args:
        inputs: One a step, all of one shape.
        whole_output: Returns the tensor whose rows the given deferred tensors are, or ``None``.
    """
    whole = whole_output(inputs)
    if whole is not None:
        return whole
    first = inputs[0]
    if all(x is first for x in inputs):
        return first[None].expand(len(inputs), *first.shape)
    if type(first) is Tensor:
        base = _common_base(inputs)
        if base is not None:
            return base
    return torch.stack(list(inputs))


def _common_base(inputs: Sequence[Tensor]) -> Tensor | None:
    first = inputs[0]
    base = first._base
    if base is None or len(inputs) < 2 or base.requires_grad != first.requires_grad:
        return None
    offset, shape, stride = first.storage_offset(), first.shape, first.stride()
    step = inputs[1].storage_offset() - offset
    for t, x in enumerate(inputs):
        if type(x) is not Tensor or x._base is not base or x.requires_grad != first.requires_grad:
            return None
        if x.storage_offset() != offset + t * step or x.shape != shape or x.stride() != stride:
            return None
    for dim in range(base.dim()):
        moved = base.movedim(dim, 0)
        same = moved.shape[1:] == shape and moved.stride()[1:] == stride
        if same and step > 0 and base.stride(dim) == step:
            start, rest = divmod(int(offset) - int(base.storage_offset()), int(step))
            if rest == 0 and 0 <= start <= base.shape[dim] - len(inputs):
                return moved if len(inputs) == base.shape[dim] else moved.narrow(0, start, len(inputs))
    if step <= 0 or not base.is_contiguous():
        return None
    return base.as_strided((len(inputs), *shape), (step, *stride), offset)
