"""Which layers are replaced, by what, and how they come back."""

import copy

import pytest
import torch
from torch import nn

from lightning_accel.low_rank import (
    LowRankLinear,
    RankPlan,
    TuckerConv,
    decompose,
    eligible_layers,
    factorize,
    low_rank_layers,
    make_plan,
    merge,
)
from lightning_accel.low_rank.calls import input_second_moments
from lightning_accel.low_rank.decompose import swap


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def fixed(model, ratio=1.5):
    return make_plan(model, None, ratio=ratio, method="fixed")


class OwnLinear(nn.Linear):
    pass


def tied():
    model = nn.ModuleDict({"embedding": nn.Embedding(16, 8), "out": nn.Linear(8, 16)})
    model["out"].weight = model["embedding"].weight
    return model


def shared():
    layer = nn.Linear(8, 8)
    return nn.ModuleDict({"a": layer, "b": layer})


def weight_normed():
    return nn.ModuleDict({"x": torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))})


def with_plain_tensor_weight():
    layer = nn.Linear(8, 8)
    del layer.weight
    layer.weight = torch.zeros(8, 8)
    return nn.ModuleDict({"x": layer})


def with_integer_weight():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    return nn.ModuleDict({"x": layer})


SKIPPED = {
    "tied": (tied, "out", "tied"),
    "shared": (shared, "a", "shared"),
    "parametrized": (weight_normed, "x", "parametrized"),
    "computed weight": (with_plain_tensor_weight, "x", "parametrized"),
    "integers": (with_integer_weight, "x", "int8"),
    "lazy": (lambda: nn.ModuleDict({"x": nn.LazyLinear(8)}), "x", "lazy"),
    "grouped": (lambda: nn.ModuleDict({"x": nn.Conv2d(8, 8, 3, groups=2)}), "x", "grouped"),
    "transposed": (lambda: nn.ModuleDict({"x": nn.ConvTranspose2d(8, 8, 3)}), "x", "ConvTranspose2d"),
    "3-D": (lambda: nn.ModuleDict({"x": nn.Conv3d(8, 8, 3)}), "x", "Conv3d"),
    "subclass": (lambda: nn.ModuleDict({"x": OwnLinear(8, 8)}), "x", "OwnLinear"),
    "attention": (lambda: nn.ModuleDict({"x": nn.MultiheadAttention(8, 2)}), "x.out_proj", "fast path"),
    "encoder 1": (lambda: nn.ModuleDict({"x": nn.TransformerEncoderLayer(8, 2)}), "x.linear1", "fast path"),
    "encoder 2": (lambda: nn.ModuleDict({"x": nn.TransformerEncoderLayer(8, 2)}), "x.linear2", "fast path"),
    "meta": (lambda: nn.ModuleDict({"x": nn.Linear(8, 8, device="meta")}), "x", "meta"),
    "root": (lambda: nn.Linear(8, 8), "", "no parent"),
    "low rank": (lambda: nn.ModuleDict({"x": LowRankLinear(8, 8, 2)}), "x", "already low rank"),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_what_can_not_be_factored_is_skipped_with_a_reason(case):
    make, name, reason = SKIPPED[case]
    eligible, skipped = eligible_layers(make())
    assert not eligible
    assert reason in skipped[name]


def test_skipped_layers_stand_in_the_plan_and_stay_as_they_are(net):
    net.attention = nn.TransformerEncoderLayer(8, 2, dim_feedforward=64, batch_first=True)
    before = {name: id(module) for name, module in net.attention.named_modules()}
    plan = fixed(net)
    reasons = {layer.name: layer.reason for layer in plan.layers if layer.decision == "skipped"}
    assert {"attention.linear1", "attention.linear2", "attention.self_attn.out_proj"} <= set(reasons)
    decompose(net, plan)
    assert {name: id(module) for name, module in net.attention.named_modules()} == before


def test_include_and_exclude_are_patterns_of_names(net):
    eligible, skipped = eligible_layers(net, include=("head.*",), exclude=("*.2",))
    assert set(eligible) == {"head.0"}
    assert skipped == {"conv": "not matched by `include`", "head.2": "matched by `exclude`"}


def test_decompose_replaces_in_place_and_keeps_the_rest(net):
    biases = {name: p for name, p in net.named_parameters() if name.endswith("bias")}
    net.head.eval()
    names = decompose(net, fixed(net))
    assert names == ["conv", "head.0", "head.2"]
    assert isinstance(net.conv, TuckerConv)
    assert isinstance(net.head[0], LowRankLinear)
    assert not net.head[0].training
    assert all(dict(net.named_parameters())[name] is bias for name, bias in biases.items())


def test_second_call_changes_nothing(net):
    plan = fixed(net)
    decompose(net, plan)
    before = dict(net.named_modules())
    assert decompose(net, plan) == []
    with pytest.raises(ValueError, match="can be factored; found"):
        fixed(net)
    assert dict(net.named_modules()) == before


def test_merge_gives_the_plain_model_back(net):
    plain = copy.deepcopy(net)
    x = torch.randn(2, 3, 8, 8)
    decompose(net, fixed(net))
    net.eval()
    expected = net(x)
    assert merge(net, ["head.0"]) == ["head.0"]
    assert merge(net) == ["conv", "head.2"]
    plain.load_state_dict(net.state_dict(), strict=True)
    assert not low_rank_layers(net)
    torch.testing.assert_close(plain.eval()(x), expected)


def test_merging_an_unknown_layer_is_refused_before_anything_changes(net):
    decompose(net, fixed(net))
    with pytest.raises(ValueError, match=r"`norm` is no low-rank layer"):
        merge(net, ["conv", "norm"])
    assert set(low_rank_layers(net)) == {"conv", "head.0", "head.2"}


def test_a_plan_of_another_model_is_refused_and_nothing_changes(net):
    other = Net()
    other.head[2] = nn.Linear(32, 5)
    modules = dict(net.named_modules())
    with pytest.raises(ValueError, match=r"layer `head.2` has shape \(4, 32\), the plan was made for \(5, 32\)"):
        decompose(net, fixed(other))
    other.tail = nn.Linear(16, 16)
    with pytest.raises(ValueError, match=r"layer `tail` of the plan can not be factored \(no such"):
        decompose(net, RankPlan(fixed(other).layers[-1:], "fixed", "ratio", 2.0))
    assert dict(net.named_modules()) == modules


def test_nan_weights_leave_the_model_untouched(net):
    plan = fixed(net)
    with torch.no_grad():
        net.head[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        decompose(net, plan)
    assert not low_rank_layers(net)
    with pytest.raises(ValueError, match="NaN or infinite"):
        fixed(net)


def test_weighted_plan_needs_second_moments(net):
    def run(model):
        return model(torch.randn(4, 3, 8, 8))

    plan = make_plan(net, run, ratio=1.5, method="fixed", weighting="activation")
    with pytest.raises(ValueError, match="`second_moments` lacks `conv`"):
        decompose(copy.deepcopy(net), plan)
    moments = input_second_moments(net, eligible_layers(net)[0], run)
    assert decompose(net, plan, second_moments=moments) == ["conv", "head.0", "head.2"]


def test_second_moments_are_those_of_the_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 5, 3), nn.Flatten(), nn.Linear(20, 2))
    x = torch.randn(4, 3, 6)
    moments = input_second_moments(model, {"0": model[0], "2": model[2]}, lambda m: m(x))
    rows = x.transpose(1, 2).reshape(-1, 3).double()
    torch.testing.assert_close(moments["0"], rows.T @ rows / 24)
    hidden = model[0](x).flatten(1).double()
    torch.testing.assert_close(moments["2"], (hidden.T @ hidden / 4).detach())
    alone = input_second_moments(model[0], {"": model[0]}, lambda m: [m(sample) for sample in x])
    torch.testing.assert_close(alone[""], moments["0"])


def _errors(rows, decades):
    """Output errors, over that of an unweighted decomposition, of one weighted by the mean of few inputs and shrunk."""
    random = torch.Generator().manual_seed(rows)
    scales, turn = 10.0 ** torch.linspace(0, -decades, 64), torch.linalg.qr(torch.randn(64, 64, generator=random)).Q

    def inputs(count):
        return torch.randn(count, 64, generator=random) * scales @ turn.T

    layer, seen, unseen = nn.Linear(64, 48, bias=False).requires_grad_(False), inputs(rows), inputs(2000)
    nn.init.normal_(layer.weight, generator=random)
    layer.weight *= 10.0 ** torch.linspace(0, -1, 48)[:, None]

    def error(moment):
        return float((factorize(layer, (16,), second_moment=moment)(unseen) - layer(unseen)).square().sum())

    def moment(*, shrink):
        return input_second_moments(layer, {"": layer}, lambda m: m(seen), shrink=shrink)[""]

    return error(moment(shrink=False)) / error(None), error(moment(shrink=True)) / error(None)


@pytest.mark.parametrize("rows", [1, 2, 8, 24, 40])
@pytest.mark.parametrize("decades", [0.5, 1.0, 2.0])
def test_a_few_inputs_do_not_make_a_layer_forget_the_others(rows, decades):
    assert _errors(rows, decades)[1] < 1.001


def test_shrinking_mends_what_few_inputs_spoil_and_keeps_what_many_show():
    raw, shrunk = _errors(24, 0.5)
    assert raw > 1.5
    assert shrunk < 1.0
    raw, shrunk = _errors(200, 2.0)
    assert shrunk < 1.05 * raw < 0.25


def test_inputs_of_zeros_or_of_one_channel_are_not_shrunk():
    for layer, x in ((nn.Linear(3, 2), torch.zeros(4, 3)), (nn.Linear(1, 2), torch.ones(4, 1))):
        moments = input_second_moments(layer, {"": layer}, lambda m, x=x: m(x), shrink=True)
        torch.testing.assert_close(moments[""], x.T.double() @ x.double() / 4)


def test_user_hooks_move_to_the_new_layer(net):
    seen = []
    net.head[0].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    net.head[0].register_forward_pre_hook(lambda module, args, kwargs: seen.append(len(kwargs)), with_kwargs=True)
    old = swap(net, "head.0", factorize(net.head[0], (4,)))
    net(torch.randn(2, 3, 8, 8))
    assert seen == [0, LowRankLinear]
    assert type(old) is nn.Linear
