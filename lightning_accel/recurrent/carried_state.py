"""Carry the state of a recurrent layer from batch to batch of a long stream: truncated backpropagation."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_accel.recurrent.instance_forward import InstanceForward
from lightning_accel.recurrent.module import Recurrent


class CarriedState:
    """Stand before one layer's ``forward``; calls without a state go on where the batch before ended.

    Args:
        layer: `Recurrent`, ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``.
        prefix_batches: Earlier batches that are run again before each one, so that gradients reach back into them.

    Attributes:
        active: Whether states are carried now.
        resets: Streams that begin anew with the next call, shape (B,); ``None`` for none.
    """

    def __init__(self, layer: nn.Module, prefix_batches: int = 0) -> None:
        self.layer, self.prefix_batches = layer, prefix_batches
        self.active = False
        self.resets: Tensor | None = None
        self._start: Any = None
        self._history: list[tuple[Tensor, Tensor | None]] = []
        self._batch_dim = 0 if isinstance(layer, Recurrent) else 1
        self._forward = InstanceForward(layer, self._call)

    def begin(self) -> None:
        """Forget everything: every stream begins anew."""
        self._start, self._history = None, []

    def remove(self) -> None:
        """Give the layer its own forward back."""
        self._forward.remove()

    def state(self) -> dict[str, Any]:
        """Return what is carried."""
        return {"start": self._start, "history": list(self._history)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with what was carried."""
        self._start, self._history = state["start"], list(state["history"])

    def _call(self, x: Tensor, state: Any = None, **kwargs: Any) -> Any:
        if not self.active or state is not None or not isinstance(x, Tensor) or kwargs:
            return self._forward.original(x, state, **kwargs)
        streams = x.shape[0 if self.layer.batch_first else 1]
        self._check(streams)
        state, following = self._start, []
        for old, resets in self._history:
            _, state = self._forward.original(old, self._reset(state, resets))
            following.append(state)
        resets = self.resets
        y, last = self._forward.original(x, self._reset(state, resets))
        self._history.append((x.detach(), resets))
        following.append(last)
        while len(self._history) > self.prefix_batches:
            self._history.pop(0)
            self._start = pytree.tree_map(lambda s: s.detach().clone(), following.pop(0))
        return y, last

    def _reset(self, state: Any, resets: Tensor | None) -> Any:
        if state is None or resets is None:
            return state

        def zeroed(s: Tensor) -> Tensor:
            shape = [1] * s.dim()
            shape[self._batch_dim] = len(resets)
            return torch.where(resets.to(s.device).view(shape), torch.zeros_like(s), s)

        return pytree.tree_map(zeroed, state)

    def _check(self, streams: int) -> None:
        carried = [] if self._start is None else pytree.tree_leaves(self._start)
        known = carried[0].shape[self._batch_dim] if carried else streams
        if known != streams or (self.resets is not None and self.resets.shape != (streams,)):
            raise ValueError(
                f"streams can not change their number within an epoch: {known} are carried and a batch has {streams}; "
                "use `drop_last=True`, and one reset a stream."
            )


def recurrent_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers whose state can be carried, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (Recurrent, nn.RNNBase))}
