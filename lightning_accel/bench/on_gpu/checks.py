"""Whether every path for CUDA is right on this machine's device, and reads nothing back; before anything is timed."""

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_accel.low_rank import decompose, make_plan
from lightning_accel.measure import synchronize
from lightning_accel.projection import project_l1inf
from lightning_accel.projection.training.ball_specification import Ball
from lightning_accel.projection.training.projector import Projector
from lightning_accel.projection.training.targets import Target
from lightning_accel.recurrent.cells import (
    CoupledGateLSTMCell,
    FeedbackLSTMCell,
    LayerNormLSTMCell,
    MinGRUCell,
    OutputGRUCell,
    PeepholeLSTMCell,
)
from lightning_accel.recurrent.module import Recurrent
from lightning_accel.recurrent.scan import linear_scan
from lightning_accel.recurrent.schedule_choice import Schedule

CELLS: dict[str, Callable[[int, int], nn.Module]] = {
    "LSTM": nn.LSTMCell,
    "GRU": nn.GRUCell,
    "peephole LSTM": PeepholeLSTMCell,
    "LayerNorm LSTM": LayerNormLSTMCell,
    "coupled-gate LSTM": CoupledGateLSTMCell,
    "feedback LSTM": FeedbackLSTMCell,
    "GRU with output": OutputGRUCell,
    "minGRU": MinGRUCell,
}
SCHEDULES: tuple[Schedule, ...] = ("compiled", "intra_stream")
_FLOAT32, _HALF = 1e-4, 6e-2


def checks(device: str, *, quick: bool) -> Iterator[tuple[str, float, float]]:
    """Yield (what, error, largest error allowed); an error is relative to the largest number of its tensor."""
    cells = dict(list(CELLS.items())[:2]) if quick else CELLS
    for name, make in cells.items():
        for schedule in SCHEDULES:
            yield f"{name}, {schedule}, float32", _recurrent_error(make, schedule, device, half=False), _FLOAT32
        if torch.device(device).type == "cuda":  # the loop in half precision takes long on a CPU
            yield f"{name}, compiled, bfloat16", _recurrent_error(make, "compiled", device, half=True), _HALF
    for method in ("bilevel", "exact"):
        yield f"projection, {method}", _projection_error(method, device), 1e-5
    yield "projection, parameters of one shape together", _stacked_error(device), 1e-5
    packed: Schedule = "compiled" if torch.device(device).type == "cuda" else "intra_stream"  # needs no C compiler
    yield f"packed sequences, {packed}, float32", _packed_error(packed, device), _FLOAT32
    yield "linear scan", _scan_error(device), _FLOAT32
    for half in (False, True):
        yield (
            f"low rank, {'bfloat16' if half else 'float32'}",
            _low_rank_error(device, half=half),
            (_HALF if half else _FLOAT32),
        )
    yield "no read-back in a projected step", _reads_back(device), 0.5


def _recurrent_error(make: Callable[[int, int], nn.Module], schedule: Schedule, device: str, *, half: bool) -> float:
    torch.manual_seed(0)
    loop = Recurrent(make(24, 40), schedule="loop").to(device)
    fast = Recurrent(copy.deepcopy(loop.cell), schedule=schedule)
    x = torch.randn(40, 5, 24, device=device)
    found = []
    for rnn in (loop, fast, fast, fast):  # CUDA graphs are recorded at the third call of a kind
        leaf = x.clone().requires_grad_()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half and rnn is fast):
            y, _ = rnn(leaf)
        gradients = torch.autograd.grad(y.float().cos().sum(), [leaf, *rnn.parameters()])
        found.append([y.detach().float(), *gradients])
    if set(fast.schedules[0].choices.values()) != {schedule}:
        return float("inf")
    return _largest_error(found[-1], found[0])


def _projection_error(method: str, device: str) -> float:
    torch.manual_seed(0)
    x = torch.randn(300, 200)
    expected = project_l1inf(x, 50.0, method=method)  # type: ignore[arg-type]
    there = project_l1inf(x.to(device), 50.0, method=method)  # type: ignore[arg-type]
    again = project_l1inf(there, 50.0, method=method)  # type: ignore[arg-type]
    feasible = float(there.double().abs().amax(1).sum()) <= 50.0
    if not feasible or not torch.equal(there, again):
        return float("inf")
    return _largest_error([there.cpu()], [expected])


def _stacked_error(device: str) -> float:
    """Compare parameters that are stacked on the device with each alone on the CPU."""
    torch.manual_seed(0)
    weights = [torch.randn(40, 30) * (k + 1.0) for k in range(4)]
    found = []
    for where, together in ((device, True), ("cpu", False)):
        layers = [nn.Linear(30, 40, device=where) for _ in weights]
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.data.copy_(weight)
        targets = [Target(str(k), layer, "weight", (0,), (40, 30)) for k, layer in enumerate(layers)]
        for group in [targets] if together else [[target] for target in targets]:
            Projector(group, Ball(target_sparsity=0.5), freeze_zero_groups=True).project(1)
        found.append([layer.weight.detach().cpu() for layer in layers])
    return _largest_error(*found)


def _packed_error(schedule: Schedule, device: str) -> float:
    torch.manual_seed(0)
    loop = Recurrent(LayerNormLSTMCell(24, 40), schedule="loop").to(device)
    fast = Recurrent(copy.deepcopy(loop.cell), schedule=schedule)
    lengths = torch.tensor([7, 30, 1, 18])
    x = torch.randn(30, 4, 24, device=device)
    found = []
    for rnn in (loop, fast):
        leaf = x.clone().requires_grad_()
        y, _ = rnn(pack_padded_sequence(leaf, lengths, enforce_sorted=False))
        gradients = torch.autograd.grad(y.data.cos().sum(), [leaf, *rnn.parameters()])
        found.append([y.data.detach(), *gradients])
    if set(fast.schedules[0].choices.values()) != {schedule}:
        return float("inf")
    return _largest_error(found[1], found[0])


def _scan_error(device: str) -> float:
    torch.manual_seed(0)
    a, b = torch.rand(500, 3, 8), torch.randn(500, 3, 8)
    state, expected = torch.zeros(3, 8), []
    for factor, summand in zip(a, b, strict=True):
        state = factor * state + summand
        expected.append(state)
    return _largest_error([linear_scan(a.to(device), b.to(device)).cpu()], [torch.stack(expected)])


def _low_rank_error(device: str, *, half: bool) -> float:
    """Compare low-rank layers with the dense ones of the product of their factors, captured as a CUDA graph as well."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1)).to(device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    decompose(model, make_plan(model, None, ratio=2.0, method="fixed"))
    dense = copy.deepcopy(model).cpu().float()
    x = torch.randn(4, 16, 8, 8)
    expected = dense(x)
    there = x.to(device).contiguous(memory_format=torch.channels_last)
    kind = torch.device(device).type
    with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=half):
        found = model(there)
        if kind == "cuda":
            found = _captured(model, there)
    return _largest_error([found.float().cpu()], [expected.detach()])


def _captured(model: nn.Module, x: Tensor) -> Tensor:
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        model(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y: Tensor = model(x)
    graph.replay()
    torch.cuda.synchronize()
    return y


def _reads_back(device: str) -> float:
    """Return 1 if a projected step waits for the device, 0 if not; torch itself watches on CUDA."""
    weights = [torch.randn(64, 32, device=device) for _ in range(2)]
    layers = [nn.Linear(32, 64, device=device) for _ in range(3)]
    targets = [Target(str(k), layer, "weight", (0,), (64, 32)) for k, layer in enumerate(layers)]
    projector = Projector(targets, Ball(target_sparsity=0.5), freeze_zero_groups=True)
    synchronize(device)
    with _no_waiting(device):
        try:
            for step in (1, 2):
                projector.project(step)
            projector.check_finite(wait=False)
            for method in ("bilevel", "exact"):
                for weight in weights:
                    project_l1inf(weight, 5.0, method=method, out=weight, nonfinite="skip")
        except RuntimeError:
            return 1.0
    return 0.0


@contextlib.contextmanager
def _no_waiting(device: str) -> Iterator[None]:
    if torch.device(device).type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _largest_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        float((a.double() - e.double()).abs().max() / e.double().abs().max().clamp_min(1e-3))
        for a, e in zip(actual, expected, strict=True)
    )
