"""The order of one step's calls in C: what can be written, and which calls share a region and a pass over a row.

Regions alternate: row operations of all streams have even numbers, products of matrices odd ones. Within a region of
rows, a call begins in the first pass in which all elements that it reads exist.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from lightning_accel.machine.c_functions import REALS
from lightning_accel.recurrent.compiler.emit_c.emit_c_row import NORM, NotInCError, check, passes, width
from lightning_accel.recurrent.compiler.emit_python.function_text import parts
from lightning_accel.recurrent.compiler.rewrite import VIEWS, Node, aten, shape
from lightning_accel.recurrent.compiler.stage import Segment, Stages

PRODUCTS = {aten.mm.default, aten.addmm.default}


def inlined(
    stages: Stages, segments: list[Segment], apart: Iterable[Node], can_write: Callable[[Node], bool]
) -> dict[int, list[Node]]:
    """Find elementwise calls before a loop that nothing but the loop reads; there they need no memory.

    Args:
        stages: Of the step.
        segments: Of the forward or the backward.
        apart: Values that are needed elsewhere.
        can_write: Whether the loop's language has a form of an elementwise call.

    Returns:
        Index of a loop's segment: calls that it may take, in order.
    """
    home = {n: k for k, s in enumerate(segments) for n in s.nodes}
    fixed, found = set(apart), {}
    loops = [k for k, s in enumerate(segments) if s.loop]
    step = stages.step
    fixed.update(n for n in (*step.next_states, *step.states, *step.d_states, *step.d_next_states) if n is not None)
    for loop in loops:
        taken: set[Node] = set()
        for node in reversed([n for s in segments[:loop] if not s.loop for n in s.nodes]):
            users = [u for u in node.users if u in home]
            if (
                node.op == "call_function"
                and node not in fixed
                and _is_row(stages, node)
                and users
                and all(home[u] == loop or u in taken for u in users)
                and all(width(u) == width(node) and u.target not in PRODUCTS for u in users if is_tensor(u))
                and can_write(node)
                and torch.Tag.pointwise in node.target.tags
            ):
                taken.add(node)
        found[loop] = sorted(taken, key=stages.order.__getitem__)
    return found


def is_view(node: Node) -> bool:
    """Tell calls that show a part of a row; repeating a number is an operation here."""
    return node.target in VIEWS and node.target is not aten.expand.default


def is_tensor(node: Node) -> bool:
    """Tell calls with one result from those with several."""
    return isinstance(node.meta["val"], torch.Tensor)


def _is_row(stages: Stages, node: Node) -> bool:
    value = node.meta["val"]
    streams = stages.step.streams
    return isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[0] == streams


class RowOrder:
    """The order of a loop's calls.

    Args:
        stages: Of the step.
        calls: Of the loop, in the order of the step.
        members: All nodes of the loop.
        extra: Calls among them that nothing of the loop is needed for.

    Attributes:
        rows: Calls that compute something.
        region: Where each of them runs.
        begin: Pass in which each row operation begins.
        end: Pass, and width, in which each element of a value exists; width 0: one number for the row, after the pass.
        dtype: Of the numbers.

    Raises:
        NotInCError: If a call can not be written.
    """

    def __init__(self, stages: Stages, calls: Sequence[Node], members: set[Node], extra: Sequence[Node]) -> None:
        self._stages, self._calls, self.inside, self._extra = stages, calls, members, extra
        self.rows = [n for n in calls if not is_view(n) and n.target is not operator.getitem]
        self.region: dict[Node, int] = {}
        self.begin: dict[Node, int] = {}
        self.end: dict[Node, tuple[int, int]] = {}
        self._check()
        self._level()

    def _check(self) -> None:
        kinds = {n.meta["val"].dtype for n in self.rows if isinstance(n.meta["val"], torch.Tensor)} - {torch.bool}
        self.dtype = self.type_of(kinds)
        for node in self._calls:
            if node.target is operator.getitem:
                continue
            if is_view(node):
                self._check_view(node)
                continue
            for value in parts(node) or [node]:
                if not _is_row(self._stages, value):
                    raise NotInCError(f"{value} of shape {shape(value)}")
            for source in node.all_input_nodes:
                if node.target not in PRODUCTS or source is not node.args[-1]:
                    self._check_operand(node, source)
            if node.target in PRODUCTS:
                self._check_product(node)
            elif node.target is aten.cat.default:
                if (int(node.args[1]) if len(node.args) > 1 else 0) % 2 != 1:
                    raise NotInCError("a concatenation of streams")
            else:
                self.check_call(node)

    def type_of(self, kinds: set[torch.dtype]) -> torch.dtype:
        """Return the type in which numbers of these types are computed."""
        if len(kinds) != 1 or not kinds <= set(REALS):
            raise NotInCError(f"numbers of the types {kinds}")
        (dtype,) = kinds
        return dtype

    def is_number(self, dtype: torch.dtype) -> bool:
        """Whether the loop may read numbers of a type."""
        return dtype is self.dtype

    def check_call(self, node: Node) -> None:
        """Refuse a row operation that can not be written."""
        check(node)

    def _check_view(self, node: Node) -> None:
        x, *args = node.args
        defaults: tuple[Any, ...] = (0, None, None, 1)
        dim, _, _, step = tuple(args) + defaults[len(args) :]
        if node.target is not aten.slice.Tensor or step != 1 or int(dim) % len(shape(x)) != 1:
            raise NotInCError(f"the view {node.target}")

    def _check_operand(self, node: Node, source: Node) -> None:
        value = source.meta["val"]
        if not isinstance(value, torch.Tensor):
            return  # the parts of a call
        if value.dim() > 2 or not (self.is_number(value.dtype) or value.dtype is torch.bool):
            raise NotInCError(f"{source} of shape {shape(source)} and type {value.dtype}")
        rows_ = value.shape[0] if value.dim() == 2 else 1
        if rows_ not in (1, self._stages.step.streams) or width(source) not in (1, *self._widths(node)):
            raise NotInCError(f"{source} of shape {shape(source)}")

    def _widths(self, node: Node) -> list[int]:
        if (
            node.target in PRODUCTS
            or node.target is aten.cat.default
            or not isinstance(node.meta["val"], torch.Tensor)
            or passes(node)
        ):
            return [width(s) for s in node.all_input_nodes if isinstance(s.meta["val"], torch.Tensor)]
        return [width(node)]

    def _check_product(self, node: Node) -> None:
        left, right = node.args[-2:]
        if node.kwargs or right in self.inside or right not in self._stages.invariant:
            raise NotInCError("a product whose second factor changes")
        if self.resolve(left)[0] not in self.inside:
            raise NotInCError("a product whose first factor is not the loop's own")

    def resolve(self, node: Node) -> tuple[Node, int]:
        """Return the value that a view of the loop shows, and its first element there."""
        start = 0
        while node in self.inside and is_view(node):
            x, *args = node.args
            first = args[1] if len(args) > 1 and args[1] is not None else 0
            start += slice(first, None).indices(width(x))[0]
            node = x
        return node, start

    def _sources(self, node: Node) -> list[tuple[Node, bool]]:
        """Return the loop's own calls whose values a call reads, and whether as they are."""
        found = []
        for source in node.all_input_nodes:
            value, _ = self.resolve(source)
            direct = value is source
            owner = value.args[0] if value.target is operator.getitem else value
            if owner in self.region:
                found.append((value, direct))
        return found

    def _level(self) -> None:
        """Give every call its region (products have odd ones) and the pass within it in which it begins."""
        for node in self.rows:
            if node in self._extra:
                continue
            sources = self._sources(node)
            regions = [self.region[owner_of(v)] for v, _ in sources]
            if node.target in PRODUCTS:
                self.region[node] = max([r + 1 + r % 2 for r in regions], default=1)
                continue
            region = max([r + r % 2 for r in regions], default=0)
            self.region[node] = region
            begin = 0
            for value, direct in sources:
                owner = owner_of(value)
                if self.region[owner] != region or owner.target in PRODUCTS:
                    continue
                level, size = self.end[value]
                same = (
                    direct
                    and size == self.row_width(node)
                    and size == width(value)
                    and owner.target is not (aten.cat.default)
                )
                begin = max(begin, level if same else level + 1)
            self.begin[node] = begin
            self._set_ends(node, begin)
        for node in reversed(self._extra):  # as late as its first reader
            users = [u for u in node.users if u in self.begin]
            first = min((self.region[u], self.begin[u]) for u in users)
            self.region[node], self.begin[node] = first
            self._set_ends(node, first[1])

    def row_width(self, node: Node) -> int:
        """Return the width of the passes that a call begins with."""
        return width(node.args[0]) if passes(node) or node.target is NORM else width(node)

    def _set_ends(self, node: Node, begin: int) -> None:
        if node.target is NORM:
            for part in parts(node):
                self.end[part] = (begin + 2, width(part)) if part.args[1] == 0 else (begin + 1, 0)
        elif parts(node):
            self.end[parts(node)[0]] = (begin + 1, width(parts(node)[0]))
        else:
            self.end[node] = (begin + passes(node), width(node)) if not passes(node) else (begin, 0)


def owner_of(value: Node) -> Node:
    """Return the call that makes a value; parts belong to the call they are taken from."""
    return value.args[0] if value.target is operator.getitem else value
