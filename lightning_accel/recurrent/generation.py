"""Write the staged step as straight-line Python: one function each for a block's forward and backward.

The loops hold calls with ``out=`` only, wherever an operation has it: every value has its place in a slab of all time
steps, or in one buffer that all steps share. Views are taken before the loop.
"""

import io
import math
import operator
import tokenize
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_accel.recurrent import batching
from lightning_accel.recurrent.rewriting import VIEWS, Node, aten, shape
from lightning_accel.recurrent.scan import scan_into
from lightning_accel.recurrent.scan_lowering import affine_forms
from lightning_accel.recurrent.staging import Segment, Stages
from lightning_accel.recurrent.time_sums import TimeSums, layer_norm_sums
from lightning_accel.recurrent.tracing import CannotScheduleError

_INDENT = "    "


@dataclass(frozen=True)
class Wanted:
    """Which gradients are wanted: of the per-step inputs, of the weights, and whether any at all."""

    xs: tuple[bool, ...]
    weights: tuple[bool, ...]
    any: bool


class Generator:
    """Source text of one variant.

    The text defines ``make_slabs(n)``, ``forward_constants(W)``, ``forward(n, X, bounds, inv, slabs, ws)``,
    ``make_gradient_slabs(n)``, ``backward_constants(W)`` and
    ``backward(n, X, inv, saved, dys, dbounds, slabs, ws, sums)``. ``X`` are blocks of the inputs, ``bounds`` states at
    the block's start (``dbounds``: gradients at its end), ``slabs`` blocks of what outlives the call, ``ws`` buffers
    that the next block of the same length uses again.
    """

    def __init__(self, stages: Stages, wanted: Wanted, *, scan: bool = False) -> None:
        self._scan = scan
        self.stages, self.step, self.wanted = stages, stages.step, wanted
        self._lines: list[str] = []
        self._phase_inv: dict[Node, None] = {}
        self._outputs: dict[Node, None] = {}
        self._contiguous: set[Node] = set()

    def source(self) -> str:
        """Write the text."""
        self._sums = TimeSums(self.stages)
        if self.wanted.any:
            for k, wanted in enumerate(self.wanted.xs):
                gradient = self.step.d_xs[k]
                if wanted and gradient is not None:
                    self.stages.add_backward(gradient)
            for k, wanted in enumerate(self.wanted.weights):
                gradient = self.step.d_weights[k]
                if wanted and gradient is not None:
                    self._sums.add(k, gradient)
        saved = self.stages.saved if self.wanted.any else []
        self._saved = [n for n in saved if n not in self.step.xs]
        forward = self._forward()
        backward = self._backward() if self.wanted.any else ""
        return forward + "\n" + backward

    # --- forward ------------------------------------------------------------------------------------------------------

    def _forward(self) -> str:
        self._start({**dict.fromkeys(self._saved), **dict.fromkeys(y for y in self.step.ys if y not in self._inv)})
        looped = self._looped_states()
        for k, x in enumerate(self.step.xs):
            self._say(f"{self._name(x)} = X[{k}]")
        for j in sorted(looped):
            self._say(
                f"state_{j} = slabs['state_{j}'] if 'state_{j}' in slabs else ws_get(ws, 'state_{j}', "
                f"(n + 1, {_shape(self.step.states[j])}), {_dtype(self.step.states[j])})"
            )
            self._say(f"state_{j}[0].copy_(bounds[{j}])")
        for segment in self.stages.forward:
            if segment.loop:
                self._write_loop(segment, reverse=False)
            else:
                self._write_block(segment)
        ends = []
        for j, (state, following) in enumerate(zip(self.step.states, self.step.next_states, strict=True)):
            if state is following:
                ends.append(f"bounds[{j}]")
            elif j in looped:
                ends.append(f"state_{j}[n]")
            else:
                ends.append(f"{self._block(following)}[n - 1]")
        self._say(f"return [{', '.join(ends)}]")
        body = self._function("forward(n, X, bounds, inv, slabs, ws)", "forward_constants")
        slabs = [
            f"'{n.name}': torch.empty((n, {_shape(n)}), dtype={_dtype(n)}, device=device)"
            for n in self._outputs
            if self._state_of(n) is None and n not in self.step.xs
        ]
        held = {j for j in map(self._state_of, self._outputs) if j is not None}
        slabs += [
            f"'state_{j}': torch.empty((n + 1, {_shape(self.step.states[j])}), "
            f"dtype={_dtype(self.step.states[j])}, device=device)"
            for j in sorted(held)
        ]
        return f"def make_slabs(n):\n{_INDENT}return {{{', '.join(slabs)}}}\n\n{body}"

    def output_names(self) -> list[tuple[str, str]]:
        """Return where each output lies: (kind, name) with kind ``slab``, ``state`` or ``constant``."""
        places = []
        for y in self.step.ys:
            state = self._state_of(y)
            if y in self._inv:
                places.append(("constant", y.name))
            elif state is not None:
                places.append(("state", f"state_{state}"))
            else:
                places.append(("slab", y.name))
        return places

    # --- backward -----------------------------------------------------------------------------------------------------

    def _backward(self) -> str:
        gradients = [(k, g) for k, g in enumerate(self.step.d_xs) if g is not None and self.wanted.xs[k]]
        outputs = [g for _, g in gradients if g not in self._inv]
        self._start(dict.fromkeys(outputs))
        for k, x in enumerate(self.step.xs):
            self._say(f"{self._name(x)} = X[{k}]")
        for node in self._saved:
            state = self._state_of(node)
            if state is None:
                self._say(f"{self._name(node)} = saved['{node.name}']")
            else:
                part = "[:-1]" if node is self.step.states[state] else "[1:]"
                self._say(f"{self._name(node)} = saved['state_{state}']{part}")
        for k, dy in enumerate(self.step.d_ys):
            if dy is not None:
                self._say(f"{self._name(dy)} = dys[{k}]")
        for segment in self.stages.backward:
            if segment.loop:
                self._write_loop(segment, reverse=True)
            else:
                self._write_block(segment)
        for k, statements in self._sums.statements(self._name, self._is_block).items():
            for statement in statements[:-1]:
                self._say(statement)
            self._say(f"sums[{k}] = {statements[-1]}")
        ends = []
        for tangent, gradient in zip(self.step.d_next_states, self.step.d_states, strict=True):
            if gradient is None or tangent is None:
                ends.append("None")
            elif self._in_loop(tangent):
                ends.append(f"start_{tangent.name}")
            else:
                ends.append(f"{self._block(gradient)}[0]")
        self._say(f"return [{', '.join(ends)}]")
        body = self._function("backward(n, X, inv, saved, dys, dbounds, slabs, ws, sums)", "backward_constants")
        slabs = [
            f"'{n.name}': torch.empty((n, {_shape(n)}), dtype={_dtype(n)}, device=device)"
            for n in dict.fromkeys(outputs)
        ]
        places = [f"({k}, '{g.name}')" if g not in self._inv else f"({k}, None)" for k, g in gradients]
        return (
            f"def make_gradient_slabs(n):\n{_INDENT}return {{{', '.join(slabs)}}}\n\n"
            f"GRADIENT_PLACES = [{', '.join(places)}]\n\n{body}"
        )

    # --- both ---------------------------------------------------------------------------------------------------------

    @property
    def _inv(self) -> set[Node]:
        return self.stages.invariant

    def _start(self, outputs: dict[Node, None]) -> None:
        self._lines, self._phase_inv, self._outputs, self._contiguous = [], {}, outputs, set()

    def _say(self, line: str, depth: int = 1) -> None:
        self._lines.append(_INDENT * depth + line)

    def _name(self, node: Node) -> str:
        if node in self._inv:
            self._phase_inv.setdefault(node)
        return f"v_{node.name}"

    def _is_block(self, node: Node) -> bool:
        return node not in self._inv

    def _block(self, node: Node) -> str:
        """Name a block's value; one that no step changes is repeated."""
        return self._name(node) if self._is_block(node) else f"{self._name(node)}.expand(n, {_shape(node)})"

    def _looped_states(self) -> set[int]:
        return {j for j, s in enumerate(self.step.states) if self._in_loop(s)}

    def _in_loop(self, node: Node) -> bool:
        return node in self.stages.loop_of and node not in self.stages.constant_states

    def _state_of(self, node: Node) -> int | None:
        """Return which state's slab holds the node."""
        for j, (state, following) in enumerate(zip(self.step.states, self.step.next_states, strict=True)):
            if self._in_loop(state) and node in (state, following):
                return j
        return None

    def _function(self, header: str, constants: str) -> str:
        """Close the function; what no time step changes is computed in a function of its own."""
        order: dict[Node, None] = {}

        def visit(node: Node) -> None:
            if node not in order:
                for source in node.all_input_nodes:
                    visit(source)
                order[node] = None

        for node in self._phase_inv:
            visit(node)
        lines = [f"def {constants}(W):"]
        for node in order:
            name = f"v_{node.name}"
            if node in self.step.weights:
                lines.append(f"{_INDENT}{name} = W[{self.step.weights.index(node)}]")
            elif node.op == "get_attr":
                lines.append(f"{_INDENT}{name} = constants['{node.target}']")
            elif node.target in VIEWS:
                lines.append(f"{_INDENT}{name} = {batching.call_view(node, f'v_{node.args[0].name}', block=False)}")
            else:
                lines.append(f"{_INDENT}{name} = {batching.call(node, lambda m: f'v_{m.name}')}")
        kept = [f"v_{n.name}.contiguous()" if n in self._contiguous else f"v_{n.name}" for n in self._phase_inv]
        lines.append(f"{_INDENT}return [{', '.join(kept)}]")
        unpack = [f"{_INDENT}[{', '.join(f'v_{n.name}' for n in self._phase_inv)}] = inv"] if self._phase_inv else []
        return "\n".join([*lines, "", f"def {header}:", *unpack, *self._lines, ""])

    def _write_block(self, segment: Segment) -> None:
        delayed = dict(zip(self.step.states, self.step.next_states, strict=True))
        forward_delayed = {
            d: g for d, g in zip(self.step.d_next_states, self.step.d_states, strict=True) if d is not None
        }
        for node in segment.nodes:
            name = self._name(node)
            if node in delayed:
                j = self.step.states.index(node)
                if node in self.stages.constant_states:
                    value = f"bounds[{j}].expand(n, {_shape(node)})"
                else:
                    value = f"torch.cat([bounds[{j}][None], {self._block(delayed[node])}[:n - 1]])"
            elif node in forward_delayed:
                j = self.step.d_next_states.index(node)
                value = f"torch.cat([{self._block(forward_delayed[node])}[1:], dbounds[{j}][None]])"
            elif node.op == "placeholder" or node.target is operator.getitem:
                continue
            elif node.target in VIEWS:
                source = node.args[0]
                if node.target is aten.view.default:  # of what another view made, memory may not allow a view
                    value = f"{self._name(source)}.reshape(n, {_shape(node)})"
                else:
                    value = batching.call_view(node, self._name(source), block=True)
            else:
                if node.target in (aten.mm.default, aten.addmm.default):
                    place = f"slabs['{node.name}']" if node in self._outputs else _buffer(node, "n, ")
                    product = batching.call_block_product(node, self._name, self._is_block, place)
                    if product is not None:
                        self._say(f"{name} = {product}")
                        continue
                value = batching.call_block(node, self._name, self._is_block)
                if _is_fast_pointwise(node) and node not in self._outputs:
                    value = f"{value[:-1]}, out=ws.get('{node.name}'))"
                    self._say(f"{name} = ws['{node.name}'] = {value}")
                    continue
            if node in self._outputs and node not in self.step.xs:
                fast = _is_fast_pointwise(node)
                value = f"{value[:-1]}, out=slabs['{node.name}'])" if fast else f"slabs['{node.name}'].copy_({value})"
            self._say(f"{name} = {value}")
            for part in self._parts(node):
                got = batching.call(part, self._name)
                self._say(
                    f"{self._name(part)} = slabs['{part.name}'].copy_({got})"
                    if part in self._outputs
                    else f"{self._name(part)} = {got}"
                )

    def _parts(self, node: Node) -> list[Node]:
        return [u for u in node.users if u.target is operator.getitem]

    # --- loops --------------------------------------------------------------------------------------------------------

    def _write_loop(self, segment: Segment, *, reverse: bool) -> None:
        loop = _Loop(self, segment, reverse=reverse)
        if not (self._scan and loop.write_scan()):
            loop.write()


class _Loop:
    """Write one loop: places for every value, lists of one view a step, and the calls."""

    def __init__(self, generator: Generator, segment: Segment, *, reverse: bool) -> None:
        self.g, self.reverse = generator, reverse
        self.nodes = [n for n in segment.nodes if n.op != "placeholder"]
        self.members = set(segment.nodes)
        self.placeholders = [n for n in segment.nodes if n.op == "placeholder"]
        self.slab: dict[Node, str] = {}  # value of every step: name of a block's tensor
        self.shared: dict[Node, str] = {}  # value of the step only: name of a tensor
        self.fresh: set[Node] = set()  # value that a call allocates
        self.parent: dict[Node, tuple[Node, int]] = {}  # part of a concatenation, and where in it
        self.zipped: dict[str, str] = {}
        self.kept: dict[Node, None] = {}  # values that calls allocate, collected in the loop and stacked after it
        step = generator.step
        if reverse:
            pairs = zip(step.d_next_states, step.d_states, strict=True)
        else:
            pairs = zip(step.states, step.next_states, strict=True)
        self.delays: list[tuple[int, Node, Node]] = [
            (j, p, n) for j, (p, n) in enumerate(pairs) if p in self.members and p is not None
        ]
        self.next_of = {n: j for j, _, n in self.delays}

    def write(self) -> None:
        say = self.g._say
        outside = self._needed_outside()
        self._place_parts()
        for node in reversed(self.nodes):
            if node in outside and node.target in VIEWS and node.args[0] in self.members:
                outside.add(node.args[0])
        for node in list(self.parent):
            if node in outside:
                outside.add(self.parent[node][0])
        self._open_delays(outside)
        for node in self.nodes:
            self._place(node, outside)
        body: list[str] = []
        for node in self.nodes:
            body += self._emit(node)
        if self.zipped:
            names, lists = list(self.zipped), list(self.zipped.values())
            rows = [f"{item}[::-1]" if self.reverse else item for item in lists]
            say(
                f"for {', '.join(names)}{',' if len(names) == 1 else ''} in zip({', '.join(rows)}):"
                if len(names) > 1
                else f"for {names[0]} in {rows[0]}:"
            )
        else:
            say("for _ in range(n):")
        for line in body or ["pass"]:
            say(line, 2)
        for node in self.kept:
            say(f"torch.stack(kept_{node.name}{'[::-1]' if self.reverse else ''}, out=block_{node.name})")
        for node in sorted(outside, key=self.g.stages.order.__getitem__):
            if node in self.slab:
                say(f"v_{node.name} = {self.slab[node]}")
        for j, place, _ in self.delays:
            if self.reverse:
                say(f"start_{place.name} = delay_{j}[0]")
            else:
                say(f"v_{place.name} = state_{j}[:-1]")

    def write_scan(self) -> bool:
        """Write the loop as a scan, if it is elementwise and affine in its only state."""
        g, say = self.g, self.g._say
        forms = affine_forms(self.nodes, [p for _, p, _ in self.delays], g._name, g._is_block)
        if forms is None:
            return False
        ((j, place, following),) = self.delays
        factor, summand = forms[following]
        size = f"n, {_shape(place)}"
        say(f"factor_{j} = ({factor or '0.0'} + torch.zeros((), dtype={_dtype(place)}, device=device)).expand({size})")
        say(
            f"summand_{j} = ({summand or '0.0'} + torch.zeros((), dtype={_dtype(place)}, device=device)).expand({size})"
        )
        if self.reverse:
            say(f"slab_{j} = ws_get(ws, 'delay_{j}', (n + 1, {_shape(place)}), {_dtype(place)})")
            say(f"slab_{j}[n].copy_(dbounds[{j}])")
            say(f"scan_into(slab_{j}[:-1], factor_{j}, summand_{j}, reverse=True, start=slab_{j}[n])")
            say(f"v_{place.name} = slab_{j}[1:]")
            say(f"v_{following.name} = slab_{j}[:-1]")
            say(f"start_{place.name} = slab_{j}[0]")
        else:
            say(f"scan_into(state_{j}[1:], factor_{j}, summand_{j}, reverse=False, start=state_{j}[0])")
            say(f"v_{place.name} = state_{j}[:-1]")
            say(f"v_{following.name} = state_{j}[1:]")
        outside = self._needed_outside()
        for node in sorted(outside - {place, following}, key=g.stages.order.__getitem__):
            factor, summand = forms[node]
            value = " + ".join(part for part in (factor and f"{factor} * v_{place.name}", summand) if part)
            value = f"({value}).expand({size})"
            say(
                f"v_{node.name} = slabs['{node.name}'].copy_({value})"
                if node in g._outputs
                else f"v_{node.name} = {value}"
            )
        return True

    def _needed_outside(self) -> set[Node]:
        g = self.g
        phase = g.stages.backward_nodes if self.reverse else g.stages.forward_nodes
        needed = {n for n in self.members if n in g._outputs}
        if self.reverse:
            needed |= self.members & g.stages.read
        for node in self.members:
            if any(
                u in phase and u not in self.members and u.op != "output"
                for u in node.users
                if u.target is not operator.getitem
            ):
                needed.add(node)
        sources = g.step.d_states if self.reverse else g.step.next_states
        targets = g.step.d_next_states if self.reverse else g.step.states
        for source, target in zip(sources, targets, strict=True):
            if source in self.members and target not in self.members:
                needed.add(source)
        for node in list(self.members):
            for part in g._parts(node):
                if part in g._outputs or any(
                    u in phase and u not in self.members and u.op != "output" for u in part.users
                ):
                    needed.add(part)
        return needed

    def _place_parts(self) -> None:
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
                    and batching.call_into(part, lambda n: n.name, "o") is not None
                    and part.meta["val"].dtype == node.meta["val"].dtype
                    and all(u.target is not aten.view.default for u in part.users)
                ):
                    self.parent[part] = (node, start)
                start += length

    def _open_delays(self, outside: set[Node]) -> None:
        say = self.g._say
        for j, place, following in self.delays:
            if not self.reverse:
                say(f"steps_{j} = state_{j}.unbind(0)")
                self.slab[place], self.slab[following] = f"state_{j}[:-1]", f"state_{j}[1:]"
                self._zip(place, f"steps_{j}[:-1]")
                if following is not place:
                    self._zip(following, f"steps_{j}[1:]")
                continue
            shape_, dtype = _shape(place), _dtype(place)
            if {place, following} & outside or self._has_views(place) or self._has_views(following):
                say(f"slab_{j} = ws_get(ws, 'delay_{j}', (n + 1, {shape_}), {dtype})")
                say(f"delay_{j} = slab_{j}.unbind(0)")
                self.slab[place], self.slab[following] = f"slab_{j}[1:]", f"slab_{j}[:-1]"
            else:
                say(f"delay_{j} = two_buffers(ws, 'delay_{j}', n + 1, ({shape_}), {dtype})")
            say(f"delay_{j}[n].copy_(dbounds[{j}])")
            self._zip(place, f"delay_{j}[1:]")
            if following is not place:
                self._zip(following, f"delay_{j}[:-1]")

    def _has_views(self, node: Node) -> bool:
        return any(u.target in VIEWS and u in self.members for u in node.users)

    def _zip(self, node: Node, steps: str) -> None:
        self.zipped[f"s_{node.name}"] = steps

    def _place(self, node: Node, outside: set[Node]) -> None:
        g, say = self.g, self.g._say
        if node in self.next_of:
            return
        if node.target in VIEWS:
            self._place_view(node, outside)
            return
        if isinstance(node.meta["val"], (list, tuple)) or node.target is operator.getitem:
            self.fresh.add(node)
            for part in g._parts(node):
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
                say(f"list_{node.name} = {self.slab[node]}.unbind(0)")
                self._zip(node, f"list_{node.name}")
            else:
                self.shared[node] = f"{self.shared[whole]}[{':, ' * axis}{start}:{end}]"
                say(f"s_{node.name} = {self.shared[node]}")
            if node in g._outputs:
                self._copy_out(node)
            return
        if node in self.slab or node in self.shared:
            return
        if batching.call_into(node, lambda n: n.name, "o") is None:
            self.fresh.add(node)
            if node in outside:
                self._copy_out(node)
            return
        self._make_room(node, node in outside)

    def _over(self, node: Node) -> Node | None:
        """Return the summand that a matrix product may be added to in place: made for all steps and used only here."""
        if node.target is not aten.addmm.default or node.kwargs:
            return None
        u, g = node.args[0], self.g
        free = u.op == "call_function" and u.target not in VIEWS and u.target is not operator.getitem
        if not free or u in self.members or u in g._inv or u in g._outputs or u in g._saved or u in g.stages.read:
            return None
        users = [n for n in u.users if n in (g.stages.backward_nodes if self.reverse else g.stages.forward_nodes)]
        return u if users == [node] and shape(u) == shape(node) else None

    def _make_room(self, node: Node, outside: bool) -> None:
        say = self.g._say
        summand = None if node in self.g._outputs else self._over(node)
        if summand is not None:
            self.slab[node] = f"v_{summand.name}"
            say(f"list_{node.name} = v_{summand.name}.unbind(0)")
            self._zip(node, f"list_{node.name}")
            return
        if outside:
            if node in self.g._outputs:
                say(f"block_{node.name} = slabs['{node.name}']")
            else:
                say(f"block_{node.name} = {_buffer(node, 'n, ')}")
            self.slab[node] = f"block_{node.name}"
            say(f"list_{node.name} = block_{node.name}.unbind(0)")
            self._zip(node, f"list_{node.name}")
        else:
            say(f"s_{node.name} = {_buffer(node)}")
            self.shared[node] = f"s_{node.name}"

    def _copy_out(self, node: Node) -> None:
        """Keep a value that has its place elsewhere: each step copies it."""
        say = self.g._say
        if node in self.g._outputs:
            say(f"block_{node.name} = slabs['{node.name}']")
        else:
            say(f"block_{node.name} = {_buffer(node, 'n, ')}")
        self.slab[node] = f"block_{node.name}"
        if node in self.fresh or node.target is operator.getitem:
            say(f"kept_{node.name} = []")
            self.kept[node] = None
        else:
            say(f"copies_{node.name} = block_{node.name}.unbind(0)")
            self.zipped[f"copy_{node.name}"] = f"copies_{node.name}"

    def _place_view(self, node: Node, outside: set[Node]) -> None:
        source, say = node.args[0], self.g._say
        if source in self.fresh or (source not in self.slab and source not in self.shared and source in self.members):
            self.fresh.add(node)
            if node in outside:
                self._copy_out(node)
        elif source in self.shared:
            self.shared[node] = f"s_{node.name}"
            say(f"s_{node.name} = {batching.call_view(node, self.shared[source], block=False)}")
        else:
            base = self.slab[source] if source in self.slab else self.g._block(source)
            self.slab[node] = f"block_{node.name}"
            say(f"block_{node.name} = {batching.call_view(node, base, block=True)}")
            say(f"list_{node.name} = block_{node.name}.unbind(0)")
            self._zip(node, f"list_{node.name}")
            if node in self.g._outputs:
                self._copy_out(node)

    def _emit(self, node: Node) -> list[str]:
        name = self._operand
        lines: list[str] = []
        if node.target in VIEWS:
            if node in self.fresh:
                lines.append(f"s_{node.name} = {batching.call_view(node, name(node.args[0]), block=False)}")
        elif node.target is operator.getitem:
            return []
        elif node in self.fresh:
            lines.append(f"s_{node.name} = {batching.call(node, name)}")
            lines += [f"s_{p.name} = s_{node.name}[{p.args[1]}]" for p in self.g._parts(node)]
            lines += [f"kept_{p.name}.append(s_{p.name})" for p in self.g._parts(node) if p in self.kept]
        elif node.target is aten.cat.default and any(
            p in self.parent and self.parent[p][0] is node for p in node.args[0]
        ):
            start, axis = 0, (int(node.args[1]) if len(node.args) > 1 else 0) % len(shape(node))
            for part in node.args[0]:
                end = start + shape(part)[axis]
                if self.parent.get(part, (None, 0))[0] is not node:
                    lines.append(f"s_{node.name}[{':, ' * axis}{start}:{end}].copy_({name(part)})")
                start = end
        elif self.slab.get(node, "").startswith("v_"):
            lines.append(f"s_{node.name}.addmm_({name(node.args[1])}, {name(node.args[2])})")
        else:
            written = batching.call_into(node, name, f"s_{node.name}")
            lines.append(written if written is not None else f"s_{node.name}.copy_({batching.call(node, name)})")
        if node in self.kept:
            lines.append(f"kept_{node.name}.append(s_{node.name})")
        if f"copy_{node.name}" in self.zipped:
            lines.append(f"copy_{node.name}.copy_(s_{node.name})")
        return lines

    def _operand(self, node: Node) -> str:
        """Name one step's value."""
        if node in self.g._inv:
            if len(shape(node)) == 2:  # a transposed weight is several times slower in a small product
                self.g._contiguous.add(node)
            return self.g._name(node)
        if node not in self.members and f"s_{node.name}" not in self.zipped:
            self.g._say(f"list_{node.name} = {self.g._name(node)}.unbind(0)")
            self._zip(node, f"list_{node.name}")
        return f"s_{node.name}"


def generalize(at_three: str, at_five: str) -> str | None:
    """Turn integers that grew with the batch, in texts written for 3 and 5 streams, into multiples of ``B``.

    Returns:
        The text for any number of streams; ``None`` if the texts differ otherwise.
    """
    threes, fives = _tokens(at_three), _tokens(at_five)
    if len(threes) != len(fives):
        return None
    pieces: list[tuple[int, str]] = []
    for three, five in zip(threes, fives, strict=True):
        text = three.string
        if three.string != five.string:
            if not (three.type == five.type == tokenize.NUMBER and three.string.isdigit() and five.string.isdigit()):
                return None
            multiple, rest = divmod(int(three.string), 3)
            if rest or multiple * 5 != int(five.string):
                return None
            text = f"({multiple} * B)"
        pieces.append((three.type, text))
    return tokenize.untokenize(pieces)


def compile_source(source: str, constants: dict[str, Tensor], device: torch.device, streams: int) -> dict[str, Any]:
    """Compile the text for ``B = streams`` and return its functions by name."""
    space: dict[str, Any] = {
        "torch": torch,
        "aten": aten,
        **batching.fast_functions(),
        "constants": constants,
        "device": device,
        "B": streams,
        "inf": math.inf,
        "nan": math.nan,
        "scan_into": scan_into,
        "layer_norm_sums": layer_norm_sums,
        "ws_get": _buffer_maker(device),
        "two_buffers": _pair_maker(device),
        "add_to": _add_to,
        "add_product": _add_product,
    }
    try:
        exec(compile(source, "<recurrent schedule>", "exec"), space)
    except SyntaxError as error:
        raise CannotScheduleError(f"the schedule's code does not compile: {error}") from error
    return space


def _buffer_maker(device: torch.device) -> Callable[..., Tensor]:
    def ws_get(ws: dict[str, Any], name: str, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        found = ws.get(name)
        if found is None:
            found = ws[name] = torch.empty(size, dtype=dtype, device=device)
        return found

    return ws_get


def _pair_maker(device: torch.device) -> Callable[..., list[Tensor]]:
    def two_buffers(
        ws: dict[str, Any], name: str, length: int, size: Sequence[int], dtype: torch.dtype
    ) -> list[Tensor]:
        if name not in ws:
            ws[name] = [torch.empty(size, dtype=dtype, device=device) for _ in range(2)]
        pair = ws[name]
        return [pair[k % 2] for k in range(length)]

    return two_buffers


def _add_to(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right) if total is None else total.addmm_(left, right)


def _tokens(source: str) -> list[tokenize.TokenInfo]:
    return list(tokenize.generate_tokens(io.StringIO(source).readline))


def _is_fast_pointwise(node: Node) -> bool:
    return node.target in batching.FAST and torch.Tag.pointwise in node.target.tags


def _buffer(node: Node, lead: str = "") -> str:
    return f"ws_get(ws, '{node.name}', ({lead}{_shape(node)}), {_dtype(node)})"


def _shape(node: Node) -> str:
    return "".join(f"{s}, " for s in shape(node))


def _dtype(node: Node) -> str:
    return str(node.meta["val"].dtype)
