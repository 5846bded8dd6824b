"""The compiler's README shows what the compiler writes. Run this file as a program to write the shown texts anew."""

import ast
import re
from pathlib import Path

import torch
from torch import nn

from lightning_accel.recurrent import compiler
from lightning_accel.recurrent.compiler.emit_python.generator import Wanted
from lightning_accel.recurrent.compiler.executor import StepSchedule
from lightning_accel.recurrent.compiler.trace import TensorSpec, trace_step

README = Path(compiler.__file__).parent / "README.md"
BLOCK = re.compile(r"(<!-- shown: (?P<name>[\w ]+) -->\n```\w*\n)(?P<text>.*?)(```\n)", re.DOTALL)


class Cell(nn.Module):
    """h' = tanh(x W_x^T + h W_h^T)."""

    def __init__(self):
        super().__init__()
        self.weight_x = nn.Parameter(torch.zeros(4, 2))
        self.weight_h = nn.Parameter(torch.zeros(4, 4))

    def forward(self, x, h):
        h = torch.tanh(x @ self.weight_x.t() + h @ self.weight_h.t())
        return h, h


def step(module, xs, states):
    y, h = module(xs[0], states[0])
    return [y], [h]


def operations(graph):
    """One line an operation."""
    lines = []
    for node in graph.nodes:
        if node.op == "call_function":
            keywords = "".join(f", {k}={v}" for k, v in node.kwargs.items())
            lines.append(f"{node.name} = {node.target}({', '.join(map(str, node.args))}{keywords})")
        elif node.op == "output":
            lines.append(f"return {', '.join(map(str, node.args[0]))}")
    return "\n".join(lines)


def segments(stages):
    lines = ["once: " + ", ".join(n.name for n in stages.step.graph.nodes if n in stages.invariant)]
    for way, found in (("forward", stages.forward), ("backward", stages.backward)):
        for segment in found:
            when = "step by step" if segment.loop else "all steps at once"
            lines.append(f"{way}, {when}: {', '.join(n.name for n in segment.nodes)}")
    return "\n".join(lines)


def texts():
    """Everything that the README shows, by name."""
    size = lambda n: TensorSpec((3, n), torch.float32, torch.device("cpu"))  # noqa: E731
    wanted = Wanted((True,), (True, True), True)
    python = StepSchedule(Cell(), step, [size(2)], [size(4)])
    machine = StepSchedule(Cell(), step, [size(2)], [size(4)], compiled=True).source(wanted)
    head, _, rest = machine.partition("\n\n")
    source = ast.literal_eval(head.removeprefix("machine = MachineCode(").removesuffix(", torch.float32)"))
    calls = [line for line in rest.splitlines() if "machine.run" in line]
    return {
        "traced graph": operations(trace_step(Cell(), step, [size(2)], [size(4)]).graph),
        "rewritten graph": operations(python.stages.step.graph),
        "staged graph": segments(python.stages),
        "emitted Python": python.source(wanted),
        "emitted C": source,
        "calls of the emitted C": "\n".join(calls),
    }


def test_the_readme_shows_what_the_compiler_writes():
    shown = {match["name"]: match["text"].rstrip("\n") for match in BLOCK.finditer(README.read_text(encoding="utf-8"))}
    expected = {name: text.rstrip("\n") for name, text in texts().items()}
    assert list(shown) == list(expected)
    for name, text in expected.items():
        assert shown[name] == text, f"run `python {Path(__file__).name}` to write {name!r} anew"


def test_the_readme_names_every_module():
    text = README.read_text(encoding="utf-8")
    for module in README.parent.rglob("*.py"):
        if module.name != "__init__.py":
            assert f"`{module.relative_to(README.parent)}`" in text


if __name__ == "__main__":
    written = texts()
    page = README.read_text(encoding="utf-8")
    page = BLOCK.sub(lambda m: f"{m[1]}{written[m['name']].rstrip()}\n{m[4]}", page)
    README.write_text(page, encoding="utf-8")
