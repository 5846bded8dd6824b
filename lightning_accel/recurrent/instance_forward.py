"""Replace the ``forward`` of one module instance, so that copies and pickles of it are as if nothing had been done."""

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


class InstanceForward:
    """Stand in the place of one instance's ``forward``.

    Args:
        module: The instance.
        call: Called instead; ``original`` is what it replaces.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self.module, self.call, self._removed = module, call, False
        self.own = module.__dict__.get("forward")
        self.original: Callable[..., Any] = module.forward
        module.__dict__["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make the call."""
        return self.call(*args, **kwargs)

    def stands_first(self) -> bool:
        """Tell whether nobody but others of this kind stands before it: what a user put there calls it for a part."""
        top = self.module.__dict__.get("forward")
        while top is not self and isinstance(top, InstanceForward):
            top = top.own
        return top is self

    def remove(self) -> None:
        """Put back what was there; under another one, pass calls through until that one goes."""
        self.call, self._removed = self.original, True
        top = self.module.__dict__.get("forward")
        while isinstance(top, InstanceForward) and top._removed:
            top = top.own
        if top is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.__dict__["forward"] = top

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """Give the copy of the module its plain forward."""
        if self.own is not None:
            return copy.deepcopy(self.own, memo)
        return MethodType(type(self.module).forward, memo.get(id(self.module), self.module))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the plain forward of the unpickled module."""
        return getattr, (self.module, "forward") if self.own is None else (self.own, "__call__")


def plain_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the module's forward without what `InstanceForward` put before it."""
    forward = module.forward
    while isinstance(forward, InstanceForward):
        forward = forward.original
    return forward
