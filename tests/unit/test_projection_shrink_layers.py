"""`shrink` keeps flags, names and hooks, and leaves alone, with the reason, what it can not follow."""

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal

from lightning_accel.projection.shrink import shrink
from lightning_accel.projection.shrink.features import SelectedFeatures


def clear(layer, rows, *, bias=True):
    with torch.no_grad():
        layer.weight[rows] = 0.0
        if bias and layer.bias is not None:
            layer.bias[rows] = 0.0


def assert_same(result, model, *inputs):
    model.eval()
    result.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(result.model(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


class Encoder(nn.Module):
    """Has children called as attributes of other classes are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.module, self.head = nn.Sequential(nn.Linear(16, 8), nn.Dropout(), nn.ReLU()), nn.Linear(8, 4)

    def forward(self, x):
        for layer in self.layer:
            x = torch.relu(layer(x))
        return self.head(self.module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flags_names_modes_hooks_types_and_attributes_stay(dtype):
    model = nn.Sequential(Encoder()).to(dtype)
    encoder, seen = model[0], []
    encoder.layer.requires_grad_(False)
    encoder.head.bias.requires_grad_(False)
    encoder.module[1].eval()
    encoder.layer[1].weight.no_decay = True
    encoder.layer[1].register_forward_hook(lambda module, args, out: seen.append(out.shape[-1]))
    clear(encoder.layer[1], range(8))
    clear(encoder.module[0], [0, 3])
    with torch.no_grad():
        encoder.layer[0].weight[:, [2, 5]] = 0.0
    result = shrink(model, torch.randn(3, 16, dtype=dtype))
    small = result.model[0]
    assert (small.layer[1].out_features, small.module[0].out_features, small.layer[0].in_features) == (8, 6, 14)
    assert isinstance(small.layer[0], SelectedFeatures)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in result.model.named_parameters()} == flags
    assert {n: m.training for n, m in result.model.named_modules()} == {n: m.training for n, m in model.named_modules()}
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert small.layer[1].weight.no_decay
    seen.clear()
    result.model(torch.randn(3, 16, dtype=dtype))
    assert seen == [8]
    assert_same(result, model, torch.randn(5, 16, dtype=dtype))


def test_bias_made_of_folded_constants_is_as_frozen_as_its_layer():
    torch.manual_seed(0)
    for frozen in (True, False):
        model = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 3, bias=False))
        model[2].requires_grad_(not frozen)
        clear(model[0], [0, 1], bias=False)
        small = shrink(model, torch.randn(5, 4)).model
        assert small[2].bias.requires_grad is not frozen


class Gated(nn.Module):
    def __init__(self, gate, hidden=12, rows=24):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.gate = nn.Linear(8, rows), nn.Linear(hidden, 4), gate
        clear(self.up, range(0, rows, 3))

    def forward(self, x):
        return self.down(self.gate(self.up(x)))


def of_attention(h):
    q, k, v = h.unflatten(-1, (3, 2, 4)).unbind(-3)
    return F.scaled_dot_product_attention(q, k, v).flatten(-2)


def of_parts(join):
    return lambda h: join(*h.chunk(2, -1))


GATES = {
    "GLU": F.glu,
    "chunk": of_parts(lambda a, b: a * b.sigmoid()),
    "swapped": of_parts(lambda a, b: F.gelu(b) * a),
    "sum of parts": of_parts(torch.add),
    "split": lambda h: torch.mul(*h.split(12, -1)),
    "tensor_split": lambda h: torch.mul(*h.tensor_split(2, -1)),
    "slices": lambda h: h[..., :12] * h[..., 12:],
    "every other": lambda h: h[..., ::2] * h[..., 1::2],
    "unflatten": lambda h: h.unflatten(-1, (2, 12)).prod(-2),
    "view": lambda h: h.view(*h.shape[:-1], 12, 2).amax(-1),
    "reshape": lambda h: h.reshape(len(h), -1, 12).sum(1),
    "maxout": lambda h: h.unflatten(-1, (12, -1)).amax(-1),
    "index": lambda h: h[..., torch.arange(12)],
    "gather": lambda h: h.index_select(-1, torch.arange(23, 11, -1)),
    "pooling": lambda h: F.avg_pool1d(h.unsqueeze(1), 2).squeeze(1),
    "first": lambda h: h.narrow(-1, 0, 12),
}


@pytest.mark.parametrize("name", GATES)
def test_channels_before_a_gate_go_right_or_stay_with_a_reason(name):
    model, x = Gated(GATES[name]), torch.randn(6, 8)
    result = shrink(model, x)
    if result.model.up.out_features == 24:
        assert result.left["up"]
    assert_same(result, model, 3 * torch.randn(5, 8) + 1)


def test_fused_attention_stays_with_a_reason():
    model = Gated(of_attention, hidden=8)
    result = shrink(model, torch.randn(2, 6, 8))
    assert result.left["up"]
    assert_same(result, model, torch.randn(3, 5, 8))


def test_zero_gate_of_a_live_value_stays_and_says_who_writes_the_same_channel():
    class SwiGLU(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 4)

        def forward(self, x):
            return self.down(F.silu(self.gate(x)) * self.up(x))

    model, x = SwiGLU(), torch.randn(6, 8)
    clear(model.gate, [0, 1, 2])
    clear(model.up, [2, 3])
    result = shrink(model, x)
    assert result.kept["gate"].tolist() == result.kept["up"].tolist() == [0, 1, *range(3, 12)]
    assert "`up` writes the same channels and is not zero there" in result.left["gate"]
    assert_same(result, model, torch.randn(5, 8))


def images(*body):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), *body)
    clear(model[0], [0, 1, 4])
    return model


IMAGES = {
    "GroupNorm": lambda: images(nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 1)),
    "PixelShuffle": lambda: images(nn.PixelShuffle(2), nn.Conv2d(2, 3, 1)),
    "ChannelShuffle": lambda: images(nn.ChannelShuffle(2), nn.Conv2d(8, 3, 1)),
    "transposed convolution": lambda: images(nn.ConvTranspose2d(8, 6, 2), nn.ReLU(), nn.Conv2d(6, 3, 1)),
    "grouped convolution": lambda: images(nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 3, 1)),
    "multiplied channels": lambda: images(nn.Conv2d(8, 16, 3, groups=8), nn.ReLU(), nn.Conv2d(16, 3, 1)),
    "local response": lambda: images(nn.LocalResponseNorm(3), nn.Conv2d(8, 3, 1)),
    "Unfold": lambda: images(nn.Unfold(2), nn.Conv1d(32, 3, 1)),
    "Flatten of all": lambda: images(nn.Flatten(), nn.Linear(8 * 36, 3)),
    "Flatten of places": lambda: images(nn.Flatten(2), nn.Linear(36, 3), nn.Flatten(), nn.Linear(24, 2)),
    "Softmax2d": lambda: images(nn.Softmax2d(), nn.Conv2d(8, 3, 1)),
    "attention by squeezing": lambda: images(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Unflatten(1, (2, 4))),
}


@pytest.mark.parametrize("name", IMAGES)
def test_channels_of_images_go_right_or_stay_with_a_reason(name):
    model = IMAGES[name]()
    result = shrink(model, torch.randn(2, 2, 6, 6))
    if result.model[0].out_channels == 8:
        assert result.left["0"]
    assert_same(result, model, torch.randn(3, 2, 6, 6))


def test_convolutions_of_one_image_without_a_batch_shrink():
    model = images(nn.Conv2d(8, 3, 1))
    clear(model[0], [0, 1, 4], bias=False)
    with torch.no_grad():
        model[0].bias[[0, 1]] = torch.tensor([0.5, 1.0])
    result = shrink(model, torch.randn(2, 6, 6))
    assert result.model[0].out_channels == 5
    assert_same(result, model, torch.randn(2, 6, 6))


class Branches(nn.Module):
    """A layer for another use of the module, which ``forward`` does not call."""

    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.aux = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(width, 2)
        clear(self.a, [0, 1])

    def forward(self, x):
        return self.b(self.a(x).relu())


@pytest.mark.parametrize(("width", "kept"), [(6, 6), (5, 4)])
def test_channels_that_a_layer_off_the_path_may_read_stay(width, kept):
    model = Branches(width)
    result = shrink(model, torch.randn(5, 4))
    assert result.model.a.out_features == kept
    assert ("`aux`, which the example does not call" in result.left.get("a", "")) is (width == 6)
    result.model.aux(torch.randn(2, width))


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * torch.linspace(1.0, 2.0, 6)


class WithScale(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(sizes[1]))


def strange_layers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.utils.weight_norm(nn.Linear(6, 6))
    pruned = nn.Linear(6, 6)
    prune.ln_structured(pruned, "weight", amount=0.3, n=2, dim=0)
    instance = nn.Linear(6, 6)
    instance.forward = lambda x: F.linear(x, instance.weight) + torch.linspace(1.0, 2.0, 6)
    return {
        "own forward": (OwnForward(6, 6), "forward of its own"),
        "parameter beside": (WithScale(6, 6), "holds `scale` beside"),
        "old weight norm": (old, "computes its weight"),
        "pruned": (pruned, "computes its weight"),
        "orthogonal": (orthogonal(nn.Linear(6, 6)), "computes its weight"),
        "instance": (instance, "forward of its own"),
    }


@pytest.mark.parametrize(
    "name", ["own forward", "parameter beside", "old weight norm", "pruned", "orthogonal", "instance"]
)
def test_layer_that_is_more_than_a_layer_stays_and_others_go(name):
    torch.manual_seed(0)
    layer, why = strange_layers()[name]
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), layer, nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    clear(model[0], [0, 1])
    clear(model[4], [0, 1])
    result = shrink(model, torch.randn(5, 4))
    assert why in result.left["0"]
    assert result.model[0].out_features == 6
    assert result.model[4].out_features == 6
    assert_same(result, model, torch.randn(5, 4))


class Untraceable(nn.Module):
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.how = nn.Linear(4, 6), nn.Linear(6, 3), how
        clear(self.a, [0, 1])

    def forward(self, x):
        return self.how(self, x)


@torch.no_grad()
def without_gradients(model, x):
    return model.b(model.a(x).relu())


WAYS = {
    "no_grad": without_gradients,
    "integers": lambda m, x: m.b(m.a(x).relu()).argmax(-1),
    "numpy": lambda m, x: torch.as_tensor(m.b(m.a(x).relu()).detach().numpy()),
    "detached": lambda m, x: m.b(m.a(x).relu().detach()),
    "weights alone": lambda m, x: F.linear(F.linear(x, m.a.weight, m.a.bias).relu(), m.b.weight),
    "also a weight": lambda m, x: m.b(m.a(x).relu()) + m.a.weight.sum(1).view(2, 3).sum(0),
    "force": lambda m, x: torch.autograd.grad(m.b(m.a(p := x.detach().requires_grad_()).tanh()).sum(), p)[0],
}


@pytest.mark.parametrize("name", WAYS)
def test_model_that_can_not_be_followed_is_left_alone_layer_by_layer(name):
    model = Untraceable(WAYS[name])
    result = shrink(model, torch.randn(5, 4))
    assert result.left["a"]
    assert result.model.a.out_features == 6
    model.eval()
    x = torch.randn(5, 4)
    torch.testing.assert_close(result.model.eval()(x), model(x))


def test_layer_of_two_names_selects_features_for_both():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 2)
            self.again, self.listed = self.a, [self.a]
            with torch.no_grad():
                self.a.weight[:, [0, 3]] = 0.0

        def forward(self, x):
            return self.b(self.again(x))

    model = Two()
    result = shrink(model, torch.randn(5, 6))
    assert result.features.tolist() == [1, 2, 4, 5]
    assert result.model.again is result.model.a
    assert list(result.model.state_dict()) == [*model.state_dict(), "a.index", "again.index"] or set(
        model.state_dict()
    ) < set(result.model.state_dict())
    assert_same(result, model, torch.randn(5, 6))


def test_features_stay_where_the_weight_is_read_elsewhere_too():
    class Elsewhere(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 6)
            with torch.no_grad():
                self.a.weight[:, [0, 3]] = 0.0

        def forward(self, x):
            return self.b(self.a(x)) + F.linear(self.a(x), self.a.weight.t())

    model = Elsewhere()
    result = shrink(model, torch.randn(5, 6))
    assert result.features is None
    assert_same(result, model, torch.randn(5, 6))


def test_lazy_layers_are_refused_by_name_of_what_to_do():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="lazy layers that have no weights yet: call it once"):
        shrink(model, torch.randn(2, 3))


class Locked(nn.Module):
    """Holds what can not be copied, and state that was computed in an earlier call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.lock, self.last = nn.Linear(4, 6), nn.Linear(6, 3), threading.Lock(), None
        clear(self.a, [0, 1])

    def forward(self, x):
        with self.lock:
            self.last = self.b(self.a(x).relu())
        return self.last


def test_modules_that_hold_locks_and_graphs_are_copied_without():
    model = Locked()
    model(torch.randn(2, 4))
    last = model.last
    result = shrink(model, torch.randn(5, 4))
    assert result.model.a.out_features == 4
    assert model.last is last
    assert_same(result, model, torch.randn(5, 4))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:Initializing zero-element:UserWarning")
def test_scripted_complex_and_empty_layers_stay_and_others_go():
    torch.manual_seed(0)
    scripted = torch.jit.script(nn.Linear(6, 6))
    model = nn.Sequential(nn.Linear(4, 6), scripted, nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    clear(model[0], [0, 1])
    clear(model[2], [0, 1])
    result = shrink(model, torch.randn(5, 4))
    assert result.left["0"]
    assert result.model[2].out_features == 6
    assert_same(result, model, torch.randn(5, 4))
    whole = torch.jit.script(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)))
    assert_same(shrink(whole, torch.randn(5, 4)), whole, torch.randn(5, 4))
    of_complex = nn.Sequential(nn.Linear(4, 6, dtype=torch.cfloat), nn.Linear(6, 3, dtype=torch.cfloat))
    clear(of_complex[0], [0, 1])
    x = torch.randn(5, 4, dtype=torch.cfloat)
    result = shrink(of_complex, x)
    assert result.left.get("0") or result.model[0].out_features == 4
    assert_same(result, of_complex, x)
    empty = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3), nn.ReLU(), nn.Linear(3, 2))
    clear(empty[1], [0])
    assert_same(shrink(empty, torch.randn(5, 4)), empty, torch.randn(5, 4))
