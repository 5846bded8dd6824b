"""Parameters change places in a running optimizer and their moments follow."""

import pytest
import torch
from torch import nn

from lightning_accel.low_rank import factorize, replace_parameters, to_dense
from lightning_accel.low_rank.factors.factorize import full_ranks
from lightning_accel.low_rank.optimizers.exchange import (
    orphans,
    project_state,
    put_weight,
    state_alike,
    undo_replacement,
)
from lightning_accel.low_rank.optimizers.kinds import description, like, why_not_followed

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
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


def test_variances_are_projected_by_squares_and_counters_copied():
    model, optimizer = trained(OPTIMIZERS["adam"])
    state = {key: value.clone() for key, value in optimizer.state[model[0].weight].items()}
    low = factorize(model[0], (3,))
    replace_parameters(optimizer, {model[0].weight: low})
    mine = optimizer.state[low.factor_in]
    u, first, second = low.factor_out.detach(), 1.0 - 0.9**3, 1.0 - 0.999**3  # sums of the averages' weights so far
    mean = state["exp_avg"] / first
    variance = (state["exp_avg_sq"] / second - mean.square()).clamp_min(0.0)
    expected = second * (u.square().T @ variance + (u.T @ mean).square())
    torch.testing.assert_close(mine["exp_avg_sq"], expected)
    assert (mine["max_exp_avg_sq"] >= mine["exp_avg_sq"]).all()
    assert mine["step"] == 3
    assert mine["step"] is not optimizer.state[low.factor_out]["step"]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "radam", "rmsprop", "adamax"])
@pytest.mark.parametrize("steps", [1, 40])
def test_no_second_moment_is_below_the_square_of_the_first(name, layer, steps):
    model, optimizer = trained(OPTIMIZERS[name], layer, steps)
    dense = model[0]
    low = factorize(dense, [3] * len(full_ranks(dense)))
    replace_parameters(optimizer, {dense.weight: low})
    for factor in (getattr(low, name) for name in low.factor_names):
        state = optimizer.state[factor]
        if name == "rmsprop":
            second, least = state["square_avg"], state["grad_avg"].square()
        elif name == "adamax":
            second, least = state["exp_inf"], (state["exp_avg"] / (1.0 - 0.9**steps)).abs()
        else:
            mean = state["exp_avg"] / (1.0 - 0.9**steps)
            second, least = state["exp_avg_sq"] / (1.0 - 0.999**steps), mean.square()
        assert (second >= (1.0 - 1e-4) * least - 1e-12).all()


EVERY_OPTIMIZER = {
    **OPTIMIZERS,
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, weight_decay=0.01),
    "adadelta": torch.optim.Adadelta,
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
    "rmsprop, plainly centered": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True),
    "adam, fused": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
    "adam, one tensor after the other": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=False),
    "adam, rate in a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-3)),
    "sgd, nesterov": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", EVERY_OPTIMIZER)
def test_weights_stay_finite_and_move_by_little_after_the_replacement(name, layer):
    model, optimizer = trained(EVERY_OPTIMIZER[name], layer, 40)
    assert why_not_followed(optimizer) is None
    dense = model[0]
    low = model[0] = factorize(dense, [3] * len(full_ranks(dense)))
    replace_parameters(optimizer, {dense.weight: low})
    before = low.weight.detach().clone()
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(LAYERS[layer][1])).square().sum().backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in low.parameters())
    assert 0.0 < float((low.weight.detach() - before).norm()) < 3.0 * float(before.norm()) + 1.0


class Averaging(torch.optim.SGD):
    """Keeps an average of each parameter, in a list of its own."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]


class Wrapper(torch.optim.Optimizer):
    """Steps another optimizer, as sharpness-aware ones and Lookahead do."""

    def __init__(self, parameters):
        inner = torch.optim.SGD(parameters, lr=0.1)
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


class Described(torch.optim.SGD):
    """Has attributes, none of which holds tensors."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.calls, self.names, self.rule = 0, ["a"], lambda step: 0.1 * step


def with_tensors_in_its_groups(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    optimizer.param_groups[0]["slow"] = [torch.zeros(2)]
    return optimizer


class Eager(torch.optim.SGD):
    """Makes its states when it is made, and asks for them in every step."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        for p in self.param_groups[0]["params"]:
            self.state[p]["calls"] = torch.zeros(())

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["calls"] += 1
        return super().step(closure)


class AsksForAClosure(torch.optim.SGD):
    """Evaluates the loss twice a step."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)

    def step(self, closure):
        closure()
        return super().step(closure)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (torch.optim.LBFGS, "LBFGS"),
        (Averaging, "`slow`"),
        (Wrapper, "`inner`"),
        (with_tensors_in_its_groups, "`slow` of its groups"),
        (Eager, "Eager can not step a new parameter: KeyError"),
        (AsksForAClosure, "AsksForAClosure can not step a new parameter: TypeError"),
    ],
)
def test_optimizers_that_keep_parameters_of_their_own_are_named(make, word):
    assert word in why_not_followed(make(nn.Linear(3, 2).parameters()))


def test_optimizers_that_keep_other_things_are_followed():
    optimizer = Described(nn.Linear(3, 2).parameters())
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps `step` on the instance
    assert why_not_followed(optimizer) is None


@pytest.mark.parametrize("kind", [Described, *EVERY_OPTIMIZER.values()])
def test_optimizer_like_another_has_its_class_and_options_and_leaves_it_alone(kind):
    weight, other = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    optimizer = kind([weight])
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    state = {p: {k: v.clone() for k, v in entries.items()} for p, entries in optimizer.state.items()}
    made = like(optimizer, optimizer.param_groups[0])([other])
    assert type(made) is type(optimizer)
    options = [{k: v for k, v in o.param_groups[0].items() if k != "params"} for o in (optimizer, made)]
    assert options[0] == options[1]
    other.grad = torch.ones(3, 2)
    made.step()
    assert not torch.equal(other, torch.ones(3, 2)) or "rprop" in repr(kind).lower()
    assert torch.equal(weight, torch.ones(3, 2))
    assert optimizer.state == {} or all(torch.equal(v, state[weight][k]) for k, v in optimizer.state[weight].items())


def test_what_is_told_apart_and_what_can_not_be():
    weight = torch.zeros(2, 2)
    known = [
        lambda p: torch.optim.SGD(p, 0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, 0.1),
        lambda p: torch.optim.AdamW(p, 0.1, fused=True),
        lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
        lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True),
        lambda p: torch.optim.AdamW(p, torch.tensor(0.1), capturable=True),
    ]
    assert len({description(make, weight) for make in known}) == len(known)
    assert description(known[0], weight) == description(lambda p: torch.optim.SGD(p, 0.2), weight)  # as fast
    assert description(Described, weight) is None
    assert description(lambda p: 1 / 0, weight) is None


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


@pytest.mark.parametrize("back", ["undone", "dense"])
def test_named_parameters_keep_names_that_are_theirs(back):
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4))
    weight = model[0].weight
    optimizer = torch.optim.AdamW(model.named_parameters())
    (group,) = optimizer.param_groups
    layer = factorize(model[0], (3,))
    done = replace_parameters(optimizer, {weight: layer})
    assert group["param_names"] == ["0.factor_in", "0.factor_out", "0.bias", "1.weight", "1.bias"]
    optimizer.load_state_dict(optimizer.state_dict())
    if back == "undone":
        undo_replacement(done)
    else:
        put_weight(optimizer, (layer.factor_in, layer.factor_out), weight)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))


def test_merged_weights_take_the_place_of_their_factors_with_fresh_moments():
    torch.manual_seed(0)
    low = factorize(nn.Linear(6, 5), (3,))
    optimizer = torch.optim.AdamW(low.parameters(), lr=0.01)
    low(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()
    dense = to_dense(low)
    assert put_weight(optimizer, (low.factor_in, low.factor_out), dense.weight)  # the factors had moments
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(dense.weight), id(dense.bias)}
    assert set(optimizer.state) == {dense.bias}
    optimizer.zero_grad()
    dense(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()


def test_orphans_are_trainable_parameters_that_no_optimizer_holds():
    low = factorize(nn.Linear(6, 5), (3,))
    factors = {name: getattr(low, name) for name in low.factor_names}
    assert orphans([torch.optim.SGD([low.factor_in], lr=0.1)], factors) == ["factor_out"]
    assert orphans([torch.optim.SGD([factor], lr=0.1) for factor in factors.values()], factors) == []
    low.factor_out.requires_grad_(False)
    assert orphans([torch.optim.SGD([low.factor_in], lr=0.1)], factors) == []


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_of_steps_that_are_only_timed_have_the_entries_and_shapes_of_the_projected_ones(name, layer):
    states = []
    for project in (None, state_alike):
        model, optimizer = trained(OPTIMIZERS[name], layer)
        low = factorize(model[0], [3] * len(full_ranks(model[0])))
        replace_parameters(optimizer, {model[0].weight: low}, project=project)
        states.append([optimizer.state[getattr(low, factor)] for factor in low.factor_names])
        model[0] = low
        model(torch.randn(LAYERS[layer][1])).square().sum().backward()
        optimizer.step()
        assert all(p.isfinite().all() for p in low.parameters())
    for projected, alike in zip(*states, strict=True):
        assert list(alike) == list(projected)
        assert [getattr(value, "shape", None) for value in alike.values()] == [
            getattr(value, "shape", None) for value in projected.values()
        ]


def test_states_of_steps_that_are_only_timed_are_as_large_as_the_weights():
    model, optimizer = trained(OPTIMIZERS["adamw"])
    before = optimizer.state[model[0].weight]["exp_avg_sq"].mean()
    low = factorize(model[0], (3,))
    replace_parameters(optimizer, {model[0].weight: low}, project=state_alike)
    torch.testing.assert_close(optimizer.state[low.factor_in]["exp_avg_sq"], before.expand_as(low.factor_in))


@pytest.mark.parametrize("optimizer", ["sum of gradients", "second moment alone"])
@pytest.mark.parametrize(
    ("dense", "ranks"),
    [
        (nn.Linear(5, 7), (3,)),
        (nn.Conv2d(5, 7, 1), (3,)),
        (nn.Conv2d(5, 7, 3), (4,)),
        (nn.Conv2d(5, 7, 3), (2, 3)),
        (nn.Conv1d(5, 7, 4), (2, 3)),
    ],
    ids=str,
)
def test_moments_are_those_of_the_derivatives_that_autograd_finds(dense, ranks, optimizer):
    layer, value = factorize(dense, ranks), torch.rand_like(dense.weight)
    key, power = ("momentum_buffer", 1) if optimizer == "sum of gradients" else ("sum", 2)
    factors = {n: getattr(layer, n).detach().pow(power).requires_grad_() for n in layer.factor_names}
    product = layer.product(factors)
    expected = torch.autograd.grad(product, list(factors.values()), value.view_as(product))
    found = project_state({key: value}, layer, {})
    for name, gradient in zip(factors, expected, strict=True):
        torch.testing.assert_close(found[name][key], gradient)
