"""Memory for large results on CPU: huge pages, and the block of the last result that was dropped.

Writing to memory that the operating system has just given takes about three times as long as to memory in use, for it
is cleared page by page first; on a virtual machine, whose host may have to find it, up to ten times as long.
"""

import mmap
import weakref

import torch
from torch import Tensor

_HUGE = 1 << 23  # bytes; from here on huge pages save more than rounding up to them wastes
_HAS = hasattr(mmap, "MADV_HUGEPAGE") and hasattr(mmap, "MADV_FREE")
_idle: list[mmap.mmap] = []  # at most one block, which the operating system may take back whenever it wants


def empty_like_dense(x: Tensor) -> Tensor:
    """Return an uninitialized tensor with the strides of ``x`` where they are dense.

    A large one on CPU lies in huge pages, where the operating system gives them to those who ask; once it is dropped,
    its memory serves the next result of the same size, unless the operating system has needed it in the meantime.
    """
    size = x.numel() * x.element_size()
    if x.device.type != "cpu" or size < _HUGE or not _HAS:
        return torch.empty_like(x, memory_format=torch.preserve_format)
    memory = _take(size)
    view = memoryview(memory)
    weakref.finalize(view, _give_back, memory).atexit = False
    storage = torch.frombuffer(view, dtype=x.dtype).untyped_storage()  # which keeps `view`
    strides = torch.empty_like(x, device="meta", memory_format=torch.preserve_format).stride()
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(storage, 0, x.shape, strides)


def _take(size: int) -> mmap.mmap:
    try:
        memory = _idle.pop()
    except IndexError:
        memory = None
    if memory is not None and len(memory) == size:
        return memory
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _give_back(memory: mmap.mmap) -> None:
    """Keep a block whose last tensor is gone, and let the operating system have it before it runs short."""
    memory.madvise(mmap.MADV_FREE)
    _idle[:] = [memory]
