"""A rank's part of what its replica reads and pushes: slices of the memory that the server shares."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_accel.async_sgd.policy.encoding.tensor_spec import TensorSpec
from lightning_accel.async_sgd.replicas.ranks import Ranks
from lightning_accel.async_sgd.replicas.shards import Part, as_spread
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.shared_memory.memory import Mailbox, ParameterPage, copy_all, fence
from lightning_accel.async_sgd.shared_memory.peers import mailbox_areas, typed
from lightning_accel.async_sgd.shared_memory.pushing import is_finite


class SharedPage(ParameterPage):
    """Reads parts of a publication that the leader has chosen, so that all ranks have one version."""

    def narrow(self, parts: Sequence[Part | None]) -> None:
        """Read these parts of the first tensors (None: all of one) from now on."""
        for tensors in self._tensors:
            for i, part in enumerate(parts):
                if part is not None:
                    tensors[i] = tensors[i][part]

    @property
    def latest(self) -> int:
        """Number of the latest publication."""
        return self._header[1]

    @torch.no_grad()
    def read_at(self, number: int, targets: Sequence[Tensor | None]) -> tuple[int, list[int]] | None:
        """Copy publication ``number``; returns version and counters, or None if the server has written over it."""
        fence()
        pairs = zip(targets, self._tensors[number % 2], strict=True)
        wanted = [(target, source) for target, source in pairs if target is not None]
        copy_all([target for target, _ in wanted], [source for _, source in wanted])
        version, *counters = self._meta[number % 2]
        fence()
        return (version, counters) if self._header[0] <= number + 1 else None


class ShardWriter:
    """Write pushes of a replica, each rank its own shards; the leader commits when all have written.

    Stands where a worker alone has its `PushWriter`.

    Args:
        ranks: Of the replica.
        specs: Of the whole parameters, then of the buffers.
        count: How many of them are parameters.
        settings: Of the run.
        fd: Descriptor of the mailbox.
    """

    def __init__(self, ranks: Ranks, specs: list[TensorSpec], count: int, settings: Settings, fd: int) -> None:
        self._ranks, self._count = ranks, count
        self._mailbox = Mailbox(*mailbox_areas(specs, count, settings), fd)
        self._slots = [typed(self._mailbox.areas(slot), specs[:count]) for slot in range(2)]
        self._parameters: list[Tensor] = []
        self._parts: list[Part | None] = []

    def spread_as(self, parameters: Sequence[Tensor], parts: Sequence[Part | None]) -> None:
        """Take note of how parameters are spread over the ranks."""
        self._parameters, self._parts = list(parameters), list(parts)

    def close(self) -> None:
        """Give up the mailbox."""
        self._mailbox.segment.close()

    @torch.no_grad()
    def write(
        self,
        sequence: int,
        meta: dict[str, Any],
        gradients: Sequence[Tensor | None],
        *,
        buffers: Sequence[Tensor],
        base: Sequence[Tensor],  # noqa: ARG002  # as of a `PushWriter`; refused for replicas
        probe: Callable[[str], None],
    ) -> None:
        """Write this rank's part of push ``sequence``; see `PushWriter.write`."""
        leads = self._ranks.leads
        areas = self._mailbox.areas(sequence)
        writing: Any = self._mailbox.writing(sequence, meta, probe) if leads else contextlib.nullcontext(areas)
        with writing:
            self._ranks.all_agree(True)  # the slot is free
            present = [i for i, gradient in enumerate(gradients) if gradient is not None]
            found = [as_spread(gradients[i], self._parameters[i]) for i in present]  # type: ignore[arg-type]
            slot = self._slots[sequence % 2]
            for i, gradient in zip(present, found, strict=True):
                part = self._parts[i]
                if part is not None:
                    slot[i][part].copy_(gradient)
                elif leads:
                    slot[i].copy_(gradient)
            probe("half-way")
            finite = self._ranks.all_agree(is_finite(found))  # and everybody has written
            meta.update(present=present if finite else [], finite=finite, buffers=bool(buffers), base=False)
            for tensor, area in zip(buffers if leads else [], areas[self._count :], strict=False):
                area.view(tensor.dtype).view(tensor.shape).copy_(tensor)
