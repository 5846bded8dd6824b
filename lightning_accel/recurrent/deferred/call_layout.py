"""How a cell is called: where in its arguments inputs and states stand, and which result is which next state."""

import dataclasses
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_accel.recurrent.instance_forward import plain_forward

_PLAIN = (int, float, str, bool, type(None))


def flatten(value: Any, leaves: list[Any]) -> Any:
    """Append the leaves of nested tuples, lists, dicts, named tuples and dataclasses; return the nesting.

    The nesting of a leaf is ``None``; any other is a tuple that `unflatten` understands.
    """
    kind = type(value)
    if kind is tuple or kind is list:
        return (kind.__name__, *[flatten(v, leaves) for v in value])
    if kind is dict:
        return ("dict", tuple(value), *[flatten(v, leaves) for v in value.values()])
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return ("named", kind, *[flatten(v, leaves) for v in value])
    if _is_simple_dataclass(value):
        names = tuple(field.name for field in dataclasses.fields(value))
        return ("data", kind, names, *[flatten(getattr(value, name), leaves) for name in names])
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
    if kind == "named":
        made, *parts = parts
        return made(*[unflatten(part, leaves) for part in parts])
    if kind == "data":
        made, names, *parts = parts
        return made(**{name: unflatten(part, leaves) for name, part in zip(names, parts, strict=True)})
    values = [unflatten(part, leaves) for part in parts]
    return tuple(values) if kind == "tuple" else values


def as_plain(value: Any) -> Any:
    """Return a nesting as lists, numbers and texts, which every way of loading a checkpoint takes."""
    if isinstance(value, type):
        return f"class {value.__module__}:{value.__qualname__}"
    if isinstance(value, dict):
        return {name: as_plain(v) for name, v in value.items()}
    return [as_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def as_tuples(value: Any) -> Any:
    """Undo `as_plain`.

    Raises:
        AttributeError, ImportError: If a class in it is gone.
    """
    if isinstance(value, str) and value.startswith("class "):
        module, _, path = value.removeprefix("class ").partition(":")
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
        return found
    return tuple(as_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _is_simple_dataclass(value: Any) -> bool:
    kind = type(value)
    if not dataclasses.is_dataclass(kind) or isinstance(value, (dict, nn.Module, Tensor)):
        return False
    return all(field.init for field in dataclasses.fields(kind)) and not hasattr(kind, "__post_init__")


@dataclass(frozen=True)
class CallLayout:
    """The form of one cell's calls.

    Attributes:
        arguments: Nesting of ``(args, kwargs)``.
        x_places: Indices of the arguments' leaves that change freely.
        state_places: Indices of those that are results of the call before.
        state_slots: For each of them, the index of that result among the distinct ones.
        fixed: Index and value of leaves that are no tensors.
        results: Nesting of what the cell returns.
        unique: For each of its leaves, which distinct tensor it is; -1 for ``None``.
    """

    arguments: Any
    x_places: tuple[int, ...]
    state_places: tuple[int, ...]
    state_slots: tuple[int, ...]
    fixed: tuple[tuple[int, Any], ...]
    results: Any
    unique: tuple[int, ...]

    @property
    def num_outputs(self) -> int:
        """Number of distinct tensors that a call returns."""
        return max(self.unique) + 1

    def split(self, leaves: Sequence[Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        """Return a call's inputs and states; ``None`` if it is of another form."""
        if len(leaves) != len(self.x_places) + len(self.state_places) + len(self.fixed):
            return None
        if any(type(leaves[k]) is not type(v) or leaves[k] != v for k, v in self.fixed):
            return None
        xs = tuple(leaves[k] for k in self.x_places)
        states = tuple(leaves[k] for k in self.state_places)
        if not all(isinstance(t, Tensor) and t.dim() > 1 for t in (*xs, *states)):
            return None
        return xs, states

    def result(self, outputs: Sequence[Tensor]) -> Any:
        """Return what a call returns, made of its distinct tensors."""
        return unflatten(self.results, iter([None if slot < 0 else outputs[slot] for slot in self.unique]))

    def outputs(self, result: Any) -> list[Tensor]:
        """Return the distinct tensors of what a call returned.

        Raises:
            TypeError: If it is of another form.
        """
        found: list[Any] = []
        if flatten(result, found) != self.results or len(found) != len(self.unique):
            raise TypeError("its results differ in form")
        return [found[self.unique.index(slot)] for slot in range(self.num_outputs)]

    def __call__(
        self, cell: nn.Module, xs: Sequence[Tensor], states: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Make one step of the cell, without what stands before its forward."""
        leaves: dict[int, Any] = dict(self.fixed)
        leaves |= dict(zip(self.x_places, xs, strict=True)) | dict(zip(self.state_places, states, strict=True))
        args, kwargs = unflatten(self.arguments, iter([leaves[k] for k in sorted(leaves)]))
        outputs = self.outputs(plain_forward(cell)(*args, **kwargs))
        return outputs, [outputs[slot] for slot in self.state_slots]


def learn_layout(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, previous: Sequence[Any]) -> CallLayout:
    """Learn the form of a call whose arguments hold results of the call before.

    Args:
        args: Of the call.
        kwargs: Of the call.
        result: Of the call.
        previous: Leaves of the result of the call before.

    Raises:
        TypeError: If it has a form that can not be repeated; the message says why.
    """
    leaves: list[Any] = []
    arguments = flatten((args, kwargs), leaves)
    found: list[Any] = []
    results = flatten(result, found)
    if not all(isinstance(f, Tensor) or f is None for f in found):
        raise TypeError("it returns something else than tensors")
    if len(previous) != len(found):
        raise TypeError("its results differ in form")
    unique = distinct_tensors(found)
    places: dict[int, int] = {}
    for k, leaf in enumerate(leaves):
        for slot, old in zip(unique, previous, strict=True):
            if isinstance(leaf, Tensor) and leaf is old:
                places[k] = slot
                break
    if any(slot < 0 for slot in places.values()):
        raise TypeError("its results differ in form")
    tensors = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and k not in places]
    fixed = tuple((k, leaf) for k, leaf in enumerate(leaves) if not isinstance(leaf, Tensor))
    if any(not isinstance(v, _PLAIN) for _, v in fixed):
        raise TypeError("an argument of it is neither a tensor nor a plain value")
    if not tensors:
        raise TypeError("it takes nothing but its own result")
    return CallLayout(arguments, tuple(tensors), tuple(places), tuple(places.values()), fixed, results, unique)


def distinct_tensors(leaves: Sequence[Any]) -> tuple[int, ...]:
    """Return for each leaf which distinct tensor it is, -1 for what is none."""
    distinct: list[Any] = []
    unique = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            unique.append(-1)
            continue
        known = next((k for k, d in enumerate(distinct) if d is leaf), None)
        unique.append(len(distinct) if known is None else known)
        if known is None:
            distinct.append(leaf)
    return tuple(unique)


_LSTM = CallLayout(
    ("tuple", ("tuple", None, ("tuple", None, None)), ("dict", ())),
    (0,),
    (1, 2),
    (0, 1),
    (),
    ("tuple", None, None),
    (0, 1),
)
_SINGLE = CallLayout(("tuple", ("tuple", None, None), ("dict", ())), (0,), (1,), (0,), (), None, (0,))


def torch_layout(cell: nn.Module) -> CallLayout:
    """Return the layout of ``nn.LSTMCell``, ``nn.GRUCell`` or ``nn.RNNCell``, whose ``hx`` may be left out."""
    return _LSTM if isinstance(cell, nn.LSTMCell) else _SINGLE
