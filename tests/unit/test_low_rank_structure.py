"""The structure follows the state dict that comes in."""

import copy

import pytest
import torch
from torch import nn

from lightning_accel.low_rank import (
    LowRankConv,
    LowRankLinear,
    TuckerConv,
    adapt_structure,
    decompose,
    factorize,
    low_rank_layers,
    make_plan,
)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, (3, 5), stride=2, padding=(1, 2), padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.Flatten(),
        nn.Linear(8 * 16, 10, bias=False),
    )


def decomposed(ratio):
    model = net()
    decompose(model, make_plan(model, None, ratio=ratio, method="fixed"))
    return model


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_dense_model_takes_the_structure_of_a_factored_checkpoint():
    source, model = decomposed(2.0), net()
    assert adapt_structure(model, source.state_dict()) == ["0", "2", "4"]
    model.load_state_dict(source.state_dict(), strict=True)
    assert [type(model[k]) for k in (0, 2, 4)] == [TuckerConv, LowRankConv, LowRankLinear]
    assert torch.equal(model(X), source(X))


def test_other_ranks_are_taken_over_and_equal_ones_keep_their_parameters():
    source, model = decomposed(2.0), decomposed(2.0)
    first, last = model[0], model[4].factor_in
    source[0] = factorize(net()[0], (1, 2))
    assert adapt_structure(model, source.state_dict()) == ["0"]
    assert model[0] is first  # the same object: whoever holds it sees its new ranks
    assert first.ranks == (1, 2)
    assert model[4].factor_in is last
    model.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(model(X), source(X))


def test_both_forms_of_a_convolution_are_told_apart():
    source, model = net(), decomposed(2.0)
    source[0] = factorize(source[0], (3,))
    assert adapt_structure(model, source.state_dict()) == ["0", "2", "4"]
    model.load_state_dict(source.state_dict(), strict=True)
    assert isinstance(model[0], LowRankConv)
    assert torch.equal(model(X), source(X))
    model = net()
    assert adapt_structure(model, source.state_dict()) == ["0"]
    model.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(model(X), source(X))


def test_factored_model_becomes_dense_for_a_dense_checkpoint():
    source, model = net(), decomposed(2.0)
    assert adapt_structure(model, source.state_dict()) == ["0", "2", "4"]
    model.load_state_dict(source.state_dict(), strict=True)
    assert not low_rank_layers(model)
    assert torch.equal(model(X), source(X))


def test_keep_low_rank_factorizes_what_comes_in():
    source, model = net(), decomposed(2.0)
    state = source.state_dict()
    assert adapt_structure(model, state, keep_low_rank=True) == ["0", "2", "4"]
    model.load_state_dict(state, strict=True)
    expected = decomposed(2.0)
    assert torch.equal(model(X), expected(X))


def test_as_a_pre_hook_on_the_root_module_with_a_prefix():
    source = nn.ModuleDict({"net": decomposed(3.0)})
    model = nn.ModuleDict({"net": net()})
    model["net"].register_load_state_dict_pre_hook(lambda m, state, prefix, *_: adapt_structure(m, state, prefix))
    model["net"]._load_from_state_dict(source.state_dict(), "net.", {}, True, [], [], [])
    assert set(low_rank_layers(model)) == {"net.0", "net.2", "net.4"}
    root = net()
    root.register_load_state_dict_pre_hook(lambda m, state, prefix, *_: adapt_structure(m, state, prefix))
    root.load_state_dict(decomposed(3.0).state_dict(), strict=True)
    assert torch.equal(root(X), decomposed(3.0)(X))


def test_matching_structure_and_missing_keys_change_nothing():
    model = decomposed(2.0)
    modules = dict(model.named_modules())
    assert adapt_structure(model, model.state_dict()) == []
    assert adapt_structure(model, {}) == []
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("change", ["shape", "core"])
def test_factors_that_do_not_fit_are_refused_before_anything_changes(change):
    state = decomposed(2.0).state_dict()
    if change == "shape":
        state["4.factor_in"] = state["4.factor_in"][:, :-1]
    else:
        state["4.core"] = state["4.factor_in"]
    model = net()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match="incoming factors of layer `4`"):
        adapt_structure(model, state)
    assert dict(model.named_modules()) == modules


def test_bias_and_settings_survive_a_resize():
    model = decomposed(2.0)
    bias, text = model[0].bias, model[0].extra_repr()
    state = copy.deepcopy(model.state_dict())
    state.update({f"0.{name}": p for name, p in factorize(net()[0], (2, 1)).state_dict().items()})
    adapt_structure(model, state)
    assert model[0].bias is bias
    assert model[0].extra_repr() == text.replace(str(decomposed(2.0)[0].ranks), "(2, 1)")


def test_a_part_of_a_network_takes_dense_weights_by_itself():
    model, source = nn.ModuleDict({"body": decomposed(2.0)}), net()
    held = model["body"][4]
    model["body"].load_state_dict(source.state_dict(), strict=True)
    assert type(held) is nn.Linear
    assert torch.equal(model["body"](X), source(X))
    assert all(p.requires_grad for p in model.parameters())
