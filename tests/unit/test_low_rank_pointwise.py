"""1x1 convolutions by products of matrices equal torch's, whatever the input looks like."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_accel.low_rank import LowRankConv, TuckerConv, factorize
from lightning_accel.low_rank.factors.pointwise import multiplies, pointwise

INPUTS = {
    "many positions": (3, 5, 8, 9),
    "few positions": (3, 5, 4, 4),
    "one sample": (1, 5, 8, 8),
    "one position": (4, 5, 1, 1),
    "sequence": (3, 5, 60),
    "short sequence": (3, 5, 7),
    "no batch": (5, 8, 8),
    "empty batch": (0, 5, 8, 8),
}


def convolve(x, weight, bias):
    return (functional.conv1d if weight.dim() == 3 else functional.conv2d)(x, weight, bias)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", INPUTS.values(), ids=INPUTS.keys())
def test_values_and_gradients_are_those_of_the_convolution(shape, with_bias):
    torch.manual_seed(0)
    ones = (1,) if shape in ((3, 5, 60), (3, 5, 7)) else (1, 1)
    leaves = [torch.randn(shape), torch.randn(7, 5, *ones), torch.randn(7) if with_bias else None]
    results = []
    for function in (pointwise, convolve):
        x, weight, bias = (None if leaf is None else leaf.double().requires_grad_() for leaf in leaves)
        y = function(x, weight, bias)
        y.square().sum().backward()
        results.append([y, x.grad, weight.grad, *([] if bias is None else [bias.grad])])
    for mine, torchs in zip(*results, strict=True):
        torch.testing.assert_close(mine, torchs)
    assert results[0][0].is_contiguous()


def test_channels_last_stays_with_the_convolution():
    x = torch.randn(2, 5, 8, 8).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(7, 5, 1, 1)
    assert not multiplies(x)
    y = pointwise(x, weight)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, functional.conv2d(x, weight))


@pytest.mark.parametrize("size", [16, 6])
def test_autocast_computes_in_its_type(size):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, size, size), torch.randn(7, 5, 1, 1), torch.randn(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = pointwise(x, weight, bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), functional.conv2d(x, weight, bias), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("dense", "shape"),
    [
        (nn.Conv2d(6, 9, 1, stride=2), (2, 6, 15, 16)),
        (nn.Conv2d(6, 9, 1, stride=(1, 3), padding=0), (2, 6, 9, 16)),
        (nn.Conv2d(6, 9, 1, stride=2), (6, 15, 16)),
        (nn.Conv2d(6, 9, 1, padding=1), (2, 6, 8, 8)),
        (nn.Conv2d(6, 9, 1, stride=2, padding=1, padding_mode="reflect"), (2, 6, 8, 8)),
        (nn.Conv2d(6, 9, 1, padding="same"), (2, 6, 8, 8)),
        (nn.Conv1d(6, 9, 1, stride=2), (2, 6, 61)),
    ],
    ids=str,
)
def test_strided_and_padded_1x1_layers_of_full_rank_equal_dense(dense, shape):
    torch.manual_seed(0)
    dense = copy.deepcopy(dense).double()
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(factorize(dense, (6,))(x), dense(x))


@pytest.mark.parametrize("make", [lambda: LowRankConv(6, 9, (3, 3), 4), lambda: TuckerConv(6, 9, (3, 3), (4, 5))])
def test_second_derivatives_flow(make):
    torch.manual_seed(0)
    layer = make().double()
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in layer.parameters())
