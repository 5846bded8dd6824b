"""Optimizer steps over long tensors: the same bits as one tensor after another, and state that stays per parameter."""

import copy

import pytest
import torch
from torch import nn

from lightning_accel.async_sgd import ParameterServer, Push, Settings
from lightning_accel.async_sgd.policy.flat_optimizer import Arena, FlatOptimizer
from lightning_accel.async_sgd.store import Opening

SHAPES = [(30, 7), (11,), (), (3, 1, 5), (257,)]
KINDS = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "maximize": True}),
    (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.01}),
    (torch.optim.AdamW, {"lr": torch.tensor(0.01)}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.5}),
    (torch.optim.NAdam, {}),
]


def parameters_of(shapes=SHAPES):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def plain_step(optimizer, parameters, gradients, weight=1.0):
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * weight
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def assert_same_state(mine, theirs):
    mine, theirs = mine.state_dict()["state"], theirs.state_dict()["state"]
    assert mine.keys() == theirs.keys()
    for number, state in theirs.items():
        assert mine[number].keys() == state.keys()
        for key, value in state.items():
            equal = (
                torch.equal(mine[number][key], value) if isinstance(value, torch.Tensor) else mine[number][key] == value
            )
            assert equal, (number, key)


@pytest.mark.parametrize("split", [False, True], ids=["one group", "two interleaved groups"])
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
def test_long_tensors_make_the_bits_of_short_ones(kind, options, split):
    plain, ours = parameters_of(), parameters_of()

    def optimizer_over(parameters):
        groups = [{"params": parameters[0::2]}, {"params": parameters[1::2], "weight_decay": 0.0}]
        return kind(groups if split else parameters, **options)

    expected = optimizer_over(plain)
    flat = FlatOptimizer(optimizer_over(ours), ours, Arena(ours))
    for weight in (1.0, 1.0, 0.5, 1.0, 1.0 / 3.0, 1.0):
        gradients = [torch.randn_like(p) for p in plain]
        plain_step(expected, plain, gradients, weight)
        flat.step(gradients, weight=weight)
        assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert_same_state(flat.optimizer, expected)


def test_a_missing_gradient_leaves_its_parameter_and_its_number_of_steps_alone():
    plain, ours = parameters_of(), parameters_of()
    expected = torch.optim.AdamW(plain, lr=0.01)
    flat = FlatOptimizer(torch.optim.AdamW(ours, lr=0.01), ours, Arena(ours))
    for missing in (None, None, 1, None, 1, None):
        gradients = [None if i == missing else torch.randn_like(p) for i, p in enumerate(plain)]
        plain_step(expected, plain, gradients)
        flat.step(gradients, weight=1.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert_same_state(flat.optimizer, expected)
    assert flat.optimizer.state[ours[1]]["step"] == 4
    assert flat.optimizer.state[ours[0]]["step"] == 6


def test_momentum_that_is_switched_on_later_is_state_of_every_parameter():
    plain, ours = parameters_of(), parameters_of()
    expected = torch.optim.SGD(plain, lr=0.1)
    flat = FlatOptimizer(torch.optim.SGD(ours, lr=0.1), ours, Arena(ours))
    for momentum in (0.0, 0.0, 0.9, 0.9):
        gradients = [torch.randn_like(p) for p in plain]
        expected.param_groups[0]["momentum"] = flat.optimizer.param_groups[0]["momentum"] = momentum
        plain_step(expected, plain, gradients)
        flat.step(gradients, weight=1.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert_same_state(flat.optimizer, expected)


def test_a_scattered_state_shares_nothing_and_steps_on():
    plain, ours = parameters_of(), parameters_of()
    expected = torch.optim.Adam(plain, lr=0.01)
    flat = FlatOptimizer(torch.optim.Adam(ours, lr=0.01), ours, Arena(ours))
    for step in range(4):
        if step == 2:
            flat.scatter()
            state = [flat.optimizer.state[p] for p in ours]
            assert len({s["step"].data_ptr() for s in state}) == len(ours)
            assert all(
                s["exp_avg"].untyped_storage().nbytes() == p.numel() * 4 for s, p in zip(state, ours, strict=True)
            )
        gradients = [torch.randn_like(p) for p in plain]
        plain_step(expected, plain, gradients)
        flat.step(gradients, weight=1.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert_same_state(flat.optimizer, expected)


@pytest.mark.parametrize(
    "parameters",
    [
        [],
        [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.float64))],
        [nn.Parameter(torch.zeros(2, dtype=torch.complex64))],
        [nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))],
    ],
    ids=["none", "two dtypes", "complex", "half precision"],
)
def test_parameters_that_are_not_alike_stay_where_they_are(parameters):
    before = [p.data_ptr() for p in parameters]
    assert Arena(parameters).spans == []
    assert [p.data_ptr() for p in parameters] == before


def test_two_dtypes_are_stepped_one_tensor_after_another():
    plain = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, dtype=torch.float64))]
    ours = copy.deepcopy(plain)
    expected = torch.optim.SGD(plain, lr=0.1, momentum=0.9)
    flat = FlatOptimizer(torch.optim.SGD(ours, lr=0.1, momentum=0.9), ours, Arena(ours))
    for _ in range(3):
        gradients = [torch.randn_like(p) for p in plain]
        plain_step(expected, plain, gradients)
        flat.step(gradients, weight=1.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def test_a_restored_server_goes_on_with_the_state_of_the_cut():
    def pushed(server, sequence, gradients):
        push = Push(
            worker=0, incarnation=0, sequence=sequence, base_version=server.version, optimizer=0, gradients=gradients
        )
        assert server.apply(push) == "applied"

    parameters = parameters_of()
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    names = [str(i) for i in range(len(parameters))]
    server = ParameterServer(Opening(names, parameters, [], [], [optimizer]), Settings())
    server.admit(0, 0)
    gradients = [[torch.randn(shape) for shape in SHAPES] for _ in range(3)]
    for sequence in (1, 2):
        pushed(server, sequence, gradients[sequence - 1])
    cut = server.snapshot()
    pushed(server, 3, gradients[2])
    once = server.snapshot()
    server.restore(cut)
    pushed(server, 4, gradients[2])
    twice = server.snapshot()
    assert all(torch.equal(a, b) for a, b in zip(once.parameters, twice.parameters, strict=True))
    assert not torch.equal(cut.parameters[0], twice.parameters[0])
    assert cut.optimizer_states[0]["state"][0]["step"] == 2  # a cut is a copy
    assert twice.optimizer_states[0]["state"][0]["step"] == 3
