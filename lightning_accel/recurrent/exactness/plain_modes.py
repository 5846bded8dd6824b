"""Where a call has to run the plain loop whatever the cell is: transforms, modes and kinds of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_accel import torch_private

_PLAIN_TYPES = (Tensor, nn.Parameter)


def plain_reason(xs: Sequence[Tensor], states: Sequence[Tensor]) -> str | None:
    """Say why this call has to run the plain loop; ``None`` if nothing around it asks for that.

    A schedule writes memory that it made itself and calls machine code: whatever watches, transforms or packs single
    operations would not see them.

    Args:
        xs: Inputs, each of shape (T, B, ...).
        states: States.
    """
    if torch.compiler.is_compiling():
        return "torch.compile or torch.export traces it"
    around = surroundings()
    if around is not None:
        return f"{around} is active"
    for tensor in (*xs, *states):
        reason = _tensor_reason(tensor)
        if reason is not None:
            return reason
    if not xs:
        return "it has no input"
    if any(x.dim() < 2 for x in xs):
        return "its input has no dimension of streams"
    steps, streams = xs[0].shape[:2]
    if any(x.shape[:2] != (steps, streams) for x in xs):
        return "its inputs differ in steps or streams"
    return "there is no stream in the batch" if streams == 0 else None


def surroundings() -> str | None:
    """Name what watches or transforms single operations now; ``None`` if nothing does."""
    if torch_private.is_jit_tracing():
        return "torch.jit.trace"
    found = torch_private.active_transform() or torch_private.active_mode() or torch_private.global_hooks()
    if found is not None:
        return found
    if torch.is_anomaly_enabled():
        return "anomaly detection"
    if torch_private.saved_tensor_hooks_are_active():
        return "checkpointing or another hook on saved tensors"
    return "a cache of parametrizations" if torch_private.parametrizations_are_cached() else None


def _tensor_reason(tensor: Tensor) -> str | None:
    if type(tensor) not in _PLAIN_TYPES:
        return f"it is given a {type(tensor).__name__}"
    if tensor.is_complex():
        return "it is given complex numbers"
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return "it is given a sparse or quantized tensor"
    return "it is given a tensor without memory" if tensor.device.type == "meta" else None
