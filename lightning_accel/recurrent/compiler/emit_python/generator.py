"""Write the staged step as straight-line Python: one function each for a block's forward and backward.

The loops hold calls with ``out=`` only, wherever an operation has it: every value has its place in a slab of all time
steps, or in one buffer that all steps share. Views are taken before the loop.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lightning_accel.recurrent.compiler.emit_c.emit_c_loop import CLoop, CText
from lightning_accel.recurrent.compiler.emit_c.emit_c_matrix_loop import MatrixLoop
from lightning_accel.recurrent.compiler.emit_c.emit_c_row import NotInCError
from lightning_accel.recurrent.compiler.emit_c.fusion import inlined
from lightning_accel.recurrent.compiler.emit_c.wide_calls import wide_calls
from lightning_accel.recurrent.compiler.emit_python import emit_aten_call
from lightning_accel.recurrent.compiler.emit_python.emit_python_loop import write_loop
from lightning_accel.recurrent.compiler.emit_python.function_text import (
    INDENT,
    FunctionText,
    buffer_text,
    dtype_text,
    is_fast_pointwise,
    parts,
    shape_text,
)
from lightning_accel.recurrent.compiler.emit_python.weight_gradients import TimeSums
from lightning_accel.recurrent.compiler.emit_triton.triton_loop import TritonText
from lightning_accel.recurrent.compiler.rewrite import VIEWS, Node, aten
from lightning_accel.recurrent.compiler.stage import Segment, Stages
from lightning_accel.recurrent.compiler.trace import CannotScheduleError

Language = Literal["C", "Triton"]
_TEXTS: dict[Language, type[CText]] = {"C": CText, "Triton": TritonText}


@dataclass(frozen=True)
class Wanted:
    """Which gradients are wanted: of the per-step inputs, of the weights, and whether any at all."""

    xs: tuple[bool, ...]
    weights: tuple[bool, ...]
    any: bool


class Generator:
    """Source text of one variant.

    The text defines ``make_slabs(n, B, ws)``, ``forward_constants(W, B)``,
    ``forward(n, B, X, bounds, inv, slabs, ws)``, ``make_gradient_slabs(n, B)``, ``backward_constants(W, B)`` and
    ``backward(n, B, X, inv, saved, dys, dbounds, slabs, ws, sums)``. ``n`` is the number of steps, ``B`` that of
    streams, ``X`` are blocks of the inputs, ``bounds`` states at the block's start (``dbounds``: gradients at its end),
    ``slabs`` blocks of what outlives the call, ``ws`` a `Workspace` whose buffers the next block uses again.
    """

    def __init__(
        self,
        stages: Stages,
        wanted: Wanted,
        *,
        scan: bool = False,
        compiled: bool = False,
        language: Language = "C",
    ) -> None:
        self._scan, self._compiled, self._language = scan, compiled, language
        self.stages, self.step, self.wanted = stages, stages.step, wanted

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
        self._kernels = _TEXTS[self._language]() if self._compiled else None
        forward = self._forward()
        backward = self._backward() if self.wanted.any else ""
        return self._machine() + forward + "\n" + backward

    def _machine(self) -> str:
        if self._kernels is None:
            return ""
        if not self._kernels.functions:
            reasons = "; ".join(dict.fromkeys(self._kernels.refusals)) or "it has none"
            raise CannotScheduleError(f"none of its loops can be written in {self._kernels.language}: {reasons}.")
        return self._kernels.machine()

    def _write_segments(
        self, text: FunctionText, segments: list[Segment], apart: Iterable[Node], *, reverse: bool
    ) -> None:
        loops: dict[int, CLoop | MatrixLoop] = {}
        taken: set[Node] = set()
        kernels = self._kernels
        if kernels is not None:
            for k, extra in inlined(self.stages, segments, apart, kernels.can_write).items():
                for calls in (extra, []):
                    try:
                        loops[k] = kernels.loop(text, segments[k], reverse=reverse, extra=calls)
                    except NotInCError as refusal:
                        kernels.refusals.append(str(refusal))
                        continue
                    taken.update(calls)
                    break
                else:
                    wide = wide_calls(self.stages, segments, k)
                    for calls in (wide, []) if wide else ([],):
                        loop = kernels.matrix_loop(text, self._with(segments[k], calls), reverse=reverse)
                        if loop is not None:
                            loops[k] = loop
                            taken.update(calls)
                            break
        for k, segment in enumerate(segments):
            if k in loops:
                loops[k].write()
            elif segment.loop:
                write_loop(text, segment, reverse=reverse, scan=self._scan)
            else:
                _write_block(text, segment, taken)

    def _with(self, loop: Segment, calls: list[Node]) -> Segment:
        """Return a loop that takes calls over."""
        return Segment(sorted([*loop.nodes, *calls], key=self.stages.order.__getitem__), loop=True)

    def _forward(self) -> str:
        results = [y for y in self.step.ys if y not in self.stages.invariant]
        text = FunctionText(self.stages, [*self._saved, *results], self._saved)
        looped = self.stages.looped_states
        for k, x in enumerate(self.step.xs):
            text.write_line(f"{text.name(x)} = X[{k}]")
        for j in sorted(looped):
            text.write_line(
                f"state_{j} = slabs['state_{j}'] if 'state_{j}' in slabs else ws.buffer('state_{j}', "
                f"(n + 1, {shape_text(self.step.states[j])}), {dtype_text(self.step.states[j])})"
            )
            text.write_line(f"state_{j}[0].copy_(bounds[{j}])")
        self._write_segments(text, self.stages.forward, [*self._saved, *results], reverse=False)
        ends = []
        for j, (state, following) in enumerate(zip(self.step.states, self.step.next_states, strict=True)):
            if state is following:
                ends.append(f"bounds[{j}]")
            elif j in looped:
                ends.append(f"state_{j}[n]")
            else:
                ends.append(f"{text.block(following)}[n - 1].clone()")  # the next block computes into its memory
        text.write_line(f"return [{', '.join(ends)}]")
        body = text.close("forward(n, B, X, bounds, inv, slabs, ws)", "forward_constants")
        slabs = [
            f"'{n.name}': ws.buffer('{n.name}', (n, {shape_text(n)}), {dtype_text(n)})"
            for n in text.outputs
            if self.stages.state_of(n) is None and n not in self.step.xs
        ]
        held = {j for j in map(self.stages.state_of, text.outputs) if j is not None}
        slabs += [
            f"'state_{j}': ws.buffer('state_{j}', (n + 1, {shape_text(self.step.states[j])}), "
            f"{dtype_text(self.step.states[j])})"
            for j in sorted(held)
        ]
        return f"def make_slabs(n, B, ws):\n{INDENT}return {{{', '.join(slabs)}}}\n\n{body}"

    def output_names(self) -> list[tuple[str, str]]:
        """Return where each output lies: (kind, name) with kind ``slab``, ``state`` or ``constant``."""
        places = []
        for y in self.step.ys:
            state = self.stages.state_of(y)
            if y in self.stages.invariant:
                places.append(("constant", y.name))
            elif state is not None:
                places.append(("state", f"state_{state}"))
            else:
                places.append(("slab", y.name))
        return places

    def _backward(self) -> str:
        gradients = [(k, g) for k, g in enumerate(self.step.d_xs) if g is not None and self.wanted.xs[k]]
        outputs = [g for _, g in gradients if g not in self.stages.invariant]
        text = FunctionText(self.stages, outputs, self._saved)
        for k, x in enumerate(self.step.xs):
            text.write_line(f"{text.name(x)} = X[{k}]")
        for node in self._saved:
            state = self.stages.state_of(node)
            if state is None:
                text.write_line(f"{text.name(node)} = saved['{node.name}']")
            else:
                part = "[:-1]" if node is self.step.states[state] else "[1:]"
                text.write_line(f"{text.name(node)} = saved['state_{state}']{part}")
        for k, dy in enumerate(self.step.d_ys):
            if dy is not None:
                text.write_line(f"{text.name(dy)} = dys[{k}]")
        self._write_segments(text, self.stages.backward, [*outputs, *self.stages.read], reverse=True)
        for k, statements in self._sums.statements(text.name).items():
            for statement in statements[:-1]:
                text.write_line(statement)
            text.write_line(f"sums[{k}] = {statements[-1]}")
        ends = []
        for tangent, gradient in zip(self.step.d_next_states, self.step.d_states, strict=True):
            if gradient is None or tangent is None:
                ends.append("None")
            elif self.stages.in_loop(tangent):
                ends.append(f"start_{tangent.name}")
            else:
                ends.append(f"{text.block(gradient)}[0].clone()")
        text.write_line(f"return [{', '.join(ends)}]")
        body = text.close("backward(n, B, X, inv, saved, dys, dbounds, slabs, ws, sums)", "backward_constants")
        slabs = [
            f"'{n.name}': torch.empty((n, {shape_text(n)}), dtype={dtype_text(n)}, device=device)"
            for n in dict.fromkeys(outputs)
        ]
        places = [f"({k}, '{g.name}')" if g not in self.stages.invariant else f"({k}, None)" for k, g in gradients]
        return (
            f"def make_gradient_slabs(n, B):\n{INDENT}return {{{', '.join(slabs)}}}\n\n"
            f"GRADIENT_PLACES = [{', '.join(places)}]\n\n{body}"
        )


def _write_block(text: FunctionText, segment: Segment, taken: set[Node]) -> None:
    """Write calls that each cover all time steps of a block."""
    stages, step = text.stages, text.step
    delayed = dict(zip(step.states, step.next_states, strict=True))
    forward_delayed = {d: g for d, g in zip(step.d_next_states, step.d_states, strict=True) if d is not None}
    for node in segment.nodes:
        name = text.name(node)
        if node in delayed:
            j = step.states.index(node)
            if node in stages.constant_states:
                value = f"bounds[{j}].expand(n, {shape_text(node)})"
            else:
                value = f"torch.cat([bounds[{j}][None], {text.block(delayed[node])}[:n - 1]])"
        elif node in forward_delayed:
            j = step.d_next_states.index(node)
            value = f"torch.cat([{text.block(forward_delayed[node])}[1:], dbounds[{j}][None]])"
        elif node.op == "placeholder" or node.target is operator.getitem or node in taken:
            continue
        elif node.target in VIEWS:
            source = node.args[0]
            if node.target is aten.view.default:  # of what another view made, memory may not allow a view
                value = f"{text.name(source)}.reshape(n, {shape_text(node)})"
            else:
                value = emit_aten_call.call_view(node, text.name(source), block=True)
        else:
            if node.target in (aten.mm.default, aten.addmm.default):
                place = f"slabs['{node.name}']" if node in text.outputs else buffer_text(node, "n, ")
                product = emit_aten_call.call_block_product(node, text.name, text.is_block, place)
                if product is not None:
                    text.write_line(f"{name} = {product}")
                    continue
            value = emit_aten_call.call_block(node, text.name, text.is_block)
            if is_fast_pointwise(node) and node not in text.outputs:
                text.write_line(f"{name} = {value[:-1]}, out={buffer_text(node, 'n, ')})")
                continue
        if node in text.outputs and node not in step.xs:
            fast = is_fast_pointwise(node)
            value = f"{value[:-1]}, out=slabs['{node.name}'])" if fast else f"slabs['{node.name}'].copy_({value})"
        text.write_line(f"{name} = {value}")
        for part in parts(node):
            got = emit_aten_call.call(part, text.name)
            text.write_line(
                f"{text.name(part)} = slabs['{part.name}'].copy_({got})"
                if part in text.outputs
                else f"{text.name(part)} = {got}"
            )
