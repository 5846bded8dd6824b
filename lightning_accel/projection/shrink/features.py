"""Input features that nobody reads: the layer that reads the network's input picks the others."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_accel.projection.shrink.readings import some_rows


class SelectedFeatures(nn.Linear):
    """A linear layer that reads only some features of its input; weights and bias keep their names.

    Made of a linear layer by `select_features`. ``in_features`` counts what it reads.
    """

    index: Tensor  # (in_features,)

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.Linear
        """Map ``(..., features)`` to ``(..., out_features)``."""
        return nn.functional.linear(input.index_select(-1, self.index), self.weight, self.bias)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{super().extra_repr()}, selected from its input"


def can_select(layer: nn.Module) -> bool:
    """Whether `select_features` can change a layer: a plain linear one with some columns of zeros, and others."""
    if type(layer) is not nn.Linear or is_parametrized(layer) or "forward" in layer.__dict__:
        return False
    if not isinstance(layer._parameters.get("weight"), nn.Parameter) or {*layer._parameters} != {"weight", "bias"}:
        return False
    dead = dead_inputs(layer)
    return bool(dead.any()) and not bool(dead.all())


def select_features(layer: nn.Linear) -> Tensor:
    """Let a layer read only features that have weights, in place, so that all who hold it see it; return them."""
    index = torch.nonzero(~dead_inputs(layer))[:, 0]
    weight = layer.weight
    layer.weight = nn.Parameter(weight.detach()[:, index].contiguous(), requires_grad=weight.requires_grad)
    layer.in_features = len(index)
    layer.register_buffer("index", index)
    layer.__class__ = SelectedFeatures
    return index


def reads_input(rows: Tensor, inputs: list[Tensor]) -> bool:
    """Whether ``rows``, of a layer's `Reading`, are the entries of one of the network's inputs."""
    width = rows.shape[1]
    return any(
        x.numel() % width == 0 and x.dtype == rows.dtype and torch.equal(some_rows(x.reshape(-1, width)), rows)
        for x in inputs
    )


def dead_inputs(layer: nn.Linear) -> Tensor:
    """Return a boolean ``(in_features,)`` of the features that no output reads."""
    return (layer.weight == 0).all(0)
