"""What the recurrent rows run: models and cells as a reader would write them, and the floor of any schedule."""

import contextlib
import copy
import resource
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from lightning_accel.machine.c_functions import MachineCode, refusal
from lightning_accel.machine.large_products import are_worth_it, multiply
from lightning_accel.recurrent.cells import PeepholeLSTMCell
from lightning_accel.recurrent.graph_rnn import GraphRNN
from lightning_accel.recurrent.module import Recurrent
from lightning_accel.recurrent.schedule_choice import Schedule

INPUT, HIDDEN = 128, 256
_product = multiply if are_worth_it() else torch.mm

_PRODUCTS = """
void forth(int64_t n, int64_t B, const int64_t *at, product_t call) {
    real *const made = packed(B, n, ROWS, COLUMNS, (real *)at[6], at[8]);
    for (int64_t t = 0; t < n; ++t)
        product(call, B, ROWS, COLUMNS, (real *)at[0] + t * at[1], COLUMNS, (real *)at[6], at[8], made,
            (real *)at[3] + t * at[4], ROWS, 0, t);
    free(made);
}
void back(int64_t n, int64_t B, const int64_t *at, product_t call) {
    real *const made = packed(B, n, COLUMNS, ROWS, (real *)at[6], at[8]);
    for (int64_t t = 0; t < n; ++t)
        product(call, B, COLUMNS, ROWS, (real *)at[0] + t * at[1], ROWS, (real *)at[6], at[8], made,
            (real *)at[3] + t * at[4], COLUMNS, 0, t);
    free(made);
}
"""


def lstm_graph(schedule: Schedule, inputs: int = INPUT, hidden: int = HIDDEN) -> GraphRNN:
    """Build the LSTM of ``conf/model/recurrent_graph/lstm.yaml``, by default in the size of the benchmarks."""
    text = (files("lightning_accel.conf") / "model" / "recurrent_graph" / "lstm.yaml").read_text(encoding="utf-8")
    config: Any = yaml.safe_load(text)
    nodes = {n: node | {"size": inputs if n == "x" else hidden} for n, node in config["nodes"].items()}
    return GraphRNN(nodes, config["edges"], config["inputs"], config["outputs"], schedule=schedule)


class LoopOverTwoCells(nn.Module):
    """Two stacked ``nn.LSTMCell``s, one step after another."""

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = nn.LSTMCell(INPUT, HIDDEN), nn.LSTMCell(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, B, I) to (T, B, H)."""
        h1 = c1 = h2 = c2 = x.new_zeros(x.shape[1], HIDDEN)
        outputs = []
        for t in range(len(x)):
            h1, c1 = self.lower(x[t], (h1, c1))
            h2, c2 = self.upper(h1, (h2, c2))
            outputs.append(h2)
        return torch.stack(outputs)


class LoopOverLSTMCell(nn.Module):
    """One ``nn.LSTMCell``."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(INPUT, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, B, I) to (T, B, H)."""
        h = c = x.new_zeros(x.shape[1], HIDDEN)
        outputs = []
        for t in range(len(x)):
            h, c = self.cell(x[t], (h, c))
            outputs.append(h)
        return torch.stack(outputs)


class LoopOverGRUCell(nn.Module):
    """One ``nn.GRUCell``."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(INPUT, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, B, I) to (T, B, H)."""
        h = x.new_zeros(x.shape[1], HIDDEN)
        outputs = []
        for t in range(len(x)):
            h = self.cell(x[t], h)
            outputs.append(h)
        return torch.stack(outputs)


class LoopOverPeephole(nn.Module):
    """A peephole cell of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = PeepholeLSTMCell(INPUT, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, B, I) to (T, B, H)."""
        state = (x.new_zeros(x.shape[1], HIDDEN), x.new_zeros(x.shape[1], HIDDEN))
        outputs = []
        for t in range(len(x)):
            y, state = self.cell(x[t], state)
            outputs.append(y)
        return torch.stack(outputs)


class Decoder(nn.Module):
    """A cell that is fed its own output: every step needs the value of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(INPUT, HIDDEN), nn.Linear(HIDDEN, INPUT)

    def forward(self, x: Tensor) -> Tensor:
        """Take the first step's input of (T, B, I) and return T steps of output, (T, B, I)."""
        h = c = x.new_zeros(x.shape[1], HIDDEN)
        y, outputs = x[0], []
        for _ in range(len(x)):
            h, c = self.cell(y, (h, c))
            y = self.head(h)
            outputs.append(y)
        return torch.stack(outputs)


class LoopThatLooks(nn.Module):
    """One ``nn.LSTMCell``, each of whose states is looked at before the next step.

    Args:
        way: ``"head"``: a linear layer a step; ``"written"``: into one tensor; ``"masked"``: the states, between the
            steps; ``"sampled"``: the next input is now and then made of the last output.
    """

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.cell, self.head = way, nn.LSTMCell(INPUT, HIDDEN), nn.Linear(HIDDEN, INPUT)

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, B, I) to (T, B, I), or to (T, B, H) without a head."""
        h = c = x.new_zeros(x.shape[1], HIDDEN)
        written, outputs, y = x.new_zeros(len(x), x.shape[1], HIDDEN), [], x[0]
        keep = torch.ones(x.shape[1], 1, device=x.device)
        for t in range(len(x)):
            h, c = self.cell(y if self.way == "sampled" and t % 4 == 3 else x[t], (h, c))
            if self.way == "written":
                written[t] = h
                continue
            if self.way == "masked":
                h, c = h * keep, c * keep
            y = self.head(h)
            outputs.append(y)
        return written if self.way == "written" else torch.stack(outputs)


def gradients(
    recurrence: Callable[..., Tensor], inputs: tuple[Tensor, Tensor], gradient: Tensor
) -> Callable[[], object]:
    """Return what makes a forward and backward of a linear recurrence."""
    return lambda: torch.autograd.grad(recurrence(*inputs), inputs, gradient)


def unbind_loop(a: Tensor, b: Tensor) -> Tensor:
    """Run ``h = a h + b`` as a loop."""
    state, outputs = None, []
    for a_t, b_t in zip(a.unbind(0), b.unbind(0), strict=True):
        state = b_t if state is None else torch.addcmul(b_t, a_t, state)
        outputs.append(state)
    return torch.stack(outputs)


def layer_of(cell: nn.Module, schedule: Schedule) -> Recurrent:
    """Return a layer of a copy of the cell."""
    return Recurrent(copy.deepcopy(cell), schedule=schedule)


def training_step(layer: nn.Module, x: Tensor | tuple[Tensor, ...], *state: object) -> Callable[[], object]:
    """Return what makes a forward and backward of a layer; its result is an output or begins with one."""

    def step() -> None:
        layer.zero_grad()
        result = layer(x, *state)
        y = result[0] if isinstance(result, tuple) else result
        y.sum().backward()

    return step


def floor(
    steps: int, batch: int, device: str, *, gates: int = 4, inputs: Sequence[int] = (INPUT,)
) -> Callable[[], object]:
    """Return what does the products of a training step and nothing else, at the machine's own rate.

    Args:
        steps: Time steps.
        batch: Streams.
        device: Where.
        gates: Rows of the weights, in units of the hidden size.
        inputs: Input size of each layer.
    """
    layers = [_layer_floor(steps, batch, device, gates * HIDDEN, size) for size in inputs]

    def products() -> None:
        for layer in layers:
            layer()

    return products


def _layer_floor(steps: int, batch: int, device: str, rows: int, size: int) -> Callable[[], object]:
    x, d_x = torch.randn(steps * batch, size, device=device), torch.empty(steps * batch, size, device=device)
    gates = torch.randn(steps, batch, rows, device=device)
    hidden = torch.randn(steps, batch, HIDDEN, device=device)
    w_ih, w_hh = (torch.randn(rows, n, device=device) * 0.01 for n in (size, HIDDEN))
    across = w_hh.t().contiguous()
    made_gates, made_hidden = torch.empty_like(gates), torch.empty_like(hidden)
    sums = [torch.empty_like(w) for w in (w_ih, w_hh)]
    machine = None
    if device == "cpu" and refusal() is None:
        text = _PRODUCTS.replace("ROWS", str(rows)).replace("COLUMNS", str(HIDDEN))
        machine = MachineCode(text, torch.float32)

    def products() -> None:
        _product(x, w_ih.t(), out=made_gates.view(-1, rows))
        if machine is not None:
            machine.run("forth", steps, batch, [hidden, made_gates], [across])
            machine.run("back", steps, batch, [gates, made_hidden], [w_hh])
        else:
            for h, gate in zip(hidden, made_gates, strict=True):
                _product(h, across, out=gate)
            for gate, h in zip(gates, made_hidden, strict=True):
                _product(gate, w_hh, out=h)
        flat = gates.view(-1, rows)
        _product(flat.t(), x, out=sums[0])
        _product(flat.t(), hidden.view(-1, HIDDEN), out=sums[1])
        _product(flat, w_ih, out=d_x)

    return products


def floor_in_one_piece(cell: nn.Module, steps: int, batch: int, device: str) -> Callable[[], object]:
    """Return what does the products of every weight of a cell for all steps at once, once forward and twice backward.

    Lower than what any schedule reaches whose states feed products; it needs no knowledge of the cell.

    Args:
        cell: Whose parameters of two dimensions are taken for weights.
        steps: Time steps.
        batch: Streams.
        device: Where.
    """
    products: list[tuple[Tensor, ...]] = []
    for weight in (p.detach() for p in cell.parameters() if p.ndim == 2):
        rows, columns = weight.shape
        x, y = (torch.randn(steps * batch, n, device=device) for n in (columns, rows))
        products.append((weight, x, y, torch.empty_like(x), torch.empty_like(y), torch.empty_like(weight)))

    def run() -> None:
        for weight, x, y, d_x, made, d_weight in products:
            _product(x, weight.t(), out=made)
            _product(y, weight, out=d_x)
            _product(y.t(), x, out=d_weight)

    return run


def scan_floor(a: Tensor, b: Tensor, gradient: Tensor) -> Callable[[], object]:
    """Return what passes over the tensors of a linear recurrence once forward and once backward, as a whole."""
    a, b = a.detach(), b.detach()
    h, d_a, d_b = (torch.empty_like(a) for _ in range(3))

    def run() -> None:
        torch.mul(a, b, out=h)
        torch.mul(a, gradient, out=d_b)
        torch.mul(h, d_b, out=d_a)

    return run


def peak_kib() -> int:
    """Return the KiB that this process has held at most; ``getrusage`` also counts what it was forked from."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
