"""Layers whose weights something other than an optimizer moves: momentum copies, target networks, averages."""

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor, nn

_ENTRIES = 4096  # of each weight are compared: enough to tell a copy, and cheap
_ALIKE = 0.5  # cosine; independent weights of 64 entries and more stay far below


def find_copies(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the layers that look like a network and its moving copy, each with the name of its counterpart.

    A copy that follows by averages (BYOL, MoCo, target networks) is paired with its source parameter by parameter, and
    averages of factors are no averages of weights: either side alone, or both, low rank would ruin it. Nothing but the
    values tells such a pair: weights of one shape that point the same way, of which one is frozen; or both trainable,
    under names that differ in more than numbers (``online.0``, ``target.0``; layers ``0`` and ``1`` of a stack are
    often cloned), unless both have a gradient. All layers below the two parts are paired, whatever their values are by
    now.

    Args:
        layers: Name to dense layer.
    """
    groups: dict[object, list[str]] = {}
    for name, layer in layers.items():
        weight = layer._parameters["weight"]
        assert weight is not None
        groups.setdefault((type(layer), tuple(weight.shape), weight.device), []).append(name)
    found: dict[str, str] = {}
    for names in groups.values():
        weights = {name: layers[name]._parameters["weight"] for name in names}
        for a, b in combinations(names, 2):
            one, other = weights[a], weights[b]
            assert one is not None
            assert other is not None
            if _may_be_copies(a, one, b, other) and alike(one, other):
                found |= _below(layers, *_roots(a, b))
    return found


def _may_be_copies(a: str, one: nn.Parameter, b: str, other: nn.Parameter) -> bool:
    if one.requires_grad != other.requires_grad:
        return True
    if not one.requires_grad or (one.grad is not None and other.grad is not None):
        return False
    return _without_numbers(a) != _without_numbers(b)


def alike(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors of one shape point the same way, as a weight and an average of it do."""
    x, y = (w.detach().flatten()[:_ENTRIES].double() for w in (one, other))
    norms = float(x.norm() * y.norm())
    if norms == 0.0:
        return one.requires_grad != other.requires_grad and torch.equal(x, y)
    return float(x @ y) > _ALIKE * norms


def _without_numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if not part.isdigit()]


def _roots(a: str, b: str) -> tuple[str, str]:
    """Return the two names without the parts that they end in alike."""
    one, other = a.split("."), b.split(".")
    while one and other and one[-1] == other[-1]:
        one.pop()
        other.pop()
    return ".".join(one), ".".join(other)


def _below(layers: Mapping[str, nn.Module], one: str, other: str) -> dict[str, str]:
    """Return the layers below one root that have a counterpart below the other, both ways."""
    found = {}
    for root, counter_root in ((one, other), (other, one)):
        for name in layers:
            if name == root or name.startswith(f"{root}." if root else ""):
                counterpart = f"{counter_root}{name[len(root) :]}" if root else f"{counter_root}.{name}"
                if counterpart.strip(".") in layers:
                    found[name] = counterpart.strip(".")
    return found
