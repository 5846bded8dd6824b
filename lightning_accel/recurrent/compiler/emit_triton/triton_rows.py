"""One step's row operations as Triton: what is computed for a block of streams between two products of matrices.

Values of equal width are computed in one pass over a row, tile by tile, as long as none needs another tile of another's
row; sums over a row end such a pass. So a value that only its own pass reads stays in registers. The passes are those
of the C text, see `RowOrder`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_accel.recurrent.compiler.emit_c.emit_c_row import (
    NORM,
    NORM_BACKWARD,
    SUMS,
    NotInCError,
    Place,
    check_shape,
    width,
)
from lightning_accel.recurrent.compiler.emit_c.fusion import RowOrder
from lightning_accel.recurrent.compiler.emit_triton.triton_expression import TYPES, expression
from lightning_accel.recurrent.compiler.rewrite import Node, aten

WIDEST_TILE = 128  # columns of a tile: with 16 streams and 8 warps, 8 numbers a thread for each value of a pass
NARROWEST_TILE = 16


@dataclass
class Pass:
    """One pass over a row: statements for every tile, and for the whole row after it.

    Triton lets no name change its type within a loop, so ``tag`` tells names of one pass from those of others.
    """

    width: int
    tag: str
    sums: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    loaded: dict[tuple[str, int], str] = field(default_factory=dict)
    stores: bool = False

    @property
    def mask(self) -> str:
        """Name what says which numbers of a tile there are."""
        return f"inside_{self.tag}"

    def store(self, place: Place, value: str) -> str:
        """Write a tile to memory."""
        self.stores = True
        where = f"s_{place.name} + rows * b_{place.name} + {place.start} + columns_{self.tag}"
        return f"tl.store({where}, {value}, mask={self.mask})"

    def text(self, indent: str, real: str, *, shared: bool) -> list[str]:
        """Write it.

        Args:
            indent: Of its lines.
            real: Type of the numbers.
            shared: Whether programs of one block of streams may share its tiles; otherwise each does all of them.
        """
        lines = [f"{indent}{name} = tl.full((BLOCK, 1), 0.0, {real})" for name in self.sums]
        lines += [indent + line for line in dict.fromkeys(self.before)]
        if self.body:
            tile = tile_of(self.width)
            first, by = (f"part * {tile}", f"PARTS * {tile}") if shared else ("0", f"{tile}")
            lines.append(f"{indent}for at in tl.range({first}, {self.width}, {by}, num_stages=1):")
            lines.append(f"{indent}    columns_{self.tag} = at + tl.arange(0, {tile})[None, :]")
            lines.append(f"{indent}    inside_{self.tag} = live & (columns_{self.tag} < {self.width})")
            lines += [f"{indent}    {line}" for line in self.body]
        return lines + [indent + line for line in self.after]


def tile_of(columns: int) -> int:
    """Return how many columns a tile of a row has: a power of two."""
    return min(max(1 << (columns - 1).bit_length(), NARROWEST_TILE), WIDEST_TILE)


def check_call(node: Node, real: torch.dtype) -> None:
    """Raise `NotInCError` for a call that can not be written."""
    if check_shape(node):
        return
    if not isinstance(node.meta["val"], torch.Tensor) or expression(node, lambda _: "x", real) is None:
        raise NotInCError(f"{node.target}")


class TritonRows:
    """Write the calls of one region, which all see the rows of one block of streams.

    Args:
        calls: In order.
        place: Where a value lies in memory; `None` for one that has no memory.
        stored: Places to which a call's result has to be written.
        order: Of the loop: where each call begins, what views show, the type of its numbers.
        phase: Of the step, which this region is.
    """

    def __init__(
        self,
        calls: list[Node],
        place: Callable[[Node], Place | None],
        stored: Callable[[Node], list[Place]],
        *,
        order: RowOrder,
        phase: int,
    ) -> None:
        self._levels, self._resolve, self._place, self._stored = order.begin, order.resolve, place, stored
        self._phase, real = phase, order.dtype
        self._real, self._type = real, TYPES[real]
        self._passes: dict[tuple[int, int], Pass] = {}
        self._local: dict[Node, tuple[int, int]] = {}
        self._scalars: set[Node] = set()
        for node in calls:
            self._write(node)

    def text(self, indent: str) -> list[str]:
        """Write all passes; where threads read what others wrote, they wait."""
        lines: list[str] = []
        keys = sorted(self._passes)
        for key in keys:
            # whoever shares a pass with others may not read what they wrote before all have met again
            shared = key[0] == keys[-1][0] and not self._passes[key].sums
            lines += self._passes[key].text(indent, self._type, shared=shared)
            if self._passes[key].stores and key != keys[-1]:
                lines.append(f"{indent}tl.debug_barrier()")
        return lines

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
            value = expression(node, lambda n: self.operand(n, key), self._real)
            assert value is not None
            self._finish(node, key, value)

    def operand(self, node: Node, key: tuple[int, int]) -> str:
        """Name an argument's tile within the pass ``key``."""
        source, start = self._resolve(node)
        if source in self._scalars:
            return f"q_{source.name}"
        if source is node and self._local.get(source) == key:
            return f"x_{source.name}"
        place = self._place(source)
        if place is None:
            raise NotInCError(f"{source} has no memory")
        first = place.start + start
        one = width(node) == 1 and key[1] != 1
        current = self._pass(key)
        name = f"{'one' if one else 'r'}_{place.name}_{first}_{current.tag}"
        if (name, first) not in current.loaded:
            current.loaded[name, first] = name
            index, mask = (f"{first}", "live") if one else (f"{first} + columns_{current.tag}", current.mask)
            cast = "" if source.meta["val"].dtype is torch.bool else f".to({self._type})"
            where = f"s_{place.name} + rows * b_{place.name} + {index}"
            lines = current.before if one else current.body
            lines.append(f"{name} = tl.load({where}, mask={mask}, other=0){cast}")
        return name

    def _pass(self, key: tuple[int, int]) -> Pass:
        return self._passes.setdefault(key, Pass(key[1], f"{self._phase}_{key[0]}_{key[1]}"))

    def _finish(self, node: Node, key: tuple[int, int], value: str) -> None:
        self._local[node] = key
        current = self._pass(key)
        current.body.append(f"x_{node.name} = {value}")
        for place in self._stored(node):
            current.body.append(current.store(place, f"x_{node.name}"))

    def _scalar(self, node: Node | None, current: Pass, value: str) -> None:
        """Keep a number that belongs to the whole row; later passes read it."""
        if node is None:
            return
        self._scalars.add(node)
        current.after.append(f"q_{node.name} = {value}")
        for place in self._stored(node):
            where = f"s_{place.name} + rows * b_{place.name} + {place.start}"
            current.after.append(f"tl.store({where}, q_{node.name}, mask=live)")
            current.stores = True

    def _add(self, current: Pass, total: str, value: str) -> None:
        current.sums.append(total)
        current.body.append(f"{total} += tl.reduce(tl.where({current.mask}, {value}, 0.0), 1, plus_, keep_dims=True)")

    def _sum(self, node: Node, level: int) -> None:
        x = node.args[0]
        key = (level, width(x))
        value, total = self.operand(x, key), f"sum_{node.name}"
        current = self._pass(key)
        self._add(current, total, value)
        self._scalar(node, current, f"{total} / {width(x)}.0" if node.target is aten.mean.dim else total)

    def _copies(self, node: Node, level: int) -> None:
        whole, start = self._place(node), 0
        assert whole is not None
        for part in node.args[0]:
            length = width(part)
            if Place(whole.name, whole.start + start) not in self._stored(part):
                key = (level, length)
                value, current = self.operand(part, key), self._pass(key)
                current.body.append(current.store(Place(whole.name, whole.start + start), value))
            start += length

    def _norm(self, node: Node, level: int) -> None:
        x, _, weight, bias, epsilon = node.args
        size, name = width(x), node.name
        parts: dict[int, Any] = {u.args[1]: u for u in node.users}
        first, second, third = ((level + k, size) for k in range(3))
        self._add(self._pass(first), f"sum_{name}", self.operand(x, first))
        self._pass(first).after.append(f"mean_{name} = sum_{name} / {size}.0")
        value = self.operand(x, second)
        current = self._pass(second)
        current.body.append(f"off_{name} = {value} - mean_{name}")
        self._add(current, f"square_{name}", f"off_{name} * off_{name}")
        current.after.append(f"rstd_{name} = 1.0 / tl.sqrt(square_{name} / {size}.0 + {epsilon!r})")
        self._scalar(parts.get(1), current, f"mean_{name}")
        self._scalar(parts.get(2), current, f"rstd_{name}")
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

        def weighted(key: tuple[int, int]) -> str:
            return self.operand(gradient, key) + ("" if weight is None else f" * {self.operand(weight, key)}")

        value, scaled = weighted(first), self.operand(x, first)
        current = self._pass(first)
        current.body.append(f"g_{name} = {value}")
        self._add(current, f"plain_{name}", f"g_{name}")
        self._add(current, f"scaled_{name}", f"g_{name} * {scaled}")
        m, r = self.operand(mean, second), self.operand(rstd, second)
        slope = f"(plain_{name} * {m} - scaled_{name}) * {r} * {r} * {r} / {size}.0"
        self._pass(second).before += [
            f"slope_{name} = {slope}",
            f"shift_{name} = -slope_{name} * {m} - plain_{name} * {r} / {size}.0",
        ]
        part = next(iter(node.users))
        self._finish(
            part, second, f"{r} * ({weighted(second)}) + slope_{name} * {self.operand(x, second)} + shift_{name}"
        )
