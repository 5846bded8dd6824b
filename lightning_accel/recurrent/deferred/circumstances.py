"""When a cell's calls must be just what they say: what is going on around them, and what they are given."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_accel.recurrent.deferred.feeds import is_listened_to, is_ordinary
from lightning_accel.torch_private import (
    active_mode,
    active_transform,
    is_jit_tracing,
    running_backward,
    saved_tensor_hooks_are_active,
)

CLOSE = {torch.float32: 1e-4, torch.float64: 1e-9}  # of one step to the plain one, relative to its largest value


def unusual() -> str | None:
    """Say what is going on in which a call must be just what it says; ``None`` in usual training."""
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return "it is called without gradients"
    if torch.compiler.is_compiling() or is_jit_tracing():
        return "it is being compiled"
    if running_backward() != -1:
        return "it is called in a backward (checkpointing)"
    if saved_tensor_hooks_are_active():
        return "what its steps save for the backward is packed (checkpointing, offloading)"
    return active_transform() or active_mode()


def refusal(xs: Sequence[Tensor], states: Sequence[Tensor], weights: Iterable[nn.Parameter]) -> str | None:
    """Say why a loop can not begin with this call; ``None`` if it can."""
    streams, dtype = xs[0].shape[0] if xs[0].dim() else 0, states[0].dtype
    if not streams or dtype not in CLOSE:
        return "its states are of another type than float32 and float64, or there is no stream"
    if not all(is_ordinary(t) and t.dim() > 1 and t.shape[0] == streams for t in (*xs, *states)):
        return "an input or state is no ordinary tensor (B, ...)"
    if any(s.dtype != dtype for s in states) or any(is_listened_to(x) for x in xs):
        return "its states differ in type, or an input has a hook"
    if any(x.requires_grad and not x.dtype.is_floating_point for x in xs):
        return "an input of whole numbers has a gradient"
    weights = list(weights)
    if any(p.dtype != dtype or not is_ordinary(p) for p in weights):
        return "its weights are of another type than its states"
    if any(is_listened_to(p) for p in weights):
        return "a weight of it has a gradient hook"
    return "autocast is on" if torch.is_autocast_enabled(xs[0].device.type) else None
