"""1x1 convolutions as products of matrices: most of what a factored convolution adds to the dense one."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  # torch's own custom

from lightning_accel.torch_private import is_jit_tracing

_FEW_POSITIONS = 49  # below, one product a sample is too small to be quick; all samples share one


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map (batch, in, *positions) to (batch, out, *positions) by a weight of shape (out, in, 1[, 1]).

    On CPU, convolutions repack their inputs and gradients for the kernel at every call, which for a 1x1 kernel takes
    as long as the work itself; products of matrices read them where they lie. Elsewhere it is a plain convolution.

    Args:
        x: With or without batch, as `torch.nn.functional.conv1d` and ``conv2d`` take it.
        weight: Of a 1x1 convolution, one or two trailing ones.
        bias: (out,), or None.
    """
    if not multiplies(x) or x.dim() != weight.dim():
        return F.conv1d(x, weight, bias) if weight.dim() == 3 else F.conv2d(x, weight, bias)
    matrix, (batch, channels, *positions) = weight.flatten(1), x.shape
    if x.shape[2:].numel() < _FEW_POSITIONS:
        columns = x.transpose(0, 1).reshape(channels, -1)
        y = torch.mm(matrix, columns) if bias is None else torch.addmm(bias[:, None], matrix, columns)
        return y.view(-1, batch, *positions).transpose(0, 1).contiguous()
    matrices, columns = matrix.expand(batch, -1, -1), x.flatten(2)
    y = torch.bmm(matrices, columns) if bias is None else torch.baddbmm(bias[:, None], matrices, columns)
    return y.view(batch, -1, *positions)


def multiplies(x: Tensor) -> bool:
    """Whether `pointwise` multiplies matrices for this input (a batch in the usual order on CPU, in no trace)."""
    return not is_jit_tracing() and x.device.type == "cpu" and x.is_contiguous() and x.numel() > 0
