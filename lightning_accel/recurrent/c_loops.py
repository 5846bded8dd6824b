"""Write a loop as one C function: all time steps, products of matrices included."""

import operator
from collections.abc import Iterable
from typing import Any

import torch

from lightning_accel.recurrent import batching
from lightning_accel.recurrent.c_expressions import expression
from lightning_accel.recurrent.c_rows import NORM, NotInCError, Place, RowWriter, check, passes, width
from lightning_accel.recurrent.function_text import FunctionText, buffer_text, dtype_text, parts, shape_text
from lightning_accel.recurrent.loop_places import LoopPlaces
from lightning_accel.recurrent.machine_code import REALS
from lightning_accel.recurrent.rewriting import VIEWS, Node, aten, shape
from lightning_accel.recurrent.staging import Segment, Stages

_PRODUCTS = {aten.mm.default, aten.addmm.default}
_INDENT = "        "


class CText:
    """C functions that belong to one schedule; equal numbers, counted through forward and backward."""

    def __init__(self) -> None:
        self.functions: list[str] = []
        self.refusals: list[str] = []
        self.dtype: torch.dtype | None = None

    @property
    def source(self) -> str:
        """All of them."""
        return "\n\n".join(self.functions)

    def add(self, body: str, dtype: torch.dtype) -> str:
        """Add a function with this body; return its name."""
        if self.dtype not in (None, dtype):
            raise NotInCError("loops of two types of numbers")
        self.dtype = dtype
        name = f"loop_{len(self.functions)}"
        header = f"void {name}(int64_t n, int64_t B, const int64_t *at, product_t call)"
        self.functions.append(f"{header} {{\n{body}\n}}")
        return name


def inlined(stages: Stages, segments: list[Segment], apart: Iterable[Node]) -> dict[int, list[Node]]:
    """Find elementwise calls before a loop that nothing but the loop reads; there they need no memory.

    Args:
        stages: Of the step.
        segments: Of the forward or the backward.
        apart: Values that are needed elsewhere.

    Returns:
        Index of a loop's segment: calls that it may take, in order.
    """
    home = {n: k for k, s in enumerate(segments) for n in s.nodes}
    fixed, found = set(apart), {}
    loops = [k for k, s in enumerate(segments) if s.loop]
    kept = [s for pairs in ((stages.step.next_states, stages.step.states),) for s in [*pairs[0], *pairs[1]]]
    kept += [n for n in (*stages.step.d_states, *stages.step.d_next_states) if n is not None]
    fixed.update(kept)
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
                and all(width(u) == width(node) and u.target not in _PRODUCTS for u in users if _is_tensor(u))
                and expression(node, lambda _: "x") is not None
                and torch.Tag.pointwise in node.target.tags
            ):
                taken.add(node)
        found[loop] = sorted(taken, key=stages.order.__getitem__)
    return found


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor)


def _is_row(stages: Stages, node: Node) -> bool:
    value = node.meta["val"]
    streams = stages.step.streams
    return isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[0] == streams


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

    def __init__(self, text: FunctionText, segment: Segment, c: CText, *, reverse: bool, extra: list[Node]) -> None:
        self.text, self.c, self.reverse = text, c, reverse
        self.places = LoopPlaces(text, segment, reverse=reverse)
        order = text.stages.order
        self.calls = sorted([*self.places.nodes, *extra], key=order.__getitem__)
        self.inside = {*self.places.members, *extra}
        self.rows = [n for n in self.calls if n.target not in VIEWS and n.target is not operator.getitem]
        self.extra = extra
        self.outside = self._needed_outside()
        self.place: dict[Node, Place] = {}
        self.also: dict[Node, list[Place]] = {}
        self.blocks: dict[str, str] = {}
        self.constants: dict[str, str] = {}
        self.setup: list[str] = []
        self.over: dict[Node, Node] = {}
        self._check()
        self._level()
        self._put_states()
        self._put_concatenations()
        for node in self.rows:
            for value in parts(node) or [node]:
                self._put(value)
        self.name = self.c.add(self._body(), self.dtype)

    def write(self) -> None:
        """Write what calls the C function."""
        say = self.text.say
        for line in self.setup:
            say(line)
        blocks, constants = ", ".join(self.blocks.values()), ", ".join(self.constants.values())
        say(f"machine.run('{self.name}', n, B, [{blocks}], [{constants}])")
        self._name_results()

    def _needed_outside(self) -> set[Node]:
        outside = self.places.needed_outside()
        for node in reversed(self.places.nodes):
            if node in outside and node.target in VIEWS and node.args[0] in self.places.members:
                outside.add(node.args[0])
        for node in self.places.nodes:
            if node.target is aten.cat.default and any(
                part in outside and part not in self.places.next_of for part in node.args[0]
            ):
                outside.add(node)
        return outside

    # ---- what can be written, and in which order ----

    def _check(self) -> None:
        kinds = {n.meta["val"].dtype for n in self.rows if isinstance(n.meta["val"], torch.Tensor)} - {torch.bool}
        if len(kinds) != 1 or not kinds <= set(REALS):
            raise NotInCError(f"numbers of the types {kinds}")
        (self.dtype,) = kinds
        for node in self.calls:
            if node.target is operator.getitem:
                continue
            if node.target in VIEWS:
                self._check_view(node)
                continue
            for value in parts(node) or [node]:
                if not _is_row(self.text.stages, value):
                    raise NotInCError(f"{value} of shape {shape(value)}")
            for source in node.all_input_nodes:
                if node.target not in _PRODUCTS or source is not node.args[-1]:
                    self._check_operand(node, source)
            if node.target in _PRODUCTS:
                self._check_product(node)
            elif node.target is aten.cat.default:
                if (int(node.args[1]) if len(node.args) > 1 else 0) % 2 != 1:
                    raise NotInCError("a concatenation of streams")
            else:
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
        if value.dim() > 2 or (value.dtype is not self.dtype and value.dtype is not torch.bool):
            raise NotInCError(f"{source} of shape {shape(source)} and type {value.dtype}")
        rows_ = value.shape[0] if value.dim() == 2 else 1
        if rows_ not in (1, self.text.stages.step.streams) or width(source) not in (1, *self._widths(node)):
            raise NotInCError(f"{source} of shape {shape(source)}")

    def _widths(self, node: Node) -> list[int]:
        if (
            node.target in _PRODUCTS
            or node.target is aten.cat.default
            or not isinstance(node.meta["val"], torch.Tensor)
            or passes(node)
        ):
            return [width(s) for s in node.all_input_nodes if isinstance(s.meta["val"], torch.Tensor)]
        return [width(node)]

    def _check_product(self, node: Node) -> None:
        left, right = node.args[-2:]
        if node.kwargs or right in self.inside or right not in self.text.stages.invariant:
            raise NotInCError("a product whose second factor changes")
        if self._resolve(left)[0] not in self.inside:
            raise NotInCError("a product whose first factor is not the loop's own")

    def _resolve(self, node: Node) -> tuple[Node, int]:
        start = 0
        while node in self.inside and node.target in VIEWS:
            x, *args = node.args
            first = args[1] if len(args) > 1 and args[1] is not None else 0
            start += slice(first, None).indices(width(x))[0]
            node = x
        return node, start

    def _sources(self, node: Node) -> list[tuple[Node, bool]]:
        """Return the loop's own calls whose values a call reads, and whether as they are."""
        found = []
        for source in node.all_input_nodes:
            value, _ = self._resolve(source)
            direct = value is source
            owner = value.args[0] if value.target is operator.getitem else value
            if owner in self.region:
                found.append((value, direct))
        return found

    def _level(self) -> None:
        """Give every call its region (products have odd ones) and the pass within it in which it begins."""
        self.region: dict[Node, int] = {}
        self.begin: dict[Node, int] = {}
        self.end: dict[Node, tuple[int, int]] = {}  # pass and width in which a value exists for each element
        for node in self.rows:
            if node in self.extra:
                continue
            sources = self._sources(node)
            regions = [self.region[self._owner(v)] for v, _ in sources]
            if node.target in _PRODUCTS:
                self.region[node] = max([r + 1 + r % 2 for r in regions], default=1)
                continue
            region = max([r + r % 2 for r in regions], default=0)
            self.region[node] = region
            begin = 0
            for value, direct in sources:
                owner = self._owner(value)
                if self.region[owner] != region or owner.target in _PRODUCTS:
                    continue
                level, size = self.end[value]
                same = (
                    direct
                    and size == self._row_width(node)
                    and size == width(value)
                    and owner.target is not (aten.cat.default)
                )
                begin = max(begin, level if same else level + 1)
            self.begin[node] = begin
            self._set_ends(node, begin)
        for node in reversed(self.extra):  # as late as its first reader
            users = [u for u in node.users if u in self.begin]
            first = min((self.region[u], self.begin[u]) for u in users)
            self.region[node], self.begin[node] = first
            self._set_ends(node, first[1])

    def _row_width(self, node: Node) -> int:
        return width(node.args[0]) if passes(node) or node.target is NORM else width(node)

    def _set_ends(self, node: Node, begin: int) -> None:
        if node.target is NORM:
            for part in parts(node):
                self.end[part] = (begin + 2, width(part)) if part.args[1] == 0 else (begin + 1, 0)
        elif parts(node):
            self.end[parts(node)[0]] = (begin + 1, width(parts(node)[0]))
        else:
            self.end[node] = (begin + passes(node), width(node)) if not passes(node) else (begin, 0)

    def _owner(self, value: Node) -> Node:
        return value.args[0] if value.target is operator.getitem else value

    # ---- where values lie ----

    def _put_states(self) -> None:
        for j, place, following in self.places.delays:
            if self.reverse:
                slab = f"slab_{j}"
                size, dtype = shape_text(place), dtype_text(place)
                self.setup.append(f"{slab} = ws_get(ws, 'delay_{j}', (n + 1, {size}), {dtype})")
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
                owner = self._owner(part)
                if owner in self.begin and part.target not in VIEWS:
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
        if node.target in _PRODUCTS:
            summand = None if node in self.text.outputs else self.places.summand_to_add_to(node)
            if summand is not None and summand not in self.inside and summand.target in _PRODUCTS:
                self.over[node] = summand
                self.blocks[node.name] = self.text.name(summand)
                self.place[node] = Place(node.name)
                return
            self._make_room(node)
        elif self._is_read_elsewhere(node):
            self._make_room(node)

    def _is_read_elsewhere(self, node: Node) -> bool:
        """Whether someone beyond the pass that makes a value reads it."""
        if node in self.outside or any(u in self.outside for u in node.users if u.target in VIEWS):
            return True
        owner = self._owner(node)
        for user in node.users:
            if user not in self.inside:
                continue
            if user.target in VIEWS or user.target in _PRODUCTS or self.region[user] != self.region[owner]:
                return True
            if self.end[node][1] == 0:
                continue  # a number of the whole row is kept beside its memory
            if self.end[node] != (self.begin[user], self._row_width(user)) or passes(user):
                return True
        return False

    def _make_room(self, node: Node) -> None:
        self.place[node] = self._room(node)

    def _room(self, node: Node) -> Place:
        if node in self.text.outputs:
            self.setup.append(f"block_{node.name} = slabs['{node.name}']")
        elif node in self.outside or any(u in self.outside for u in node.users if u.target in VIEWS):
            self.setup.append(f"block_{node.name} = {buffer_text(node, 'n, ')}")
        else:
            self.setup.append(f"room_{node.name} = {buffer_text(node)}")
            self.constants[node.name] = f"room_{node.name}"
            return Place(node.name)
        self.blocks[node.name] = f"block_{node.name}"
        return Place(node.name)

    def _place_of(self, node: Node) -> Place | None:
        """Find a value's memory; one from outside the loop is handed to the function."""
        if node in self.place or node in self.inside:
            return self.place.get(node)
        if node in self.text.stages.invariant:
            if len(shape(node)) == 2:
                self.text.contiguous.add(node)
            self.constants[node.name] = self.text.name(node)
        else:
            self.blocks[node.name] = self.text.name(node)
        self.place[node] = Place(node.name)
        self.types[node.name] = node.meta["val"].dtype
        return self.place[node]

    def _stored(self, node: Node) -> list[Place]:
        own = [self.place[node]] if node in self.place else []
        return [*own, *self.also.get(node, ())]

    # ---- the text ----

    def _body(self) -> str:
        self.types: dict[str, torch.dtype] = {}
        for node in self.place:
            self.types[node.name] = node.meta["val"].dtype
        steps: list[str] = []
        for region in sorted(set(self.region.values())):
            calls = [n for n in self.rows if self.region[n] == region]
            steps += self._products(calls) if region % 2 else self._row_region(calls)
        lines = []
        for k, name in enumerate([*self.blocks, *self.constants]):
            number = "unsigned char" if self.types.get(name) is torch.bool else "real"
            lines.append(f"    {number} *const p_{name} = ({number} *)at[{3 * k}];")
            lines.append(f"    const int64_t t_{name} = at[{3 * k + 1}], b_{name} = at[{3 * k + 2}];")
        count = "int64_t t = n - 1; t >= 0; --t" if self.reverse else "int64_t t = 0; t < n; ++t"
        lines.append(f"    for ({count}) {{")
        for name in [*self.blocks, *self.constants]:
            number = "unsigned char" if self.types.get(name) is torch.bool else "real"
            lines.append(f"{_INDENT}{number} *const s_{name} = p_{name} + t * t_{name};")
        return "\n".join([*lines, *steps, "    }"])

    def _row_region(self, calls: list[Node]) -> list[str]:
        writer = RowWriter(calls, self.begin, self._place_of, self._stored, self._resolve)
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
            source, start = self._resolve(left)
            a, w = self._place_of(source), self._place_of(right)
            assert a is not None
            assert w is not None
            keep = "0"
            if node.target is aten.addmm.default:
                keep = "1"
                if node not in self.over:
                    lines += self._copy(node.args[0], node)
            first = f"s_{a.name} + {a.start + start}"
            sizes = f"B, {width(node)}, {width(left)}"
            lines.append(
                f"{_INDENT}product(call, {sizes}, {first}, b_{a.name} > 0 ? b_{a.name} : {width(left)}, s_{w.name}, "
                f"s_{out} + {self.place[node].start}, b_{out} > 0 ? b_{out} : {width(node)}, {keep});"
            )
        return lines

    def _copy(self, source: Node, node: Node) -> list[str]:
        value, start = self._resolve(source)
        place, out = self._place_of(value), self.place[node]
        assert place is not None
        index = f"{place.start + start} + b * b_{place.name}" + (" + k" if width(source) > 1 else "")
        return [
            f"{_INDENT}for (int64_t b = 0; b < B; ++b)",
            f"{_INDENT}    for (long k = 0; k < {width(node)}; ++k)",
            f"{_INDENT}        s_{out.name}[{out.start} + b * b_{out.name} + k] = s_{place.name}[{index}];",
        ]

    def _name_results(self) -> None:
        say, text = self.text.say, self.text
        for j, place, following in self.places.delays:
            first, second = (
                (f"slab_{j}[1:]", f"slab_{j}[:-1]") if self.reverse else (f"state_{j}[:-1]", f"state_{j}[1:]")
            )
            say(f"v_{place.name} = {first}")
            say(f"v_{following.name} = {second}")
            if self.reverse:
                say(f"start_{place.name} = slab_{j}[0]")
        for node in sorted(self.outside, key=text.stages.order.__getitem__):
            if node in self.places.next_of or node.op == "placeholder":
                continue
            if node.target in VIEWS:
                say(f"v_{node.name} = {batching.call_view(node, f'v_{node.args[0].name}', block=True)}")
            elif f"block_{node.name}" in self.blocks.values():
                say(f"v_{node.name} = block_{node.name}")
            elif node in self.over:
                say(f"v_{node.name} = v_{self.over[node].name}")
            else:
                place = self.place[node]
                say(f"v_{node.name} = block_{place.name}[:, :, {place.start}:{place.start + width(node)}]")
