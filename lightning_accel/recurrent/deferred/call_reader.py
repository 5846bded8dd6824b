"""Functions that take a cell's calls apart and put their results together, written for one form of call.

Loops make such a call at every time step; going through the nesting each time would cost as much as all that is checked
of it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_accel.recurrent.deferred.call_layout import CallLayout

Found = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


class _Text:
    """Python text of one function."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.leaves: list[str] = []
        self.space: dict[str, Any] = {"Tensor": Tensor}
        self._names = 0

    def name(self) -> str:
        self._names += 1
        return f"v{self._names}"

    def constant(self, value: Any) -> str:
        name = f"c{len(self.space)}"
        self.space[name] = value
        return name

    def refuse_if(self, condition: str) -> None:
        self.lines.append(f"if {condition}: return None")

    def take_apart(self, nesting: Any, value: str) -> None:
        """Write what takes ``value`` apart as `call_layout.flatten` would have to find it."""
        if nesting is None:
            self.leaves.append(value)
            return
        kind, *parts = nesting
        if kind == "dict":
            keys, *parts = parts
            self.refuse_if(f"type({value}) is not dict or tuple({value}) != {self.constant(keys)}")
            source = f"{value}.values()"
        elif kind == "data":
            made, attributes, *parts = parts
            self.refuse_if(f"type({value}) is not {self.constant(made)}")
            source = "(" + "".join(f"{value}.{attribute}, " for attribute in attributes) + ")"
        else:
            made = parts.pop(0) if kind == "named" else {"tuple": tuple, "list": list}[kind]
            self.refuse_if(f"type({value}) is not {self.constant(made)} or len({value}) != {len(parts)}")
            source = value
        names = [self.name() for _ in parts]
        if names:
            self.lines.append(f"{', '.join(names)}, = {source}")
        for part, name in zip(parts, names, strict=True):
            self.take_apart(part, name)

    def put_together(self, nesting: Any, leaves: list[str]) -> str:
        """Return the expression that nests the leaves."""
        if nesting is None:
            return leaves.pop(0)
        kind, *parts = nesting
        if kind == "dict":
            keys, *parts = parts
            return (
                "{"
                + "".join(f"{key!r}: {self.put_together(p, leaves)}, " for key, p in zip(keys, parts, strict=True))
                + "}"
            )
        if kind == "data":
            made, attributes, *parts = parts
            pairs = zip(attributes, parts, strict=True)
            return f"{self.constant(made)}({', '.join(f'{name}={self.put_together(p, leaves)}' for name, p in pairs)})"
        opened = f"{self.constant(parts.pop(0))}(" if kind == "named" else "(" if kind == "tuple" else "["
        inside = "".join(f"{self.put_together(part, leaves)}, " for part in parts)
        return f"{opened}{inside}{']' if kind == 'list' else ')'}"

    def function(self, header: str) -> Any:
        body = "\n    ".join(self.lines)
        exec(compile(f"def written({header}):\n    {body}\n", "<call of a recurrent cell>", "exec"), self.space)
        return self.space["written"]


def call_reader(layout: CallLayout) -> Callable[[tuple[Any, ...], dict[str, Any]], Found | None]:
    """Return what does ``layout.split`` of a call's arguments, but for a look at its states.

    The results of the call before, which these are in a loop, have been looked at; see `is_batched` for all others.
    """
    text = _Text()
    _, args, kwargs = layout.arguments
    text.take_apart(args, "args")
    text.take_apart(kwargs, "kwargs")
    for place, value in layout.fixed:
        leaf = text.leaves[place]
        text.refuse_if(f"type({leaf}) is not {text.constant(type(value))} or {leaf} != {text.constant(value)}")
    xs, states = ([text.leaves[k] for k in places] for places in (layout.x_places, layout.state_places))
    for leaf in xs:
        text.refuse_if(f"not isinstance({leaf}, Tensor) or {leaf}.dim() < 2")
    text.lines.append(f"return ({''.join(f'{x}, ' for x in xs)}), ({''.join(f'{s}, ' for s in states)})")
    found: Callable[[tuple[Any, ...], dict[str, Any]], Found | None] = text.function("args, kwargs")
    return found


def is_batched(values: Sequence[Any]) -> bool:
    """Tell whether all values are tensors of at least two dimensions."""
    return all(isinstance(value, Tensor) and value.dim() > 1 for value in values)


def result_writer(layout: CallLayout) -> Callable[[Sequence[Tensor]], Any]:
    """Return what does ``layout.result`` of a call's distinct tensors."""
    text = _Text()
    leaves = ["None" if slot < 0 else f"outputs[{slot}]" for slot in layout.unique]
    text.lines.append(f"return {text.put_together(layout.results, leaves)}")
    found: Callable[[Sequence[Tensor]], Any] = text.function("outputs")
    return found
