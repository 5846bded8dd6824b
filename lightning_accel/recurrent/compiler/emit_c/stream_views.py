"""One stream's part of a value as memory: where each element lies after slices, transposes and broadcasts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_accel.recurrent.compiler.emit_c.emit_c_row import NotInCError
from lightning_accel.recurrent.compiler.rewrite import Node, aten, shape


@dataclass(frozen=True)
class StreamView:
    """Elements of one stream's value.

    Attributes:
        owner: The call, or the value from outside the loop, whose memory it is.
        sizes: Of its dimensions, without that of the streams.
        strides: In elements.
        offset: Of the first element.
    """

    owner: Node
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def is_dense(self) -> bool:
        """Whether its elements lie one after another in their order."""
        dense = strides_of(self.sizes)
        return all(a == b or n == 1 for a, b, n in zip(self.strides, dense, self.sizes, strict=True))

    def broadcast(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return strides with which it is read as a value of these sizes.

        Raises:
            NotInCError: If it can not be.
        """
        missing = len(sizes) - len(self.sizes)
        extra = max(-missing, 0)  # of values that no stream changes
        if any(size != 1 for size in self.sizes[:extra]):
            raise NotInCError(f"{self.owner} of shape {shape(self.owner)}")
        found, missing = [0] * missing, max(missing, 0)
        for own, wanted, stride in zip(self.sizes[extra:], sizes[missing:], self.strides[extra:], strict=True):
            if own not in (1, wanted):
                raise NotInCError(f"{self.owner} of shape {shape(self.owner)}")
            found.append(stride if own == wanted else 0)
        return tuple(found)


def strides_of(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of dense elements."""
    return tuple(math.prod(sizes[k + 1 :]) for k in range(len(sizes)))


def whole(owner: Node, sizes: Sequence[int]) -> StreamView:
    """Return all elements of a value."""
    return StreamView(owner, tuple(sizes), strides_of(sizes))


def view_of(node: Node, source: StreamView) -> StreamView:
    """Return what a view shows of what another one shows.

    Args:
        node: The call that makes it, of values with the streams as their first dimension.
        source: Its argument.

    Raises:
        NotInCError: If it moves the streams, or its elements would have to be copied.
    """
    x, *args = node.args
    rank, sizes, strides = len(shape(x)), list(source.sizes), list(source.strides)

    def dim(value: int, of: int = rank) -> int:
        found = int(value) % of - 1
        if found < 0:
            raise NotInCError(f"the view {node.target} of streams")
        return found

    if node.target is aten.slice.Tensor:
        defaults: tuple[Any, ...] = (0, None, None, 1)
        axis, start, end, step = tuple(args) + defaults[len(args) :]
        if int(axis) % rank == 0 and shape(node) == shape(x):
            return source
        k = dim(axis)
        first, last, _ = slice(start, end, step).indices(sizes[k])
        offset = source.offset + first * strides[k]
        sizes[k], strides[k] = len(range(first, last, step)), strides[k] * step
        return StreamView(source.owner, tuple(sizes), tuple(strides), offset)
    if node.target is aten.select.int:
        k = dim(args[0])
        offset = source.offset + int(args[1]) % sizes.pop(k) * strides.pop(k)
        return StreamView(source.owner, tuple(sizes), tuple(strides), offset)
    if node.target in (aten.transpose.int, aten.permute.default):
        if node.target is aten.permute.default:
            order = [int(d) % rank for d in args[0]]
        else:
            order = list(range(rank))
            a, b = int(args[0]) % rank, int(args[1]) % rank
            order[a], order[b] = order[b], order[a]
        if order[0] != 0:
            raise NotInCError(f"the view {node.target} of streams")
        moved = [d - 1 for d in order[1:]]
        return replace(source, sizes=tuple(sizes[d] for d in moved), strides=tuple(strides[d] for d in moved))
    if node.target is aten.unsqueeze.default:
        k = dim(args[0], rank + 1)
        return replace(source, sizes=(*sizes[:k], 1, *sizes[k:]), strides=(*strides[:k], 0, *strides[k:]))
    if node.target is aten.squeeze.dim:
        k = int(args[0]) % rank - 1
        if shape(x)[k + 1] != 1:
            return source
        k = dim(args[0])
        return replace(source, sizes=(*sizes[:k], *sizes[k + 1 :]), strides=(*strides[:k], *strides[k + 1 :]))
    if node.target is aten.expand.default and shape(node)[0] == shape(x)[0] and len(shape(node)) == rank:
        return replace(source, sizes=shape(node)[1:], strides=source.broadcast(shape(node)[1:]))
    if node.target is aten.view.default and shape(node)[:1] == shape(x)[:1] and source.is_dense:
        return replace(source, sizes=shape(node)[1:], strides=strides_of(shape(node)[1:]))
    raise NotInCError(f"the view {node.target}")
