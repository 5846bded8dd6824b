"""Shapes, sizes and arithmetic of the zoo's models."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_accel import zoo
from lightning_accel.zoo.models.cells import LayerNormLSTMCell, MinGRUCell, PeepholeLSTMCell
from lightning_accel.zoo.models.gan import squared_mmd
from lightning_accel.zoo.models.optimization import learning_rate_factor
from lightning_accel.zoo.models.recurrent_layers import RecurrentLayers, unroll
from lightning_accel.zoo.models.vit import Attention

IMAGES = torch.linspace(-1, 1, 3 * 64).reshape(3, 1, 8, 8)
MODELS = {
    "MLP": ({"width": 16, "depth": 2}, IMAGES, (3, 10)),
    "CNN": ({}, IMAGES, (3, 10)),
    "ResNet18": ({"channels": 1, "image_size": 8, "width": 4}, IMAGES, (3, 10)),
    "ViT": ({"channels": 1, "image_size": 8, "dim": 12, "depth": 2}, IMAGES, (3, 10)),
    "CharLM": ({"vocab_size": 7, "hidden_size": 6}, torch.arange(10).reshape(2, 5) % 7, (2, 5, 7)),
    "RecurrentRegressor": ({"hidden_size": 6}, torch.ones(2, 5, 2), (2,)),
    "GAN": ({}, torch.ones(4, 32), (4, 1, 8, 8)),
}


def make(name, **changes):
    torch.manual_seed(0)
    return getattr(zoo, name)(**{**MODELS[name][0], **changes}).eval()


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_outputs_have_the_documented_shapes(name):
    assert tuple(make(name)(MODELS[name][1]).shape) == MODELS[name][2]


def test_autoencoder_returns_logits_and_reconstruction():
    logits, reconstruction = zoo.SupervisedAutoencoder(num_classes=10)(IMAGES)
    assert logits.shape == (3, 10)
    assert reconstruction.shape == (3, 64)


@pytest.mark.parametrize("name", MODELS)
def test_equal_seeds_make_equal_models_and_copies_are_equal(name):
    model, x = make(name), MODELS[name][1]
    with torch.no_grad():
        expected = model(x)
        for twin in (make(name), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), expected)


def test_default_sizes_are_those_of_the_literature():
    mlp, cnn, resnet, vit = zoo.MLP(), zoo.CNN(), zoo.ResNet18(), zoo.ViT()
    assert [tuple(layer.weight.shape) for layer in mlp.hidden if isinstance(layer, nn.Linear)] == [
        (1024, 64),
        (1024, 1024),
        (1024, 1024),
        (1024, 1024),
    ]
    assert parameters(cnn) == 138_698
    assert parameters(resnet) == 11_173_962
    assert sum(isinstance(module, nn.Conv2d) for module in resnet.modules()) == 20
    assert (len(vit.blocks), vit.head.in_features, vit.position.shape) == (6, 384, (64, 384))


def test_autoencoder_is_d_100_k_100_d():
    sae = zoo.SupervisedAutoencoder(in_features=30, num_classes=4)
    shapes = [tuple(m.weight.shape) for m in sae.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(100, 30), (4, 100), (100, 4), (30, 100)]


def test_dropout_acts_in_training_only():
    model = make("MLP", dropout=0.5)
    assert torch.equal(model(IMAGES), model(IMAGES))
    assert not torch.equal(model.train()(IMAGES), model(IMAGES))


def test_attention_equals_the_formula():
    torch.manual_seed(0)
    attention = Attention(12, 3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    query, key, value = attention.qkv(x).chunk(3, dim=-1)
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        weights = torch.softmax(query[..., part] @ key[..., part].transpose(1, 2) / 2.0, dim=-1)
        heads.append(weights @ value[..., part])
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, dim=-1)))


def test_peephole_cell_without_peepholes_is_an_lstm_cell():
    torch.manual_seed(0)
    cell, lstm = PeepholeLSTMCell(3, 5).double(), nn.LSTMCell(3, 5).double()
    with torch.no_grad():
        for peephole in (cell.peephole_i, cell.peephole_f, cell.peephole_o):
            peephole.zero_()
        lstm.weight_ih.copy_(cell.weight_ih)
        lstm.weight_hh.copy_(cell.weight_hh)
        lstm.bias_ih.copy_(cell.bias)
        lstm.bias_hh.zero_()
    x, state = torch.randn(2, 3).double(), (torch.randn(2, 5).double(), torch.randn(2, 5).double())
    y, (h, c) = cell(x, state)
    expected_h, expected_c = lstm(x, state)
    torch.testing.assert_close((y, h, c), (expected_h, expected_h, expected_c))


def test_peepholes_see_the_memory_of_the_right_step():
    cell = PeepholeLSTMCell(1, 1).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
        cell.peephole_i.fill_(1.0)
        cell.peephole_f.fill_(2.0)
        cell.peephole_o.fill_(3.0)
        cell.bias[2] = 0.5
    c = torch.tensor([[0.7]], dtype=torch.float64)
    _, (h, new_c) = cell(torch.zeros(1, 1).double(), (torch.zeros(1, 1).double(), c))
    expected_c = torch.sigmoid(2 * c) * c + torch.sigmoid(c) * torch.tanh(torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(new_c, expected_c)
    torch.testing.assert_close(h, torch.sigmoid(3 * expected_c) * torch.tanh(expected_c))


def test_layer_norm_cell_ignores_the_scale_of_its_input_map():
    torch.manual_seed(0)
    cell = LayerNormLSTMCell(3, 8).double()
    x = torch.randn(2, 3).double()
    before = cell(x)[0]
    with torch.no_grad():
        cell.input_map.weight.mul_(1000)
    torch.testing.assert_close(cell(x)[0], before, atol=1e-3, rtol=0)


def test_min_gru_equals_its_closed_form():
    torch.manual_seed(0)
    cell = MinGRUCell(3, 4).double()
    x = torch.randn(6, 2, 3).double()
    z, candidate = torch.sigmoid(cell.gate(x)), cell.candidate(x)
    expected = sum(z[t] * candidate[t] * (1 - z[t + 1 :]).prod(dim=0) for t in range(6))
    torch.testing.assert_close(unroll(cell, x)[-1], expected)


@pytest.mark.parametrize("cell", [PeepholeLSTMCell, LayerNormLSTMCell, MinGRUCell])
def test_state_of_none_is_a_state_of_zeros(cell):
    torch.manual_seed(0)
    step, x, zeros = cell(3, 4), torch.randn(2, 3), torch.zeros(2, 4)
    state = zeros if cell is MinGRUCell else (zeros, zeros)
    assert torch.equal(step(x)[0], step(x, state)[0])


def test_stack_of_lstm_cells_equals_lstm():
    torch.manual_seed(0)
    native, loop = RecurrentLayers("lstm", 3, 4, 2).double(), RecurrentLayers("lstm_cell", 3, 4, 2).double()
    for layer, cell in enumerate(loop.stack):
        for name, parameter in cell.named_parameters():
            parameter.data.copy_(getattr(native.stack, f"{name}_l{layer}"))
    x = torch.randn(5, 2, 3).double()
    torch.testing.assert_close(loop(x), native(x))


@pytest.mark.parametrize("cell", ["lstm", "lstm_cell", "peephole", "layer_norm", "min_gru"])
def test_char_lm_does_not_see_the_future(cell):
    model = make("CharLM", cell=cell, layers=2)
    tokens = torch.arange(10).reshape(2, 5) % 7
    changed = tokens.clone()
    changed[:, 3:] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :3], model(changed)[:, :3])
        assert not torch.allclose(model(tokens)[:, 3], model(changed)[:, 3])


def test_squared_mmd_equals_the_double_sum():
    torch.manual_seed(0)
    x, y = torch.randn(4, 3).double(), torch.randn(5, 3).double()

    def kernel(a, b):
        return sum(torch.exp(-((a - b) ** 2).sum() / (2 * 3 * width)) for width in (0.25, 1.0, 4.0)) / 3

    def mean(a, b):
        return sum(kernel(u, v) for u in a for v in b) / (len(a) * len(b))

    torch.testing.assert_close(squared_mmd(x, y), mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert squared_mmd(x, x).abs() < 1e-12


def test_learning_rate_rises_then_falls_to_zero():
    def factors(schedule):
        return [learning_rate_factor(step, schedule=schedule, warmup_steps=2, total_steps=6) for step in range(7)]

    assert factors("constant") == [0.5, 1, 1, 1, 1, 1, 1]
    assert factors("linear") == [0.5, 1, 1, 0.75, 0.5, 0.25, 0]
    assert factors("cosine") == pytest.approx([0.5, 1, 1, 0.5 + 2**-1.5, 0.5, 0.5 - 2**-1.5, 0])
