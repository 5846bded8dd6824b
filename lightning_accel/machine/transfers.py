"""Copies between host and device that the host need not wait for: pinned memory, side streams, marks.

One code for every device. On a CPU a copy is done when the call returns, there is no stream beside another, and memory
needs no pinning; on CUDA each of these is the real thing.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor


class Mark:
    """A point in the work that a device was given so far.

    Args:
        device: Whose; on a CPU it is passed at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def is_passed(self) -> bool:
        """Whether all work before it is done; does not wait."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Let the host wait until it is."""
        if self._event is not None:
            self._event.synchronize()


def send_to_host(x: Tensor) -> tuple[Tensor, Mark]:
    """Begin to copy a tensor to the host; returns the copy, and the mark from which on it may be looked at.

    Complexity: No host synchronization: torch makes a copy that nobody waits for in pinned memory.
    """
    copied = x.to("cpu", non_blocking=True)
    return copied, Mark(x.device)


def send_to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return a host's tensor on a device; what the device is given from now on sees it.

    Complexity: No host synchronization: it goes through pinned memory, which torch keeps until the copy is done.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=device.type != "cpu")


def pin(memory: Tensor, device: torch.device) -> bool:
    """Lock memory of the host into its place, so that a device copies it by itself; shared between processes or not.

    Args:
        memory: On the host, contiguous. `unpin` it before it is given up.
        device: That is going to read or write it.

    Returns:
        Whether it is pinned. Not on a CPU, and not where the system refuses (a limit on locked memory, say): copies are
        slower then, and the same.
    """
    if device.type != "cuda" or not memory.numel():
        return False
    runtime = torch.cuda.cudart()
    with torch.cuda.device(device):
        if runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0) == runtime.cudaError.success:
            return True
        with contextlib.suppress(RuntimeError):  # the next launch reports the refusal, which is no error of its own
            torch.zeros(1, device=device)
    return False


def unpin(memory: Tensor) -> None:
    """Take back what `pin` did."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


class Lane:
    """Copies beside the work of a device: on CUDA in a stream of their own, after all that was asked for before.

    Args:
        device: From or to which the copies go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pinned: list[Tensor] = []

    def pin(self, memory: Tensor) -> None:
        """Pin memory of the host as long as this lane is used."""
        if pin(memory, self.device):
            self._pinned.append(memory)

    def unpin(self) -> None:
        """Give up what was pinned."""
        for memory in self._pinned:
            unpin(memory)
        self._pinned = []

    def begin(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Begin to copy tensors, all at once; what the device is given from now on comes after it."""
        if not targets:
            return
        if self._stream is None:
            torch._foreach_copy_(list(targets), list(sources))
            return
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            torch._foreach_copy_(list(targets), list(sources), non_blocking=True)
        current.wait_stream(self._stream)

    def wait(self) -> None:
        """Let the host wait until all copies are done."""
        if self._stream is not None:
            self._stream.synchronize()

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Copy tensors and wait until that is done."""
        self.begin(targets, sources)
        self.wait()


def lane_of(tensors: Sequence[Tensor | None]) -> Lane:
    """Return a lane for tensors: beside the one CUDA device that all of them lie on, else a plain one."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    return Lane(devices.pop() if len(devices) == 1 else torch.device("cpu"))
