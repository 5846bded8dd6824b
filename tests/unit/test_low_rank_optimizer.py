"""Parameters change places in a running optimizer and their moments follow."""

import pytest
import torch
from torch import nn

from lightning_accel.low_rank import (
    factorize,
    full_ranks,
    orphans,
    replace_by_merged,
    replace_parameters,
    to_dense,
    undo_replacement,
)

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}
LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (8, 6)),
    "conv 1x1": (lambda: nn.Conv2d(6, 5, 1), (2, 6, 3, 3)),
    "conv": (lambda: nn.Conv2d(6, 5, 3), (2, 6, 5, 5)),
}


def trained(make_optimizer, layer="linear", steps=3):
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    model = nn.Sequential(make(), nn.Tanh())
    optimizer = make_optimizer(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(shape)).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_factors_take_the_place_of_the_weight_and_train_on(name, layer):
    model, optimizer = trained(OPTIMIZERS[name], layer)
    dense = model[0]
    low = factorize(dense, [3] * len(full_ranks(dense)))
    result = replace_parameters(optimizer, {dense.weight: low})
    assert not result.fresh
    assert result.projected == len(low.factor_names)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        *(id(getattr(low, name)) for name in low.factor_names),
        id(low.bias),
    ]
    assert dense.weight not in optimizer.state
    model[0] = low
    before = [p.detach().clone() for p in low.parameters()]
    model(torch.randn(LAYERS[layer][1])).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(low.parameters(), before, strict=True))


def test_first_moments_are_projected_by_the_factors():
    model, optimizer = trained(OPTIMIZERS["sgd"])
    moment = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    low = factorize(model[0], (3,))
    replace_parameters(optimizer, {model[0].weight: low})
    torch.testing.assert_close(optimizer.state[low.factor_out]["momentum_buffer"], moment @ low.factor_in.detach().T)
    torch.testing.assert_close(optimizer.state[low.factor_in]["momentum_buffer"], low.factor_out.detach().T @ moment)


@pytest.mark.parametrize("form", [1, 2])
def test_projected_momentum_is_the_one_the_factors_would_have_gathered(form):
    """With factors at rest, projecting the summed gradients equals summing the factors' gradients."""
    torch.manual_seed(0)
    dense = nn.Conv2d(6, 5, 3).double()
    low = factorize(dense, full_ranks(dense, form))
    sgd, direct = torch.optim.SGD([dense.weight], lr=0.0, momentum=0.9), torch.optim.SGD(low.parameters(), 0.0, 0.9)
    for _ in range(3):
        x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
        for layer, optimizer in ((dense, sgd), (low, direct)):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
    replace_parameters(sgd, {dense.weight: low})
    for name in low.factor_names:
        factor = getattr(low, name)
        torch.testing.assert_close(sgd.state[factor]["momentum_buffer"], direct.state[factor]["momentum_buffer"])


def test_second_moments_are_projected_by_squares_and_counters_copied():
    model, optimizer = trained(OPTIMIZERS["adam"])
    state = {key: value.clone() for key, value in optimizer.state[model[0].weight].items()}
    low = factorize(model[0], (3,))
    replace_parameters(optimizer, {model[0].weight: low})
    mine = optimizer.state[low.factor_in]
    torch.testing.assert_close(mine["exp_avg_sq"], low.factor_out.detach().square().T @ state["exp_avg_sq"])
    assert (mine["exp_avg_sq"] >= 0.0).all()
    assert mine["step"] == 3
    assert mine["step"] is not optimizer.state[low.factor_out]["step"]


def test_rmsprops_normalized_momentum_starts_at_zero():
    model, optimizer = trained(OPTIMIZERS["rmsprop"])
    low = factorize(model[0], (3,))
    replace_parameters(optimizer, {model[0].weight: low})
    assert not optimizer.state[low.factor_in]["momentum_buffer"].any()
    assert optimizer.state[low.factor_in]["square_avg"].all()


def test_unknown_states_start_fresh_and_say_so():
    model, optimizer = trained(lambda p: torch.optim.Adadelta(p))
    result = replace_parameters(optimizer, {model[0].weight: (low := factorize(model[0], (3,)))})
    assert result.fresh == ("(5, 6): the state entry `acc_delta` is unknown, moments start fresh",)
    assert low.factor_in not in optimizer.state
    model, optimizer = trained(OPTIMIZERS["sgd"])
    optimizer.state[model[0].weight]["momentum_buffer"] = torch.zeros(3)
    result = replace_parameters(optimizer, {model[0].weight: factorize(model[0], (3,))})
    assert "another shape" in result.fresh[0]


def test_sgd_without_momentum_has_nothing_to_project():
    model, optimizer = trained(lambda p: torch.optim.SGD(p, lr=0.1))
    result = replace_parameters(optimizer, {model[0].weight: factorize(model[0], (3,))})
    assert (result.projected, result.fresh) == (0, ())


def test_groups_keep_their_options_and_foreign_weights_are_ignored():
    a, b, foreign = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(6, 5)
    optimizer = torch.optim.SGD([{"params": a.parameters(), "lr": 0.5}, {"params": b.parameters()}], lr=0.1)
    low = factorize(b, (2,))
    replace_parameters(optimizer, {b.weight: low, foreign.weight: factorize(foreign, (2,))})
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 3]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    assert optimizer.param_groups[0]["params"][0] is a.weight


def test_undo_puts_weights_and_states_back():
    model, optimizer = trained(OPTIMIZERS["adamw"])
    lists = [list(group["params"]) for group in optimizer.param_groups]
    moment = optimizer.state[model[0].weight]["exp_avg"]
    low = factorize(model[0], (3,))
    result = replace_parameters(optimizer, {model[0].weight: low})
    low(torch.randn(8, 6)).sum().backward()
    optimizer.step()
    undo_replacement(result)
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [[id(p) for p in lists[0]]]
    assert optimizer.state[model[0].weight]["exp_avg"] is moment
    assert low.factor_in not in optimizer.state


def test_merged_weights_take_the_place_of_their_factors_with_fresh_moments():
    torch.manual_seed(0)
    low = factorize(nn.Linear(6, 5), (3,))
    optimizer = torch.optim.AdamW(low.parameters(), lr=0.01)
    low(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()
    dense = to_dense(low)
    fresh = replace_by_merged(optimizer, {low: dense.weight})
    assert fresh == ("(5, 6): moments of factors do not determine those of the weight",)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(dense.weight), id(dense.bias)}
    assert set(optimizer.state) == {dense.bias}
    optimizer.zero_grad()
    dense(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()


def test_orphans_are_trainable_factors_that_no_optimizer_holds():
    low = factorize(nn.Linear(6, 5), (3,))
    assert orphans([torch.optim.SGD([low.factor_in], lr=0.1)], low) == ["factor_out"]
    assert orphans([torch.optim.SGD([low.factor_in], lr=0.1), torch.optim.SGD([low.factor_out], lr=0.1)], low) == []
    low.factor_out.requires_grad_(False)
    assert orphans([torch.optim.SGD([low.factor_in], lr=0.1)], low) == []
