"""Write a loop as one C function: all time steps, products of matrices included."""

import torch

from lightning_accel.recurrent.compiler.emit_c.emit_c_expression import expression
from lightning_accel.recurrent.compiler.emit_c.emit_c_matrix_loop import MatrixLoop
from lightning_accel.recurrent.compiler.emit_c.emit_c_row import NotInCError, Place, RowWriter, passes, width
from lightning_accel.recurrent.compiler.emit_c.fusion import PRODUCTS, RowOrder, is_view, owner_of
from lightning_accel.recurrent.compiler.emit_python import emit_aten_call
from lightning_accel.recurrent.compiler.emit_python.buffer_assignment import BufferAssignment, name_states
from lightning_accel.recurrent.compiler.emit_python.function_text import (
    FunctionText,
    buffer_text,
    dtype_text,
    parts,
    shape_text,
)
from lightning_accel.recurrent.compiler.rewrite import Node, aten, shape
from lightning_accel.recurrent.compiler.stage import Segment

_INDENT = "        "


class CText:
    """C functions that belong to one schedule; equal numbers, counted through forward and backward."""

    language = "C"

    def __init__(self) -> None:
        self.functions: list[str] = []
        self.refusals: list[str] = []
        self.dtype: torch.dtype | None = None

    @property
    def source(self) -> str:
        """All of them."""
        return "\n\n".join(self.functions)

    def can_write(self, node: Node) -> bool:
        """Whether a loop can compute an elementwise call that comes before it."""
        return expression(node, lambda _: "x") is not None

    def loop(self, text: FunctionText, segment: Segment, *, reverse: bool, extra: list[Node]) -> "CLoop":
        """Write a loop; see `CLoop`."""
        return CLoop(text, segment, self, reverse=reverse, extra=extra)

    def matrix_loop(self, text: FunctionText, segment: Segment, *, reverse: bool) -> MatrixLoop | None:
        """Write a loop whose values are more than rows; ``None``, and a refusal, if it has no such form."""
        try:
            return MatrixLoop(text, segment, self.add, reverse=reverse)
        except NotInCError as refusal:
            self.refusals.append(str(refusal))
            return None

    def machine(self) -> str:
        """Write what makes the functions callable."""
        return f"machine = MachineCode({self.source!r}, {self.dtype})\n\n"

    def add(self, body: str, dtype: torch.dtype) -> str:
        """Add a function with this body; return its name."""
        if self.dtype not in (None, dtype):
            raise NotInCError("loops of two types of numbers")
        self.dtype = dtype
        name = f"loop_{len(self.functions)}"
        header = f"void {name}(int64_t n, int64_t B, const int64_t *at, product_t call)"
        self.functions.append(f"{header} {{\n{body}\n}}")
        return name


class CLoop:
    """A loop as a call of a C function.

    Args:
        text: The Python function it belongs to.
        segment: The loop.
        c: Takes the C function.
        reverse: Whether the loop runs backwards in time.
        extra: Calls before the loop that it takes over.

    Raises:
        NotInCError: If the loop holds an operation that has no C form; nothing is written then.
    """

    order_type = RowOrder

    def __init__(self, text: FunctionText, segment: Segment, c: CText, *, reverse: bool, extra: list[Node]) -> None:
        self.text, self.c, self.reverse = text, c, reverse
        self.places = BufferAssignment(text, segment, reverse=reverse)
        self.calls = sorted([*self.places.nodes, *extra], key=text.stages.order.__getitem__)
        self.inside = {*self.places.members, *extra}
        self.order = self.order_type(text.stages, self.calls, self.inside, extra)
        self.rows, self.dtype = self.order.rows, self.order.dtype
        self.outside = self._needed_outside()
        self.place: dict[Node, Place] = {}
        self.also: dict[Node, list[Place]] = {}
        self.blocks: dict[str, str] = {}
        self.constants: dict[str, str] = {}
        self.setup: list[str] = []
        self.over: dict[Node, Node] = {}
        self._put_states()
        self._put_concatenations()
        for node in self.rows:
            for value in parts(node) or [node]:
                self._put(value)
        self.name = self._add()

    def write(self) -> None:
        """Write what calls the C function."""
        write_line = self.text.write_line
        for line in self.setup:
            write_line(line)
        blocks, constants = ", ".join(self.blocks.values()), ", ".join(self.constants.values())
        write_line(f"machine.run('{self.name}', n, B, [{blocks}], [{constants}])")
        self._name_results()

    def _needed_outside(self) -> set[Node]:
        outside = self.places.needed_outside()
        for node in reversed(self.places.nodes):
            if node in outside and is_view(node) and node.args[0] in self.places.members:
                outside.add(node.args[0])
        for node in self.places.nodes:
            if node.target is aten.cat.default and any(
                part in outside and part not in self.places.next_of for part in node.args[0]
            ):
                outside.add(node)
        return outside

    # ---- where values lie ----

    def _put_states(self) -> None:
        for j, place, following in self.places.delays:
            if self.reverse:
                slab = f"slab_{j}"
                size, dtype = shape_text(place), dtype_text(place)
                self.setup.append(f"{slab} = ws.buffer('delay_{j}', (n + 1, {size}), {dtype})")
                self.setup.append(f"{slab}[n].copy_(dbounds[{j}])")
                ends = (f"{slab}[1:]", f"{slab}[:-1]")
            else:
                ends = (f"state_{j}[:-1]", f"state_{j}[1:]")
            for node, tensor in zip((place, following), ends, strict=True):
                self.blocks[node.name] = tensor
                self.place[node] = Place(node.name)

    def _put_concatenations(self) -> None:
        for node in self.rows:
            if node.target is not aten.cat.default:
                continue
            self._make_room(node)
            start = 0
            for part in node.args[0]:
                owner = owner_of(part)
                if owner in self.order.begin and not is_view(part):
                    there = Place(self.place[node].name, self.place[node].start + start)
                    if part in self.place:
                        self.also.setdefault(part, []).append(there)
                    else:
                        self.place[part] = there
                start += width(part)

    def _put(self, node: Node) -> None:
        if node in self.place:
            if node in self.text.outputs and self.place[node].name != node.name and node not in self.places.next_of:
                own = self._room(node)
                self.also.setdefault(node, []).append(own)
            return
        if node.target in PRODUCTS:
            summand = None if node in self.text.outputs else self.places.summand_to_add_to(node)
            if summand is not None and summand not in self.inside and summand.target in PRODUCTS:
                self.over[node] = summand
                self.blocks[node.name] = self.text.name(summand)
                self.place[node] = Place(node.name)
                return
            self._make_room(node)
        elif self._is_read_elsewhere(node):
            self._make_room(node)

    def _is_read_elsewhere(self, node: Node) -> bool:
        """Whether someone beyond the pass that makes a value reads it."""
        if node in self.outside or any(u in self.outside for u in node.users if is_view(u)):
            return True
        owner = owner_of(node)
        for user in node.users:
            if user not in self.inside:
                continue
            if is_view(user) or user.target in PRODUCTS or self.order.region[user] != self.order.region[owner]:
                return True
            if self.order.end[node][1] == 0:
                continue  # a number of the whole row is kept beside its memory
            if self.order.end[node] != (self.order.begin[user], self.order.row_width(user)) or passes(user):
                return True
        return False

    def _make_room(self, node: Node) -> None:
        self.place[node] = self._room(node)

    def _room(self, node: Node) -> Place:
        if node in self.text.outputs:
            self.setup.append(f"block_{node.name} = slabs['{node.name}']")
        elif node in self.outside or any(u in self.outside for u in node.users if is_view(u)):
            self.setup.append(f"block_{node.name} = {buffer_text(node, 'n, ')}")
        else:
            self.setup.append(f"room_{node.name} = {buffer_text(node)}")
            self.constants[node.name] = f"room_{node.name}"
            return Place(node.name)
        self.blocks[node.name] = f"block_{node.name}"
        return Place(node.name)

    def _place_of(self, node: Node) -> Place | None:
        """Find a value's memory; one from outside the loop is handed to the function."""
        if node in self.text.stages.invariant and len(shape(node)) == 2 and node not in self.inside:
            self.text.contiguous.add(node)
        if node in self.place or node in self.inside:
            return self.place.get(node)
        if node in self.text.stages.invariant:
            self.constants[node.name] = self.text.name(node)
        else:
            self.blocks[node.name] = self.text.name(node)
        self.place[node] = Place(node.name)
        self.types[node.name] = node.meta["val"].dtype
        return self.place[node]

    def _place_of_matrix(self, node: Node) -> Place:
        """Find the memory of a product's second factor, which may lie column by column if nothing else reads it."""
        is_read_by_rows = node in self.text.contiguous
        found = self._place_of(node)
        assert found is not None
        if not is_read_by_rows:
            self.text.contiguous.discard(node)
            self.text.matrices.add(node)
        return found

    def _stored(self, node: Node) -> list[Place]:
        own = [self.place[node]] if node in self.place else []
        return [*own, *self.also.get(node, ())]

    # ---- the text ----

    def _add(self) -> str:
        """Hand the function over; return its name."""
        return self.c.add(self._body(), self.dtype)

    def _body(self) -> str:
        self.types: dict[str, torch.dtype] = {}
        self.packed: dict[str, str] = {}
        for node in self.place:
            self.types[node.name] = node.meta["val"].dtype
        steps: list[str] = []
        for region in sorted(set(self.order.region.values())):
            calls = [n for n in self.rows if self.order.region[n] == region]
            steps += self._products(calls) if region % 2 else self._row_region(calls)
        lines = []
        for k, name in enumerate([*self.blocks, *self.constants]):
            number = "unsigned char" if self.types.get(name) is torch.bool else "real"
            lines.append(f"    {number} *const p_{name} = ({number} *)at[{3 * k}];")
            lines.append(f"    const int64_t t_{name} = at[{3 * k + 1}], b_{name} = at[{3 * k + 2}];")
        for name, sizes in self.packed.items():
            lines.append(f"    real *const w_{name} = packed(B, n, {sizes}, p_{name}, b_{name});")
        count = "int64_t t = n - 1; t >= 0; --t" if self.reverse else "int64_t t = 0; t < n; ++t"
        lines.append(f"    for ({count}) {{")
        for name in [*self.blocks, *self.constants]:
            number = "unsigned char" if self.types.get(name) is torch.bool else "real"
            lines.append(f"{_INDENT}{number} *const s_{name} = p_{name} + t * t_{name};")
        return "\n".join([*lines, *steps, "    }", *(f"    free(w_{name});" for name in self.packed)])

    def _row_region(self, calls: list[Node]) -> list[str]:
        writer = RowWriter(calls, self.order.begin, self._place_of, self._stored, self.order.resolve)
        inner = writer.text(f"{_INDENT}    ")
        lines = [f"{_INDENT}for (int64_t b = 0; b < B; ++b) {{"]
        for name in writer.rows:
            number = "unsigned char" if self.types.get(name) is torch.bool else "real"
            lines.append(f"{_INDENT}    {number} *const r_{name} = s_{name} + b * b_{name};")
        return [*lines, *inner, f"{_INDENT}}}"]

    def _products(self, calls: list[Node]) -> list[str]:
        lines = []
        for node in calls:
            out = self.place[node].name
            left, right = node.args[-2:]
            source, start = self.order.resolve(left)
            a, w = self._place_of(source), self._place_of_matrix(right)
            assert a is not None
            keep = "0"
            if node.target is aten.addmm.default:
                keep = "1"
                if node not in self.over:
                    lines += self._copy(node.args[0], node)
            first = f"s_{a.name} + {a.start + start}"
            sizes = f"{width(node)}, {width(left)}"
            self.packed[w.name] = sizes  # a matrix has one size
            lines.append(
                f"{_INDENT}product(call, B, {sizes}, {first}, b_{a.name} > 0 ? b_{a.name} : {width(left)}, "
                f"s_{w.name}, b_{w.name}, w_{w.name}, s_{out} + {self.place[node].start}, "
                f"b_{out} > 0 ? b_{out} : {width(node)}, {keep}, t);"
            )
        return lines

    def _copy(self, source: Node, node: Node) -> list[str]:
        value, start = self.order.resolve(source)
        place, out = self._place_of(value), self.place[node]
        assert place is not None
        index = f"{place.start + start} + b * b_{place.name}" + (" + k" if width(source) > 1 else "")
        return [
            f"{_INDENT}for (int64_t b = 0; b < B; ++b)",
            f"{_INDENT}    for (long k = 0; k < {width(node)}; ++k)",
            f"{_INDENT}        s_{out.name}[{out.start} + b * b_{out.name} + k] = s_{place.name}[{index}];",
        ]

    def _name_results(self) -> None:
        write_line, text = self.text.write_line, self.text
        name_states(text, self.places, reverse=self.reverse)
        for node in sorted(self.outside, key=text.stages.order.__getitem__):
            if node in self.places.next_of or node.op == "placeholder":
                continue
            if is_view(node):
                write_line(f"v_{node.name} = {emit_aten_call.call_view(node, f'v_{node.args[0].name}', block=True)}")
            elif f"block_{node.name}" in self.blocks.values():
                write_line(f"v_{node.name} = block_{node.name}")
            elif node in self.over:
                write_line(f"v_{node.name} = v_{self.over[node].name}")
            else:
                place = self.place[node]
                write_line(f"v_{node.name} = block_{place.name}[:, :, {place.start}:{place.start + width(node)}]")
