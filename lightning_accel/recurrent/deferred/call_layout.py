"""How a cell is called: where in its arguments inputs and states stand, and which result is which next state."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_accel.recurrent.instance_forward import plain_forward


def flatten(value: Any, leaves: list[Any]) -> Any:
    """Append the leaves of nested tuples, lists and dicts to ``leaves``; return the nesting, ``None`` for a leaf.

    The nesting is made of tuples and strings, so that it can be saved.
    """
    kind = type(value)
    if kind is tuple or kind is list:
        return (kind.__name__, *[flatten(v, leaves) for v in value])
    if kind is dict:
        return ("dict", tuple(value), *[flatten(v, leaves) for v in value.values()])
    leaves.append(value)
    return None


def unflatten(nesting: Any, leaves: Any) -> Any:
    """Undo `flatten`; ``leaves`` is an iterator."""
    if nesting is None:
        return next(leaves)
    kind, *parts = nesting
    if kind == "dict":
        names, *parts = parts
        return {name: unflatten(part, leaves) for name, part in zip(names, parts, strict=True)}
    values = [unflatten(part, leaves) for part in parts]
    return tuple(values) if kind == "tuple" else values


@dataclass(frozen=True)
class CallLayout:
    """The form of one cell's calls.

    Attributes:
        arguments: Nesting of ``(args, kwargs)``.
        x_places: Indices of the arguments' leaves that change freely.
        state_places: Indices of those that are results of the call before.
        state_slots: For each of them, the index of that result.
        fixed: Index and value of leaves that are no tensors.
        results: Nesting of what the cell returns.
        unique: For each of its leaves, which distinct tensor it is.
    """

    arguments: Any
    x_places: tuple[int, ...]
    state_places: tuple[int, ...]
    state_slots: tuple[int, ...]
    fixed: tuple[tuple[int, Any], ...]
    results: Any
    unique: tuple[int, ...]

    def split(self, leaves: Sequence[Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        """Return a call's inputs and states; ``None`` if it is of another form."""
        if any(type(leaves[k]) is not type(v) or leaves[k] != v for k, v in self.fixed):
            return None
        xs = tuple(leaves[k] for k in self.x_places)
        states = tuple(leaves[k] for k in self.state_places)
        if not all(isinstance(t, Tensor) and t.dim() > 1 for t in (*xs, *states)):
            return None
        return xs, states

    def __call__(
        self, cell: nn.Module, xs: Sequence[Tensor], states: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Make one step of the cell, without what stands before its forward."""
        leaves: dict[int, Any] = dict(self.fixed)
        leaves |= dict(zip(self.x_places, xs, strict=True)) | dict(zip(self.state_places, states, strict=True))
        args, kwargs = unflatten(self.arguments, iter([leaves[k] for k in sorted(leaves)]))
        found: list[Tensor] = []
        flatten(plain_forward(cell)(*args, **kwargs), found)
        outputs = [found[self.unique.index(k)] for k in range(len(set(self.unique)))]
        return outputs, [outputs[slot] for slot in self.state_slots]


def learn_layout(
    args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, previous: Sequence[Any]
) -> CallLayout | None:
    """Learn the form of a call whose arguments hold results of the call before; ``None`` if they hold none.

    Args:
        args: Of the call.
        kwargs: Of the call.
        result: Of the call.
        previous: Leaves of the result of the call before.
    """
    leaves: list[Any] = []
    arguments = flatten((args, kwargs), leaves)
    found: list[Any] = []
    results = flatten(result, found)
    distinct: list[Any] = []
    unique = []
    for leaf in found:
        known = next((k for k, d in enumerate(distinct) if d is leaf), None)
        unique.append(len(distinct) if known is None else known)
        if known is None:
            distinct.append(leaf)
    places: dict[int, int] = {}
    for k, leaf in enumerate(leaves):
        for j, old in enumerate(previous):
            if isinstance(leaf, Tensor) and leaf is old:
                places[k] = unique[j] if j < len(unique) else -1
                break
    if not places or len(previous) != len(found) or not all(isinstance(f, Tensor) for f in found):
        return None
    tensors = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and k not in places]
    fixed = tuple((k, leaf) for k, leaf in enumerate(leaves) if not isinstance(leaf, Tensor))
    if any(not isinstance(v, (int, float, str, bool, type(None))) for _, v in fixed) or not tensors:
        return None
    return CallLayout(arguments, tuple(tensors), tuple(places), tuple(places.values()), fixed, results, tuple(unique))
