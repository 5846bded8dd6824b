"""Write a loop: calls with ``out=`` only, wherever an operation has it, or one scan instead of all of them."""

import operator

from lightning_accel.recurrent.compiler.emit_python import emit_aten_call
from lightning_accel.recurrent.compiler.emit_python.buffer_assignment import BufferAssignment
from lightning_accel.recurrent.compiler.emit_python.function_text import FunctionText, dtype_text, parts, shape_text
from lightning_accel.recurrent.compiler.rewrite import VIEWS, Node, aten, shape
from lightning_accel.recurrent.compiler.scan_lowering import affine_forms
from lightning_accel.recurrent.compiler.stage import Segment


def write_loop(text: FunctionText, segment: Segment, *, reverse: bool, scan: bool) -> None:
    """Write a loop.

    Args:
        text: The function it belongs to.
        segment: The loop.
        reverse: Whether it runs backwards in time.
        scan: Whether it becomes a scan where it can.
    """
    loop = _Loop(text, segment, reverse=reverse)
    if not (scan and loop.write_scan()):
        loop.write()


class _Loop:
    """One loop: lists of one view a step, and the calls."""

    def __init__(self, text: FunctionText, segment: Segment, *, reverse: bool) -> None:
        self.text, self.places = text, BufferAssignment(text, segment, reverse=reverse)

    def write(self) -> None:
        """Write the loop step by step."""
        places, write_line = self.places, self.text.write_line
        outside = places.needed_outside()
        places.place_parts()
        for node in reversed(places.nodes):
            if node in outside and node.target in VIEWS and node.args[0] in places.members:
                outside.add(node.args[0])
        for node in list(places.parent):
            if node in outside:
                outside.add(places.parent[node][0])
        places.open_delays(outside)
        for node in places.nodes:
            places.place(node, outside)
        body: list[str] = []
        for node in places.nodes:
            body += self._emit(node)
        if places.zipped:
            names, lists = list(places.zipped), list(places.zipped.values())
            rows = [f"{item}[::-1]" if places.reverse else item for item in lists]
            write_line(
                f"for {', '.join(names)}{',' if len(names) == 1 else ''} in zip({', '.join(rows)}):"
                if len(names) > 1
                else f"for {names[0]} in {rows[0]}:"
            )
        else:
            write_line("for _ in range(n):")
        for line in body or ["pass"]:
            write_line(line, 2)
        for node in places.kept:
            write_line(f"torch.stack(kept_{node.name}{'[::-1]' if places.reverse else ''}, out=block_{node.name})")
        for node in sorted(outside, key=self.text.stages.order.__getitem__):
            if node in places.slab:
                write_line(f"v_{node.name} = {places.slab[node]}")
        for j, place, _ in places.delays:
            if places.reverse:
                write_line(f"start_{place.name} = delay_{j}[0]")
            else:
                write_line(f"v_{place.name} = state_{j}[:-1]")

    def write_scan(self) -> bool:
        """Write the loop as a scan, if it is elementwise and affine in its only state."""
        places, text, write_line = self.places, self.text, self.text.write_line
        forms = affine_forms(places.nodes, [p for _, p, _ in places.delays], text.name, text.is_block)
        if forms is None:
            return False
        ((j, place, following),) = places.delays
        factor, summand = forms[following]
        size = f"n, {shape_text(place)}"
        zero = f"torch.zeros((), dtype={dtype_text(place)}, device=device)"
        write_line(f"factor_{j} = ({factor or '0.0'} + {zero}).expand({size})")
        write_line(f"summand_{j} = ({summand or '0.0'} + {zero}).expand({size})")
        if places.reverse:
            write_line(f"slab_{j} = ws.buffer('delay_{j}', (n + 1, {shape_text(place)}), {dtype_text(place)})")
            write_line(f"slab_{j}[n].copy_(dbounds[{j}])")
            write_line(f"scan_into(slab_{j}[:-1], factor_{j}, summand_{j}, reverse=True, start=slab_{j}[n])")
            write_line(f"v_{place.name} = slab_{j}[1:]")
            write_line(f"v_{following.name} = slab_{j}[:-1]")
            write_line(f"start_{place.name} = slab_{j}[0]")
        else:
            write_line(f"scan_into(state_{j}[1:], factor_{j}, summand_{j}, reverse=False, start=state_{j}[0])")
            write_line(f"v_{place.name} = state_{j}[:-1]")
            write_line(f"v_{following.name} = state_{j}[1:]")
        outside = places.needed_outside()
        for node in sorted(outside - {place, following}, key=text.stages.order.__getitem__):
            factor, summand = forms[node]
            value = " + ".join(part for part in (factor and f"{factor} * v_{place.name}", summand) if part)
            value = f"({value}).expand({size})"
            write_line(
                f"v_{node.name} = slabs['{node.name}'].copy_({value})"
                if node in text.outputs
                else f"v_{node.name} = {value}"
            )
        return True

    def _emit(self, node: Node) -> list[str]:
        places, name = self.places, self._operand
        lines: list[str] = []
        if node.target in VIEWS:
            if node in places.fresh:
                lines.append(f"s_{node.name} = {emit_aten_call.call_view(node, name(node.args[0]), block=False)}")
        elif node.target is operator.getitem:
            return []
        elif node in places.fresh:
            lines.append(f"s_{node.name} = {emit_aten_call.call(node, name)}")
            lines += [f"s_{p.name} = s_{node.name}[{p.args[1]}]" for p in parts(node)]
            lines += [f"kept_{p.name}.append(s_{p.name})" for p in parts(node) if p in places.kept]
        elif node.target is aten.cat.default and any(
            p in places.parent and places.parent[p][0] is node for p in node.args[0]
        ):
            start, axis = 0, (int(node.args[1]) if len(node.args) > 1 else 0) % len(shape(node))
            for part in node.args[0]:
                end = start + shape(part)[axis]
                if places.parent.get(part, (None, 0))[0] is not node:
                    lines.append(f"s_{node.name}[{':, ' * axis}{start}:{end}].copy_({name(part)})")
                start = end
        elif places.slab.get(node, "").startswith("v_"):
            lines.append(f"s_{node.name}.addmm_({name(node.args[1])}, {name(node.args[2])})")
        else:
            written = emit_aten_call.call_into(node, name, f"s_{node.name}")
            lines.append(written if written is not None else f"s_{node.name}.copy_({emit_aten_call.call(node, name)})")
        if node in places.kept:
            lines.append(f"kept_{node.name}.append(s_{node.name})")
        if f"copy_{node.name}" in places.zipped:
            lines.append(f"copy_{node.name}.copy_(s_{node.name})")
        return lines

    def _operand(self, node: Node) -> str:
        """Name one step's value."""
        places = self.places
        if node in self.text.stages.invariant:
            if len(shape(node)) == 2:  # a transposed weight is several times slower in a small product
                self.text.contiguous.add(node)
            return self.text.name(node)
        if node not in places.members and f"s_{node.name}" not in places.zipped:
            self.text.write_line(f"list_{node.name} = {self.text.name(node)}.unbind(0)")
            places.zip_steps(node, f"list_{node.name}")
        return f"s_{node.name}"
