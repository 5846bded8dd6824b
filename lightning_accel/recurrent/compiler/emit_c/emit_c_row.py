"""One step's row operations as C: what is computed for one stream between two products of matrices.

Values of equal width are computed in one inner loop as long as none needs another element of another's row; sums over
a row end such a loop. So a value that only its own loop reads is never stored.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_accel.recurrent.compiler.emit_c.emit_c_expression import expression
from lightning_accel.recurrent.compiler.rewrite import Node, aten, shape

NORM, NORM_BACKWARD = aten.native_layer_norm.default, aten.native_layer_norm_backward.default
SUMS = {aten.sum.dim_IntList, aten.mean.dim}


class NotInCError(Exception):
    """A loop holds what can not be written in C."""


@dataclass
class InnerLoop:
    """One pass over a row: statements for every element, before and after them."""

    width: int
    sums: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)

    def text(self, indent: str) -> list[str]:
        """Write it."""
        lines = [f"{indent}real {name} = 0;" for name in self.sums]
        lines += [indent + line for line in dict.fromkeys(self.before)]
        if self.body:
            sums = f" reduction(+:{', '.join(self.sums)})" if self.sums else ""
            lines.append(f"#pragma omp simd{sums}")
            lines.append(f"{indent}for (long k = 0; k < {self.width}; ++k) {{")
            lines += [f"{indent}    {line}" for line in self.body]
            lines.append(f"{indent}}}")
        return lines + [indent + line for line in self.after]


@dataclass(frozen=True)
class Place:
    """Where a row lies: the name of a tensor and the element it begins with."""

    name: str
    start: int = 0


def width(node: Node) -> int:
    """Return the length of a value's rows."""
    sizes = shape(node)
    return sizes[-1] if sizes else 1


def passes(node: Node) -> int:
    """Return how many passes over the row lie between a call's inputs and its result."""
    if node.target is NORM:
        return 2
    return 1 if node.target is NORM_BACKWARD or node.target in SUMS else 0


def check_shape(node: Node) -> bool:
    """Look at calls that are more than elementwise; tell whether this is one.

    Raises:
        NotInCError: If it can not be written.
    """
    target = node.target
    if target is NORM or target is NORM_BACKWARD:
        normalized = list(node.args[1 if target is NORM else 2])
        if normalized != [shape(node.args[0])[-1]]:
            raise NotInCError(f"{target} over more than the last dimension")
        if target is NORM_BACKWARD and list(node.args[-1]) != [True, False, False]:
            raise NotInCError(f"{target} of a weight")
        return True
    if target in SUMS:
        dims = [int(d) % len(shape(node.args[0])) for d in node.args[1]]
        if dims != [len(shape(node.args[0])) - 1] or len(node.args) < 3 or not node.args[2] or node.kwargs:
            raise NotInCError(f"{target} over other dimensions than the last")
        return True
    return False


def check(node: Node) -> None:
    """Raise `NotInCError` for a call that can not be written."""
    if check_shape(node):
        return
    if not isinstance(node.meta["val"], torch.Tensor) or expression(node, lambda _: "x") is None:
        raise NotInCError(f"{node.target}")


class RowWriter:
    """Write the calls of one region, which all see one row of one stream.

    Args:
        calls: In order.
        levels: The pass in which each begins.
        place: Where a value lies in memory; `None` for one that has no memory.
        stored: Places to which a call's result has to be written.
        resolve: The value that a view shows, and its first element.
    """

    def __init__(
        self,
        calls: list[Node],
        levels: dict[Node, int],
        place: Callable[[Node], Place | None],
        stored: Callable[[Node], list[Place]],
        resolve: Callable[[Node], tuple[Node, int]],
    ) -> None:
        self._levels, self._place, self._stored, self._resolve = levels, place, stored, resolve
        self._loops: dict[tuple[int, int], InnerLoop] = {}
        self._local: dict[Node, tuple[int, int]] = {}
        self._scalars: set[Node] = set()
        self.rows: dict[str, None] = {}
        for node in calls:
            self._write(node)

    def text(self, indent: str) -> list[str]:
        """Write all passes."""
        return [line for key in sorted(self._loops) for line in self._loops[key].text(indent)]

    def _write(self, node: Node) -> None:
        level = self._levels[node]
        if node.target is NORM:
            self._norm(node, level)
        elif node.target is NORM_BACKWARD:
            self._norm_backward(node, level)
        elif node.target in SUMS:
            self._sum(node, level)
        elif node.target is aten.cat.default:
            self._copies(node, level)
        else:
            key = (level, width(node))
            value = expression(node, lambda n: self.operand(n, key))
            assert value is not None
            self._finish(node, key, value)

    def operand(self, node: Node, key: tuple[int, int]) -> str:
        """Name one element of an argument within the pass ``key``."""
        source, start = self._resolve(node)
        if source in self._scalars:
            return f"q_{source.name}"
        if source is node and self._local.get(source) == key:
            return f"x_{source.name}"
        place = self._place(source)
        if place is None:
            raise NotInCError(f"{source} has no memory")
        self.rows.setdefault(place.name)
        first = place.start + start
        if width(node) == 1 and key[1] != 1:
            name = f"one_{place.name}_{first}_{key[0]}_{key[1]}"
            number = "int" if source.meta["val"].dtype is torch.bool else "real"
            self._loop(key).before.append(f"const {number} {name} = r_{place.name}[{first}];")
            return name
        return f"r_{place.name}[{f'{first} + ' if first else ''}k]"

    def _loop(self, key: tuple[int, int]) -> InnerLoop:
        return self._loops.setdefault(key, InnerLoop(key[1]))

    def _finish(self, node: Node, key: tuple[int, int], value: str) -> None:
        number = "int" if node.meta["val"].dtype is torch.bool else "real"
        self._local[node] = key
        body = self._loop(key).body
        body.append(f"const {number} x_{node.name} = {value};")
        for place in self._stored(node):
            self.rows.setdefault(place.name)
            body.append(f"r_{place.name}[{f'{place.start} + ' if place.start else ''}k] = x_{node.name};")

    def _scalar(self, node: Node | None, loop: InnerLoop, value: str) -> None:
        """Keep a number that belongs to the whole row; later passes read it."""
        if node is None:
            return
        self._scalars.add(node)
        loop.after.append(f"const real q_{node.name} = {value};")
        for place in self._stored(node):
            self.rows.setdefault(place.name)
            loop.after.append(f"r_{place.name}[{place.start}] = q_{node.name};")

    def _sum(self, node: Node, level: int) -> None:
        x = node.args[0]
        key = (level, width(x))
        loop, total = self._loop(key), f"sum_{node.name}"
        loop.sums.append(total)
        loop.body.append(f"{total} += {self.operand(x, key)};")
        self._scalar(node, loop, f"{total} / (real){width(x)}" if node.target is aten.mean.dim else total)

    def _copies(self, node: Node, level: int) -> None:
        whole, start = self._place(node), 0
        assert whole is not None
        self.rows.setdefault(whole.name)
        for part in node.args[0]:
            length = width(part)
            if Place(whole.name, whole.start + start) not in self._stored(part):
                key = (level, length)
                self._loop(key).body.append(f"r_{whole.name}[{whole.start + start} + k] = {self.operand(part, key)};")
            start += length

    def _norm(self, node: Node, level: int) -> None:
        x, _, weight, bias, epsilon = node.args
        size, name = width(x), node.name
        parts: dict[int, Any] = {u.args[1]: u for u in node.users}
        first, second, third = ((level + k, size) for k in range(3))
        self._loop(first).sums.append(f"sum_{name}")
        self._loop(first).body.append(f"sum_{name} += {self.operand(x, first)};")
        self._loop(first).after.append(f"const real mean_{name} = sum_{name} / (real){size};")
        self._loop(second).sums.append(f"square_{name}")
        self._loop(second).body += [
            f"const real off_{name} = {self.operand(x, second)} - mean_{name};",
            f"square_{name} += off_{name} * off_{name};",
        ]
        self._loop(second).after.append(
            f"const real rstd_{name} = (real)(1.0 / sqrt((double)(square_{name} / (real){size} + (real){epsilon!r})));"
        )
        self._scalar(parts.get(1), self._loop(second), f"mean_{name}")
        self._scalar(parts.get(2), self._loop(second), f"rstd_{name}")
        if 0 not in parts:
            return
        value = f"({self.operand(x, third)} - mean_{name}) * rstd_{name}"
        value += "" if weight is None else f" * {self.operand(weight, third)}"
        value += "" if bias is None else f" + {self.operand(bias, third)}"
        self._finish(parts[0], third, value)

    def _norm_backward(self, node: Node, level: int) -> None:
        gradient, x, _, mean, rstd, weight, *_ = node.args
        size, name = width(x), node.name
        first, second = (level, size), (level + 1, size)
        loop = self._loop(first)
        loop.sums += [f"plain_{name}", f"scaled_{name}"]

        def weighted(key: tuple[int, int]) -> str:
            return self.operand(gradient, key) + ("" if weight is None else f" * {self.operand(weight, key)}")

        loop.body += [
            f"const real g_{name} = {weighted(first)};",
            f"plain_{name} += g_{name};",
            f"scaled_{name} += g_{name} * {self.operand(x, first)};",
        ]
        m, r = self.operand(mean, second), self.operand(rstd, second)
        loop = self._loop(second)
        loop.before += [
            f"const real slope_{name} = (plain_{name} * {m} - scaled_{name}) * {r} * {r} * {r} / (real){size};",
            f"const real shift_{name} = -slope_{name} * {m} - plain_{name} * {r} / (real){size};",
        ]
        part = next(iter(node.users))
        self._finish(
            part, second, f"{r} * ({weighted(second)}) + slope_{name} * {self.operand(x, second)} + shift_{name}"
        )
