import contextlib
import itertools
import random

import pytest
import torch
from torch import nn

from lightning_accel import measure
from lightning_accel.measure import environment, synchronize, time_interleaved, undisturbed


class Clock:
    """Stands still but when a candidate moves it."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def takes(self, seconds):
        def work():
            self.now += seconds

        return work


def test_each_candidate_gets_its_own_times():
    clock = Clock()
    seconds = time_interleaved({"a": clock.takes(1.0), "b": clock.takes(2.0)}, rounds=3, clock=clock)
    assert seconds == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_candidates_take_turns_in_an_order_shuffled_anew_each_round():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    time_interleaved(candidates, rounds=20, warmup=2, seed=3)
    assert len(calls) == 3 * 22
    rounds = [tuple(calls[i : i + 3]) for i in range(6, len(calls), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 1


def test_order_leaves_the_global_random_state_alone():
    random.seed(7)
    expected = random.random()
    random.seed(7)
    time_interleaved({"a": lambda: None, "b": lambda: None}, rounds=3)
    assert random.random() == expected


def test_budget_ends_the_rounds_but_not_before_the_least():
    seconds = time_interleaved({"a": lambda: None}, rounds=50, budget_seconds=0.0, min_rounds=4)
    assert len(seconds["a"]) == 4


@pytest.mark.parametrize(
    ("candidates", "rounds", "warmup", "message"),
    [
        ({}, 1, 0, "`candidates` must name at least one callable"),
        ({"a": print}, 0, 0, "`rounds` must be >= 1 and `warmup` >= 0, got 0 and 0"),
        ({"a": print}, 1, -1, "`rounds` must be >= 1 and `warmup` >= 0, got 1 and -1"),
    ],
)
def test_arguments_are_checked(candidates, rounds, warmup, message):
    with pytest.raises(ValueError, match=message):
        time_interleaved(candidates, rounds=rounds, warmup=warmup)


def test_synchronizing_the_cpu_does_nothing():
    assert synchronize("cpu") is None


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def test_a_trial_step_leaves_no_trace():
    model = _model()
    model[0].weight.requires_grad_(False)
    model[3].eval()
    before_gradient = torch.ones_like(model[0].bias)
    model[0].bias.grad = before_gradient
    state = {name: value.clone() for name, value in model.state_dict().items()}
    places = [p.data_ptr() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(3), random.random()
    torch.manual_seed(5)
    random.seed(5)
    with undisturbed(model):
        assert model[0].bias.grad is None
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model.train()
        model.requires_grad_(True)
        model(torch.rand(8, 3)).sum().backward()
        optimizer.step()
        random.random()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert [p.data_ptr() for p in model.parameters()] == places
    assert [m.training for m in model.modules()] == modes
    assert model[0].bias.grad is before_gradient
    assert model[3].bias.grad is None
    assert not model[0].weight.requires_grad
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]


def test_a_trial_that_fails_leaves_no_trace_either():
    model = _model()
    before = model[0].weight.detach().clone()

    def fail():
        with undisturbed(model), torch.no_grad():
            model[0].weight.zero_()
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert torch.equal(model[0].weight, before)


def test_several_modules_that_share_a_parameter_are_restored():
    first, second = _model(), _model()
    second[0].weight = first[0].weight
    before = first[0].weight.detach().clone()
    with undisturbed(first, second), torch.no_grad():
        for parameter in itertools.chain(first.parameters(), second.parameters()):
            parameter.add_(1.0)
    assert torch.equal(first[0].weight, before)
    assert second[0].weight is first[0].weight


def test_environment_names_hardware_and_versions_but_nobody():
    block = environment()
    assert block["torch"] == torch.__version__
    assert block["threads"] == torch.get_num_threads()
    assert block["cores"] >= 1
    assert block["device_type"] == "cpu"
    import getpass
    import platform

    text = " ".join(map(str, block.values()))
    assert "/" not in text
    assert not {platform.node(), getpass.getuser()} & set(text.split())


def test_times_on_a_device_lie_between_two_events_after_the_caches_were_filled(monkeypatch):
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("event")

        def synchronize(self):
            happened.append("wait")

        def elapsed_time(self, end):
            return 3.0  # milliseconds

    class Memory:
        def zero_(self):
            happened.append("fill")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(measure.torch, "empty", lambda *args, **kwargs: Memory())
    found = measure.time_interleaved({"a": lambda: happened.append("call")}, rounds=2, device="cuda")
    assert found == {"a": [0.003, 0.003]}
    assert happened == ["call", *["fill", "event", "call", "event", "wait"] * 2]
