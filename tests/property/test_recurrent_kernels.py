"""Whole layers by emitted Triton kernels, interpreted: zoo cells, graphs of the configurations, packed sequences."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recurrent_emitted import round_as_chips_do
from test_recurrent_random_graphs import graphs
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils import _pytree as pytree

from lightning_accel.recurrent import GraphRNN, Recurrent
from lightning_accel.recurrent.compiler import executor
from lightning_accel.zoo.models.cells import LayerNormLSTMCell, MinGRUCell, PeepholeLSTMCell

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # numbers beyond a row's end
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
LIMITS = {torch.float64: 1e-11, torch.float32: 2e-5}  # of the largest number of each tensor
EPSILON = 2.0**-8  # of bfloat16
CONF = Path(__file__).parents[2] / "conf" / "model" / "recurrent_graph"


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    round_as_chips_do(monkeypatch)
    monkeypatch.setattr(executor, "language_of", lambda device: "Triton")


def zoo_cell(kind):
    return lambda schedule: Recurrent(kind(5, 12), schedule=schedule)


def of_configuration(path):
    found = yaml.safe_load(path.read_text())
    return lambda schedule: GraphRNN(
        *(found[key] for key in ("nodes", "edges", "inputs", "outputs")), schedule=schedule
    )


NETWORKS = {kind.__name__: zoo_cell(kind) for kind in (PeepholeLSTMCell, LayerNormLSTMCell, MinGRUCell)}
NETWORKS |= {path.stem: of_configuration(path) for path in sorted(CONF.glob("*.yaml"))}


def zero_state(rnn, streams, dtype):
    if isinstance(rnn, GraphRNN):
        return None
    zeros = torch.zeros(streams, rnn.cell.hidden_size, dtype=dtype)
    return zeros if isinstance(rnn.cell, MinGRUCell) else (zeros, zeros)


def results(rnn, x, *given, half=False):
    """Return outputs, final states and all gradients."""
    leaf = x.data if isinstance(x, PackedSequence) else x
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        y, last = rnn(x, *given)
    y = y.data if isinstance(y, PackedSequence) else y
    parts = [y, *pytree.tree_leaves(last)]
    total = sum((k + 1.0) * part.float().cos().sum() for k, part in enumerate(parts))
    gradients = torch.autograd.grad(total, [leaf, *rnn.parameters()], allow_unused=True)
    return [t if t is None else t.detach() for t in (*parts, *gradients)]


def choices(rnn):
    inner = rnn.rnn if isinstance(rnn, GraphRNN) else rnn
    return {chosen for choice in inner.schedules for chosen in choice.choices.values()}


def pair_of(name, dtype):
    torch.manual_seed(0)
    loop = NETWORKS[name]("loop").to(dtype)
    fast = NETWORKS[name]("compiled").to(dtype)
    fast.load_state_dict(loop.state_dict())
    size = loop.input_size if isinstance(loop, GraphRNN) else loop.cell.input_size
    return loop, fast, torch.randn(5, 3, size).to(dtype).requires_grad_()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_the_zoo_run_as_kernels(name, dtype):
    loop, fast, x = pair_of(name, dtype)
    given = zero_state(loop, 3, dtype)
    expected, actual = results(loop, x, given), results(fast, x, given)
    assert choices(fast) == {"compiled"}
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            assert float((a - e).abs().max()) <= LIMITS[dtype] * max(float(e.abs().max()), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("half", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_the_zoo_in_bfloat16_are_as_near_as_the_loop(name, half):
    dtype = torch.bfloat16 if half == "bfloat16" else torch.float32
    loop, fast, x = pair_of(name, dtype)
    given = zero_state(loop, 3, dtype)
    wide = copy.deepcopy(loop).float()
    exact = results(wide, x.detach().float().requires_grad_(), zero_state(loop, 3, torch.float32))
    plain, actual = (results(rnn, x, given, half=half == "autocast") for rnn in (loop, fast))
    assert choices(fast) == {"compiled"}
    for a, p, e in zip(actual, plain, exact, strict=True):
        if e is not None:
            scale = e.abs().max().clamp_min(1e-3)
            error, usual = (float((v.float() - e).abs().max() / scale) for v in (a, p))
            assert error <= 3.0 * usual + 4.0 * EPSILON


@pytest.mark.slow
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(graphs(), st.integers(2, 4), st.integers(1, 3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_random_graphs_in_other_numbers_are_as_near_as_the_loop(arguments, steps, streams, dtype):
    torch.manual_seed(0)
    loop = GraphRNN(*arguments, schedule="loop").to(dtype)
    fast = GraphRNN(*arguments, schedule="compiled").to(dtype)
    fast.load_state_dict(loop.state_dict())
    x = torch.randn(steps, streams, loop.input_size).to(dtype).requires_grad_()
    exact = results(copy.deepcopy(loop).double(), x.detach().double().requires_grad_())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a graph without a loop has nothing to compile
        actual = results(fast, x)
    plain = results(loop, x)
    looped = any(stage.loop for stage in fast.graph.schedule)
    assert choices(fast) == {"compiled"} or not looped or "it has none" in str(fast.rnn.schedules[0].refusals)
    epsilon = torch.finfo(dtype).eps
    for a, p, e in zip(actual, plain, exact, strict=True):
        if e is not None:
            scale = e.abs().max().clamp_min(1e-3)
            error, usual = (float((v.double() - e).abs().max() / scale) for v in (a, p))
            assert error <= 3.0 * usual + 8.0 * epsilon


CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "peephole": PeepholeLSTMCell, "layer norm": LayerNormLSTMCell}


@pytest.mark.slow
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one direction", "both"])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_packed_sequences_run_as_kernels(name, dtype, bidirectional):
    torch.manual_seed(0)
    loop = Recurrent(CELLS[name](5, 12), bidirectional=bidirectional, schedule="loop").to(dtype)
    fast = Recurrent(CELLS[name](5, 12), bidirectional=bidirectional, schedule="compiled").to(dtype)
    fast.load_state_dict(loop.state_dict())
    data = torch.randn(6, 4, 5, dtype=dtype)
    lengths = torch.tensor([2, 6, 1, 4])
    packed = pack_padded_sequence(data, lengths, enforce_sorted=False)
    packed = PackedSequence(packed.data.clone().requires_grad_(), *packed[1:])
    state = torch.randn(4, 12, dtype=dtype)
    given = state if name == "gru" else (state, 0.5 * state)
    given = (given, given) if bidirectional else given
    expected, actual = results(loop, packed, given), results(fast, packed, given)
    assert choices(fast) == {"compiled"}
    for a, e in zip(actual, expected, strict=True):
        assert float((a - e).abs().max()) <= LIMITS[dtype] * max(float(e.abs().max()), 1e-3)


def test_packed_rows_are_those_of_each_sequence_alone():
    """An oracle that knows nothing of packing: every sequence by itself."""
    torch.manual_seed(0)
    fast = Recurrent(nn.LSTMCell(5, 12), schedule="compiled").double()
    sequences = [torch.randn(length, 5, dtype=torch.double) for length in (2, 6, 1, 4)]
    padded = nn.utils.rnn.pad_sequence(sequences)
    y, (h, c) = fast(pack_padded_sequence(padded, torch.tensor([2, 6, 1, 4]), enforce_sorted=False))
    rows, lengths = nn.utils.rnn.pad_packed_sequence(y)
    assert lengths.tolist() == [2, 6, 1, 4]
    for k, sequence in enumerate(sequences):
        state = (torch.zeros(1, 12, dtype=torch.double),) * 2
        for t, x in enumerate(sequence):
            state = fast.cell(x[None], state)
            torch.testing.assert_close(rows[t, k], state[0][0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close((h[k], c[k]), (state[0][0], state[1][0]), rtol=1e-12, atol=1e-12)
        assert not rows[len(sequence) :, k].any()
