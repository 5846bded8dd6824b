"""Whole fits on a device that is not there: no step makes the host wait, whatever callback acts in it."""

import lightning.pytorch as pl
import no_read_back
import pytest
import torch
from no_read_back import DEVICE, ReadBackError, Watch
from torch import nn

from lightning_accel import L1InfProjection, MultilevelProjection, SequentialFreezing
from lightning_accel.low_rank import decompose, make_plan

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


class Regression(pl.LightningModule):
    """Three hidden layers, two of one shape; ``look`` makes every step read its loss."""

    def __init__(self, optimizer="sgd", *, low_rank=False, look=False):
        super().__init__()
        layers = [nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(32, 1))
        self.optimizer, self.look = optimizer, look
        if low_rank:
            decompose(self, make_plan(self, None, ratio=2.0, method="fixed"))

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean()
        if self.look:
            float(loss)
        return loss

    def configure_optimizers(self):
        return OPTIMIZERS[self.optimizer](self.parameters())


@pytest.fixture
def watch():
    with Watch() as found:
        yield found


def run(watch, module, callbacks, *, batches=24, **options):
    """Fit the module on as many batches; return the Trainer and the steps that were watched."""
    there = [torch.empty(8, 24, device=DEVICE) for _ in range(batches)]
    return no_read_back.fit(watch, module, callbacks, there, **options)


def regression(*arguments, **options):
    """Return a module whose layers are on the device."""
    return Regression(*arguments, **options).to(DEVICE)


def test_a_plain_fit_reads_nothing_back(watch):
    _, steps = run(watch, regression(), [])
    assert steps == list(range(1, 25))
    assert len(watch.operations) > 24 * 20


def test_a_look_in_a_step_is_seen(watch):
    with pytest.raises(ReadBackError, match="waits for the device"):
        run(watch, regression(look=True), [])


def test_copies_that_wait_are_seen(watch):
    watch.strict = True
    x = torch.empty(3, device=DEVICE)
    for wait in (
        lambda: x.cpu(),
        lambda: x.copy_(torch.empty(3)),
        lambda: x[x > 0.0],
        lambda: torch.tensor(1.0).to(DEVICE),
    ):
        with pytest.raises(ReadBackError):
            wait()
    x.to("cpu", non_blocking=True)
    watch.strict = False
    assert not bool((x > 0.0).any())  # a stand-in


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make", [L1InfProjection, MultilevelProjection], ids=["l1,inf", "multi-level"])
def test_projected_steps_read_nothing_back(watch, make, optimizer):
    """The defaults: hidden layers found in the first step, a ramp over the fit, groups that stay cleared.

    After step 50 what was found so far is on its way to the host, and nobody waits for it.
    """
    callback = make()
    trainer, steps = run(watch, regression(optimizer), [callback], batches=54)
    assert steps == list(range(1, 55))
    assert trainer.global_step == 54
    ramp = callback._run.timing.ramp
    assert callback.projections == sum(round(10_000 * step / 54) > ramp.start_step for step in steps)
    assert [t.name for t in callback._run.projector.targets] == ["net.0.weight", "net.2.weight", "net.4.weight"]


PROJECTIONS = {
    "radius": {"radius": 1.0},
    "exact": {"method": "exact", "radius": 1.0},
    "exact fraction": {"method": "exact"},
    "one budget": {"scope": "global"},
    "columns, every third step": {"groups": "columns", "every_n_steps": 3},
    "linear ramp": {"target_sparsity": 0.5, "schedule": "linear", "end_step": 16},
    "fraction of the norm": {"radius_fraction": 0.5},
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_other_projected_steps_read_nothing_back(watch, name):
    exact = "exact" in name  # thousands of operations a step
    callback = L1InfProjection(**PROJECTIONS[name])
    count = 5 if exact else 24
    first = int(name == "fraction of the norm")  # the first step looks at the first norms, once
    _, steps = run(watch, regression(), [callback], batches=count, first=first)
    assert steps == list(range(1, count + 1))
    assert callback.projections >= count // 3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_in_which_factors_switch_read_nothing_back(watch, optimizer):
    callback, frozen = SequentialFreezing(period_steps=3), []

    class Look(pl.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            frozen.append(frozenset(n for n, p in module.named_parameters() if not p.requires_grad))

    _, steps = run(watch, regression(optimizer, low_rank=True), [callback, Look()], batches=20)
    assert steps == list(range(1, 21))
    switches = [step for step in range(1, 20) if frozen[step] != frozen[step - 1]]
    assert switches == [3, 6, 9, 12, 15, 18]
    assert all(frozen)


def test_phases_of_epochs_read_nothing_back(watch):
    _, steps = run(watch, regression(low_rank=True), [SequentialFreezing()], batches=5, epochs=4)
    assert steps == list(range(1, 21))


def test_both_together_read_nothing_back(watch):
    callbacks = [
        SequentialFreezing(period_steps=4),
        L1InfProjection(parameters="net.0.*", module_types=None, target_sparsity=0.3),
    ]
    _, steps = run(watch, regression(low_rank=True), callbacks)
    assert steps == list(range(1, 25))
