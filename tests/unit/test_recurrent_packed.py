"""Packed nn.LSTM, nn.GRU and nn.RNN run padded: outputs, states and gradients are the packed kernel's."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_accel.recurrent.packed import run_padded as packed_calls
from lightning_accel.recurrent.packed.layouts import PaddedGrid, Stretches, best_layout
from lightning_accel.recurrent.packed.run_padded import RunPackedPadded

LENGTHS = torch.tensor([3, 7, 1, 5])


@pytest.fixture(params=[PaddedGrid, Stretches])
def layout(request, monkeypatch):
    monkeypatch.setattr(packed_calls, "best_layout", lambda *_: request.param)
    return request.param


def sizes(lengths):
    return (torch.arange(max(lengths))[:, None] < torch.tensor(lengths)).sum(1)


def run(rnn, x, states, *, padded, lengths=LENGTHS, seed=1):
    torch.manual_seed(seed)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False, batch_first=rnn.batch_first)
    mode = RunPackedPadded()
    if padded:
        with mode:
            out, last = rnn(packed, states)
    else:
        out, last = rnn(packed, states)
    assert mode.replaced == int(padded)
    assert isinstance(out, PackedSequence)
    last = last if isinstance(last, tuple) else (last,)
    y, _ = pad_packed_sequence(out)
    loss = y.sin().sum() + sum((k + 2.0) * s.cos().sum() for k, s in enumerate(last))
    inputs = [x, *rnn.parameters()]
    if states is not None:
        inputs += states if isinstance(states, tuple) else [states]
    return [y, *last, *torch.autograd.grad(loss, inputs)]


def assert_equal(actual, expected, tolerance=1e-12):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_equals_the_packed_kernel(kind, layers, bias, bidirectional):
    torch.manual_seed(0)
    dropout = 0.4 if layers == 2 else 0.0
    rnn = kind(3, 5, layers, bias=bias, bidirectional=bidirectional, dropout=dropout).double()
    x = torch.randn(7, 4, 3, dtype=torch.double, requires_grad=True)
    shape = (layers * (2 if bidirectional else 1), 4, 5)
    states = [torch.randn(shape, dtype=torch.double, requires_grad=True) for _ in range(2 if kind is nn.LSTM else 1)]
    states = tuple(states) if kind is nn.LSTM else states[0]
    assert_equal(run(rnn, x, states, padded=True), run(rnn, x, states, padded=False))


@pytest.mark.usefixtures("layout")
def test_projected_lstm_and_relu_rnn():
    torch.manual_seed(0)
    for rnn in (nn.LSTM(3, 5, proj_size=2, batch_first=True).double(), nn.RNN(3, 5, nonlinearity="relu").double()):
        x = torch.randn(*((4, 7, 3) if rnn.batch_first else (7, 4, 3)), dtype=torch.double, requires_grad=True)
        assert_equal(run(rnn, x, None, padded=True), run(rnn, x, None, padded=False))


@pytest.mark.usefixtures("layout")
def test_nan_in_the_padding_never_enters():
    torch.manual_seed(0)
    rnn = nn.LSTM(3, 5, bidirectional=True)
    x = torch.randn(7, 4, 3)
    for stream, length in enumerate(LENGTHS):
        x[length:, stream] = float("nan")
    x.requires_grad_()
    results = run(rnn, x, None, padded=True)
    assert all(torch.isfinite(r).all() for r in results)


def test_a_mostly_empty_grid_stays_with_the_packed_kernel():
    rnn = nn.GRU(2, 3)
    lengths = torch.tensor([20, *range(10, 0, -1), *[1] * 30])
    packed = pack_padded_sequence(torch.randn(20, len(lengths), 2), lengths, enforce_sorted=True)
    with RunPackedPadded() as mode:
        rnn(packed)
    assert mode.replaced == 0


def test_unpacked_and_half_precision_calls_pass_through():
    rnn = nn.LSTM(2, 3)
    with RunPackedPadded() as mode:
        y, _ = rnn(torch.ones(4, 1, 2))
        rnn.to(torch.bfloat16)(pack_padded_sequence(torch.ones(4, 1, 2, dtype=torch.bfloat16), torch.tensor([4])))
    assert y.shape == (4, 1, 3)
    assert mode.replaced == 0


@pytest.mark.usefixtures("layout")
def test_gradients_of_gradients():
    torch.manual_seed(0)
    rnn = nn.RNN(2, 3, bidirectional=True).double()
    x = torch.randn(4, 2, 2, dtype=torch.double, requires_grad=True)

    def loss(x):
        with RunPackedPadded():
            out, _ = rnn(pack_padded_sequence(x, torch.tensor([4, 2])))
        return out.data.square().sum()

    assert torch.autograd.gradgradcheck(loss, x)


@pytest.mark.usefixtures("layout")
def test_single_precision_of_the_fast_kernel():
    torch.manual_seed(0)
    rnn = nn.LSTM(6, 8, 2, bidirectional=True)
    x = torch.randn(7, 4, 6, requires_grad=True)
    assert_equal(run(rnn, x, None, padded=True), run(rnn, x, None, padded=False), 1e-5)


def test_layout_follows_the_lengths():
    weights = 1024 * 384
    assert best_layout(sizes([8] * 4), weights) is Stretches  # one dense grid, nothing is padded
    assert best_layout(sizes([500, 300, 256]), weights) is Stretches
    assert best_layout(sizes([12, 11, 10, 9]), weights) is PaddedGrid
    assert best_layout(sizes([500] + [1] * 19), weights) is Stretches
    assert best_layout(sizes([20, *range(10, 0, -1), *[1] * 30]), weights) is None


def test_small_networks_pad_where_large_ones_make_calls():
    lengths = sizes([100, 80, 60])
    assert best_layout(lengths, 4 * 64 * 128) is PaddedGrid
    assert best_layout(lengths, 4 * 1024 * 2048) is Stretches
