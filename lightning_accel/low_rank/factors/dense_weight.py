"""What a factored layer hands out as its dense weight: the product, watched for what people do to it."""

import copy
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_accel import torch_private
from lightning_accel.low_rank.factors.dense_gradient import dense_gradient


class Factored(Protocol):
    """What a handed-out weight asks of its layer."""

    place: str
    factor_names: tuple[str, ...]

    def settle(self) -> bool:
        """Become dense if something was done that factors can not follow; return whether this is still low rank."""


class _OfTensors(type(Tensor)):  # type: ignore[misc]
    """Let every tensor be an instance: `torch.testing` compares nothing but values of related classes."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Tensor)


class DenseWeight(Tensor, metaclass=_OfTensors):
    """The product of a layer's factors: an ordinary tensor, but that its gradient is the layer's.

    Hooks on it, and what is written into its gradient, make the layer dense, where they act as on any weight.
    """

    __torch_function__ = torch_private.no_torch_function  # as `nn.Parameter` has it

    @property
    def grad(self) -> Tensor | None:
        """Return the gradient as far as the factors' tell it, see `dense_gradient`; the dense one is never computed."""
        handed = self._of_layer()
        return super().grad if handed is None else handed.read_gradient()

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        handed = self._of_layer()
        if handed is None:
            torch_private.set_gradient(self, value)
        else:
            handed.set_gradient(value)

    @property
    def requires_grad(self) -> bool:
        """Whether this product needs a gradient; setting it freezes or thaws the factors."""
        return super().requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> "DenseWeight":
        """Freeze or thaw the factors, as it would the dense weight."""
        handed = self._of_layer()
        if handed is None:
            super().requires_grad_(requires_grad)
        else:
            handed.set_trainable(requires_grad)
        return self

    def register_post_accumulate_grad_hook(self, hook: Callable[[Tensor], None]) -> RemovableHandle:
        """Keep a hook for the weight that the layer becomes; torch has none for what is computed."""
        hooks = self.__dict__.setdefault("_later_hooks", OrderedDict())
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        return handle

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as a plain tensor."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Copy as a plain tensor."""
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def _of_layer(self) -> "HandedOut | None":
        """Return what knows the layer; None where the tensor has a gradient of its own."""
        handed: Callable[[], HandedOut | None] | None = self.__dict__.get("_handed")
        return None if handed is None or self.retains_grad else handed()


class HandedOut:
    """The memory of the product that was handed out as ``weight``, and a copy of it that nobody else has."""

    def __init__(self, layer: Factored, product: Tensor) -> None:
        self.layer = ref(layer)
        self.buffer = product.detach()
        self.pristine = self.buffer.clone()
        self.given: list[DenseWeight] = []
        self._gradient: tuple[Tensor, Tensor] | None = None  # as it was handed out, and a copy
        self._assigned: Tensor | None = None
        self._give(product)

    def give(self, product: Tensor) -> DenseWeight:
        """Return the product anew, in the memory in which it was handed out."""
        return self._give(_SameMemory.apply(product, self) if product.requires_grad else self.alias())

    def _give(self, tensor: Tensor) -> DenseWeight:
        tensor.__class__ = DenseWeight  # no view, which `as_subclass` makes; torch turns lazy parameters so, too
        assert isinstance(tensor, DenseWeight)
        tensor.__dict__["_handed"] = ref(self)
        self.given.append(tensor)
        return tensor

    def alias(self) -> Tensor:
        """Return a tensor in the same memory; no view, for autograd."""
        return self.buffer.new_empty(0).set_(self.buffer)  # type: ignore[call-overload]

    def has(self, value: object) -> bool:
        """Say whether a tensor lies in the memory."""
        return isinstance(value, Tensor) and value.data_ptr() == self.buffer.data_ptr()

    def written(self) -> Tensor | None:
        """Return what was written into the memory, or put in its place by ``weight.data = ...``; None if nothing."""
        replaced = [tensor.detach() for tensor in self.given if not self.has(tensor)]
        if replaced:
            return replaced[-1].clone()
        same = torch.equal(self.buffer.view(torch.uint8), self.pristine.view(torch.uint8))  # NaN equals itself
        return None if same else self.buffer.clone()

    def hooked(self) -> list[DenseWeight]:
        """Return what has hooks that want the dense weight's gradient."""
        return [tensor for tensor in self.given if torch_private.gradient_hooks_of(tensor) or _later_hooks(tensor)]

    def gradient(self) -> Tensor | None:
        """Return what was assigned to the gradient, or written into it; None if nothing."""
        if self._assigned is not None or self._gradient is None:
            return self._assigned
        given, pristine = self._gradient
        return None if torch.equal(given.view(torch.uint8), pristine.view(torch.uint8)) else given

    def move(self, hooked: list[DenseWeight], weight: nn.Parameter) -> None:
        """Let hooks act on the weight that the layer has become, and their handles go on working."""
        for tensor in hooked:
            torch_private.move_gradient_hooks(tensor, weight, _later_hooks(tensor))

    def read_gradient(self) -> Tensor | None:
        """Return the weight's gradient as far as those of the factors tell it, and say so."""
        layer: Any = self.layer()
        if layer is None or not layer.settle():
            return None if layer is None else layer.weight.grad
        factors = {name: getattr(layer, name) for name in layer.factor_names}
        with torch.autocast(self.buffer.device.type, enabled=False):
            gradient = dense_gradient(factors, {name: factor.grad for name, factor in factors.items()})
        if gradient is None:
            return None
        if not layer.gradient_read:
            layer.gradient_read = True
            warnings.warn(
                f"the gradient of the dense `weight` of {_named(layer)} is not computed where its factors are trained: "
                "`weight.grad` is the part of it that the factors see. Changing it makes the layer dense.",
                stacklevel=3,
            )
        if self._gradient is None or not torch.equal(self._gradient[1], gradient):
            self._gradient = gradient, gradient.clone()
        return self._gradient[0]

    def set_gradient(self, value: Tensor | None) -> None:
        """Clear the factors' gradients, too, or make the layer dense with the gradient."""
        layer: Any = self.layer()
        if layer is None:
            return
        if not layer.settle():
            layer.weight.grad = value
        elif value is None:
            self._gradient = None
            for name in layer.factor_names:
                getattr(layer, name).grad = None
        else:
            self._assigned = value
            layer.settle()

    def set_trainable(self, trainable: bool) -> None:
        """Freeze or thaw the factors, or the weight that the layer has become."""
        layer: Any = self.layer()
        if layer is not None:
            names = layer.factor_names if layer.settle() else ("weight",)
            for name in names:
                getattr(layer, name).requires_grad_(trainable)

    def is_over(self) -> bool:
        """Say whether nobody else holds the memory, so that nobody can write into it any more."""
        # what only this list, the loop and the counting function refer to is ours alone
        self.given = [tensor for tensor in self.given if sys.getrefcount(tensor) > 3]
        if self._gradient is not None and sys.getrefcount(self._gradient[0]) <= 2:
            self._gradient = None
        return not self.given and self._gradient is None and torch_private.storage_users(self.buffer) == 1


class _SameMemory(torch.autograd.Function):
    """Give a product the memory in which it was handed out before."""

    @staticmethod
    def forward(_: Any, __: Tensor, handed: HandedOut) -> Tensor:
        return handed.alias()

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _later_hooks(tensor: Tensor) -> "OrderedDict[int, Callable[[Tensor], None]]":
    return tensor.__dict__.get("_later_hooks", OrderedDict())


def _named(layer: Factored) -> str:
    return f"the low-rank layer `{layer.place}`" if layer.place else f"a {type(layer).__name__}"
