"""Calls around a loop over matrix-valued states that the loop takes over, for they are as wide as its states.

For all steps at once, such a call reads and writes more than the caches hold: an outer product, a decay of every entry,
a sum over the whole state. Step by step and stream by stream, what it needs lies in the first-level cache, and calls on
values of one shape share a nest.
"""

import math

from lightning_accel.recurrent.compiler.emit_c.emit_c_nest import REDUCTIONS, check, is_elementwise
from lightning_accel.recurrent.compiler.emit_c.emit_c_row import NotInCError
from lightning_accel.recurrent.compiler.emit_c.fusion import is_tensor
from lightning_accel.recurrent.compiler.rewrite import VIEWS, Node, shape
from lightning_accel.recurrent.compiler.stage import Segment, Stages


def wide_calls(stages: Stages, segments: list[Segment], loop: int) -> list[Node]:
    """Find the calls that the only loop of a forward or a backward may take over.

    Args:
        stages: Of the step.
        segments: Of the forward or the backward.
        loop: Which of them it is.

    Returns:
        Calls before it that it needs, and after it that need it; none where there are other loops.
    """
    if sum(segment.loop for segment in segments) != 1:
        return []
    step, members, taken = stages.step, set(segments[loop].nodes), set[Node]()
    home = {n: k for k, segment in enumerate(segments) for n in segment.nodes}
    fixed = {*step.next_states, *step.states, *step.d_states, *step.d_next_states}
    widest = max((_elements(n) for n in members if is_tensor(n)), default=0)

    def fits(node: Node) -> bool:
        known = node.op == "call_function" and node not in fixed and node.target not in VIEWS and is_tensor(node)
        return known and shape(node)[:1] == (step.streams,) and _is_wide(node, widest)

    for node in reversed([n for segment in segments[:loop] for n in segment.nodes]):
        users = [u for u in node.users if u in home]
        needed = any(u in members or u in taken for u in users)
        if needed and fits(node) and all(u in members or u in taken or home[u] > loop for u in users):
            taken.add(node)
    for node in [n for segment in segments[loop + 1 :] for n in segment.nodes]:
        sources = node.all_input_nodes
        needs = any(s in members or s in taken for s in sources)
        if needs and fits(node) and all(s in members or s in taken or home.get(s, -1) < loop for s in sources):
            taken.add(node)
    return sorted(taken, key=stages.order.__getitem__)


def _is_wide(node: Node, widest: int) -> bool:
    if is_elementwise(node):
        return _elements(node) >= widest
    if node.target not in REDUCTIONS or _elements(node.args[0]) < widest:
        return False
    try:
        check(node)
    except NotInCError:
        return False
    return True


def _elements(node: Node) -> int:
    """Return the elements of one stream's part of a value."""
    return math.prod(shape(node)[1:])
