"""The text of one generated function while it is written: its lines, and the names and places of values in it."""

import operator
from collections.abc import Iterable

import torch

from lightning_accel.recurrent.compiler.emit_python import emit_aten_call
from lightning_accel.recurrent.compiler.rewrite import VIEWS, Node, shape
from lightning_accel.recurrent.compiler.stage import Stages

INDENT = "    "


class FunctionText:
    """A function that is being written.

    Args:
        stages: Of the step.
        outputs: Values of every time step that outlive the call.
        saved: Forward values that the backward reads.

    Attributes:
        contiguous: Invariant values that are wanted contiguous.
        matrices: Invariant values that only products in C read.
    """

    def __init__(self, stages: Stages, outputs: Iterable[Node], saved: Iterable[Node]) -> None:
        self.stages, self.step = stages, stages.step
        self.outputs = dict.fromkeys(outputs)
        self.saved = list(saved)
        self.contiguous: set[Node] = set()
        self.matrices: set[Node] = set()
        self._lines: list[str] = []
        self._invariants: dict[Node, None] = {}

    def write_line(self, line: str, depth: int = 1) -> None:
        """Write a line."""
        self._lines.append(INDENT * depth + line)

    def name(self, node: Node) -> str:
        """Name a value; one that no time step changes will be handed to the function."""
        if node in self.stages.invariant:
            self._invariants.setdefault(node)
        return f"v_{node.name}"

    def is_block(self, node: Node) -> bool:
        """Whether a value has a time dimension."""
        return node not in self.stages.invariant

    def block(self, node: Node) -> str:
        """Name a block's value; one that no step changes is repeated."""
        return self.name(node) if self.is_block(node) else f"{self.name(node)}.expand(n, {shape_text(node)})"

    def close(self, header: str, constants: str) -> str:
        """Close the function; what no time step changes is computed in a function of its own."""
        order: dict[Node, None] = {}

        def visit(node: Node) -> None:
            if node not in order:
                for source in node.all_input_nodes:
                    visit(source)
                order[node] = None

        for node in self._invariants:
            visit(node)
        lines = [f"def {constants}(W, B):"]
        for node in order:
            name = f"v_{node.name}"
            if node in self.stages.step.weights:
                lines.append(f"{INDENT}{name} = W[{self.stages.step.weights.index(node)}]")
            elif node.op == "get_attr":
                lines.append(f"{INDENT}{name} = constants['{node.target}']")
            elif node.target in VIEWS:
                lines.append(
                    f"{INDENT}{name} = {emit_aten_call.call_view(node, f'v_{node.args[0].name}', block=False)}"
                )
            else:
                lines.append(f"{INDENT}{name} = {emit_aten_call.call(node, lambda m: f'v_{m.name}')}")
        lines.append(f"{INDENT}return [{', '.join(map(self._kept, self._invariants))}]")
        unpack = [f"{INDENT}[{', '.join(f'v_{n.name}' for n in self._invariants)}] = inv"] if self._invariants else []
        return "\n".join([*lines, "", f"def {header}:", *unpack, *self._lines, ""])

    def _kept(self, node: Node) -> str:
        name = f"v_{node.name}"
        if node in self.contiguous:
            return f"{name}.contiguous()"
        return f"second_factor({name}, B)" if node in self.matrices else name


def parts(node: Node) -> list[Node]:
    """Return the parts that are taken of what a call returns."""
    return [u for u in node.users if u.target is operator.getitem]


def is_fast_pointwise(node: Node) -> bool:
    """Whether a call is pointwise and has a fast form with ``out=``."""
    return node.target in emit_aten_call.FAST and torch.Tag.pointwise in node.target.tags


def buffer_text(node: Node, lead: str = "") -> str:
    """Write the buffer of a value, that the next block of the same length uses again."""
    return f"ws.buffer('{node.name}', ({lead}{shape_text(node)}), {dtype_text(node)})"


def shape_text(node: Node) -> str:
    """Write a value's sizes, each followed by a comma."""
    return "".join(f"{s}, " for s in shape(node))


def dtype_text(node: Node) -> str:
    """Write a value's type."""
    return str(node.meta["val"].dtype)
