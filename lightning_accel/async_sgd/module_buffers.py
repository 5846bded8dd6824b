"""The buffers of a worker's module, where a forward pass may put another tensor into the place of one."""

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_accel.async_sgd.policy.buffers import buffer_roles


def give_buffers_own_memory(module: nn.Module) -> None:
    """Copy each buffer of which several elements are one place in memory (``expand``), so that it can be written to."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if _shares_elements(buffer):
                setattr(part, name, buffer.clone(memory_format=torch.contiguous_format))


def _shares_elements(buffer: Tensor) -> bool:
    if is_lazy(buffer) or buffer.layout != torch.strided:
        return False
    return any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))


class ModuleBuffers:
    """Find the tensors that a module's buffers are now.

    Args:
        module: Whose they are; without, the given tensors are what they are.
        buffers: All buffers by name, as the run knows them.

    Attributes:
        roles: Of each, see `take_buffers`.
    """

    def __init__(self, module: nn.Module | None, buffers: dict[str, Tensor]) -> None:
        self.roles = buffer_roles(module, list(buffers))
        self._known = dict(buffers)
        parts = {} if module is None else dict(module.named_modules())
        splits = [name.rpartition(".") for name in buffers]
        self._places = [(parts.get(owner), leaf) for owner, _, leaf in splits]

    def now(self) -> dict[str, Tensor]:
        """Return the buffers by name.

        One that has got another shape or dtype cannot go to the server any more: the last that could stands for it.
        """
        for (name, known), (part, leaf) in zip(list(self._known.items()), self._places, strict=True):
            found = getattr(part, leaf, None)
            if isinstance(found, Tensor) and found is not known:
                same = (found.shape, found.dtype, found.layout) == (known.shape, known.dtype, known.layout)
                self._known[name] = found if same and not _shares_elements(found) else known
        return self._known
