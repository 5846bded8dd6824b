"""How a worker writes a push into its mailbox: gradients, compressed or not, and whether they are finite."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_accel.async_sgd.policy.encoding.compression import ErrorFeedback
from lightning_accel.async_sgd.policy.encoding.tensor_spec import TensorSpec
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.shared_memory.memory import Mailbox
from lightning_accel.async_sgd.shared_memory.peers import mailbox_areas, typed
from lightning_accel.machine.transfers import Lane, lane_of


class PushWriter:
    """Write pushes of one worker, all for the same parameters.

    Args:
        specs: Of the parameters, then of the buffers.
        parameters: How many of them are parameters.
        settings: Of the run.
        fd: Descriptor of the worker's mailbox.
    """

    def __init__(self, specs: list[TensorSpec], parameters: int, settings: Settings, fd: int) -> None:
        self._parameters = parameters
        self._lane = Lane(torch.device("cpu"))  # until the worker's device is known
        self._known = False
        self._mailbox = Mailbox(*mailbox_areas(specs, parameters, settings), fd)
        self._slots: list[list[Tensor]] = []  # both slots of the mailbox as tensors, where nothing is compressed
        if settings.compression.name == "none":
            self._slots = [typed(self._mailbox.areas(slot), specs[:parameters]) for slot in range(2)]
        self._feedback = ErrorFeedback(settings.compression)

    def beside(self, page: Tensor, tensors: Sequence[Tensor | None]) -> Lane:
        """Return what copies between shared memory and the worker's device, which shows in the tensors that it pulls.

        Args:
            page: All bytes of the parameters' page; pinned, as the mailbox is.
            tensors: On the device.
        """
        if not self._known:
            self._known, self._lane = True, lane_of(tensors)
            self._lane.pin(page)
            self._lane.pin(self._mailbox.segment.bytes)
        return self._lane

    def close(self) -> None:
        """Give up the mailbox."""
        self._lane.unpin()
        self._mailbox.segment.close()

    def write(
        self,
        sequence: int,
        meta: dict[str, Any],
        gradients: Sequence[Tensor | None],
        *,
        buffers: Sequence[Tensor],
        base: Sequence[Tensor],
        probe: Callable[[str], None],
    ) -> None:
        """Write push ``sequence``; what is not finite goes without its gradients.

        Args:
            sequence: Number of the push, from 1.
            meta: What describes it, but for what follows.
            gradients: One of each parameter, or None.
            buffers: All, or none.
            base: Parameters that the gradients belong to, or none.
            probe: Told the stages of the push.
        """
        here = [gradient for gradient in gradients if gradient is not None]
        present = [i for i, gradient in enumerate(gradients) if gradient is not None]
        # before compression, which would keep a NaN for the next push; else in the slot, whose bytes are at hand
        finite = bool(self._slots) or is_finite(here)
        meta.update(present=present if finite else [], finite=finite, buffers=bool(buffers), base=bool(base))
        with self._mailbox.writing(sequence, meta, probe) as areas:
            middle = len(present) // 2
            self._write(sequence, present[:middle] if finite else [], here[:middle], areas)
            probe("half-way")
            self._write(sequence, present[middle:] if finite else [], here[middle:], areas)
            rest = areas[self._parameters :]
            self._begin(rest, buffers)
            self._begin(rest[len(rest) - len(base) :], base)
            self._lane.wait()  # what is looked at now, and what is committed after it, is there
            if here and self._slots and not (self._is_slot_finite(sequence) or is_finite(here)):
                meta.update(finite=False, present=[])

    @torch.no_grad()
    def _begin(self, areas: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        pairs = zip(areas, tensors, strict=False)
        self._lane.begin([area.view(t.dtype).view(t.shape) for area, t in pairs], [t.detach() for t in tensors])

    @torch.no_grad()
    def _write(
        self, sequence: int, places: Sequence[int], gradients: Sequence[Tensor], areas: Sequence[Tensor]
    ) -> None:
        if self._slots:
            slot = self._slots[sequence % 2]
            self._lane.begin([slot[i] for i in places], gradients[: len(places)])
            return
        for i, gradient in zip(places, gradients, strict=False):
            self._feedback.write(i, gradient, areas[i])

    def _is_slot_finite(self, sequence: int) -> bool:
        """Whether all of the slot is finite, told by one sum. False may also mean overflow, or an older gradient."""
        kinds = {(tensor.dtype, tensor.is_floating_point()) for tensor in self._slots[0]}
        if len(kinds) != 1:
            return False
        dtype, floating = kinds.pop()
        if not floating:
            return False
        payload = self._mailbox.span(sequence, self._parameters).view(dtype)
        return math.isfinite(payload.sum(dtype=torch.promote_types(dtype, torch.float32)).item())


def is_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element is NaN or infinite; one pass where all is well, one host synchronization."""
    filled = [t.detach() for t in tensors if t.numel()]
    if not filled:
        return True
    norms = torch.stack([norm.double() for norm in torch._foreach_norm(filled)])
    if norms.isfinite().all():
        return True
    # large finite elements overflow a norm, too
    return all(bool(t.isfinite().all()) for t in filled)
