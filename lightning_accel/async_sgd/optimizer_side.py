"""Where the optimizers of a server step: on the host, or on a device that parameters and states are kept on."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.machine.transfers import Lane, send_to_host

if TYPE_CHECKING:
    from lightning_accel.async_sgd.policy.pushes import Push


def is_far(device: torch.device) -> bool:
    """Whether a device has memory of its own; one question, which tests answer otherwise."""
    return device.type != "cpu"


class OptimizerSide:
    """Bring pushes to where a server's optimizers step, and what they make back to the host.

    On the host there is nothing to bring. Elsewhere parameters and states are moved there once; each push is copied
    there out of the mailbox, and parameters are copied to the host to be published.

    Args:
        device: Of the optimizers.
        parameters: Of the server, on the host; moved.
        optimizers: Over them; their states are moved.
    """

    def __init__(
        self, device: torch.device, parameters: Sequence[nn.Parameter], optimizers: Sequence[Optimizer]
    ) -> None:
        self._parameters, self._optimizers = parameters, optimizers
        self._far = is_far(device)
        self._lane = Lane(device)
        self._mailboxes: set[int] = set()
        self._published: list[Tensor] = []
        self._spans: list[tuple[int, int]] = []
        if self._far:
            self._move(device)

    def close(self) -> None:
        """Give up what was pinned."""
        self._lane.unpin()

    def leave(self) -> None:
        """Bring parameters and states back to the host, where they stay."""
        if self._far:
            self.close()
            self._move(torch.device("cpu"))
            self._far = False

    def know_spans(self, spans: Sequence[tuple[int, int]]) -> None:
        """Take note of where each parameter lies in a flat gradient, see `Arena`; nowhere if there are none."""
        self._spans = list(spans)

    def received(self, push: "Push") -> "Push":
        """Return a push whose gradients lie where the optimizers step."""
        if not self._far or all(gradient is None for gradient in push.gradients):
            return push
        if push.flat is not None and self._spans:
            self._pin_mailbox(push.flat)
            (flat,) = self._bring([push.flat])
            assert flat is not None
            triples = zip(self._spans, self._parameters, push.gradients, strict=True)
            found = [None if g is None else flat[begin:end].view(p.shape) for (begin, end), p, g in triples]
            return dataclasses.replace(push, gradients=found, flat=flat, base=self._bring(push.base))
        return dataclasses.replace(push, gradients=self._bring(push.gradients), base=self._bring(push.base))

    def published(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return values on the host, in memory that the next call writes over."""
        if not self._far:
            return [*values]
        if not self._published:
            self._published = [torch.empty_like(v, device="cpu") for v in values]
            for copied in self._published:
                self._lane.pin(copied)
        self._lane.copy(self._published, [v.detach() for v in values])
        return self._published

    def _bring(self, values: Sequence[Tensor | None]) -> list[Any]:
        """Return copies on the device; done when this returns, for the mailbox is free then."""
        found = [None if v is None else torch.empty_like(v, device=self._lane.device) for v in values]
        pairs = [(copied, v) for copied, v in zip(found, values, strict=True) if copied is not None and v is not None]
        self._lane.copy([copied for copied, _ in pairs], [v for _, v in pairs])
        return found

    def _pin_mailbox(self, slot: Tensor) -> None:
        """Pin all of the mailbox that a slot is a part of, once."""
        memory = slot.untyped_storage()
        if memory.data_ptr() not in self._mailboxes:
            self._mailboxes.add(memory.data_ptr())
            self._lane.pin(torch.empty(0, dtype=torch.uint8).set_(memory))

    @torch.no_grad()
    def _move(self, device: torch.device) -> None:
        for parameter in self._parameters:
            parameter.data = parameter.detach().to(device, copy=True)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                counts_there = group.get("capturable") or group.get("fused")  # where torch keeps the number of steps
                for parameter in group["params"]:
                    state = optimizer.state.get(parameter, {})
                    moved = {k: v for k, v in state.items() if isinstance(v, Tensor) and (k != "step" or counts_there)}
                    state.update({k: v.to(device, copy=True) for k, v in moved.items()})


def on_host(x: Tensor) -> Tensor:
    """Return a copy on the host."""
    if x.device.type == "cpu":
        return x.clone()
    copied, mark = send_to_host(x)
    mark.wait()
    return copied


def refuse_elsewhere(optimizers: Sequence[Optimizer], device: str) -> None:
    """Refuse optimizers whose state cannot be moved to a device without knowing them.

    Raises:
        ValueError: For a device that is not the host, and an optimizer that is not one of `torch.optim`.
    """
    if torch.device(device).type == "cpu":
        return
    for optimizer in optimizers:
        if not type(optimizer).__module__.startswith("torch.optim"):
            raise ValueError(
                f"`optimizer_device={device}` moves the state of torch's own optimizers, and nobody knows where "
                f"`{type(optimizer).__name__}` keeps its own; leave it at 'cpu', or use an optimizer of `torch.optim`."
            )
