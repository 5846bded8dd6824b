"""A shrunk model is smaller and computes the same, in the cases that make pruning by hand go wrong."""

import builtins

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_accel import zoo
from lightning_accel.bench.shrink_rows import describe, with_zero_rows
from lightning_accel.projection.shrink import shrink
from lightning_accel.projection.shrink.features import SelectedFeatures


def clear(layer, channels, *, bias=False):
    with torch.no_grad():
        layer.weight[channels] = 0.0
        if bias and layer.bias is not None:
            layer.bias[channels] = 0.0


def clear_fraction(model, fraction, keep):
    generator = torch.Generator().manual_seed(0)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and name not in keep:
            rows = len(layer.weight)
            clear(layer, torch.randperm(rows, generator=generator)[: int(rows * fraction)])


def assert_same(result, model, x, tolerance=1e-5):
    model.eval()
    result.model.eval()
    with torch.no_grad():
        for probe in (x, torch.randn(x.shape, generator=torch.Generator().manual_seed(9))):
            expected, actual = model(probe), result.model(probe)
            for was, now in zip(*((o if isinstance(o, tuple) else (o,)) for o in (expected, actual)), strict=True):
                assert float((was - now).abs().max()) <= tolerance * max(1.0, float(was.abs().max()))
    assert result.largest_difference <= tolerance


ZOO = {
    "MLP": (lambda: zoo.MLP(width=64, depth=3), (4, 1, 8, 8), ("head",)),
    "ResNet18": (lambda: zoo.ResNet18(width=8, channels=1, image_size=8), (2, 1, 8, 8), ("fc",)),
    "ViT": (
        lambda: zoo.ViT(channels=1, image_size=8, dim=24, depth=2, heads=3, patch_size=4),
        (2, 1, 8, 8),
        ("head",),
    ),
    "autoencoder": (lambda: zoo.SupervisedAutoencoder(in_features=50), (4, 50), ("encoder.2", "decoder.2")),
}


@pytest.mark.parametrize("fraction", [0.5, 0.9])
@pytest.mark.parametrize("name", ZOO)
def test_zoo_models_shrink_and_compute_the_same(name, fraction):
    torch.manual_seed(0)
    make, shape, keep = ZOO[name]
    model, x = make(), torch.randn(shape)
    clear_fraction(model, fraction, keep)
    result = shrink(model, x)
    assert result.parameters_before == sum(p.numel() for p in model.parameters())
    assert result.parameters_after == sum(p.numel() for p in result.model.parameters())
    share = {"ViT": 1 - 0.5 * fraction}.get(name, (1 - fraction) + 0.05)
    assert result.parameters_after <= share * result.parameters_before * 1.4
    assert_same(result, model, x)


@pytest.mark.parametrize(("fraction", "share"), [(0.5, 0.5), (0.9, 0.1)])
def test_measured_models_have_that_many_zero_rows_and_lose_them(fraction, share):
    torch.manual_seed(0)
    model = zoo.MLP(in_features=64, width=200, depth=3)
    sparse = with_zero_rows(model, fraction, ("head",))
    rows = [int((layer.weight == 0).all(1).sum()) for layer in sparse.modules() if isinstance(layer, nn.Linear)]
    assert rows[:-1] == [fraction * 200] * (len(rows) - 1)
    assert rows[-1] == 0
    x = torch.randn(4, 64)
    result = shrink(sparse, x)
    assert all(len(kept) == round(share * 200) for name, kept in result.kept.items() if name != "head")
    assert f"{result.parameters_before:,} -> {result.parameters_after:,} parameters" in describe(result)
    assert_same(result, sparse, x)


def test_dead_row_with_a_bias_leaves_its_activation_in_the_next_bias():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 3, bias=False))
    clear(model[0], [1, 4])
    result = shrink(model, torch.randn(5, 4))
    assert result.model[0].out_features == result.model[2].in_features == 4
    assert result.model[2].bias is not None
    assert result.kept["0"].tolist() == [0, 2, 3, 5]
    assert_same(result, model, torch.randn(5, 4))


def test_columns_that_nobody_reads_free_the_rows_before():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[2].weight[:, [0, 5]] = 0.0
    result = shrink(model, torch.randn(5, 4))
    assert result.kept["0"].tolist() == [1, 2, 3, 4]
    assert_same(result, model, torch.randn(5, 4))


def test_norm_and_flatten_after_a_dead_channel():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 9, 4)
    )
    for _ in range(3):
        model(torch.randn(8, 2, 8, 8))  # moves the running statistics
    with torch.no_grad():
        model[1].bias.uniform_(-1.0, 1.0)
    clear(model[0], [0, 3])
    x = torch.randn(2, 2, 8, 8)
    result = shrink(model, x)
    assert result.model[0].out_channels == result.model[1].num_features == 4
    assert result.model[5].in_features == 4 * 9
    assert_same(result, model, x)


@pytest.mark.parametrize(("padding", "channels"), [(0, 4), (1, 6)])
def test_constant_goes_into_a_convolution_only_if_no_border_sees_zero_instead(padding, channels):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 3, 3, padding=padding))
    clear(model[0], [0, 3])
    x = torch.randn(2, 2, 8, 8)
    result = shrink(model, x)
    assert result.model[0].out_channels == channels
    assert ("0" in result.left) == (padding == 1)
    if padding:
        assert "border of a convolution" in result.left["0"]
    assert_same(result, model, x)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(x + self.outer(self.inner(x).relu()))


def test_residual_channel_goes_only_if_all_that_write_it_are_dead():
    torch.manual_seed(0)
    model = Residual()
    clear(model.stem, [0, 1, 2])
    clear(model.outer, [1, 2, 3])
    clear(model.inner, [4, 5])
    x = torch.randn(5, 5)
    result = shrink(model, x)
    assert result.kept["stem"].tolist() == result.kept["outer"].tolist() == [0, 3, 4, 5, 6, 7]
    assert result.model.inner.out_features == 6
    assert_same(result, model, x)


@pytest.mark.parametrize("groups", [6, 2])
def test_depthwise_convolutions_follow_and_grouped_ones_stay(groups):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=groups), nn.ReLU(), nn.Conv2d(6, 3, 1)
    )
    clear(model[0], [1, 2], bias=True)
    x = torch.randn(2, 2, 8, 8)
    result = shrink(model, x)
    if groups == 6:
        assert result.model[2].groups == result.model[0].out_channels == 4
    else:
        assert result.model[0].out_channels == 6
        assert "grouped convolution" in result.left["0"]
    assert_same(result, model, x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 6), nn.Linear(6, 6)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(self.encode(x).relu())


def test_tied_weights_stay_tied():
    torch.manual_seed(0)
    model = Tied()
    clear(model.encode, [0, 1])
    result = shrink(model, torch.randn(4, 6))
    assert result.model.encode.weight is result.model.decode.weight
    assert "tied" in result.left["encode"]
    assert_same(result, model, torch.randn(4, 6))


def test_layer_that_is_all_dead_keeps_one_channel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))
    clear(model[0], list(range(6)))
    result = shrink(model, torch.randn(5, 4))
    assert result.model[0].out_features == 1
    assert_same(result, model, torch.randn(5, 4))


def test_outputs_and_normalized_channels_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    clear(model[0], [0])
    clear(model[2], [1])
    result = shrink(model, torch.randn(5, 4))
    assert "LayerNorm" in result.left["0"]
    assert "output" in result.left["2"]
    assert result.parameters_after == result.parameters_before
    assert_same(result, model, torch.randn(5, 4))


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(x) + x)


def test_what_is_constant_by_chance_in_the_example_is_not_taken_for_constant():
    torch.manual_seed(0)
    model = Sum()
    clear(model.layer, [0, 1])
    result = shrink(model, torch.zeros(4, 6))
    assert result.model.layer.out_features == 6
    assert_same(result, model, torch.randn(4, 6))


def test_input_features_without_weights_are_no_longer_read():
    torch.manual_seed(0)
    model = zoo.SupervisedAutoencoder(in_features=30)
    with torch.no_grad():
        model.encoder[0].weight[:, 5:25] = 0.0
    x = torch.randn(4, 30)
    result = shrink(model, x)
    assert result.features.tolist() == [*range(5), *range(25, 30)]
    assert result.features_before == 30
    assert isinstance(result.model.encoder[0], SelectedFeatures)
    assert result.model.encoder[0].in_features == 10
    assert_same(result, model, x)


class Called(nn.Module):
    """Two layers, called in the way of a function."""

    def __init__(self, call, reader=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.reader = nn.Linear(4, 6), nn.Linear(6, 3) if reader is None else reader
        self.call = call
        clear(self.first, [0, 1])

    def forward(self, x):
        return self.call(self, x)


def into_the_input(model, x):
    return model.reader(model.first(x.mul_(2.0)).relu())


def twice(model, x):
    return model.reader(model.first(x).relu()) + model.reader(model.first(x).relu() + 1.0)


@pytest.mark.parametrize(
    "call",
    [lambda m, x: m.reader(input=m.first(input=x).relu()), into_the_input],
    ids=["named arguments", "writes into its input"],
)
def test_layers_may_be_called_in_any_way(call):
    model, x = Called(call), torch.randn(5, 4)
    before = x.clone()
    result = shrink(model, x)
    assert torch.equal(x, before)
    assert result.model.first.out_features == result.model.reader.in_features == 4
    with torch.no_grad():
        torch.testing.assert_close(result.model(x.clone()), model(x.clone()))


@pytest.mark.parametrize(
    ("model", "shape", "why"),
    [
        (Called(twice), (5, 4), "`reader`, which reads it, is called more than once, or not as a module"),
        (Called(lambda m, x: m.reader(m.first(x).relu())[0], nn.GRU(6, 3, batch_first=True)), (5, 7, 4), "followed"),
        (Called(lambda m, x: m.reader(m.first(x).relu()), weight_norm(nn.Linear(6, 3))), (5, 4), "other parameters"),
        (Called(lambda m, x: m.reader(m.first(x).relu().view(-1, 6))), (5, 4), "does not run without them"),
        (Called(lambda m, x: (m.reader(h := m.first(x).relu()), h)), (5, 4), "changes the shape of an output"),
        (Called(lambda m, x: m.reader(nn.functional.linear(x, m.first.weight))), (5, 4), "not called as a module"),
        (Called(lambda m, x: m.reader(m.first(x).softmax(-1))), (5, 4), "its constant is not the same everywhere"),
    ],
    ids=["twice", "recurrent", "parametrized", "sizes in the code", "two outputs", "weight alone", "softmax"],
)
def test_what_can_not_go_stays_with_its_reason(model, shape, why):
    x = torch.randn(shape)
    result = shrink(model, x)
    assert why in result.left["first"]
    assert result.parameters_after == result.parameters_before
    assert_same(result, model, x)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_modules_shrink_as_what_was_compiled(whole):
    plain = Called(lambda m, x: m.reader(m.first(x).relu()))
    if whole:
        model = torch.compile(plain, backend="eager")
    else:
        model = nn.Sequential(torch.compile(plain, backend="eager"), nn.Identity())
    model.eval()
    plain.reader.requires_grad_(False)
    x = torch.randn(5, 4)
    result = shrink(model, x)
    name = "first" if whole else "0.first"
    assert result.kept[name].tolist() == [2, 3, 4, 5]
    assert not any("_orig_mod" in n for n, _ in result.model.named_parameters())
    trained = [n for n, p in result.model.named_parameters() if p.requires_grad]
    assert trained == [f"{name}.weight", f"{name}.bias"]
    assert not result.model.training
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), plain(x))


@pytest.mark.parametrize(("dtype", "loose"), [(torch.float64, 1e-12), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_outputs_are_compared_as_closely_as_the_type_of_numbers_bears(dtype, loose):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Sigmoid(), nn.Linear(64, 3)).to(dtype)
    clear(model[0], list(range(30)))
    x = torch.randn(5, 8).to(dtype)
    result = shrink(model, x)
    assert result.model[0].out_features == 34
    assert 0.0 < result.largest_difference <= loose
    assert next(result.model.parameters()).dtype == dtype
    strict = shrink(model, x, tolerance=1e-300)
    assert "removing them changes the outputs by" in strict.left["0"]
    assert strict.parameters_after == strict.parameters_before


@pytest.mark.parametrize(
    "between", [nn.PReLU(6), nn.InstanceNorm2d(6, affine=True), nn.BatchNorm2d(6)], ids=lambda m: type(m).__name__
)
def test_layers_that_treat_each_channel_by_itself_follow(between):
    torch.manual_seed(0)
    for parameter in between.parameters():
        nn.init.normal_(parameter)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), between, nn.Conv2d(6, 3, 1))
    clear(model[0], [0, 3])
    x = torch.randn(2, 2, 8, 8)
    result = shrink(model.eval(), x)
    assert result.model[0].out_channels == result.model[2].in_channels == 4
    assert all(len(p) == 4 for p in result.model[1].parameters())
    assert_same(result, model, x)


def test_attention_keeps_its_heads_and_its_block_loses_hidden_units():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    clear(model.linear1, [0, 3, 5])
    clear(model.self_attn.out_proj, [1])
    x = torch.randn(3, 6, 8)
    result = shrink(model, x)
    assert result.model.linear1.out_features == result.model.linear2.in_features == 13
    assert "not called as a module" in result.left["self_attn.out_proj"]
    assert_same(result, model, x)


def test_shrunk_model_trains_on_with_an_optimizer_of_its_own():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(5, 4)
    old = torch.optim.Adam(model.parameters())
    model(x).square().sum().backward()
    old.step()
    clear(model[0], [0, 1])
    before = [p.clone() for p in model.parameters()]
    result = shrink(model, x)
    assert all(p.grad is None for p in result.model.parameters())
    assert not {id(p) for p in result.model.parameters()} & {id(p) for p in model.parameters()}
    new = torch.optim.Adam(result.model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        new.zero_grad()
        loss = result.model(x).square().sum()
        loss.backward()
        new.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    moments = {p.shape: new.state[p]["exp_avg"].shape for p in result.model.parameters()}
    assert all(shape == moment for shape, moment in moments.items())


def test_original_is_untouched_and_flags_are_kept():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 3))
    model[2].weight.requires_grad_(False)
    model[1].eval()
    clear(model[0], [0, 1])
    before = {n: p.clone() for n, p in model.state_dict().items()}
    result = shrink(model, torch.randn(5, 4))
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert result.model[0].out_features == 4
    assert result.model.training
    assert not result.model[1].training
    assert not result.model[2].weight.requires_grad
    assert result.model[0].weight.requires_grad


def test_model_without_zeros_stays_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    result = shrink(model, torch.randn(5, 4))
    assert result.parameters_after == result.parameters_before
    assert result.left == {}
    assert result.features is None


def test_invalid_tolerance_and_a_missing_library_are_errors(monkeypatch):
    model, x = nn.Linear(2, 2), torch.randn(1, 2)
    with pytest.raises(ValueError, match="`tolerance` must be > 0"):
        shrink(model, x, tolerance=0.0)
    with pytest.raises(ValueError, match="`example_inputs` must hold at least one sample"):
        shrink(model, x[:0])
    real = builtins.__import__

    def without_pruning(name, *args, **kwargs):
        if name == "torch_pruning":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pruning)
    with pytest.raises(ImportError, match=r"pip install 'lightning-accel\[shrink\]'"):
        shrink(model, x)
