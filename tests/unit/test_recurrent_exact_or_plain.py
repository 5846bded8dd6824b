"""A schedule computes what the plain loop computes with the cell as it is now, or the plain loop runs and says why."""

import collections
import copy
import functools
import gc
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, jacrev, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_accel.recurrent import GraphRNN, PeepholeLSTMCell, Recurrent
from lightning_accel.recurrent.compiler import run_blocks

T, B, F, H = 9, 3, 4, 5
SCALE = 1.0


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Cell(nn.Module):
    """What the tests change afterwards, in one step."""

    def __init__(self, width=H):
        super().__init__()
        self.a, self.b, self.act, self.scale = nn.Linear(F, H), nn.Linear(H, H), nn.Tanh(), 1.0
        self.up, self.down = nn.Linear(H, width), nn.Linear(width, H)
        self.unused, self.options = nn.Linear(2, 2), {"shift": 0.1}
        self.hidden_from_torch = [nn.Linear(H, H).double().requires_grad_(False)]
        self.twice = functools.partial(torch.mul, 2.0)
        self.factors = np.ones(1)
        self.mask = torch.ones(H)

    def initial_state(self, x):
        return (x.new_zeros(len(x), H),)

    def mix(self, h):
        return self.down(torch.tanh(self.up(h)))

    def forward(self, x, state):
        h = self.act(self.a(x) + SCALE * self.scale * self.b(state[0] * self.mask) + self.mix(state[0]))
        h = h + self.options["shift"] * float(self.factors[0])
        if h.dtype is torch.double:
            h = h + self.hidden_from_torch[0](self.twice(state[0]))
        return h, (h,)


def results(rnn, x, state=None):
    """Outputs, the final state and every gradient."""
    y, last = rnn(x, state)
    outs = [t for t in torch.utils._pytree.tree_leaves((y, last)) if t.requires_grad]
    total = sum((k + 1.0) * o.sin().sum() for k, o in enumerate(outs))
    return [*outs, *torch.autograd.grad(total, [x, *rnn.parameters()], allow_unused=True)]


def assert_as_the_loop(rnn, x=None, state=None):
    x = torch.randn(T, B, F, dtype=torch.double, requires_grad=True) if x is None else x
    loop = Recurrent(rnn.cell, schedule="loop")
    for actual, expected in zip(results(rnn, x, state), results(loop, x, state), strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def new_widths(cell):
    with torch.no_grad():
        cell.up.weight, cell.up.bias = nn.Parameter(cell.up.weight[:2].clone()), nn.Parameter(cell.up.bias[:2].clone())
        cell.down.weight = nn.Parameter(cell.down.weight[:, :2].clone())


def replace_method(cell):
    cell.mix = lambda h: -h


def change_global(_):
    global SCALE
    SCALE = 0.3


def change_hidden_weights(cell):
    with torch.no_grad():
        cell.hidden_from_torch[0].weight.mul_(3.0)


CHANGES = {
    "weights of a module in a list": change_hidden_weights,
    "a partial function": lambda cell: setattr(cell, "twice", functools.partial(torch.mul, -1.0)),
    "an array in place": lambda cell: cell.factors.fill(-2.0),
    "a float": lambda cell: setattr(cell, "scale", 0.1),
    "a module": lambda cell: setattr(cell, "act", nn.ReLU()),
    "an entry of a dictionary": lambda cell: cell.options.update(shift=-1.0),
    "a tensor in place": lambda cell: cell.mask.mul_(0.2),
    "a tensor": lambda cell: setattr(cell, "mask", torch.arange(H).double()),
    "a method": replace_method,
    "a global": change_global,
    "widths": new_widths,
    "frozen weights": lambda cell: cell.b.requires_grad_(False),
    "tied weights": lambda cell: setattr(cell.b, "bias", cell.a.bias),
    "a parametrization": lambda cell: nn.utils.parametrizations.weight_norm(cell.b),
    "the mode": lambda cell: cell.eval(),
}


@pytest.fixture
def same_global():
    global SCALE
    SCALE = 1.0
    yield
    SCALE = 1.0


def assert_or_frozen(rnn):
    x = torch.randn(T, B, F, dtype=torch.double, requires_grad=True)
    loop = Recurrent(rnn.cell, schedule="loop")
    found = []
    for module in (rnn, loop):
        for p in module.parameters():
            p.grad = None
        y, _ = module(x)
        y.sin().sum().backward()
        found.append([y, *(p.grad for p in module.parameters())])
    for actual, expected in zip(*found, strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("same_global")
@pytest.mark.parametrize(
    ("change", "schedule"),
    [*((name, "intra_stream") for name in CHANGES), ("a float", "compiled"), ("widths", "compiled")],
)
def test_what_changes_after_the_trace_counts(change, schedule):
    cell = Cell().double()
    cell.mask = cell.mask.double()
    rnn = Recurrent(cell, schedule=schedule)
    assert_or_frozen(rnn)
    CHANGES[change](cell)
    assert_or_frozen(rnn)


class Gain:
    """Two of these are of one class, whose attribute counts for both."""

    shared = 1.0

    def __init__(self, own):
        self.own = own

    def of(self, x):
        return x * (self.shared + self.own)


class TwoGains(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Gain(0.5), Gain(0.25)
        self.weight = nn.Parameter(torch.rand(H))

    def forward(self, x, h):
        h = torch.tanh(self.second.of(self.first.of(x) * self.weight + h))
        return h, h


@pytest.mark.parametrize("change", ["the class", "the first", "the second", "a method"])
def test_objects_of_one_class_count_with_it(change, monkeypatch):
    rnn = Recurrent(TwoGains().double(), schedule="intra_stream")
    x = torch.randn(T, B, H, dtype=torch.double, requires_grad=True)
    start = torch.zeros(B, H, dtype=torch.double)
    assert_as_the_loop(rnn, x, start)
    before = rnn(x, start)[0]
    if change == "the class":
        monkeypatch.setattr(Gain, "shared", 3.0)
    elif change == "a method":
        monkeypatch.setattr(Gain, "of", lambda self, x: x - self.own)
    else:
        getattr(rnn.cell, change.split()[1]).own = 2.0
    assert_as_the_loop(rnn, x, start)
    assert not torch.equal(rnn(x, start)[0], before)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(
    ("add", "said"),
    [
        (lambda cell: cell.act.register_forward_hook(lambda module, args, y: 0.5 * y), "`act` has forward hooks"),
        (lambda cell: cell.b.register_forward_pre_hook(lambda module, args: (args[0] * 2,)), "forward pre hooks"),
        (lambda cell: cell.b.register_full_backward_pre_hook(lambda module, out: (out[0] * 3,)), "backward pre hooks"),
    ],
)
def test_hooks_on_a_part_of_the_cell_are_called_by_the_plain_loop(add, said):
    cell = Cell().double()
    cell.mask = cell.mask.double()
    rnn = Recurrent(cell, schedule="intra_stream")
    assert_as_the_loop(rnn)
    handle = add(cell)
    with pytest.warns(UserWarning, match=said):
        assert_as_the_loop(rnn)
    handle.remove()
    assert_as_the_loop(rnn)


def test_a_cell_that_changes_with_every_call_is_not_traced_for_ever():
    cell = Cell().double()
    cell.mask = cell.mask.double()
    rnn = Recurrent(cell, schedule="intra_stream")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(9):
            cell.scale = 1.0 - 0.1 * k
            assert_as_the_loop(rnn)
    (said,) = [str(w.message) for w in caught]
    assert "`scale` changes too often to trace the cell anew" in said


class BranchesOnStreams(Cell):
    def forward(self, x, state):
        h = torch.tanh(self.a(x) + (2.0 if x.shape[0] > 4 else 1.0) * self.b(state[0]))
        return h, (h.detach() if len(x) == 7 else h,)


@pytest.mark.parametrize("schedule", ["intra_stream", "compiled"])
def test_a_step_that_branches_on_the_batch_size_is_traced_for_each(schedule):
    rnn = Recurrent(BranchesOnStreams().double(), schedule=schedule)
    for streams in (3, 5, 1, 7, 4, 8):
        assert_as_the_loop(rnn, torch.randn(T, streams, F, dtype=torch.double, requires_grad=True))


class ShiftedOnly(nn.Module):
    """A state that lies on no cycle: the previous step's features, in blocks of their own."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(F, H)

    def initial_state(self, x):
        return (x.new_zeros(len(x), H),)

    def forward(self, x, state):
        features = torch.tanh(self.a(x))
        return features + 2.0 * state[0], (features,)


@pytest.mark.parametrize("steps", [9, 300])
def test_a_state_without_a_loop_passes_the_border_of_blocks(steps, monkeypatch):
    monkeypatch.setattr(run_blocks, "_BLOCK_NUMBERS", 0)
    rnn = Recurrent(ShiftedOnly().double(), schedule="intra_stream")
    assert_as_the_loop(rnn, torch.randn(steps, B, F, dtype=torch.double, requires_grad=True))


class Flagged(Cell):
    """A boolean and an integer state beside the real one."""

    def forward(self, x, state):
        h, seen, count = state
        h = torch.where(seen, torch.tanh(self.a(x) + self.b(h)), self.a(x))
        return h, (h, seen | (x.sum(1, keepdim=True) > 1), count + seen.long())


def test_boolean_and_integer_states():
    rnn = Recurrent(Flagged().double(), schedule="intra_stream")
    state = torch.zeros(B, H, dtype=torch.double), torch.zeros(B, 1).bool(), torch.zeros(B, 1).long()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a schedule or the loop, both are right
        assert_as_the_loop(rnn, state=state)


class ConvLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2 + 3, 12, 3, padding=1)

    def forward(self, x, state):
        h, c = state
        i, f, g, o = self.conv(torch.cat([x, h], 1)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, (h, c)


def test_states_with_more_dimensions():
    rnn = Recurrent(ConvLSTM().double(), schedule="intra_stream")
    x = torch.randn(T, 2, 2, 4, 5, dtype=torch.double, requires_grad=True)
    zeros = torch.zeros(2, 3, 4, 5, dtype=torch.double)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a schedule or the loop, both are right
        assert_as_the_loop(rnn, x, (zeros, zeros))


@pytest.mark.parametrize("schedule", ["intra_stream", "compiled", "auto"])
def test_parameters_that_reach_nothing_get_no_gradient(schedule):
    class Output(Cell):
        def forward(self, x, state):
            h = torch.tanh(self.a(x) + self.b(state[0].detach()))
            return self.up(state[0]), (h,)

    rnn = Recurrent(Output().double(), schedule=schedule)
    for steps in (1, 2, T):
        x = torch.randn(steps, B, F, dtype=torch.double, requires_grad=True)
        assert_as_the_loop(rnn, x)
        grads = [
            torch.autograd.grad(m(x)[0].sum(), [x, *m.parameters()], allow_unused=True)
            for m in (rnn, Recurrent(rnn.cell, schedule="loop"))
        ]
        assert [g is None for g in grads[0]] == [g is None for g in grads[1]]


def test_two_threads_get_what_one_after_another_gets():
    rnn = Recurrent(PeepholeLSTMCell(F, H).double(), schedule="intra_stream")
    inputs = {b: torch.randn(20, b, F, dtype=torch.double) for b in (2, 7)}
    expected = {b: Recurrent(rnn.cell, schedule="loop")(x)[0].detach() for b, x in inputs.items()}
    wrong = []

    def call(streams):
        for _ in range(25):
            y = rnn(inputs[streams])[0]
            y.sum().backward()
            if not torch.allclose(y, expected[streams], atol=1e-12):
                wrong.append(streams)

    threads = [threading.Thread(target=call, args=(b,)) for b in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def held_bytes():
    gc.collect()
    storages = [o.untyped_storage() for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("schedule", ["intra_stream", "compiled"])
def test_memory_over_many_lengths_and_batch_sizes_is_that_of_the_largest(schedule):
    rnn = Recurrent(PeepholeLSTMCell(16, 64), schedule=schedule)
    before = held_bytes()

    def step(length, streams=8):
        rnn(torch.randn(length, streams, 16))[0].pow(2).mean().backward()
        rnn.zero_grad()

    step(60)
    largest = held_bytes() - before
    for length, streams in ((20, 8), (33, 7), (41, 3), (55, 8), (60, 5), (7, 1), (60, 8)):
        step(length, streams)
    assert held_bytes() - before <= 2 * largest


Pair = collections.namedtuple("Pair", ["h", "total"])


class Nested(Cell):
    def initial_state(self, x):
        return Pair(x.new_zeros(len(x), H), {"sum": x.new_zeros(len(x), H)})

    def forward(self, x, state):
        h = torch.tanh(self.a(x) + self.b(state.h))
        return {"y": h, "more": (2 * h, state.h)}, Pair(h, {"sum": state.total["sum"] + h})


@pytest.mark.parametrize("schedule", ["loop", "intra_stream", "compiled"])
def test_nested_outputs_and_states_come_back_as_the_cell_nests_them(schedule):
    rnn = Recurrent(Nested().double(), schedule=schedule, bidirectional=True)
    x, lengths = torch.randn(T, B, F, dtype=torch.double), torch.tensor([T, 4, 2])
    for _ in range(2):  # the second call runs no step
        y, (last, reverse) = rnn(x)
        assert isinstance(last, Pair)
        assert reverse.total["sum"].shape == (B, H)
        ahead, back = Recurrent(rnn.cell, schedule="loop"), Recurrent(rnn.cell_reverse, schedule="loop")
        expected = torch.cat([ahead(x)[0]["more"][1], back(x.flip(0))[0]["more"][1].flip(0)], -1)
        torch.testing.assert_close(y["more"][1], expected)
        packed, _ = rnn(pack_padded_sequence(x, lengths))
        assert isinstance(packed["y"], PackedSequence)
        padded, _ = rnn(x, None, lengths)
        torch.testing.assert_close(packed["y"].data, pack_padded_sequence(padded["y"], lengths).data)


def test_another_cell_in_its_place_and_replicas():
    rnn = Recurrent(PeepholeLSTMCell(F, H).double(), schedule="intra_stream")
    x = torch.randn(T, B, F, dtype=torch.double, requires_grad=True)
    expected = rnn(x)[0]
    replica = rnn._replicate_for_data_parallel()
    replica.cell = rnn.cell._replicate_for_data_parallel()
    for name, p in rnn.cell.named_parameters():
        setattr(replica.cell, name, p * 1.0)
    torch.testing.assert_close(replica(x)[0], expected)
    rnn.cell = PeepholeLSTMCell(F, H).double()
    assert_as_the_loop(rnn)


def flops(rnn, x):
    with FlopCounterMode(display=False) as counter:
        rnn(x)[0].sum().backward()
    return torch.tensor(float(counter.get_total_flops()))


def tangent(rnn, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(rnn(forward_ad.make_dual(x, x))[0]).tangent


def recomputed(rnn, x):
    leaf = x.clone().requires_grad_()
    checkpoint(lambda v: rnn(v)[0], leaf, use_reentrant=False).sin().sum().backward()
    return leaf.grad


def under_anomaly_detection(rnn, x):
    leaf = x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            rnn(leaf)[0].sin().sum().backward()
    return leaf.grad


def with_doubled_weights(rnn, x):
    base = {n: p.detach().clone().requires_grad_() for n, p in rnn.named_parameters()}
    y = functional_call(rnn, {n: 2 * p for n, p in base.items()}, (x,))[0]
    return torch.cat([g.flatten() for g in torch.autograd.grad(y.sin().sum(), list(base.values()))])


AROUND = {
    "vmap": (lambda rnn, x: vmap(lambda v: rnn(v)[0])(torch.stack([x, 2 * x])), "a transform of torch.func"),
    "jacrev": (lambda rnn, x: jacrev(lambda v: rnn(v)[0].sum((1, 2)))(x), "a transform of torch.func"),
    "jvp": (lambda rnn, x: jvp(lambda v: rnn(v)[0], (x,), (x,))[1], "a transform of torch.func"),
    "forward AD": (tangent, "forward-mode differentiation"),
    "FLOP counter": (flops, "FlopCounterMode"),
    "checkpoint": (recomputed, "checkpointing"),
    "anomaly": (under_anomaly_detection, ""),
    "functional_call": (with_doubled_weights, ""),
    "export": (lambda rnn, x: torch.export.export(rnn, (x,)).module()(x)[0], ""),
    "compile": (lambda rnn, x: torch.compile(rnn, backend="eager")(x)[0], ""),
    "meta": (lambda rnn, x: torch.zeros(copy.deepcopy(rnn).to("meta")(x.to("meta"))[0].shape), "without memory"),
    "no streams": (lambda rnn, x: rnn(x[:, :0])[0], "no stream in the batch"),
    "complex": (lambda rnn, x: copy.deepcopy(rnn).to(torch.complex128)(x.to(torch.complex128))[0], "complex numbers"),
}


@pytest.mark.parametrize("name", list(AROUND))
def test_transforms_modes_and_other_tensors_get_the_loops_results(name):
    run, said = AROUND[name]
    rnn = Recurrent(PeepholeLSTMCell(F, H).double(), schedule="intra_stream")
    x = torch.randn(4, B, F, dtype=torch.double)
    rnn(x)[0].sum().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = run(rnn, x)
        expected = run(Recurrent(rnn.cell, schedule="loop"), x)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert said in " ".join(str(w.message) for w in caught)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_that_precision(dtype):
    cell = PeepholeLSTMCell(F, H).to(dtype)
    rnn, loop = Recurrent(cell, schedule="intra_stream"), Recurrent(cell, schedule="loop")
    x = torch.randn(T, B, F).to(dtype)
    y, expected = rnn(x)[0], loop(x)[0]
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


def test_two_equal_edges_of_a_graph_have_weights_of_their_own():
    nodes = {"x": {"size": 3}, "y": {"size": 4}, "h": {"size": 4, "activation": "tanh"}}
    edges = ["x -> y", "x -> h", "x -> h", "y -> h diagonal", "y -> h diagonal", "h -> h delay=1"]
    rnn = GraphRNN(nodes, edges, ["x"], ["h"], schedule="loop")
    rnn(torch.randn(5, 2, 3))[0].sum().backward()
    assert len(rnn.rnn.cell.diagonals) == 2
    assert all(bool(row.any()) for p in rnn.parameters() for row in p.grad)


class Attends(nn.Module):
    """Reads what was set before the call, and wants its gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.memory = nn.Linear(F, H), None

    def forward(self, x, state):
        h = torch.tanh(self.a(x) + state @ self.memory)
        return h, h


def test_a_tensor_beside_the_parameters_keeps_its_gradient():
    rnn = Recurrent(Attends().double(), schedule="intra_stream")
    weight = torch.randn(H, H, dtype=torch.double, requires_grad=True)
    rnn.cell.memory = weight * 0.5
    with pytest.warns(UserWarning, match="`memory` wants a gradient and is no registered parameter"):
        y, _ = rnn(torch.randn(T, B, F, dtype=torch.double), torch.zeros(B, H, dtype=torch.double))
    y.sum().backward()
    assert weight.grad.any()


class Counts(Cell):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x, state):
        self.calls += 1
        return super().forward(x, state)


def test_a_step_that_changes_its_own_attributes_runs_plainly():
    rnn = Recurrent(Counts(), schedule="intra_stream")
    with pytest.warns(UserWarning, match="one step changes `calls`"):
        rnn(torch.randn(T, B, F))
    assert rnn.cell.calls == T
