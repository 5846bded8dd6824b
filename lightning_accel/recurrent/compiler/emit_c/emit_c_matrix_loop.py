"""Write a loop over values of any number of dimensions as one C function; what `emit_c_loop` is for rows."""

import math
import operator
from collections.abc import Callable
from itertools import groupby

import torch

from lightning_accel.machine.c_functions import REALS
from lightning_accel.recurrent.compiler.emit_c.emit_c_nest import (
    NestWriter,
    check,
    is_elementwise,
    is_outer,
    number_type,
)
from lightning_accel.recurrent.compiler.emit_c.emit_c_row import NotInCError
from lightning_accel.recurrent.compiler.emit_c.fusion import PRODUCTS
from lightning_accel.recurrent.compiler.emit_c.stream_views import StreamView, view_of, whole
from lightning_accel.recurrent.compiler.emit_python import emit_aten_call
from lightning_accel.recurrent.compiler.emit_python.buffer_assignment import BufferAssignment, name_states
from lightning_accel.recurrent.compiler.emit_python.function_text import (
    FunctionText,
    buffer_text,
    dtype_text,
    shape_text,
)
from lightning_accel.recurrent.compiler.rewrite import VIEWS, Node, aten, shape
from lightning_accel.recurrent.compiler.stage import Segment

_INDENT = "        "


class MatrixLoop:
    """A loop as a call of a C function that goes through the streams and, for each, through nests of loops.

    Args:
        text: The Python function it belongs to.
        segment: The loop.
        add: Takes the body of the C function and the type of its numbers; returns its name.
        reverse: Whether the loop runs backwards in time.

    Raises:
        NotInCError: If the loop holds an operation that has no C form; nothing is written then.
    """

    def __init__(
        self, text: FunctionText, segment: Segment, add: Callable[[str, torch.dtype], str], *, reverse: bool
    ) -> None:
        self.text, self.reverse = text, reverse
        self.places = BufferAssignment(text, segment, reverse=reverse)
        self.streams = text.stages.step.streams
        self._views: dict[Node, StreamView] = {}
        self._blocks: dict[str, str] = {}
        self._constants: dict[str, str] = {}
        self._setup: list[str] = []
        self._matrices: set[Node] = set()
        self._types: dict[str, str] = {}
        self.calls = [n for n in self.places.nodes if n.target not in VIEWS]
        self.dtype = self._check()
        self.groups = self._grouped()
        self.outside = self._needed_outside()
        self._lone = self._registers()
        self._put_states()
        for k, group in enumerate(self.groups):
            for node in group:
                self._put(node, k)
        self.name = add(self._body(), self.dtype)

    def write(self) -> None:
        """Write what calls the C function."""
        write_line = self.text.write_line
        for line in self._setup:
            write_line(line)
        blocks, constants = ", ".join(self._blocks.values()), ", ".join(self._constants.values())
        write_line(f"machine.run('{self.name}', n, B, [{blocks}], [{constants}])")
        self._name_results()

    # ---- what can be written ----

    def _check(self) -> torch.dtype:
        kinds = {n.meta["val"].dtype for n in self.calls if isinstance(n.meta["val"], torch.Tensor)} - {torch.bool}
        if len(kinds) != 1 or not kinds <= set(REALS):
            raise NotInCError(f"numbers of the types {kinds}")
        (dtype,) = kinds
        for node in self.places.nodes:
            if not isinstance(node.meta["val"], torch.Tensor) or shape(node)[:1] != (self.streams,):
                raise NotInCError(f"{node} without streams")
            if node.target in VIEWS:
                self._resolve(node)
            elif node.target in PRODUCTS:
                self._check_product(node)
            else:
                check(node)
                for source in node.all_input_nodes:
                    self._resolve(source)
                    if source.meta["val"].dtype not in (dtype, torch.bool):
                        raise NotInCError(f"{source} of the type {source.meta['val'].dtype}")
        return dtype

    def _check_product(self, node: Node) -> None:
        left, right = node.args[-2:]
        if node.kwargs or right not in self.text.stages.invariant:
            raise NotInCError("a product whose second factor changes")
        if left not in self.places.members or not self._resolve(left).is_dense:
            raise NotInCError("a product whose first factor is not the loop's own")

    def _resolve(self, node: Node) -> StreamView:
        """Return which memory a value's elements are read from."""
        if node not in self._views:
            if node.target in VIEWS and (node in self.places.members or self._only_repeats(node)):
                self._views[node] = view_of(node, self._resolve(node.args[0]))
            elif node in self.text.stages.invariant:
                self._views[node] = whole(node, shape(node))
            elif shape(node)[:1] != (self.streams,):
                raise NotInCError(f"{node} of shape {shape(node)}")
            else:
                self._views[node] = whole(node, shape(node)[1:])
        return self._views[node]

    def _only_repeats(self, node: Node) -> bool:
        """Whether a value from outside the loop repeats numbers of another, which is read in its place."""
        if node.target is not aten.expand.default or node in self.text.stages.invariant:
            return False
        return shape(node)[:1] == shape(node.args[0])[:1] and len(shape(node)) == len(shape(node.args[0]))

    # ---- the order ----

    def _sources(self, node: Node) -> set[Node]:
        """Return the loop's own calls that a call reads."""
        owners = {self._resolve(s).owner for s in node.all_input_nodes if s not in self.text.stages.invariant}
        return owners & set(self.calls)

    def _grouped(self) -> list[list[Node]]:
        """Put elementwise calls on values of one shape together, where none reads another through a view."""
        left, done, groups = list(self.calls), set[Node](), list[list[Node]]()
        while left:
            ready = [n for n in left if self._sources(n) <= done]
            group = groups[-1] if groups else []
            fitting = next((n for n in ready if group and self._fits(n, group)), None)
            if fitting is None:
                fitting = ready[0]
                groups.append([])
            groups[-1].append(fitting)
            left.remove(fitting)
            done.add(fitting)
        return groups

    def _fits(self, node: Node, group: list[Node]) -> bool:
        if not (is_elementwise(node) and is_elementwise(group[0])) or shape(node) != shape(group[0]):
            return False
        members, by_register = set(group), set() if is_outer(node) else set(group)
        return all(s in by_register or self._resolve(s).owner not in members for s in node.all_input_nodes)

    def _registers(self) -> set[Node]:
        """Return the values that nothing outside of their own nest reads."""
        found = set()
        for group in self.groups:
            members = set(group)
            for node in group if is_elementwise(group[0]) else ():
                if node not in self.outside and node not in self.places.next_of:
                    users = [u for u in node.users if u in self.places.members]
                    if all(u in members for u in users):
                        found.add(node)
        return found

    def _needed_outside(self) -> set[Node]:
        outside = self.places.needed_outside()
        for node in reversed(self.places.nodes):
            if node in outside and node.target in VIEWS and node.args[0] in self.places.members:
                outside.add(node.args[0])
        return outside

    # ---- where values lie ----

    def _flat(self, node: Node, name: str, lead: str) -> str:
        return f"{name}.reshape({lead}B, {math.prod(shape(node)[1:])})"

    def _put_states(self) -> None:
        for j, place, following in self.places.delays:
            if self.reverse:
                slab, size, dtype = f"slab_{j}", shape_text(place), dtype_text(place)
                self._setup.append(f"{slab} = ws.buffer('delay_{j}', (n + 1, {size}), {dtype})")
                self._setup.append(f"{slab}[n].copy_(dbounds[{j}])")
                ends = (f"{slab}[1:]", f"{slab}[:-1]")
            else:
                ends = (f"state_{j}[:-1]", f"state_{j}[1:]")
            for node, tensor in zip((place, following), ends, strict=True):
                self._blocks[node.name] = self._flat(node, tensor, "n, ")
                self._types[node.name] = number_type(node)

    def _put(self, node: Node, group: int) -> None:
        """Give a call's result memory, if it needs any."""
        if node.name in self._blocks or node in self._lone:
            return
        self._types[node.name] = number_type(node)
        if node in self.text.outputs or node in self.outside:
            block = f"slabs['{node.name}']" if node in self.text.outputs else buffer_text(node, "n, ")
            self._setup.append(f"block_{node.name} = {block}")
            self._blocks[node.name] = self._flat(node, f"block_{node.name}", "n, ")
            return
        self._setup.append(f"room_{node.name} = {buffer_text(node)}")
        room = self._flat(node, f"room_{node.name}", "")
        # what no product separates from its readers is one stream's only: then its memory stays in the cache
        self._constants[node.name] = room if self._crosses_product(node, group) else f"{room}[:1]"

    def _crosses_product(self, node: Node, group: int) -> bool:
        if node.target in PRODUCTS:
            return True
        readers = [k for k, calls in enumerate(self.groups) for n in calls if node in self._sources(n)]
        last = max(readers, default=group)
        return any(calls[0].target in PRODUCTS for calls in self.groups[group : last + 1])

    def _hand_over(self, node: Node) -> None:
        """Hand a value from outside the loop to the function."""
        if node.name in self._blocks or node.name in self._constants:
            return
        self._types[node.name] = number_type(node)
        if node in self.text.stages.invariant:
            self.text.contiguous.add(node)
            self._constants[node.name] = f"{self.text.name(node)}.reshape(1, -1)"
        else:
            self._blocks[node.name] = self._flat(node, self.text.name(node), "n, ")

    # ---- the text ----

    def _body(self) -> str:
        packed: dict[str, str] = {}
        parts: list[tuple[bool, list[str]]] = []  # whether for each stream, and the lines
        writer = NestWriter(self._read, lambda node: node not in self._lone)
        for group in self.groups:
            if group[0].target in PRODUCTS:
                if len(group[0].args) == 3:
                    parts.append((True, self._bias(group[0])))
                parts.append((False, [self._product(group[0], packed)]))
            else:
                lines = writer.elementwise(group) if is_elementwise(group[0]) else writer.other(group[0])
                parts.append((True, ["{", *("    " + line for line in lines), "}"]))
        names = [*self._blocks, *self._constants]
        lines = []
        for k, name in enumerate(names):
            number = self._types[name]
            lines.append(f"    {number} *const p_{name} = ({number} *)at[{3 * k}];")
            lines.append(f"    const int64_t t_{name} = at[{3 * k + 1}], b_{name} = at[{3 * k + 2}];")
        for name, sizes in packed.items():
            lines.append(f"    real *const w_{name} = packed(B, n, {sizes}, p_{name}, b_{name});")
        count = "int64_t t = n - 1; t >= 0; --t" if self.reverse else "int64_t t = 0; t < n; ++t"
        lines.append(f"    for ({count}) {{")
        lines += [f"{_INDENT}{self._types[name]} *const s_{name} = p_{name} + t * t_{name};" for name in names]
        rows = [f"{self._types[n]} *const r_{n} = s_{n} + b * b_{n};" for n in names if n not in packed]
        for of_streams, run in groupby(parts, key=operator.itemgetter(0)):
            body = [line for _, part in run for line in part]
            if of_streams:
                lines.append(f"{_INDENT}for (int64_t b = 0; b < B; ++b) {{")
                lines += [f"{_INDENT}    {line}" for line in [*rows, *body]]
                lines.append(f"{_INDENT}}}")
            else:
                lines += body
        return "\n".join([*lines, "    }", *(f"    free(w_{name});" for name in packed)])

    def _read(self, node: Node) -> StreamView:
        view = self._resolve(node)
        if view.owner not in self.places.members:
            self._hand_over(view.owner)
        return view

    def _bias(self, node: Node) -> list[str]:
        bias = self._read(node.args[0])
        (stride,) = bias.broadcast(shape(node)[1:])
        return [
            f"for (long k = 0; k < {shape(node)[1]}; ++k)",
            f"    r_{node.name}[k] = r_{bias.owner.name}[{bias.offset} + k * {stride}];",
        ]

    def _product(self, node: Node, packed: dict[str, str]) -> str:
        left, right = node.args[-2:]
        source = self._read(left)
        sizes = f"{shape(node)[1]}, {shape(left)[1]}"
        if right.name not in packed:
            packed[right.name] = sizes
            self._types[right.name] = number_type(right)
            self.text.matrices.add(right)
            self._constants[right.name] = self.text.name(right)
        a, w, out = source.owner.name, right.name, node.name
        keep = int(len(node.args) == 3)
        return (
            f"{_INDENT}product(call, B, {sizes}, s_{a} + {source.offset}, B > 1 ? b_{a} : {shape(left)[1]}, "
            f"s_{w}, b_{w}, w_{w}, s_{out}, B > 1 ? b_{out} : {shape(node)[1]}, {keep}, t);"
        )

    def _name_results(self) -> None:
        write_line, text = self.text.write_line, self.text
        name_states(text, self.places, reverse=self.reverse)
        for node in sorted(self.outside, key=text.stages.order.__getitem__):
            if node in self.places.next_of or node.op == "placeholder":
                continue
            if node.target in VIEWS:
                write_line(f"v_{node.name} = {emit_aten_call.call_view(node, f'v_{node.args[0].name}', block=True)}")
            else:
                write_line(f"v_{node.name} = block_{node.name}")
