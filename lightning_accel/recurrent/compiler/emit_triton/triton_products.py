"""Products of a block of streams with a weight, as Triton: the weight kept on chip where it fits, else streamed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lightning_accel.recurrent.compiler.emit_c.emit_c_row import Place, width
from lightning_accel.recurrent.compiler.emit_triton.triton_expression import TYPES
from lightning_accel.recurrent.compiler.rewrite import Node, aten, shape

RESIDENT_BYTES = 64 * 1024  # of all weights that a loop keeps on chip, of 99 KiB and more that a program can have
_INNER = 32  # rows of a streamed tile of a weight
_NARROW = 16  # least side of a tile that tensor cores multiply


@dataclass
class Operands:
    """Where a product's operands lie.

    Attributes:
        left: First factor, a row a stream.
        start: First of its elements that take part.
        right: The weight, row by row.
        out: The result.
        summand: What the product is added to; ``None``: nothing.
        wide: Whether the summand has a number for every column.
    """

    left: Place
    start: int
    right: Place
    out: Place
    summand: Place | None
    wide: bool


class TritonProducts:
    """Write the products of a loop.

    Args:
        real: Type in which they are summed.

    Attributes:
        before: Lines that load what is kept on chip, ahead of all steps.
        streamed: Columns of the widest weight that is not kept; 0 if all are.
    """

    def __init__(self, real: torch.dtype) -> None:
        self._real = TYPES[real]
        self._left = RESIDENT_BYTES
        self._resident: dict[str, str] = {}
        self.before: list[str] = []
        self.streamed = 0

    def text(self, node: Node, at: Operands, indent: str) -> list[str]:
        """Write one product; what is kept on chip is loaded by lines in ``before``, ahead of all steps."""
        inner, columns = shape(node.args[-1])
        self._tag = node.name
        kept = self._keep(node.args[-1], at.right.name, inner, columns)
        streamed = self._streamed(at, inner, columns)
        if kept is None:
            self.streamed = max(self.streamed, columns)
            return [indent + line for line in streamed]
        return [
            f"{indent}if PARTS == 1:",
            *(f"{indent}    {line}" for line in self._whole(at, kept, inner, columns)),
            f"{indent}else:",
            *(f"{indent}    {line}" for line in streamed),
        ]

    def _keep(self, weight: Node, name: str, inner: int, columns: int) -> str | None:
        """Load a weight once if there is room on chip; return its name there."""
        if name in self._resident:
            return self._resident[name]
        size = _padded(inner) * _padded(columns) * weight.meta["val"].element_size()
        if size > self._left:
            return None
        self._left -= size
        self._resident[name] = kept = f"w_{name}"
        down, across = f"down_{kept}", f"across_{kept}"
        self.before += [
            "if PARTS == 1:",
            f"    {down} = tl.arange(0, {_padded(inner)})[:, None]",
            f"    {across} = tl.arange(0, {_padded(columns)})[None, :]",
            f"    {kept} = tl.load(p_{name} + {down} * {columns} + {across}, "
            f"mask=({down} < {inner}) & ({across} < {columns}), other=0)",
        ]
        return kept

    def _whole(self, at: Operands, kept: str, inner: int, columns: int) -> list[str]:
        k = self._tag
        return [
            f"columns_{k} = tl.arange(0, {_padded(columns)})[None, :]",
            f"inside_{k} = live & (columns_{k} < {columns})",
            *self._summand(at, _padded(columns)),
            f"along_{k} = tl.arange(0, {_padded(inner)})[None, :]",
            f"left_{k} = tl.load({self._left_row(at)} + along_{k}, mask=live & (along_{k} < {inner}), other=0)",
            f"total_{k} = {self._dot(f'left_{k}, {kept}')}",
            f"tl.store({_row(at.out)} + columns_{k}, total_{k}, mask=inside_{k})",
        ]

    def _streamed(self, at: Operands, inner: int, columns: int) -> list[str]:
        k, depth = self._tag, min(_padded(inner), _INNER)
        return [
            f"for at in tl.range(part * COLUMNS, {columns}, PARTS * COLUMNS, num_stages=1):",
            f"    columns_{k} = at + tl.arange(0, COLUMNS)[None, :]",
            f"    inside_{k} = live & (columns_{k} < {columns})",
            *("    " + line for line in self._summand(at, "COLUMNS")),
            f"    for deep in tl.range(0, {inner}, {depth}, num_stages=STAGES):",
            f"        along_{k} = deep + tl.arange(0, {depth})[None, :]",
            f"        down_{k} = deep + tl.arange(0, {depth})[:, None]",
            f"        left_{k} = tl.load({self._left_row(at)} + along_{k}, mask=live & (along_{k} < {inner}), other=0)",
            f"        right_{k} = tl.load(p_{at.right.name} + down_{k} * {columns} + columns_{k}, "
            f"mask=(down_{k} < {inner}) & (columns_{k} < {columns}), other=0)",
            f"        total_{k} = {self._dot(f'left_{k}, right_{k}')}",
            f"    tl.store({_row(at.out)} + columns_{k}, total_{k}, mask=inside_{k})",
        ]

    def _summand(self, at: Operands, tile: int | str) -> list[str]:
        k = self._tag
        lines = [f"total_{k} = tl.full((BLOCK, {tile}), 0.0, {self._real})"]
        if at.summand is not None:
            index, mask = (f" + columns_{k}", f"inside_{k}") if at.wide else ("", "live")
            lines.append(f"total_{k} += tl.load({_row(at.summand)}{index}, mask={mask}, other=0).to({self._real})")
        return lines

    def _dot(self, factors: str) -> str:
        return f"dot_({factors}, total_{self._tag}, PRECISION)"

    def _left_row(self, at: Operands) -> str:
        return _row(Place(at.left.name, at.left.start + at.start))


def operands_of(
    node: Node,
    resolve: Callable[[Node], tuple[Node, int]],
    place: Callable[[Node], Place | None],
    over: Node | None,
) -> Operands:
    """Find where the operands of a product lie.

    Args:
        node: The product.
        resolve: The value that a view shows, and its first element.
        place: Where a value lies.
        over: The summand whose memory the result takes; ``None`` if it has memory of its own.
    """
    *summands, left, right = node.args
    source, start = resolve(left)
    found = [place(value) for value in (source, right, node)]
    assert None not in found
    a, w, out = found
    summand, wide = None, True
    if node.target is aten.addmm.default:
        value, first = resolve(summands[0])
        there = out if over is not None else place(value)
        assert there is not None
        summand = there if over is not None else Place(there.name, there.start + first)
        wide = over is not None or width(summands[0]) > 1 or width(node) == 1
    return Operands(a, start, w, out, summand, wide)  # type: ignore[arg-type]


def _row(place: Place) -> str:
    return f"s_{place.name} + rows * b_{place.name} + {place.start}"


def _padded(size: int) -> int:
    """Return the least power of two that holds a size, and that tensor cores take."""
    return max(1 << (size - 1).bit_length(), _NARROW)
