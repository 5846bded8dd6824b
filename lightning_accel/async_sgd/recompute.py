"""Batch-norm statistics computed anew for parameters that no worker has run a training batch with."""

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Recomputation:
    """Remember what went into the batch norms of a module lately, and compute their statistics from it again.

    With several workers the running statistics belong to a mixture of old parameters. Those of the parameters at hand
    come from passing some batches through them once more. The outermost submodule that holds batch norms is called
    again with the very arguments it was last trained with, so it does not matter how a training step calls its parts.
    Where several parts of a module are called one after another, the later ones get what the earlier ones gave then.

    Args:
        module: With batch norms that track running statistics; without any, nothing is remembered.
        calls: How many calls are remembered, >= 1; their arguments stay in memory.

    Raises:
        ValueError: If ``calls < 1``.

    References:
        Izmailov et al., arXiv:1803.05407, section 3.2. *Deviation*: other layers are in evaluation mode, as they will
        be when the statistics are used.
    """

    def __init__(self, module: nn.Module, *, calls: int = 16) -> None:
        if calls < 1:
            raise ValueError(f"`calls` must be >= 1, got {calls}.")
        self._module = module
        self._norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self._calls: deque[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = deque(maxlen=calls)
        self._depth = 0
        self._handles: list[Any] = []
        for part in module.modules():
            if any(isinstance(m, _BatchNorm) and m.track_running_stats for m in part.modules()):
                self._handles.append(part.register_forward_pre_hook(self._enter))
                self._handles.append(part.register_forward_hook(self._leave, with_kwargs=True, always_call=True))

    def detach(self) -> None:
        """Remember nothing more, and forget what is remembered."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()

    @torch.no_grad()
    def recompute(self) -> bool:
        """Set the running statistics to the means over the remembered calls; returns whether there were any."""
        if not self._calls:
            return False
        modes = [(m, m.training) for m in self._module.modules()]
        kept = [(norm, norm.momentum, _count(norm)) for norm in self._norms]
        self._module.eval()
        for norm in self._norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's word for the plain mean of all batches
            norm.train()
        self._depth = 1  # these calls are not remembered
        for part, args, kwargs in self._calls:
            part(*args, **kwargs)
        self._depth = 0
        for norm, momentum, count in kept:
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)
        for part, training in modes:
            part.training = training
        return True

    def _enter(self, part: nn.Module, args: Any) -> None:  # noqa: ARG002  # a hook's signature
        self._depth += 1

    def _leave(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._depth -= 1
        # a call that failed has no output
        if self._depth == 0 and part.training and torch.is_grad_enabled() and output is not None:
            self._calls.append((part, _detached(args), _detached(kwargs)))


def _count(norm: _BatchNorm) -> Tensor | None:
    return None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {k: _detached(v) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_detached(v) for v in value)
    return value
