"""Where the values of a loop lie: in a slab of all time steps, in one buffer that all steps share, or made anew.

Views are taken before the loop, and operands of a concatenation are computed where it wants them.
"""

import operator

from lightning_accel.recurrent.compiler.emit_python import emit_aten_call
from lightning_accel.recurrent.compiler.emit_python.function_text import (
    FunctionText,
    buffer_text,
    dtype_text,
    parts,
    shape_text,
)
from lightning_accel.recurrent.compiler.rewrite import VIEWS, Node, aten, shape
from lightning_accel.recurrent.compiler.stage import Segment


class BufferAssignment:
    """The places of one loop's values.

    Args:
        text: The function; what makes the places is written to it.
        segment: The loop.
        reverse: Whether it runs backwards in time.

    Attributes:
        nodes: Calls of the loop, in order.
        members: All of its nodes.
        slab: Values of every step: name of a block's tensor.
        shared: Values of the step only: name of a tensor.
        fresh: Values that calls allocate.
        parent: For parts of a concatenation, the whole and where in it.
        zipped: What the loop steps through: a step's name, and a list's.
        kept: Values that calls allocate, collected in the loop and stacked after it.
        delays: Place of each state of the loop, itself and its next value (backwards: their gradients).
    """

    def __init__(self, text: FunctionText, segment: Segment, *, reverse: bool) -> None:
        self.text, self.reverse = text, reverse
        self.nodes = [n for n in segment.nodes if n.op != "placeholder"]
        self.members = set(segment.nodes)
        self.slab: dict[Node, str] = {}
        self.shared: dict[Node, str] = {}
        self.fresh: set[Node] = set()
        self.parent: dict[Node, tuple[Node, int]] = {}
        self.zipped: dict[str, str] = {}
        self.kept: dict[Node, None] = {}
        step = text.step
        if reverse:
            pairs = zip(step.d_next_states, step.d_states, strict=True)
        else:
            pairs = zip(step.states, step.next_states, strict=True)
        self.delays: list[tuple[int, Node, Node]] = [
            (j, p, n) for j, (p, n) in enumerate(pairs) if p in self.members and p is not None
        ]
        self.next_of = {n: j for j, _, n in self.delays}

    def needed_outside(self) -> set[Node]:
        """Return the loop's values that are read outside it, each of them for every step."""
        text = self.text
        phase = text.stages.backward_nodes if self.reverse else text.stages.forward_nodes
        needed = {n for n in self.members if n in text.outputs}
        if self.reverse:
            needed |= self.members & text.stages.read
        for node in self.members:
            if any(
                u in phase and u not in self.members and u.op != "output"
                for u in node.users
                if u.target is not operator.getitem
            ):
                needed.add(node)
        sources = text.step.d_states if self.reverse else text.step.next_states
        targets = text.step.d_next_states if self.reverse else text.step.states
        for source, target in zip(sources, targets, strict=True):
            if source in self.members and target not in self.members:
                needed.add(source)
        for node in list(self.members):
            for part in parts(node):
                if part in text.outputs or any(
                    u in phase and u not in self.members and u.op != "output" for u in part.users
                ):
                    needed.add(part)
        return needed

    def place_parts(self) -> None:
        """Let the operands of a concatenation be computed where it wants them."""
        for node in self.nodes:
            if node.target is not aten.cat.default:
                continue
            start, axis = 0, (int(node.args[1]) if len(node.args) > 1 else 0) % len(shape(node))
            for part in node.args[0]:
                length = shape(part)[axis]
                free = part in self.members and part.op != "placeholder" and part not in self.parent
                writes = free and part.target not in VIEWS and part.target is not operator.getitem
                if (
                    writes
                    and part not in self.next_of
                    and list(node.args[0]).count(part) == 1
                    and emit_aten_call.call_into(part, lambda n: n.name, "o") is not None
                    and part.meta["val"].dtype == node.meta["val"].dtype
                    and all(u.target is not aten.view.default for u in part.users)
                ):
                    self.parent[part] = (node, start)
                start += length

    def open_delays(self, outside: set[Node]) -> None:
        """Write where states (backwards: their gradients) lie and what the first step takes."""
        write_line = self.text.write_line
        for j, place, following in self.delays:
            if not self.reverse:
                write_line(f"steps_{j} = state_{j}.unbind(0)")
                self.slab[place], self.slab[following] = f"state_{j}[:-1]", f"state_{j}[1:]"
                self.zip_steps(place, f"steps_{j}[:-1]")
                if following is not place:
                    self.zip_steps(following, f"steps_{j}[1:]")
                continue
            shape_, dtype = shape_text(place), dtype_text(place)
            if {place, following} & outside or self._has_views(place) or self._has_views(following):
                write_line(f"slab_{j} = ws.buffer('delay_{j}', (n + 1, {shape_}), {dtype})")
                write_line(f"delay_{j} = slab_{j}.unbind(0)")
                self.slab[place], self.slab[following] = f"slab_{j}[1:]", f"slab_{j}[:-1]"
            else:
                write_line(f"delay_{j} = ws.two_buffers('delay_{j}', n + 1, ({shape_}), {dtype})")
            write_line(f"delay_{j}[n].copy_(dbounds[{j}])")
            self.zip_steps(place, f"delay_{j}[1:]")
            if following is not place:
                self.zip_steps(following, f"delay_{j}[:-1]")

    def _has_views(self, node: Node) -> bool:
        return any(u.target in VIEWS and u in self.members for u in node.users)

    def zip_steps(self, node: Node, steps: str) -> None:
        """Let the loop step through the views ``steps`` of a value."""
        self.zipped[f"s_{node.name}"] = steps

    def place(self, node: Node, outside: set[Node]) -> None:
        """Give a value its place, and write what makes it."""
        text, write_line = self.text, self.text.write_line
        if node in self.next_of:
            return
        if node.target in VIEWS:
            self._place_view(node, outside)
            return
        if isinstance(node.meta["val"], (list, tuple)) or node.target is operator.getitem:
            self.fresh.add(node)
            for part in parts(node):
                if part in outside:
                    self._copy_out(part)
            return
        if node in self.parent:
            whole, start = self.parent[node]
            # the concatenation comes later in the step, its place is needed now
            if whole not in self.slab and whole not in self.shared:
                self._make_room(whole, whole in outside)
            axis = (int(whole.args[1]) if len(whole.args) > 1 else 0) % len(shape(whole))
            end = start + shape(node)[axis]
            if whole in self.slab:
                self.slab[node] = f"{self.slab[whole]}[:, {':, ' * axis}{start}:{end}]"
                write_line(f"list_{node.name} = {self.slab[node]}.unbind(0)")
                self.zip_steps(node, f"list_{node.name}")
            else:
                self.shared[node] = f"{self.shared[whole]}[{':, ' * axis}{start}:{end}]"
                write_line(f"s_{node.name} = {self.shared[node]}")
            if node in text.outputs:
                self._copy_out(node)
            return
        if node in self.slab or node in self.shared:
            return
        if emit_aten_call.call_into(node, lambda n: n.name, "o") is None:
            self.fresh.add(node)
            if node in outside:
                self._copy_out(node)
            return
        self._make_room(node, node in outside)

    def summand_to_add_to(self, node: Node) -> Node | None:
        """Return the summand that a matrix product may be added to in place: made for all steps and used only here."""
        if node.target is not aten.addmm.default or node.kwargs:
            return None
        u, text = node.args[0], self.text
        free = u.op == "call_function" and u.target not in VIEWS and u.target is not operator.getitem
        if (
            not free
            or u in self.members
            or u in text.stages.invariant
            or u in text.outputs
            or u in text.saved
            or u in text.stages.read
        ):
            return None
        users = [n for n in u.users if n in (text.stages.backward_nodes if self.reverse else text.stages.forward_nodes)]
        return u if users == [node] and shape(u) == shape(node) else None

    def _make_room(self, node: Node, outside: bool) -> None:
        write_line = self.text.write_line
        summand = None if node in self.text.outputs else self.summand_to_add_to(node)
        if summand is not None:
            self.slab[node] = f"v_{summand.name}"
            write_line(f"list_{node.name} = v_{summand.name}.unbind(0)")
            self.zip_steps(node, f"list_{node.name}")
            return
        if outside:
            if node in self.text.outputs:
                write_line(f"block_{node.name} = slabs['{node.name}']")
            else:
                write_line(f"block_{node.name} = {buffer_text(node, 'n, ')}")
            self.slab[node] = f"block_{node.name}"
            write_line(f"list_{node.name} = block_{node.name}.unbind(0)")
            self.zip_steps(node, f"list_{node.name}")
        else:
            write_line(f"s_{node.name} = {buffer_text(node)}")
            self.shared[node] = f"s_{node.name}"

    def _copy_out(self, node: Node) -> None:
        """Keep a value that has its place elsewhere: each step copies it."""
        write_line = self.text.write_line
        if node in self.text.outputs:
            write_line(f"block_{node.name} = slabs['{node.name}']")
        else:
            write_line(f"block_{node.name} = {buffer_text(node, 'n, ')}")
        self.slab[node] = f"block_{node.name}"
        if node in self.fresh or node.target is operator.getitem:
            write_line(f"kept_{node.name} = []")
            self.kept[node] = None
        else:
            write_line(f"copies_{node.name} = block_{node.name}.unbind(0)")
            self.zipped[f"copy_{node.name}"] = f"copies_{node.name}"

    def _place_view(self, node: Node, outside: set[Node]) -> None:
        source, write_line = node.args[0], self.text.write_line
        if source in self.fresh or (source not in self.slab and source not in self.shared and source in self.members):
            self.fresh.add(node)
            if node in outside:
                self._copy_out(node)
        elif source in self.shared:
            self.shared[node] = f"s_{node.name}"
            write_line(f"s_{node.name} = {emit_aten_call.call_view(node, self.shared[source], block=False)}")
        else:
            base = self.slab[source] if source in self.slab else self.text.block(source)
            self.slab[node] = f"block_{node.name}"
            write_line(f"block_{node.name} = {emit_aten_call.call_view(node, base, block=True)}")
            write_line(f"list_{node.name} = block_{node.name}.unbind(0)")
            self.zip_steps(node, f"list_{node.name}")
            if node in self.text.outputs:
                self._copy_out(node)


def name_states(text: FunctionText, places: BufferAssignment, *, reverse: bool) -> None:
    """Write the lines that name what a loop read of each state and what it left, of all steps: views of one buffer."""
    for j, place, following in places.delays:
        first, second = (f"slab_{j}[1:]", f"slab_{j}[:-1]") if reverse else (f"state_{j}[:-1]", f"state_{j}[1:]")
        text.write_line(f"v_{place.name} = {first}")
        text.write_line(f"v_{following.name} = {second}")
        if reverse:
            text.write_line(f"start_{place.name} = slab_{j}[0]")
