"""Packed nn.LSTM, nn.GRU and nn.RNN run padded: outputs, states and gradients are the packed kernel's."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_accel.recurrent.packed import RunPackedPadded

LENGTHS = torch.tensor([3, 7, 1, 5])


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


def test_projected_lstm_and_relu_rnn():
    torch.manual_seed(0)
    for rnn in (nn.LSTM(3, 5, proj_size=2, batch_first=True).double(), nn.RNN(3, 5, nonlinearity="relu").double()):
        x = torch.randn(*((4, 7, 3) if rnn.batch_first else (7, 4, 3)), dtype=torch.double, requires_grad=True)
        assert_equal(run(rnn, x, None, padded=True), run(rnn, x, None, padded=False))


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
    packed = pack_padded_sequence(torch.randn(50, 20, 2), torch.tensor([50] + [1] * 19), enforce_sorted=True)
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


def test_gradients_of_gradients():
    torch.manual_seed(0)
    rnn = nn.RNN(2, 3).double()
    x = torch.randn(4, 2, 2, dtype=torch.double, requires_grad=True)

    def loss(x):
        with RunPackedPadded():
            out, _ = rnn(pack_padded_sequence(x, torch.tensor([4, 2])))
        return out.data.square().sum()

    assert torch.autograd.gradgradcheck(loss, x)
