"""The `weight` of a factored layer: read as any, written into with effect."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from lightning_accel.low_rank import decompose, factorize, low_rank_layers, make_plan
from lightning_accel.low_rank.decompose import swap
from lightning_accel.low_rank.factors.layers import LOW_RANK_TYPES
from lightning_accel.low_rank.in_place import become
from lightning_accel.torch_private import storage_users

LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (4,), (3, 12)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, padding=1), (4,), (2, 6, 5, 5)),
    "tucker": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding_mode="reflect", padding=1), (3, 4), (2, 6, 5, 5)),
    "conv 1-D": (lambda: nn.Conv1d(6, 8, 3), (4,), (2, 6, 9)),
}


@pytest.fixture(params=LAYERS)
def case(request):
    make, ranks, shape = LAYERS[request.param]
    torch.manual_seed(0)
    dense = make()
    return dense, factorize(dense, ranks), torch.randn(shape)


def equals_dense(layer, weight, x):
    """Say whether the layer computes what the dense layer with this weight computes."""
    other = copy.deepcopy(layer)
    other.weight = nn.Parameter(weight)
    return torch.allclose(layer(x), other(x), atol=1e-7)


def test_two_reads_share_their_memory_until_nobody_holds_it(case):
    _, layer, _ = case
    first, second = layer.weight, layer.weight
    assert first.data_ptr() == second.data_ptr()
    assert storage_users(first) >= 3, "the layer's own, too"
    del first, second
    layer.settle()
    assert layer._handed_out is None


def test_gradients_of_every_read_reach_the_factors(case):
    _, layer, _ = case
    first, second = layer.weight, layer.weight
    (first.square().sum() + second.sum()).backward()
    grads = [getattr(layer, name).grad.clone() for name in layer.factor_names]
    layer.zero_grad()
    product = layer.product({name: getattr(layer, name) for name in layer.factor_names})
    (product.square().sum() + product.sum()).backward()
    for grad, name in zip(grads, layer.factor_names, strict=True):
        torch.testing.assert_close(grad, getattr(layer, name).grad)


@pytest.mark.filterwarnings("ignore:the `weight` of the low-rank layer")
@pytest.mark.parametrize("use", ["call", "read", "save", "copy", "pickle", "cast"])
def test_what_is_written_is_what_the_layer_is_however_it_is_used_next(case, use):
    _, layer, x = case
    value = torch.randn_like(layer.weight)
    with torch.no_grad():
        layer.weight.copy_(value)
    if use == "call":
        layer(x)
    elif use == "save":
        assert torch.equal(layer.state_dict()["weight"], value)
    elif use == "copy":
        layer = copy.deepcopy(layer)
    elif use == "pickle":
        layer = pickle.loads(pickle.dumps(layer))
    elif use == "cast":
        layer, x, value = layer.double(), x.double(), value.double()
    assert torch.equal(layer.weight, value)
    assert isinstance(layer.weight, nn.Parameter)
    assert type(layer) in (nn.Linear, nn.Conv1d, nn.Conv2d)
    assert equals_dense(layer, value, x)


@pytest.mark.filterwarnings("ignore:the `weight` of the low-rank layer")
def test_a_write_counts_although_the_factors_moved_on(case):
    _, layer, x = case
    before = layer.weight.detach().clone()
    held = layer.weight.data
    with torch.no_grad():
        layer.factor_in.mul_(1.5)
    held.add_(1.0)
    layer(x)
    torch.testing.assert_close(layer.weight.detach(), 1.5 * before + 1.0)


@pytest.mark.filterwarnings("ignore:the `weight` of the low-rank layer")
@pytest.mark.parametrize("written_inside", [True, False])
def test_a_write_counts_in_inference_mode_and_what_was_written_can_be_trained(case, written_inside):
    _, layer, x = case
    with torch.inference_mode(written_inside), torch.no_grad():
        layer.weight.fill_(0.5)
    with torch.inference_mode():
        layer(x)
    assert bool((layer.weight == 0.5).all())
    layer(x).square().sum().backward()
    assert bool(layer.weight.grad.any())


@pytest.mark.filterwarnings("ignore:the `weight` of the low-rank layer")
def test_weights_have_their_own_type_inside_autocast(case):
    _, layer, x = case
    outside = layer.weight
    layer(x).sum().backward()
    with pytest.warns(UserWarning, match="the gradient of the dense `weight`"):
        gradient = layer.weight.grad.clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, outside)
        assert torch.equal(layer.weight.grad, gradient)
        with torch.no_grad():
            layer.weight.clamp_(-0.1, 0.1)
        layer(x)
    assert isinstance(layer.weight, nn.Parameter)
    assert torch.equal(layer.weight, outside.clamp(-0.1, 0.1))


def test_a_reference_that_outlives_a_call_is_still_watched(case):
    _, layer, x = case
    held = layer.weight.data
    layer(x)
    held.zero_()
    with pytest.warns(UserWarning, match="was written into"):
        layer(x)
    assert not layer.weight.any()


def test_reading_changes_nothing_and_warns_of_nothing(case):
    _, layer, x = case
    y = layer(x)
    layer.weight.detach().numpy().sum()
    repr(layer.weight)
    assert torch.equal(layer(x), y)
    assert isinstance(layer, LOW_RANK_TYPES)


@pytest.mark.filterwarnings("ignore:the `weight` of the low-rank layer")
def test_new_data_of_a_weight_counts(case):
    _, layer, x = case
    value = torch.randn_like(layer.weight).detach()
    layer.weight.data = value
    assert torch.equal(layer.weight, value)
    assert equals_dense(layer, value, x)


@pytest.mark.filterwarnings("ignore:the `weight` of the low-rank layer")
def test_a_hook_that_makes_the_layer_dense_in_its_own_call_acts_in_that_call(case):
    dense, layer, x = case

    def constrain(module, _):
        with torch.no_grad():
            module.weight.clamp_(-0.05, 0.05)
            module.weight.mul_(0.5)

    with torch.no_grad():
        dense.weight.copy_(layer.weight.clamp(-0.05, 0.05).mul(0.5))
    layer.register_forward_pre_hook(constrain)
    torch.testing.assert_close(layer(x), dense(x))


def test_the_input_has_the_name_that_it_has_in_a_dense_layer(case):
    _, layer, x = case
    assert torch.equal(layer(input=x), layer(x))


def test_freezing_and_thawing_the_weight_freezes_and_thaws_the_factors(case):
    _, layer, x = case
    factors = [getattr(layer, name) for name in layer.factor_names]
    layer.weight.requires_grad = False
    assert not any(factor.requires_grad for factor in factors)
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    assert layer.weight.requires_grad_().requires_grad is False, "the same product, still outside of any graph"
    assert all(factor.requires_grad for factor in factors)
    layer(x).sum().backward()
    assert layer.weight.requires_grad
    assert all(bool(factor.grad.any()) for factor in factors)
    with torch.no_grad(), pytest.warns(UserWarning, match="was written into"):
        layer.weight.fill_(0.5).requires_grad_(False)
    assert not layer.weight.requires_grad


@pytest.mark.filterwarnings("ignore:the `weight` of the low-rank layer")
@pytest.mark.parametrize("write", [False, True])
def test_traced_layers_compute_what_the_layer_does(case, write):
    _, layer, x = case
    if write:
        with torch.no_grad():
            layer.weight.fill_(0.5)
    traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(2.0 * x), layer(2.0 * x))
    assert (type(layer) in LOW_RANK_TYPES) != write


def test_many_reads_keep_no_memory(case):
    _, layer, _ = case
    for _ in range(20):
        layer.weight.norm()
    assert len(layer._handed_out.given) <= 2


def test_a_parameter_can_be_assigned_and_a_tensor_not(case):
    dense, layer, x = case
    with pytest.raises(TypeError, match=r"`weight` must be a Parameter, got Tensor"):
        layer.weight = torch.zeros_like(dense.weight)
    layer.weight = nn.Parameter(dense.weight.detach().clone())
    assert torch.equal(layer(x), dense(x))


@pytest.mark.filterwarnings("ignore:the `weight` of the low-rank layer")
@pytest.mark.parametrize("initialize", [nn.init.xavier_uniform_, nn.init.zeros_, nn.init.orthogonal_, nn.init.dirac_])
def test_initializations_act(case, initialize):
    dense, layer, x = case
    if initialize is nn.init.dirac_ and isinstance(dense, nn.Linear):
        initialize = nn.init.eye_
    torch.manual_seed(3)
    initialize(dense.weight)
    torch.manual_seed(3)
    initialize(layer.weight)
    torch.testing.assert_close(layer(x), dense(x))


@pytest.mark.filterwarnings("ignore:the `weight` of the low-rank layer `0`")
def test_resetting_a_model_gives_the_new_values_of_the_dense_one(case):
    def reset(module):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    dense, layer, x = case
    model, plain = nn.Sequential(copy.deepcopy(dense)), nn.Sequential(dense)
    swap(model, "0", layer)
    for network in (model, plain):
        torch.manual_seed(3)
        network.apply(reset)
    assert torch.equal(model(x), plain(x))
    assert type(model[0]) is type(dense)


def test_factors_that_were_made_by_hand_are_reset_as_factors(case):
    _, layer, _ = case
    before = [p.detach().clone() for p in layer.parameters()]
    deviation = float(layer.weight.detach().std())
    layer.reset_parameters()
    assert isinstance(layer, LOW_RANK_TYPES)
    assert not any(torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True))
    assert 0.3 * deviation < float(layer.weight.detach().std()) < 3.0 * deviation


def test_all_parameters_can_be_written_as_a_vector(case):
    _, layer, x = case
    vector = nn.utils.parameters_to_vector(layer.parameters())
    y = layer(x)
    nn.utils.vector_to_parameters(2.0 * vector, layer.parameters())
    assert not torch.allclose(layer(x), y)
    nn.utils.vector_to_parameters(vector, layer.parameters())
    torch.testing.assert_close(layer(x), y)


class Adapted(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.a, self.b = nn.Parameter(torch.randn(2, 12)), nn.Parameter(torch.randn(8, 2))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T

    def merge(self, sign=1.0):
        self.base.weight.data += sign * (self.b.data @ self.a.data)


@pytest.mark.filterwarnings("ignore:the `weight` of the low-rank layer")
def test_an_adapter_merges_into_a_factored_layer_and_out_of_it():
    torch.manual_seed(0)
    model = Adapted(nn.Linear(12, 8))
    decompose(model, make_plan(model, None, ratio=1.5, method="fixed"))
    x = torch.randn(4, 12)
    base, wanted = model.base(x), model(x)
    model.merge()
    torch.testing.assert_close(model.base(x), wanted)
    model.merge(-1.0)
    torch.testing.assert_close(model.base(x), base)


def test_the_layer_stays_the_object_that_others_hold():
    model = nn.Sequential(nn.Linear(12, 8))
    held, other = model[0], nn.ModuleList([model[0]])
    seen = []
    handle = held.register_forward_hook(lambda *_: seen.append(1))
    held.tag, held.extra = "mine", nn.Linear(2, 2)
    held.register_buffer("scale", torch.ones(3))
    before = swap(model, "0", factorize(held, (4,)))
    assert model[0] is held is other[0]
    assert low_rank_layers(model) == {"0": held}
    assert held.place == "0"
    held(torch.randn(2, 12))
    handle.remove()
    held(torch.randn(2, 12))
    assert seen == [1]
    assert (held.tag, type(held.extra), held.scale.sum()) == ("mine", nn.Linear, 3.0)
    low = become(held, before)
    assert type(held) is nn.Linear
    assert held.weight is before.weight
    assert (held.tag, type(held.extra), held.scale.sum()) == ("mine", nn.Linear, 3.0)
    assert set(dict(held.named_parameters(recurse=False))) == {"weight", "bias"}
    assert type(low) in LOW_RANK_TYPES


@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("kind", ["linear", "conv", "1x1"])
@pytest.mark.parametrize("zero", ["all", "rows", "columns", "low rank"])
def test_no_direction_of_a_factored_layer_is_dead(kind, zero, rank):
    torch.manual_seed(0)
    dense = {"linear": nn.Linear(12, 8), "conv": nn.Conv2d(12, 8, 3), "1x1": nn.Conv1d(12, 8, 1)}[kind].double()
    with torch.no_grad():
        if zero == "all":
            dense.weight.zero_()
        elif zero == "rows":
            dense.weight[1:].zero_()
        elif zero == "columns":
            dense.weight[:, 1:].zero_()
        else:
            left, right = torch.randn(8, 2).double(), torch.randn(2, dense.weight[0].numel()).double()
            dense.weight.copy_((0.05 * left @ right).view_as(dense.weight))
    layer = factorize(dense, (rank,))
    torch.manual_seed(1)
    again = factorize(dense, (rank,))
    assert torch.equal(layer.factor_in, again.factor_in), "the same at every call"
    wanted = dense.weight.detach().flatten(1)
    kept = torch.linalg.matrix_rank(wanted)
    if rank >= int(kept):
        torch.testing.assert_close(layer.weight.detach().flatten(1), wanted)
    out, into = layer.factor_out.detach().flatten(1), layer.factor_in.detach().flatten(1)
    assert bool(((out.norm(dim=0) > 1e-3) | (into.norm(dim=1) > 1e-3)).all())
    x = torch.randn({"linear": (16, 12), "conv": (16, 12, 3, 3), "1x1": (16, 12, 4)}[kind]).double()
    target = torch.randn_like(layer(x))
    for _ in range(60):
        layer.zero_grad()
        (layer(x) - target).square().mean().backward()
        with torch.no_grad():
            for p in layer.parameters():
                p -= 0.05 * p.grad
    alive = torch.linalg.matrix_rank(layer.weight.detach().flatten(1), tol=1e-7)
    assert int(alive) == min(rank, 8)


def test_all_zero_weights_are_no_basis_for_a_plan():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    nn.init.zeros_(model[1].weight)
    plan = make_plan(model, None, ratio=2.0, method="fixed")
    assert plan.layers[0].ranks is not None
    assert plan.layers[1].ranks is None
    assert "its weight is zero" in plan.layers[1].reason


def test_layers_left_alone_are_no_error_and_named():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    plan = make_plan(model, None, ratio=2.0, method="fixed")
    model[0].weight.register_hook(lambda grad: grad)
    original = model[1].forward
    model[1].forward = lambda x: 0.5 * original(x)
    with pytest.warns(UserWarning, match="`0` .a gradient hook is registered on its weight.*`1` .its `forward` was"):
        assert decompose(model, plan) == []
    again = make_plan(model, None, ratio=2.0, method="fixed")
    assert [layer.decision for layer in again.layers] == ["skipped", "skipped"]


def test_clones_of_a_stack_are_no_copies_and_a_frozen_stranger_is_none():
    layer = nn.Linear(64, 64)
    stack = nn.ModuleList(copy.deepcopy(layer) for _ in range(3))
    model = nn.ModuleDict({"stack": stack, "frozen": nn.Linear(64, 64).requires_grad_(False)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decompose(model, make_plan(model, None, ratio=2.0, method="fixed"))
    assert len(low_rank_layers(model)) == 4


def test_all_layers_of_a_network_and_its_copy_are_left_alone_though_one_has_moved_far():
    online = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model = nn.ModuleDict({"online": online, "target": copy.deepcopy(online).requires_grad_(False)})
    nn.init.normal_(model["online"][2].weight)
    model["head"] = nn.Linear(64, 64)
    plan = make_plan(model, None, ratio=2.0, method="fixed")
    assert {layer.name for layer in plan.layers if layer.ranks is not None} == {"head"}
