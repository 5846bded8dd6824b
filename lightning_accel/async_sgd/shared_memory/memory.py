"""Shared memory without names and without locks: nothing to leave behind, nothing a killed process can hold.

A segment is anonymous memory behind a file descriptor, handed from the server to a worker over their socket, so
``/dev/shm`` never shows an entry. Parameters go out by a seqlock over two buffers, gradients come in through a
mailbox of two slots per worker whose commit number is written last.
"""

import contextlib
import mmap
import os
import pickle
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_accel.async_sgd.policy.encoding.tensor_spec import TensorSpec

_ALIGN = 64
_HEADER = 8  # int64 words of a header


class Segment:
    """Anonymous shared memory; ``fd`` names it to another process.

    Args:
        nbytes: Size, > 0, for a new segment.
        fd: Descriptor of an existing segment of this size, which is taken over.
    """

    def __init__(self, nbytes: int, fd: int | None = None) -> None:
        self.nbytes = nbytes
        self.fd = anonymous_file(nbytes) if fd is None else fd
        self._map = mmap.mmap(self.fd, nbytes)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def words(self, begin: int, end: int) -> memoryview:
        """Return bytes ``[begin, end)`` as int64 words; reading or writing one costs no tensor."""
        return memoryview(self._map)[begin:end].cast("q")

    def raw(self, begin: int, end: int) -> memoryview:
        """Return bytes ``[begin, end)``."""
        return memoryview(self._map)[begin:end]

    def close(self) -> None:
        """Give up the descriptor. The memory itself goes with the last tensor on it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def anonymous_file(nbytes: int = 0) -> int:
    """Return the descriptor of a new file without a name: it is gone with its last descriptor."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("lightning-accel", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, nbytes)
    return fd


class _Fence:
    """Order memory accesses around it: taking a free lock is an atomic read-modify-write on every platform."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            pass


fence = _Fence()


def aligned(nbytes: int) -> int:
    """Return the room that a tensor of so many bytes takes."""
    return -(-nbytes // _ALIGN) * _ALIGN


class ParameterPage:
    """Parameters and buffers that one writer publishes and any number of readers copy, without a lock.

    Publication ``n`` lives in buffer ``n % 2``. The writer announces a publication before it starts and completes it
    after; a reader's copy is whole unless the writer has by then announced a second one.
    """

    def __init__(self, specs: Sequence[TensorSpec], counters: int, fd: int | None = None) -> None:
        self.specs = list(specs)
        head = aligned(8 * _HEADER)
        meta = aligned(8 * (1 + counters))
        body = sum(aligned(spec.nbytes) for spec in specs)
        self.segment = Segment(head + 2 * (meta + body), fd)
        raw = self.segment.bytes
        self._header = self.segment.words(0, 8 * _HEADER)  # [announced, completed]
        self._meta: list[memoryview] = []
        self._tensors: list[list[Tensor]] = []
        offset = head
        for _ in range(2):
            self._meta.append(self.segment.words(offset, offset + 8 * (1 + counters)))
            offset += meta
            self._tensors.append([])
            for spec in specs:
                self._tensors[-1].append(_view(raw, offset, spec))
                offset += aligned(spec.nbytes)

    @torch.no_grad()
    def publish(self, tensors: Sequence[Tensor], version: int, counters: Sequence[int]) -> None:
        """Make tensors, version and counters visible at once."""
        number = self._header[1] + 1
        self._header[0] = number
        fence()
        copy_all(self._tensors[number % 2], tensors)
        for place, value in enumerate((version, *counters)):
            self._meta[number % 2][place] = value
        fence()
        self._header[1] = number

    @torch.no_grad()
    def read_into(
        self, targets: Sequence[Tensor | None], copy: Callable[[Sequence[Tensor], Sequence[Tensor]], None] | None = None
    ) -> tuple[int, list[int]]:
        """Copy the latest publication into ``targets`` (None: skip); returns version and counters.

        Retries while the writer laps it; two full publications within one copy are rare.

        Args:
            targets: One a tensor of the publication.
            copy: Copies tensors, and returns when that is done; `copy_all` by default.
        """
        wanted = [place for place, target in enumerate(targets) if target is not None]
        into = [target for target in targets if target is not None]
        while True:
            number = self._header[1]
            fence()
            published = self._tensors[number % 2]
            (copy or copy_all)(
                into, published if len(wanted) == len(published) else [published[place] for place in wanted]
            )
            version, *counters = self._meta[number % 2]
            fence()
            if self._header[0] <= number + 1:
                return version, counters


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors in place, in one call: with many small ones, a call each would cost more than the bytes."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def _view(raw: Tensor, offset: int, spec: TensorSpec) -> Tensor:
    return raw[offset : offset + spec.nbytes].view(spec.dtype).view(spec.shape)


class Mailbox:
    """Two slots through which one worker hands pushes to the server.

    A slot is free once the push in it has been acknowledged; push ``n`` uses slot ``n % 2``. Its number, the commit
    flag, is written last, so a push is there as a whole or not at all.

    Args:
        areas: Bytes of each tensor's payload.
        meta_bytes: Room for the pickled description of a push.
        fd: Descriptor of an existing mailbox.
    """

    def __init__(self, areas: Sequence[int], meta_bytes: int, fd: int | None = None) -> None:
        head = aligned(8 * _HEADER)
        slot = head + aligned(meta_bytes) + sum(aligned(n) for n in areas)
        self.segment = Segment(2 * slot, fd)
        raw = self.segment.bytes
        self._headers = [self.segment.words(i * slot, i * slot + 8 * _HEADER) for i in range(2)]
        self._meta = [self.segment.raw(i * slot + head, i * slot + head + meta_bytes) for i in range(2)]
        self._areas: list[list[Tensor]] = []
        starts = [head + aligned(meta_bytes)]
        for nbytes in areas:
            starts.append(starts[-1] + aligned(nbytes))
        for i in range(2):
            pairs = zip(starts, areas, strict=False)
            self._areas.append([raw[i * slot + start : i * slot + start + nbytes] for start, nbytes in pairs])
        # the gaps between areas are zero for ever
        self._spans = [[raw[i * slot + starts[0] : i * slot + end] for end in starts] for i in range(2)]

    def areas(self, sequence: int) -> list[Tensor]:
        """Return the payload areas of the slot of push ``sequence``, always the same objects for one slot."""
        return self._areas[sequence % 2]

    def span(self, sequence: int, count: int) -> Tensor:
        """Return the bytes of the first ``count`` areas of a slot, with the zeros between them."""
        return self._spans[sequence % 2][count]

    @contextlib.contextmanager
    def writing(self, sequence: int, meta: dict[str, Any], probe: Callable[[str], None]) -> Iterator[list[Tensor]]:
        """Fill the slot of push ``sequence`` (>= 1): yields the payload areas and commits on leaving.

        Raises:
            ValueError: If the description does not fit.
        """
        header, room = self._headers[sequence % 2], self._meta[sequence % 2]
        header[0] = 0
        fence()
        yield self._areas[sequence % 2]
        packed = pickle.dumps(meta)
        if len(packed) > len(room):
            raise ValueError(
                f"a push is described by {len(packed)} bytes, the mailbox has room for {len(room)}; "
                "use fewer optimizer parameter groups."
            )
        room[: len(packed)] = packed
        header[1] = len(packed)
        probe("before the flag")
        fence()
        header[0] = sequence

    def committed(self, sequence: int) -> tuple[dict[str, Any], list[Tensor]] | None:
        """Return description and payload areas of push ``sequence``, or None while it is not committed."""
        header = self._headers[sequence % 2]
        if header[0] != sequence:
            return None
        fence()
        return pickle.loads(self._meta[sequence % 2][: header[1]]), self._areas[sequence % 2]
