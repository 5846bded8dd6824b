"""Memory that calls of a schedule use one after another: fresh pages cost more than what is done in them."""

import math
import threading
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

_SPARES = 3  # of one kind: as many as calls commonly lie between a forward and its backward (directions, two views)


class Workspace:
    """Named buffers of one call. A buffer lies at the front of the memory of the largest that had its name.

    So sequences of many lengths and batches of many sizes use the memory of the largest, and hold no more.

    Args:
        device: Of the buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: dict[str, Tensor] = {}
        self._views: dict[str, Tensor] = {}

    def buffer(self, name: str, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a dense tensor of this size, with anything in it."""
        view = self._views.get(name)
        if view is not None and view.shape == size and view.dtype is dtype:
            return view
        count = math.prod(size)
        memory = self._memory.get(name)
        if memory is None or memory.numel() < count or memory.dtype is not dtype:
            memory = self._memory[name] = torch.empty(count, dtype=dtype, device=self._device)
        view = self._views[name] = memory[:count].view(tuple(size))
        return view

    def two_buffers(self, name: str, length: int, size: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """Return ``length`` tensors that are two buffers in turn."""
        pair = [self.buffer(f"{name}.{k}", size, dtype) for k in range(2)]
        return [pair[k % 2] for k in range(length)]


class SpareWorkspaces:
    """Workspaces that no call uses now. Threads may take and leave them at the same time.

    Args:
        device: Of their buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._spare: dict[Hashable, list[Workspace]] = {}

    def take(self, kind: Hashable) -> Workspace:
        """Take a workspace that an earlier call of this kind left, or a new one."""
        with self._lock:
            left = self._spare.get(kind)
            return left.pop() if left else Workspace(self._device)

    def leave(self, kind: Hashable, workspace: Workspace) -> None:
        """Leave a workspace for a later call; nobody else may hold a part of it that will be read again."""
        with self._lock:
            left = self._spare.setdefault(kind, [])
            if len(left) < _SPARES:
                left.append(workspace)

    def clear(self) -> None:
        """Give all memory back; the next calls take fresh pages."""
        with self._lock:
            self._spare.clear()
