"""Sums over time of what a step's backward would compute at every step: the gradients of the weights.

Linear operations change places with the sum, so that of ``transpose(A_t) @ B_t`` only one product over all time steps
is left, and nothing of a weight's size is made once a step.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_accel.recurrent.compiler.emit_python import emit_aten_call
from lightning_accel.recurrent.compiler.rewrite import VIEWS, Node, aten, shape
from lightning_accel.recurrent.compiler.stage import Stages
from lightning_accel.recurrent.compiler.workspace import Workspace

Name = Callable[[Node], str]

_LINEAR = {aten.neg.default, aten._to_copy.default, aten.clone.default}
_LINEAR_IN_FIRST = {aten.slice_backward.default, aten.select_backward.default}


def layer_norm_sums(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, dims: int, *, ws: Workspace
) -> tuple[None, Tensor, Tensor]:
    """Return the gradients of a LayerNorm's weight and bias, summed over all but the last ``dims`` dimensions.

    Several times faster on CPU than torch's own kernel.
    """
    lead = list(range(g.dim() - dims))
    scaled = torch.sub(x, mean, out=ws.buffer("normalized", x.shape, x.dtype))
    return None, scaled.mul_(rstd).mul_(g).sum(lead), g.sum(lead)


class TimeSums:
    """Plan the sums, then write them.

    `add` marks what has to exist for every time step; `statements` writes the text once the rest is placed.
    """

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        self._wanted: dict[int, Node] = {}

    def add(self, weight: int, gradient: Node) -> None:
        """Plan the sum of a weight's gradient."""
        self._wanted[weight] = gradient
        for leaf in self._leaves(gradient):
            self.stages.add_backward(leaf)
            self.stages.read.add(leaf)

    def statements(self, name: Name) -> dict[int, list[str]]:
        """Write, for each weight, statements of which the last is the sum, what earlier blocks gave included."""
        self._before: list[str] = []
        self._name = name
        self._made: set[Node] = set()
        self._together = self._summed_together()
        texts = {}
        known: dict[str, str] = {}  # two biases that are added have one gradient
        for weight, gradient in self._wanted.items():
            self._before = []
            before = f"sums[{weight}]"
            if self._rule(gradient)[0] == "product":
                expression = f"add_product({before}, {self._factors(gradient)})"
            else:
                total = self._sum(gradient)
                if total not in known:
                    known[total] = f"part_{weight}"
                    self._before.append(f"part_{weight} = {total}")
                    expression = f"add_to({before}, part_{weight})"
                else:
                    expression = f"add_to({before}, {known[total]}.clone())"
            texts[weight] = [*self._before, expression]
        return texts

    def _summed_together(self) -> dict[Node, tuple[Node, int]]:
        """Return the parts of rows of which all are summed over the streams, with the whole row and where they begin.

        The sum of the whole takes as long as that of a part: biases of gates, whose gradients a product wants in one.
        """
        summed: set[Node] = set()
        waiting = list(self._wanted.values())
        while waiting:
            node = waiting.pop()
            rule, inner = self._rule(node)
            waiting += inner if rule == "linear" else []
            if rule == "sum" and list(node.args[1]) == [0] and len(shape(node.args[0])) == 2:
                summed.add(node.args[0])
        found: dict[Node, tuple[Node, int]] = {}
        for whole in self.stages.read:
            rows = whole.target is aten.cat.default and len(shape(whole)) == 2 and whole.args[1:] in ((1,), (-1,))
            if not rows or not summed.issuperset(whole.args[0]):
                continue
            start = 0
            for part in whole.args[0]:
                found[part] = whole, start
                start += shape(part)[1]
        return found

    def _rule(self, node: Node) -> tuple[str, list[Node]]:
        """Decide how to sum a node: the rule's name, and the nodes that are summed in their turn."""
        target, changing = node.target, [i for i in node.all_input_nodes if i not in self.stages.invariant]
        if node in self.stages.invariant:
            return "constant", []
        if node.op == "placeholder" or node in self.stages.forward_nodes or node in self.stages.loop_of:
            return "value", []
        if target in VIEWS or target in _LINEAR:
            return "linear", changing
        if target in _LINEAR_IN_FIRST:
            return "linear", changing
        if target is aten.mm.default:
            return ("linear", changing) if len(changing) == 1 else ("product", [])
        if target in (aten.add.Tensor, aten.sub.Tensor, aten.cat.default) and len(changing) == len(
            node.all_input_nodes
        ):
            same = target is aten.cat.default or all(shape(i) == shape(node) for i in changing)
            return ("linear", changing) if same else ("value", [])
        if target is aten.mul.Tensor and len(changing) == 1 and node.args[0] is not node.args[1]:
            return "linear", changing
        if target is aten.div.Tensor and changing == [node.args[0]]:
            return "linear", changing
        if target is aten.sum.dim_IntList and node.args[1]:
            return "sum", []
        if target is operator.getitem and node.args[0].target is aten.native_layer_norm_backward.default:
            return ("norm", []) if not node.args[0].args[-1][0] else ("value", [])
        if target is aten.embedding_dense_backward.default:
            return "embedding", []
        return "value", []

    def _leaves(self, node: Node) -> list[Node]:
        rule, inner = self._rule(node)
        if rule == "constant":
            return []
        if rule == "linear":
            return [leaf for i in inner for leaf in self._leaves(i)]
        if rule == "product":
            return [self._behind_transpose(node.args[0])[0], node.args[1]]
        if rule == "sum":
            return [node.args[0]]
        if rule == "norm":
            return [i for i in node.args[0].all_input_nodes if i not in self.stages.invariant]
        if rule == "embedding":
            return [i for i in node.all_input_nodes if i not in self.stages.invariant]
        return [node]

    def _sum(self, node: Node) -> str:
        rule, inner = self._rule(node)
        name = self._name
        if rule == "constant":
            return f"({name(node)} * n)"
        if rule == "linear":
            sums = {i: self._sum(i) for i in inner}

            def operand(source: Node) -> str:
                return sums[source] if source in sums else name(source)

            if node.target in VIEWS:
                if node.target is aten.view.default:
                    return f"{operand(node.args[0])}.reshape({tuple(shape(node))})"
                return emit_aten_call.call_view(node, operand(node.args[0]), block=False)
            return emit_aten_call.call(node, operand)
        if rule == "product":
            return f"torch.mm({self._factors(node)})"
        if rule == "sum":
            x, dims, *keep = node.args
            if x in self._together and list(dims) == [0]:
                whole, start = self._together[x]
                if whole not in self._made:
                    self._made.add(whole)
                    self._before.append(f"total_{whole.name} = {name(whole)}.sum([0, 1])")
                row = f"total_{whole.name}[{start}:{start + shape(x)[1]}].clone()"
                return f"{row}[None]" if keep and keep[0] else row
            axes = [0] + [int(d) % len(shape(x)) + 1 for d in dims]
            return f"{name(x)}.sum({axes}, True)[0]" if keep and keep[0] else f"{name(x)}.sum({axes})"
        if rule == "norm":
            source = node.args[0]
            if source not in self._made:
                self._made.add(source)
                g, x, normalized, mean, rstd = source.args[:5]
                values = ", ".join(name(v) for v in (g, x, mean, rstd))
                self._before.append(f"v_{source.name} = layer_norm_sums({values}, {len(normalized)}, ws=ws)")
            return f"v_{source.name}[{node.args[1]}]"
        if rule == "embedding":
            return emit_aten_call.call(node, lambda i: f"{name(i)}.flatten(0, 1)")
        return f"{name(node)}.sum(0)"

    def _factors(self, node: Node) -> str:
        left, transposed = self._behind_transpose(node.args[0])
        right = node.args[1]
        flat_right = f"{self._name(right)}.reshape(-1, {shape(right)[1]})"
        if transposed:
            return f"{self._name(left)}.reshape(-1, {shape(left)[1]}).t(), {flat_right}"
        rows = shape(left)[0]
        return f"{self._name(left)}.transpose(0, 1).reshape({rows}, -1), {flat_right}"

    def _behind_transpose(self, node: Any) -> tuple[Node, bool]:
        if node.target is aten.t.default and node.args[0] not in self.stages.invariant:
            return node.args[0], True
        return node, False
