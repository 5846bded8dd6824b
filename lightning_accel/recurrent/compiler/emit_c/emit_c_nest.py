"""One stream's operations on values of any number of dimensions, as nests of loops in C: matrix-valued states.

Elementwise operations on values of one shape that follow one another share a nest, and what only they read stays in a
register. All others (products of two changing matrices, sums, softmax) have nests of their own.
"""

from collections.abc import Callable, Sequence

import torch

from lightning_accel.recurrent.compiler.emit_c.emit_c_expression import expression
from lightning_accel.recurrent.compiler.emit_c.emit_c_row import NotInCError
from lightning_accel.recurrent.compiler.emit_c.stream_views import StreamView, strides_of
from lightning_accel.recurrent.compiler.rewrite import Node, aten, shape

SOFTMAX, SOFTMAX_BACKWARD = aten._softmax.default, aten._softmax_backward_data.default
PARTS_BACKWARD = {aten.select_backward.default, aten.slice_backward.default}
REDUCTIONS = {aten.sum.dim_IntList, aten.mean.dim, aten.amax.default}
_LARGEST = "({0} > {1} || {0} != {0} ? {0} : {1})"


def is_outer(node: Node) -> bool:
    """Tell whether a product of matrices has one summand only: then it is elementwise."""
    return node.target is aten.bmm.default and shape(node.args[0])[-1] == 1


def is_elementwise(node: Node) -> bool:
    """Tell whether a nest may compute a call element by element."""
    if is_outer(node):
        return True
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor) or node.target is aten.expand.default:
        return False
    known = torch.Tag.pointwise in node.target.tags or node.target in (aten.clone.default, aten._to_copy.default)
    return known and expression(node, lambda _: "x") is not None


def check(node: Node) -> None:
    """Look at a call.

    Raises:
        NotInCError: If it has no nest.
    """
    target = node.target
    if is_elementwise(node) or target is aten.bmm.default:
        return
    if target in REDUCTIONS and len(node.args) > 1 and not node.kwargs:
        dims = list(node.args[1])
    elif target is SOFTMAX and not node.args[2]:
        dims = [node.args[1]]
    elif target is SOFTMAX_BACKWARD:
        dims = [node.args[2]]
    elif target is aten.cat.default:
        dims = [node.args[1] if len(node.args) > 1 else 0]
    elif target in PARTS_BACKWARD:
        dims = [node.args[2]]
    else:
        dims = []
    ranked = node if target is aten.cat.default or target in PARTS_BACKWARD else node.args[0]
    rank = len(shape(ranked)) if dims else 0
    if dims and all(int(d) % rank for d in dims):  # none is that of the streams
        return
    raise NotInCError(f"{target}")


class NestWriter:
    """Write nests of loops.

    Args:
        resolve: The memory that an argument's elements are read from.
        stored: Whether a call's result has memory.
    """

    def __init__(self, resolve: Callable[[Node], StreamView], stored: Callable[[Node], bool]) -> None:
        self._resolve, self._stored = resolve, stored

    def elementwise(self, calls: Sequence[Node]) -> list[str]:
        """Write calls on values of one shape."""
        sizes = shape(calls[0])[1:]
        read: dict[str, tuple[StreamView, tuple[int, ...]]] = {}
        made = set(calls)
        body: list[str] = []

        def operand(node: Node) -> str:
            if node in made:
                return f"x_{node.name}"
            view = self._resolve(node)
            strides = view.broadcast(sizes)
            for name, known in read.items():
                if known == (view, strides):
                    return name
            name = f"e_{len(read)}"
            read[name] = (view, strides)
            return name

        for node in calls:
            if is_outer(node):
                left, right = map(self._resolve, node.args)
                value = ""
                for view, lost in ((left, 1), (right, 0)):
                    strides = tuple(0 if k == lost else s for k, s in enumerate(view.strides))
                    name = f"e_{len(read)}"
                    read[name] = (view, strides)
                    value += f"{' * ' if value else ''}{name}"
            else:
                found = expression(node, operand)
                assert found is not None
                value = found
            body.append(f"const {number_type(node)} x_{node.name} = {value};")
        out = strides_of(sizes)
        merged, in_result, *in_read = _merged(sizes, [out, *(s for _, s in read.values())])
        loads = []
        for (name, (view, _)), stride in zip(read.items(), in_read, strict=True):
            loads.append(f"const {number_type(view.owner)} {name} = {_element(view, stride)};")
        stores = [f"r_{node.name}[{_index(in_result)}] = x_{node.name};" for node in calls if self._stored(node)]
        return _nest(merged, [*loads, *body, *stores])

    def other(self, node: Node) -> list[str]:
        """Write any other call."""
        if node.target is aten.bmm.default:
            return self._product(node)
        if node.target is SOFTMAX:
            return self._softmax(node)
        if node.target is SOFTMAX_BACKWARD:
            return self._softmax_backward(node)
        if node.target is aten.cat.default:
            return self._concatenation(node)
        if node.target in PARTS_BACKWARD:
            return self._part_backward(node)
        return self._reduction(node)

    def _product(self, node: Node) -> list[str]:
        a, b = map(self._resolve, node.args)
        (rows, inner), columns = a.sizes, b.sizes[1]
        left = f"r_{a.owner.name}[{a.offset} + i * {a.strides[0]} + j * {a.strides[1]}]"
        right = f"r_{b.owner.name}[{b.offset} + j * {b.strides[0]} + k * {b.strides[1]}]"
        out = f"r_{node.name}[i * {columns} + k]"
        if a.strides[1] == b.strides[0] == 1:  # both lie along the sum
            return [
                f"for (long i = 0; i < {rows}; ++i)",
                f"    for (long k = 0; k < {columns}; ++k) {{",
                "        real sum = 0;",
                "#pragma omp simd reduction(+:sum)",
                f"        for (long j = 0; j < {inner}; ++j)",
                f"            sum += {left} * {right};",
                f"        {out} = sum;",
                "    }",
            ]
        over, under = ("k", "i") if columns == 1 or (a.strides[0] == 1 and b.strides[1] != 1) else ("i", "k")
        lengths = {"i": rows, "k": columns}
        return [
            f"for (long o = 0; o < {rows * columns}; ++o)",
            f"    r_{node.name}[o] = 0;",
            f"for (long {over} = 0; {over} < {lengths[over]}; ++{over})",
            f"    for (long j = 0; j < {inner}; ++j)",
            "#pragma omp simd",
            f"        for (long {under} = 0; {under} < {lengths[under]}; ++{under})",
            f"            {out} += {left} * {right};",
        ]

    def _reduction(self, node: Node) -> list[str]:
        x, rank = self._resolve(node.args[0]), len(shape(node.args[0]))
        gone = sorted(int(d) % rank - 1 for d in node.args[1])
        kept = [k for k in range(rank - 1) if k not in gone]
        element = _element(x, x.strides)
        out = _index_of(kept, strides_of([x.sizes[k] for k in kept]))
        largest = node.target is aten.amax.default
        start = "-INFINITY" if largest else "0"
        name, count = f"r_{node.name}[{out}]", 1
        for k in gone:
            count *= x.sizes[k]
        mean = [f"{name} /= (real){count};"] if node.target is aten.mean.dim else []
        if not kept or x.strides[gone[-1]] == 1 or x.sizes[gone[-1]] == 1:  # sums lie along the memory
            add = f"sum = {_LARGEST.format(element, 'sum')};" if largest else f"sum += {element};"
            loops = _loops(gone, x.sizes, [add], simd=False) if largest else _loops(gone, x.sizes, [add], "sum")
            inner = [f"real sum = {start};", *loops]
            return _loops(kept, x.sizes, [*inner, f"{name} = sum;", *mean], simd=False)
        add = f"{name} = {_LARGEST.format(element, name)};" if largest else f"{name} += {element};"
        return [
            *_loops(kept, x.sizes, [f"{name} = {start};"]),
            *_loops([*gone, *kept], x.sizes, [add]),
            *(_loops(kept, x.sizes, mean) if mean else []),
        ]

    def _softmax(self, node: Node) -> list[str]:
        x, axis = self._resolve(node.args[0]), int(node.args[1]) % len(shape(node)) - 1
        element, others = _element(x, x.strides), [k for k in range(len(x.sizes)) if k != axis]
        out = f"r_{node.name}[{_index(strides_of(x.sizes))}]"
        body = [
            "real top = -INFINITY, sum = 0;",
            *_loops([axis], x.sizes, [f"top = {_LARGEST.format(element, 'top')};"], simd=False),
            *_loops([axis], x.sizes, [f"{out} = exp_real({element} - top);"]),
            *_loops([axis], x.sizes, [f"sum += {out};"], "sum"),
            *_loops([axis], x.sizes, [f"{out} /= sum;"]),
        ]
        return _loops(others, x.sizes, body, simd=False)

    def _softmax_backward(self, node: Node) -> list[str]:
        gradient, y = map(self._resolve, node.args[:2])
        axis = int(node.args[2]) % len(shape(node)) - 1
        others = [k for k in range(len(y.sizes)) if k != axis]
        g, p = _element(gradient, gradient.strides), _element(y, y.strides)
        out = f"r_{node.name}[{_index(strides_of(y.sizes))}]"
        body = [
            "real sum = 0;",
            *_loops([axis], y.sizes, [f"sum += {g} * {p};"], "sum"),
            *_loops([axis], y.sizes, [f"{out} = {p} * ({g} - sum);"]),
        ]
        return _loops(others, y.sizes, body, simd=False)

    def _part_backward(self, node: Node) -> list[str]:
        """Write zeros, and the gradient of a part where that was taken from."""
        gradient, _, dim, *place = node.args
        view, sizes = self._resolve(gradient), shape(node)[1:]
        axis = int(dim) % len(shape(node)) - 1
        strides = list(strides_of(sizes))
        if node.target is aten.select_backward.default:
            first = int(place[0]) % sizes[axis] * strides.pop(axis)
        else:
            start, stop, step = place
            first = slice(start, stop, step).indices(sizes[axis])[0] * strides[axis]
            strides[axis] *= step
        out = f"r_{node.name}[{f'{first} + ' if first else ''}{_index(strides)}]"
        zeros = _loops(range(len(sizes)), sizes, [f"r_{node.name}[{_index(strides_of(sizes))}] = 0;"])
        return [
            *zeros,
            *_loops(range(len(view.sizes)), view.sizes, [f"{out} = {_element(view, view.strides)};"]),
        ]

    def _concatenation(self, node: Node) -> list[str]:
        axis, start, lines = int(node.args[1]) % len(shape(node)) - 1, 0, []
        strides = strides_of(shape(node)[1:])
        for part in node.args[0]:
            view = self._resolve(part)
            first = start * strides[axis]
            dims = list(range(len(view.sizes)))
            to = f"r_{node.name}[{f'{first} + ' if first else ''}{_index(strides)}]"
            lines += _loops(dims, view.sizes, [f"{to} = {_element(view, view.strides)};"])
            start += view.sizes[axis]
        return lines


def number_type(node: Node) -> str:
    """Return the C type of one number of a value in memory."""
    return "unsigned char" if node.meta["val"].dtype is torch.bool else "real"


def _element(view: StreamView, strides: Sequence[int]) -> str:
    first = f"{view.offset} + " if view.offset else ""
    return f"r_{view.owner.name}[{first}{_index(strides)}]"


def _index(strides: Sequence[int]) -> str:
    return _index_of(range(len(strides)), strides)


def _index_of(dims: Sequence[int], strides: Sequence[int]) -> str:
    terms = [f"i{k}" if s == 1 else f"i{k} * {s}" for k, s in zip(dims, strides, strict=True) if s]
    return " + ".join(terms) or "0"


def _nest(sizes: Sequence[int], body: Sequence[str]) -> list[str]:
    return _loops(range(len(sizes)), sizes, body)


def _loops(
    dims: Sequence[int], sizes: Sequence[int], body: Sequence[str], total: str | None = None, *, simd: bool = True
) -> list[str]:
    """Write loops over some dimensions; the innermost one in vectors, adding up ``total`` if one is given."""
    lines: list[str] = []
    for depth, k in enumerate(dims):
        if simd and depth == len(dims) - 1:
            lines.append("#pragma omp simd" + (f" reduction(+:{total})" if total else ""))
        lines.append("    " * depth + f"for (long i{k} = 0; i{k} < {sizes[k]}; ++i{k}) {{")
    depth = len(list(dims))
    lines += ["    " * depth + line for line in body]
    lines += ["    " * (depth - 1 - k) + "}" for k in range(depth)]
    return lines if dims else ["{", *("    " + line for line in body), "}"]


def _merged(sizes: Sequence[int], strides: Sequence[tuple[int, ...]]) -> tuple[list[int], ...]:
    """Join neighbouring dimensions that lie one after another in every value; return the sizes and all strides."""
    joined: list[int] = []
    rows: list[list[int]] = [[] for _ in strides]
    for k, size in enumerate(sizes):
        if size == 1:
            continue
        if joined and all(row[-1] == s[k] * size for row, s in zip(rows, strides, strict=True)):
            joined[-1] *= size
            for row, s in zip(rows, strides, strict=True):
                row[-1] = s[k]
        else:
            joined.append(size)
            for row, s in zip(rows, strides, strict=True):
                row.append(s[k])
    return joined, *rows
