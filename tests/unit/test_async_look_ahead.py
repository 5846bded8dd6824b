"""The default staleness rule and the virtual clock on which it was found."""

import pytest
import torch
from torch import nn

from lightning_accel.async_sgd import ParameterServer, Push, Settings
from lightning_accel.async_sgd.policy.look_ahead import REACH, is_normalised
from lightning_accel.async_sgd.policy.pushes import ASSIGN
from lightning_accel.async_sgd.policy.replay import replay
from lightning_accel.async_sgd.simulation.run import simulate
from lightning_accel.async_sgd.store import Opening

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "plain descent": lambda p: torch.optim.SGD(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def opened(make=OPTIMIZERS["momentum"], *, workers=2, **settings):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3))]
    server = ParameterServer(
        Opening(["w", "b"], parameters, [], [], [make(parameters)]), Settings(record_log=True, **settings)
    )
    for worker in range(workers):
        server.admit(worker, 0)
    server.live = workers
    return server


def gradients_at(values):
    return [2.0 * value for value in values]


def take_turns(server, pushes, *, workers=2):
    """Let workers push one after another, each on what was published when it pushed last."""
    read = [(0, [p.detach().clone() for p in server.published()])] * workers
    for number in range(pushes):
        worker = number % workers
        version, values = read[worker]
        found = Push(worker, 0, number // workers + 1, version, 0, gradients_at(values))
        assert server.apply(found) == "applied"
        read[worker] = server.version, [p.detach().clone() for p in server.published()]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_without_staleness_every_step_is_the_optimizers_own(make):
    server = opened(make, workers=1)
    plain = [nn.Parameter(p.detach().clone()) for p in server.parameters]
    optimizer = make(plain)
    take_turns(server, 12, workers=1)
    for _ in range(12):
        for parameter, gradient in zip(plain, gradients_at(plain), strict=True):
            parameter.grad = gradient.detach()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(server.parameters, plain, strict=True))
    assert all(a is b or torch.equal(a, b) for a, b in zip(server.published(), plain, strict=True))


def test_what_is_published_goes_on_with_the_last_step():
    server = opened()
    take_turns(server, 9)
    before = [p.detach().clone() for p in server.parameters]
    server.apply(Push(1, 0, 5, server.version - 1, 0, gradients_at(before)))
    mean = server.log[-1].reach / REACH
    assert 0.8 < mean <= 1.0  # two workers in turns: each gradient is one step old
    pairs = zip(server.published(), server.parameters, before, strict=True)
    assert all(torch.allclose(ahead, p + REACH * mean * (p - old)) for ahead, p, old in pairs)


def test_what_has_momentum_is_forecast_and_rates_fall_less_where_steps_are_normalised():
    for name, make in OPTIMIZERS.items():
        server = opened(make)
        take_turns(server, 10)
        assert (server.log[-1].reach > 0) == (name in ("momentum", "nesterov", "adamw")), name
        rate = server.log[-1].weight * server.log[-1].groups[0]["lr"] / server.optimizers[0].param_groups[0]["lr"]
        assert 0.5 < rate < 1.0
        assert (rate > 0.8) == is_normalised(server.optimizers[0]), name


def test_momentum_lasts_longer_and_each_gradient_moves_as_far_in_the_end():
    server = opened(workers=4)
    take_turns(server, 40, workers=4)
    (used,), (own,) = server.log[-1].groups, server.optimizers[0].param_groups
    times = 1.0 + server.log[-1].reach / REACH
    assert 3.5 < times <= 4.0
    assert (own["lr"], own["momentum"]) == (0.05, 0.9)  # checkpoints and schedules see the user's
    assert used["momentum"] == pytest.approx(0.9 ** (1.0 / times))
    assert used["lr"] / (1.0 - used["momentum"]) == pytest.approx(0.05 / (1.0 - 0.9))
    assert server.log[-1].weight == 1.0


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_a_steep_valley_is_reached_where_old_gradients_without_a_forecast_swing_on(workers):
    def distance(rule):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(3))]
        optimizer = torch.optim.SGD(parameters, lr=0.2 / workers, momentum=0.9)
        server = ParameterServer(Opening(["w"], parameters, [], [], [optimizer]), Settings(staleness=rule))
        for worker in range(workers):
            server.admit(worker, 0)
        read = [(0, parameters[0].detach().clone())] * workers
        for number in range(300):
            worker = number % workers
            version, value = read[worker]
            server.apply(Push(worker, 0, number // workers + 1, version, 0, [value]))  # curvature 1
            read[worker] = server.version, server.published()[0].detach().clone()
        return float(parameters[0].detach().norm())

    assert distance("look_ahead") < 0.01
    assert distance("none") > 1.0


def test_a_gradient_that_grows_is_bounded():
    server = opened()
    take_turns(server, 10)
    assert server.log[-1].scale == 1.0
    large = [torch.full((3, 2), 1e6), torch.full((3,), 1e6)]
    before = [p.detach().clone() for p in server.parameters]
    server.apply(Push(0, 0, 6, server.version - 1, 0, large))
    assert server.log[-1].scale < 1e-4
    assert all((p - old).abs().max() < 1.0 for p, old in zip(server.parameters, before, strict=True))
    overflowing = [torch.full((3, 2), 3e38), torch.full((3,), 3e38)]
    server.apply(Push(1, 0, 6, server.version - 1, 0, overflowing))
    assert all(bool(p.isfinite().all()) for p in server.parameters)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_log_of_stale_pushes_replays_to_the_bit(make):
    server = opened(make, workers=3)
    start = [p.detach().clone() for p in server.parameters]
    take_turns(server, 20, workers=3)
    again = [nn.Parameter(p.clone()) for p in start]
    replay(server.log, again, [make(again)], lambda entry, values: gradients_at(values))
    assert all(torch.equal(a, b) for a, b in zip(server.parameters, again, strict=True))


def test_parameters_that_a_hook_has_masked_stay_what_they_were_made():
    server = opened()
    take_turns(server, 10)
    before = [p.detach().clone() for p in server.parameters]
    masked = [p.detach().clone() for p in server.published()]
    masked[0][0] = 0.0
    assert server.apply(Push(0, 0, 6, server.version, ASSIGN, masked)) == "assigned"
    assert torch.equal(server.parameters[0][0], torch.zeros(2))
    assert torch.equal(server.parameters[0][1:], before[0][1:])  # not the forecast
    assert all(torch.equal(a, b) for a, b in zip(server.published(), server.parameters, strict=True))


def test_staleness_is_counted_in_steps_of_the_same_optimizer():
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optimizers = [torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in parameters]
    server = ParameterServer(Opening(["a", "b"], parameters, [], [], optimizers), Settings(record_log=True))
    server.admit(0, 0)
    for sequence in range(1, 9):  # both step on what was read before either: no step of its own is missed by any
        which = sequence % 2
        gradients = [None, None]
        gradients[which] = torch.ones(2)
        server.apply(Push(0, 0, sequence, 2 * ((sequence - 1) // 2), which, gradients))
    assert all(entry.weight == 1.0 and entry.reach == 0.0 for entry in server.log)


def regression(seed=0):
    torch.manual_seed(seed)
    x, module = torch.randn(64, 6), nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    y = torch.sin(x.sum(1, keepdim=True))
    return module, [(x[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8)] * 20


def loss_of(module, batch):
    return nn.functional.mse_loss(module(batch[0]), batch[1])


def test_one_simulated_worker_is_plain_training():
    (module, batches), (plain, _) = regression(), regression()
    simulate(
        module, loss_of, batches, OPTIMIZERS["momentum"](module.parameters()), settings=Settings(), step_seconds=[1.0]
    )
    optimizer = OPTIMIZERS["momentum"](plain.parameters())
    for batch in batches:
        optimizer.zero_grad()
        loss_of(plain, batch).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))


def test_a_simulated_straggler_makes_its_share_of_the_steps_and_repeats():
    runs = []
    for _ in range(2):
        module, batches = regression()
        optimizer = OPTIMIZERS["momentum"](module.parameters())
        found = simulate(module, loss_of, batches, optimizer, settings=Settings(), step_seconds=[1.0, 1.0, 3.0])
        runs.append((found, [p.detach().clone() for p in module.parameters()]))
    found = runs[0][0]
    assert found == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    assert sum(found.worker_pushes) == 160
    assert found.worker_pushes[0] > 2 * found.worker_pushes[2]
    assert found.staleness_mean == pytest.approx(2.0, abs=0.2)
    assert found.seconds == pytest.approx(160 / (2 + 1 / 3), rel=0.1)


@pytest.mark.parametrize(
    ("settings", "others", "message"),
    [
        ({}, {"step_seconds": []}, "`step_seconds` must be > 0"),
        ({}, {"jitter": 1.0}, r"`jitter` must be in \[0, 1\)"),
        ({"local_steps": 2, "min_workers": 2}, {}, "`min_workers` must be <= the number of workers 1"),
    ],
)
def test_simulations_that_make_no_sense_are_refused(settings, others, message):
    module, batches = regression()
    values = {"settings": Settings(**settings), "step_seconds": [1.0], **others}
    with pytest.raises(ValueError, match=message):
        simulate(module, loss_of, batches, torch.optim.SGD(module.parameters(), 0.1), **values)
