"""Recognise loops that are elementwise and affine in their only state, so that a scan can compute them."""

from collections.abc import Callable, Sequence

from torch import fx

from lightning_accel.recurrent.compiler.rewrite import Node, aten, shape

# Factor of the state and summand, as expressions of a block's values; ``None`` is zero.
Form = tuple[str | None, str | None]


def is_affine(nodes: Sequence[Node], states: Sequence[Node]) -> bool:
    """Tell whether a forward loop is elementwise and affine in the only state it holds."""
    inside = [s for s in states if s in nodes]
    calls = [n for n in nodes if n.op != "placeholder"]
    return affine_forms(calls, inside, lambda n: n.name, lambda _: True) is not None


def affine_forms(
    nodes: Sequence[Node],
    states: Sequence[Node],
    name: Callable[[Node], str],
    is_block: Callable[[Node], bool],
) -> dict[Node, Form] | None:
    """Write every node of a loop as ``factor * state + summand``; ``None`` if one can not be."""
    if len(states) != 1:
        return None
    (state,) = states
    forms: dict[Node, Form] = {state: ("1.0", None)}
    for node in nodes:
        if node.kwargs or shape(node) != shape(state):
            return None
        parts: list[Form] = []
        for argument in node.args:
            if isinstance(argument, fx.Node):
                if argument not in forms and argument in nodes:
                    return None
                missing = len(shape(state)) - len(shape(argument))
                aligned = (
                    f"{name(argument)}[:{', None' * missing}]" if missing and is_block(argument) else name(argument)
                )
                parts.append(forms.get(argument) or (None, aligned))
            elif isinstance(argument, (int, float)):
                parts.append((None, repr(float(argument))))
            else:
                return None
        form = _combine(node, parts)
        if form is None:
            return None
        forms[node] = form
    return forms


def _combine(node: Node, parts: list[Form]) -> Form | None:
    if node.target in (aten.add.Tensor, aten.add.Scalar):
        return _plus(parts[0], parts[1])
    if node.target in (aten.sub.Tensor, aten.sub.Scalar):
        return _plus(parts[0], _times(parts[1], (None, "-1.0")))
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        return _times(parts[0], parts[1])
    if node.target is aten.addcmul.default:
        product = _times(parts[1], parts[2])
        return None if product is None else _plus(parts[0], product)
    if node.target is aten.neg.default:
        return _times(parts[0], (None, "-1.0"))
    return parts[0] if node.target is aten.clone.default else None


def _plus(left: Form, right: Form | None) -> Form | None:
    return None if right is None else (_sum(left[0], right[0]), _sum(left[1], right[1]))


def _sum(left: str | None, right: str | None) -> str | None:
    if left is None or right is None:
        return left or right
    return f"({left} + {right})"


def _times(left: Form, right: Form) -> Form | None:
    if left[0] is not None and right[0] is not None:
        return None
    if left[0] is not None:
        left, right = right, left
    scale = left[1]
    if scale is None:
        return (None, None)
    return tuple(None if part is None else f"({scale} * {part})" for part in right)  # type: ignore[return-value]
