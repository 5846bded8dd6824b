"""What all factored layers share: the dense weight as it is read and written, and how they are made."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel import torch_private
from lightning_accel.low_rank.factors.dense_weight import DenseWeight, HandedOut
from lightning_accel.low_rank.in_place import become

DenseLayer = nn.Linear | nn.Conv1d | nn.Conv2d


class FactoredLayer(nn.Module):
    """A layer whose dense weight is the product of factors.

    ``weight`` is that product. Reading it is right wherever a dense weight may be read: gradients reach the factors.
    What is *written* into it (a constraint, a merged adapter, an initialization) can in general be no product of such
    factors, so the layer then becomes the dense layer with what was written, the same object as before, and warns. It
    does so when it is next used: called, read, saved, copied or moved. Gradient hooks on it, and what is written into
    its ``grad``, make it dense as well; ``weight.grad`` by itself is what the factors' gradients tell of the dense one.

    Attributes:
        place: Name of the layer in its model, for messages; empty if unknown.
        followed: Whether somebody looks after the layer, and will say so when it becomes dense.
        gradient_read: Whether it was said what ``weight.grad`` is.
    """

    factor_names: tuple[str, ...] = ()
    own_attributes: tuple[str, ...] = ("place", "followed", "gradient_read", "_handed_out")
    bias: nn.Parameter | None
    place: str
    followed: bool
    gradient_read: bool

    def __init__(self) -> None:
        super().__init__()
        self.place = ""
        self.followed = False
        self.gradient_read = False
        self._handed_out: HandedOut | None = None

    @property
    def weight(self) -> Tensor:
        """The dense weight, multiplied anew at each access; for writing, see the class."""
        if not self.settle():
            return self._parameters["weight"]  # type: ignore[return-value]
        if torch.is_inference_mode_enabled() and not torch.compiler.is_compiling():
            with torch.inference_mode(False), torch.no_grad():  # tensors of that mode can not be watched
                return self.weight
        product = self._product()
        if not _can_be_written(product):
            return product
        product = product.contiguous()
        handed = self._handed_out
        if handed is None or not torch.equal(handed.pristine, product.detach()):
            self._handed_out = HandedOut(self, product)
            return product
        handed.is_over()  # forgets what nobody holds
        return handed.give(product)

    def _product(self) -> Tensor:
        """Return the dense weight in the type of the factors, as parameters have it inside autocast, too."""
        factors = {name: getattr(self, name) for name in self.factor_names}
        device = factors["factor_in"].device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return self.product(factors)
        with torch.autocast(device, enabled=False):
            return self.product(factors)

    @staticmethod
    def product(factors: Mapping[str, Tensor]) -> Tensor:
        """Multiply factors of this layer's shapes into the dense weight."""
        raise NotImplementedError

    def dense_layer(self, weight: nn.Parameter) -> DenseLayer:
        """Return a dense layer of these settings with ``weight`` and this layer's bias and mode."""
        raise NotImplementedError

    def settle(self) -> bool:
        """Become dense if ``weight`` was written into since it was handed out; return whether this is still low rank.

        Until nobody holds the memory that was handed out, each call compares it.
        """
        handed = self._handed_out
        if handed is None:
            return True
        if torch_private.is_jit_tracing():
            with torch_private.not_traced():
                return self.settle()
        value, hooked, gradient = handed.written(), handed.hooked(), handed.gradient()
        if value is None and not hooked and gradient is None:
            del hooked
            if handed.is_over():
                self._handed_out = None
            return True
        trainable = self._trains()
        with torch.inference_mode(False), torch.no_grad():  # a tensor of inference mode could not be trained
            now = self._product().detach()
            value = now if value is None else value.clone()
            if value is not now and not torch.equal(now, handed.pristine):  # the factors have moved on meanwhile
                value += now - handed.pristine
            weight = nn.Parameter(value, requires_grad=trainable)
        name = f"`{self.place}`" if self.place else f"a {type(self).__name__} of shape {tuple(value.shape)}"
        followed = self.followed
        become(self, self.dense_layer(weight))
        handed.move(hooked, weight)
        weight.grad = gradient
        if not followed:
            what = "was written into" if not hooked else "got a gradient hook"
            what = what if gradient is None else "got another gradient"
            warnings.warn(
                f"the `weight` of the low-rank layer {name} {what}, which its factors can not follow: it is "
                "dense again, with what was written. If it goes on training, give the new weight to the optimizer; "
                "keep layers whose weight is constrained or merged dense (`exclude`).",
                stacklevel=3,
            )
        return False

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Become dense with new values, as the dense layer draws them; factors made by hand are drawn anew."""
        if not self.settle():
            type(self).reset_parameters(self)
            return
        weight = self.weight
        if not self.place:  # low rank on purpose
            reset_factors(self, fan_in=weight[0].numel())
            if self.bias is not None:
                self.bias.zero_()
            return
        dense = self.dense_layer(nn.Parameter(torch.empty_like(weight)))
        dense.reset_parameters()  # the bias, too: it is the same one
        weight.copy_(dense.weight)
        self.settle()

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign; a Parameter that is assigned to ``weight`` makes the layer dense."""
        if name != "weight":
            super().__setattr__(name, value)
        elif isinstance(value, nn.Parameter):
            become(self, self.dense_layer(value))
        elif self._handed_out is None or not self._handed_out.has(value):  # else the end of `layer.weight += x`
            raise TypeError(
                f"`weight` must be a Parameter, got {type(value).__name__}; write into it, or assign "
                "torch.nn.Parameter(value)."
            )

    def register_parameter(self, name: str, param: Any) -> None:
        """Register; the weight under another name, as pruning does it, makes the layer dense."""
        if type(param) is DenseWeight:
            become(self, self.dense_layer(nn.Parameter(param.detach().clone(), requires_grad=self._trains())))
            param = self._parameters["weight"]
        nn.Module.register_parameter(self, name, param)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy or pickle what was written, too, and no memory that others hold."""
        if self.settle():
            self.__dict__["_handed_out"] = None
        return super(nn.Module, self).__reduce_ex__(protocol)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.settle()
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        """Become dense where a dense weight comes in; whole networks may have adapted before, parts of one have not."""
        if self.settle() and f"{prefix}weight" in state_dict and f"{prefix}factor_in" not in state_dict:
            become(self, self.dense_layer(nn.Parameter(self.weight.detach().clone(), requires_grad=self._trains())))
        nn.Module._load_from_state_dict(self, state_dict, prefix, *others)

    def _trains(self) -> bool:
        return any(getattr(self, name).requires_grad for name in self.factor_names)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FactoredLayer":
        if self.settle():
            self._handed_out = None
        return nn.Module._apply(self, fn, recurse)


def is_low_rank(layer: nn.Module) -> bool:
    """Say whether a layer still has factors; a write or a hook, of the same call even, may have made it dense."""
    return isinstance(layer, FactoredLayer) and (layer._handed_out is None or layer.settle())


def _can_be_written(product: Tensor) -> bool:
    """Say whether what is handed out can be watched: nothing traces, and the memory is real."""
    return not (
        torch.compiler.is_compiling()
        or torch_private.is_jit_tracing()
        or type(product) is not Tensor
        or product.device.type == "meta"
        or product.is_inference()
        or torch_private.active_transform()
        or torch_private.active_mode()
    )


def check_sizes(**sizes: int) -> None:
    """Refuse sizes below 1, by their names."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{name}` must be >= 1, got {size}.")


def add_bias(layer: nn.Module, size: int | None, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """Register a bias of zeros, or none."""
    bias = None if size is None else nn.Parameter(torch.zeros(size, device=device, dtype=dtype))
    layer.register_parameter("bias", bias)


@torch.no_grad()
def reset_factors(layer: nn.Module, *, fan_in: int) -> None:
    """Draw factors whose product has the variance 1 / (3 fan_in) that torch gives a dense weight, evenly split."""
    factors = [p for name, p in layer.named_parameters(recurse=False) if name != "bias"]
    paths = factors[0].shape[0] * (factors[1].shape[0] if len(factors) == 3 else 1)
    deviation = (1.0 / (3.0 * fan_in * paths)) ** (0.5 / len(factors))
    for factor in factors:
        if factor.device.type != "meta":
            factor.normal_(0.0, deviation)
