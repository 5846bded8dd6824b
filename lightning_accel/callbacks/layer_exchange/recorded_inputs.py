"""The inputs that layers get in a real training step."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_accel.lightning_private import has_compiled_parts
from lightning_accel.low_rank import eligible_layers


class RecordedInputs:
    """Remember the inputs of layers that could be factored, to run these layers again without the model.

    Args:
        module: Watched inside ``with``; the inputs are kept until `clear`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers, _ = eligible_layers(module)
        self._inputs: dict[str, list[Tensor]] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "RecordedInputs":
        """Begin to watch."""
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(functools.partial(self._note, name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _note(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor):
            self._inputs.setdefault(name, []).append(x.detach().requires_grad_(x.requires_grad))

    def replay(self, module: nn.Module, *, backward: bool = False) -> None:
        """Call each layer of ``module`` with what its namesake got, and backward through it if asked."""
        for name, inputs in self._inputs.items():
            layer = module.get_submodule(name)
            for x in inputs:
                y = layer(x)
                if backward and y.requires_grad:
                    y.backward(torch.ones_like(y))
                    x.grad = None


class RunningOrder:
    """The order in which the modules that own parameters run.

    Nothing is hooked where a part is compiled, as that would compile it anew: the order of the modules' names stands in
    for it. A wrong order only freezes less usefully, never wrongly.

    Args:
        module: Watched from now until `stop`.
    """

    def __init__(self, module: nn.Module) -> None:
        owners = {name: m for name, m in module.named_modules() if m._parameters}
        self._seen: dict[str, None] = {}
        self._handles: list[RemovableHandle] = []
        if has_compiled_parts(module):
            self._seen = dict.fromkeys(owners)
            return
        for name, owner in owners.items():
            self._handles.append(owner.register_forward_pre_hook(functools.partial(self._note, name)))

    def stop(self) -> tuple[str, ...]:
        """Stop watching and return the names of the modules that ran, the first one first."""
        for handle in self._handles:
            handle.remove()
        return tuple(self._seen)

    def _note(self, name: str, *_: object) -> None:
        self._seen.setdefault(name)
