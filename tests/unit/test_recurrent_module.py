"""Recurrent: every schedule computes what the plain loop computes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_accel.recurrent import (
    CoupledGateLSTMCell,
    FeedbackLSTMCell,
    LayerNormLSTMCell,
    MinGRUCell,
    OutputGRUCell,
    PeepholeLSTMCell,
    Recurrent,
    ZoneoutLSTMCell,
)
from lightning_accel.recurrent.compiler import run_blocks
from lightning_accel.recurrent.compiler.workspace import SpareWorkspaces

F, H, T, B = 5, 4, 7, 3
ZOO = [PeepholeLSTMCell, LayerNormLSTMCell, CoupledGateLSTMCell, FeedbackLSTMCell, OutputGRUCell, MinGRUCell]


def made_of(rnn):
    """Schedules that were traced, by their keys, under the only assumptions that there were."""
    (schedules,) = rnn.schedules[0]._traced.values()
    return schedules.made


@pytest.fixture(autouse=True)
def _seed(request):
    torch.manual_seed(0)


def scheduled(rnn, schedule):
    """Make a module with the same parameters and another schedule."""
    twin = copy.deepcopy(rnn)
    for choice in twin.schedules:
        choice.schedule, choice.choices = schedule, {}
    return twin


def results(rnn, x, state=None, **arguments):
    """Outputs, final states and all gradients."""
    leaves = [t for t in torch.utils._pytree.tree_leaves((x, state)) if isinstance(t, torch.Tensor) and t.requires_grad]
    y, last = rnn(x, state, **arguments)
    outs = torch.utils._pytree.tree_leaves((y, last))
    total = sum((k + 1.0) * o.cos().sum() for k, o in enumerate(outs))
    gradients = torch.autograd.grad(total, [*leaves, *rnn.parameters()], allow_unused=True)
    return [*outs, *gradients]


def assert_equal(actual, expected, tolerance=1e-12):
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            scale = max(e.abs().max().item(), 1e-30)
            assert (a - e).abs().max().item() <= tolerance * max(scale, 1.0 if tolerance > 1e-9 else scale)


def sequence(*shape):
    return torch.randn(*shape, dtype=torch.double, requires_grad=True)


@pytest.mark.parametrize(("schedule", "rows"), [("intra_stream", 256), ("intra_stream", 2 * B), ("compiled", 2 * B)])
@pytest.mark.parametrize("kind", [*ZOO, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_gradients_equal_autograds(kind, schedule, rows, monkeypatch):
    monkeypatch.setattr(run_blocks, "_BLOCK_ROWS", rows)
    monkeypatch.setattr(run_blocks, "_BLOCK_NUMBERS", 0)
    rnn = Recurrent(kind(F, H).double(), schedule="loop")
    states = getattr(rnn.cell, "num_states", 2 if kind is nn.LSTMCell else 1)
    state = tuple(sequence(B, H) for _ in range(states)) if kind not in (nn.GRUCell, nn.RNNCell) else sequence(B, H)
    x = sequence(T, B, F)
    assert_equal(results(scheduled(rnn, schedule), x, state), results(rnn, x, state))


def test_zoneout_with_given_masks():
    rnn = Recurrent(ZoneoutLSTMCell(F, H).double(), schedule="loop")
    keep = (torch.rand(T, B, 2 * H) < 0.3).double()
    state = (sequence(B, H), sequence(B, H))
    x = (sequence(T, B, F), keep)
    assert_equal(results(scheduled(rnn, "intra_stream"), x, state), results(rnn, x, state))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_native_kernels_take_torchs_cells(kind):
    rnn = Recurrent(kind(F, H).double(), schedule="loop")
    x = sequence(T, B, F)
    assert_equal(results(scheduled(rnn, "native"), x), results(rnn, x))


@pytest.mark.parametrize("steps", [1, 2, 40])
def test_scan_of_a_recurrence_that_is_affine_in_its_state(steps):
    rnn = Recurrent(MinGRUCell(F, H).double(), schedule="loop")
    x, state = sequence(steps, B, F), (sequence(B, H),)
    assert_equal(results(scheduled(rnn, "scan"), x, state), results(rnn, x, state))


def test_changing_lengths_and_batches_make_no_new_plan():
    rnn = Recurrent(PeepholeLSTMCell(F, H).double(), schedule="intra_stream")
    loop = scheduled(rnn, "loop")
    for steps, streams in ((T, B), (T + 3, B + 2), (1, 1), (2, 9)):
        x = sequence(steps, streams, F)
        assert_equal(results(rnn, x), results(loop, x))
    (made,) = made_of(rnn).values()
    assert len({id(code) for code in made._variants.values()}) == 1


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("schedule", ["intra_stream", "compiled", "loop"])
def test_packed_sequences(schedule, bidirectional):
    lengths = torch.tensor([2, 7, 4])
    rnn = Recurrent(nn.LSTMCell(F, H).double(), bidirectional=bidirectional, schedule=schedule)
    reference = nn.LSTM(F, H, bidirectional=bidirectional).double()
    for suffix, cell in (("_l0", rnn.cell), ("_l0_reverse", rnn.cell_reverse)):
        if cell is not None:
            for name, p in cell.named_parameters():
                getattr(reference, name + suffix).data.copy_(p.data)
    x = sequence(T, B, F)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, last = rnn(packed)
    expected, (h, _) = reference(packed)
    torch.testing.assert_close(pad_packed_sequence(y)[0], pad_packed_sequence(expected)[0])
    last_h = torch.stack([s[0] for s in last]) if bidirectional else last[0][None]
    torch.testing.assert_close(last_h, h)


def test_lengths_zero_and_nan_in_the_padding():
    rnn = Recurrent(PeepholeLSTMCell(F, H).double(), schedule="intra_stream")
    x = torch.randn(T, B, F, dtype=torch.double)
    x[3:, 1] = float("nan")
    x[:, 2] = float("nan")
    state = (sequence(B, H), sequence(B, H))
    y, last = rnn(x, state, lengths=torch.tensor([T, 3, 0]))
    alone, _ = rnn(x[:3, 1:2], tuple(s[1:2] for s in state))
    torch.testing.assert_close(y[:3, 1:2], alone)
    assert not y[3:, 1].any()
    assert torch.equal(last[0][2], state[0][2])
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in rnn.parameters())


def test_batch_first_is_a_transposition():
    rnn = Recurrent(OutputGRUCell(F, H).double(), schedule="intra_stream")
    first = copy.deepcopy(rnn)
    first.batch_first = True
    x = sequence(T, B, F)
    assert torch.equal(first(x.transpose(0, 1))[0].transpose(0, 1), rnn(x)[0])


def test_frozen_tied_and_parametrized_weights():
    cell = PeepholeLSTMCell(F, H).double()
    cell.peephole_forget = cell.peephole_input
    cell.bias.requires_grad_(False)
    parametrizations.weight_norm(cell, "weight_hh")
    rnn = Recurrent(cell, schedule="loop")
    twin = scheduled(rnn, "intra_stream")
    x = sequence(T, B, F)
    found = []
    for module in (twin, rnn):
        module(x)[0].square().sum().backward()
        found.append({n: p.grad for n, p in module.named_parameters()})
    assert found[0]["cell.bias"] is None
    for name, gradient in found[1].items():
        if gradient is not None:
            torch.testing.assert_close(found[0][name], gradient, rtol=1e-11, atol=1e-13)


def test_retained_graphs_and_a_second_backward():
    rnn = Recurrent(PeepholeLSTMCell(F, H).double(), schedule="intra_stream")
    x = sequence(T, B, F)
    total = rnn(x)[0].sum()
    (first,) = torch.autograd.grad(total, x, retain_graph=True)
    rnn(sequence(T, B, F))[0].sum().backward()
    (second,) = torch.autograd.grad(total, x)
    assert torch.equal(first, second)


def test_a_step_of_the_optimizer_before_the_backward_raises():
    rnn = Recurrent(PeepholeLSTMCell(F, H), schedule="intra_stream")
    total = rnn(torch.randn(T, B, F))[0].sum()
    with torch.no_grad():
        rnn.cell.weight_hh.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_gradients_of_gradients_go_through_the_loop():
    rnn = Recurrent(PeepholeLSTMCell(F, H).double(), schedule="intra_stream")
    found = []
    x = sequence(T, B, F)
    for module in (rnn, scheduled(rnn, "loop")):
        (gradient,) = torch.autograd.grad(module(x)[0].sin().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), [x, *module.parameters()]))
    assert_equal(*found)


def test_the_callers_changes_of_the_output_do_not_reach_the_gradients():
    rnn = Recurrent(PeepholeLSTMCell(F, H).double(), schedule="intra_stream")
    x = sequence(T, B, F)
    (expected,) = torch.autograd.grad(rnn(x)[0].sum(), x)
    y = rnn(x)[0]
    y.add_(1.0)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_autocast_to_bfloat16_is_near_the_loop():
    rnn = Recurrent(PeepholeLSTMCell(F, H), schedule="intra_stream")
    loop = scheduled(rnn, "loop")
    x = torch.randn(T, B, F)
    found = []
    for module in (rnn, loop):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = module(x)
        y.float().square().sum().backward()
        found.append((y.dtype, y.float(), module.cell.weight_hh.grad))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=6e-2, atol=6e-2)


def test_without_gradients():
    rnn = Recurrent(LayerNormLSTMCell(F, H).double(), schedule="intra_stream")
    x = torch.randn(T, B, F, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(rnn(x)[0], scheduled(rnn, "loop")(x)[0])


def test_auto_measures_and_remembers():
    rnn = Recurrent(PeepholeLSTMCell(F, H))
    rnn(torch.randn(T, B, F))[0].sum().backward()
    ((key, chosen),) = rnn.schedules[0].choices.items()
    assert chosen in ("loop", "intra_stream", "compiled")
    assert rnn.schedules[0].speed[key] >= 1.0
    rnn.schedules[0].choices[key] = "loop"
    rnn(torch.randn(T, B, F))
    assert rnn.schedules[0].choices == {key: "loop"}


def test_measuring_leaves_no_memory_behind(monkeypatch):
    left = []
    leave = SpareWorkspaces.leave

    def noted(spares, kind, workspace):
        left.append((spares, kind))
        leave(spares, kind, workspace)

    def loop_wins(trials, **_):
        for trial in trials.values():
            trial()
        return {name: [0.0 if name == "loop" else 1.0] for name in trials}

    monkeypatch.setattr(SpareWorkspaces, "leave", noted)
    monkeypatch.setattr("lightning_accel.recurrent.schedule_choice.time_interleaved", loop_wins)
    rnn = Recurrent(PeepholeLSTMCell(F, H))
    rnn(torch.randn(T, B, F))
    assert set(rnn.schedules[0].choices.values()) == {"loop"}
    kept = [made.spares for made in made_of(rnn).values() if made is not None]
    measured = [(spares, kind) for spares, kind in left if spares in kept]
    assert measured
    assert all(not spares.take(kind)._memory for spares, kind in measured)


def test_copies_and_pickles():
    rnn = Recurrent(PeepholeLSTMCell(F, H), schedule="intra_stream")
    x = torch.randn(T, B, F)
    expected = rnn(x)[0]
    for twin in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert twin.schedules[0].module is twin.cell
        assert torch.equal(twin(x)[0], expected)
        with torch.no_grad():
            twin.cell.bias.add_(1.0)
        assert not torch.equal(twin(x)[0], expected)
    assert list(rnn.state_dict()) == [f"cell.{n}" for n in rnn.cell.state_dict()]


class Looks(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(H, H)

    def forward(self, x, state):
        h = self.linear(state + x)
        if h.sum() > 0:
            h = h.tanh()
        return h, h


class Draws(Looks):
    def forward(self, x, state):
        h = nn.functional.dropout(self.linear(state + x))
        return h, h


class Counts(Looks):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x, state):
        self.steps.add_(1.0)
        h = self.linear(state + x)
        return h, h


class Grows(Looks):
    def forward(self, x, state):
        h = self.linear(x)
        return h, torch.cat([h, h], -1) if state.shape[-1] == H else h


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Looks, "if h.sum\\(\\) > 0"),
        (Draws, "draws random numbers"),
        (Counts, "in-place operation"),
        (Grows, "state 0 changes from"),
    ],
)
def test_what_can_not_be_scheduled_runs_the_loop_with_one_warning(kind, message):
    rnn = Recurrent(kind(), schedule="auto")
    x, h = torch.randn(2, B, H), torch.zeros(B, H)
    with pytest.warns(UserWarning, match=message):
        y, _ = rnn(x, h)
    assert y.shape == (2, B, H)
    rnn(x, h)


def test_wrong_arguments_are_refused():
    rnn = Recurrent(PeepholeLSTMCell(F, H))
    with pytest.raises(ValueError, match="`schedule` must be one of"):
        Recurrent(rnn.cell, schedule="fast")
    with pytest.raises(ValueError, match="at least one time step"):
        rnn(torch.zeros(0, B, F))
    with pytest.raises(ValueError, match="`state` must be given"):
        Recurrent(Looks())(torch.zeros(T, B, H))
    with pytest.raises(ValueError, match="`lengths` must be 3 numbers from 0 to 7"):
        rnn(torch.zeros(T, B, F), lengths=torch.tensor([1, 2, 9]))
    with pytest.raises(ValueError, match="with a PackedSequence"):
        rnn(pack_padded_sequence(torch.zeros(T, B, F), torch.full((B,), T)), lengths=torch.full((B,), T))
    with pytest.raises(TypeError, match="must return `\\(y_t, state\\)`"):
        Recurrent(nn.Bilinear(2, 2, 2), schedule="loop")(torch.zeros(T, B, 2), torch.zeros(B, 2))
    with pytest.warns(UserWarning, match="not 'scan': no scan: the recurrence is not elementwise"):
        Recurrent(rnn.cell, schedule="scan")(torch.zeros(2, B, F))
    with pytest.raises(ValueError, match="`input_size` and `hidden_size` must be >= 1"):
        MinGRUCell(0, 1)
