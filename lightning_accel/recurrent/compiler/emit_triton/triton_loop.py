"""Write a loop as one Triton kernel: all time steps of a block of streams, products of matrices included.

A program runs a block of streams through all time steps. Where few streams would leave most of the chip idle, several
programs share a block: each takes some tiles of every row and every product, and they meet between the two, see `meet_`
in the prelude. Between two phases of a step, values travel through memory that stays in the caches.
"""

from collections.abc import Iterable

import torch

from lightning_accel.recurrent.compiler.emit_c.emit_c_loop import CLoop, CText
from lightning_accel.recurrent.compiler.emit_c.emit_c_row import NotInCError
from lightning_accel.recurrent.compiler.emit_c.fusion import RowOrder
from lightning_accel.recurrent.compiler.emit_python.function_text import FunctionText
from lightning_accel.recurrent.compiler.emit_triton.triton_code import CONSTANTS
from lightning_accel.recurrent.compiler.emit_triton.triton_expression import expression
from lightning_accel.recurrent.compiler.emit_triton.triton_products import Operands, TritonProducts, operands_of
from lightning_accel.recurrent.compiler.emit_triton.triton_rows import TritonRows, check_call
from lightning_accel.recurrent.compiler.rewrite import Node
from lightning_accel.recurrent.compiler.stage import Segment

_INDENT = "        "
_HALVES = {torch.float16, torch.bfloat16}


class TritonText(CText):
    """Kernels that belong to one schedule; equal numbers, counted through forward and backward."""

    language = "Triton"

    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[str, tuple[int, int, tuple[str, ...]]] = {}

    def can_write(self, node: Node) -> bool:
        """Whether a kernel can compute an elementwise call that comes before its loop."""
        value = node.meta["val"]
        real = torch.float64 if value.dtype is torch.float64 else torch.float32
        return expression(node, lambda _: "x", real) is not None

    def loop(self, text: FunctionText, segment: Segment, *, reverse: bool, extra: list[Node]) -> "TritonLoop":
        """Write a loop; see `CLoop`."""
        return TritonLoop(text, segment, self, reverse=reverse, extra=extra)

    def matrix_loop(self, text: FunctionText, segment: Segment, *, reverse: bool) -> None:
        """Return that there is no kernel of values that are more than rows."""

    def machine(self) -> str:
        """Write what makes the kernels callable."""
        source = "\n\n".join(self.functions)
        return f"machine = TritonCode({source!r}, {self.kernels!r})\n\n"

    def add_kernel(self, body: str, phases: int, streamed: int, tensors: Iterable[tuple[str, torch.dtype]]) -> str:
        """Add a kernel; return its name.

        Args:
            body: Its lines.
            phases: In which one step comes apart: rows, products, rows, ...
            streamed: Columns of the widest weight that is not kept on chip; 0 if all are.
            tensors: Name and type of each it is given, in order.
        """
        name = f"loop_{len(self.functions)}"
        given = list(tensors)
        parameters = ", ".join(f"p_{n}, t_{n}, b_{n}" for n, _ in given)
        constants = ", ".join(f"{n}: tl.constexpr" for n in CONSTANTS)
        self.functions.append(f"def {name}(n, B, begin, end, p_arrived, {parameters}, {constants}):\n{body}\n")
        self.kernels[name] = (phases, streamed, tuple(str(dtype).removeprefix("torch.") for _, dtype in given))
        return name


class TritonOrder(RowOrder):
    """The order of a loop's calls, which may hold numbers of several types."""

    def type_of(self, kinds: set[torch.dtype]) -> torch.dtype:
        """Return float64 for float64 alone, float32 for anything that is not wider."""
        if kinds == {torch.float64}:
            return torch.float64
        if not kinds or not kinds <= _HALVES | {torch.float32}:
            raise NotInCError(f"numbers of the types {sorted(map(str, kinds))}")
        return torch.float32

    def is_number(self, dtype: torch.dtype) -> bool:
        """Whether the loop may read numbers of a type."""
        return dtype is self.dtype or (self.dtype is torch.float32 and dtype in _HALVES)

    def check_call(self, node: Node) -> None:
        """Refuse a row operation that can not be written."""
        check_call(node, self.dtype)


class TritonLoop(CLoop):
    """A loop as a launch of a Triton kernel; see `CLoop`, whose places it has.

    Raises:
        NotInCError: If the loop holds an operation that has no Triton form; nothing is written then.
    """

    order_type = TritonOrder

    def _add(self) -> str:
        text = self.c
        assert isinstance(text, TritonText)
        body, phases, streamed = self._kernel()
        given = [*self.blocks, *self.constants]
        return text.add_kernel(body, phases, streamed, [(name, self.types[name]) for name in given])

    def _kernel(self) -> tuple[str, int, int]:
        self.types = {node.name: node.meta["val"].dtype for node in self.place}
        products = TritonProducts(self.dtype)
        regions = sorted(set(self.order.region.values()))
        steps: list[str] = []
        for phase, region in enumerate(regions):
            calls = [n for n in self.rows if self.order.region[n] == region]
            inner = f"{_INDENT}    "
            if region % 2:
                lines = [line for n in calls for line in products.text(n, self._operands(n), inner)]
            else:
                lines = TritonRows(calls, self._place_of, self._stored, order=self.order, phase=phase).text(inner)
            steps += [f"{_INDENT}if PHASE < 0 or PHASE == {phase}:", *lines]
            meeting = f"((step - begin) * {len(regions)} + {phase + 1})"
            steps += [
                f"{_INDENT}if PHASE < 0:",
                f"{_INDENT}    if PARTS == 1:",
                f"{_INDENT}        tl.debug_barrier()",
                f"{_INDENT}    else:",
                f"{_INDENT}        meet_(p_arrived + tl.program_id(0), {meeting} * PARTS)",
            ]
        lines = [
            "    rows = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]",
            "    live = rows < B",
            "    part = 0 if PARTS == 1 else tl.program_id(1)",
            *("    " + line for line in products.before),
            "    for step in tl.range(begin, end, num_stages=1):",
            f"{_INDENT}t = {'n - 1 - step' if self.reverse else 'step'} + tl.full((), 0, tl.int64)",
        ]
        lines += [f"{_INDENT}s_{name} = p_{name} + t * t_{name}" for name in (*self.blocks, *self.constants)]
        return "\n".join([*lines, *steps]), len(regions), products.streamed

    def _operands(self, node: Node) -> Operands:
        return operands_of(node, self.order.resolve, self._place_of, self.over.get(node))
