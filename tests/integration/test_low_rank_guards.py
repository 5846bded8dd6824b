"""Rank quantization notices models that ask for layer types, optimizers that shard, and the phases of freezing."""

import logging
import random

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from low_rank_models import Classifier, train
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from lightning_accel.callbacks import RankQuantization, SequentialFreezing
from lightning_accel.callbacks.layer_exchange.recorded_inputs import RunningOrder
from lightning_accel.callbacks.rank_quantization import request as _request
from lightning_accel.callbacks.rank_quantization import step_times as _step_times
from lightning_accel.low_rank import decompose, low_rank_layers, make_plan


def keep(**settings):
    defaults = {"ratio": 2.0, "method": "fixed", "when": "setup", "on_loss": "keep", "exclude": ["net.6"]}
    return RankQuantization(**defaults | settings)


class Regularized(Classifier):
    """Adds the norms of what it takes for its linear layers: low-rank ones escape without any error."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        penalty = sum(m.weight.square().sum() for name, m in self.net.named_children() if self.counts(name, m))
        return {"loss": loss + 0.1 * penalty}

    def counts(self, name, module):
        return type(module) is nn.Linear


class RegularizesOne(Regularized):
    def counts(self, name, module):
        return type(module) is nn.Linear and name == "4"


@pytest.mark.parametrize(("kind", "low_rank"), [(Regularized, set()), (RegularizesOne, {"net.0"})])
def test_layers_that_silently_change_the_loss_stay_dense(kind, low_rank, tmp_path, caplog):
    module = kind()
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        train(module, [keep()], tmp_path)
    assert set(low_rank_layers(module)) == low_rank
    assert "net.4 stays dense, because the training step has another loss with it low rank" in caplog.text
    assert "although nothing is cut off" in caplog.text
    assert ("with any of its layers low rank" in caplog.text) == (not low_rank)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_noise_that_is_repeated_and_rounding_are_no_other_loss(precision, tmp_path, caplog):
    module = Classifier()
    with caplog.at_level(logging.WARNING, logger="lightning_accel"):
        train(module, [keep()], tmp_path, precision=precision)
    assert set(low_rank_layers(module)) == {"net.0", "net.4"}
    assert "another loss" not in caplog.text


def test_loss_that_is_never_the_same_is_not_judged(tmp_path, caplog):
    class Unrepeatable(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)["loss"]
            return {"loss": loss * (1.0 + 0.5 * random.SystemRandom().random())}

    module = Unrepeatable()
    with caplog.at_level(logging.WARNING, logger="lightning_accel"):
        train(module, [keep()], tmp_path)
    assert set(low_rank_layers(module)) == {"net.0", "net.4"}
    assert "another loss" not in caplog.text


@pytest.fixture
def one_process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Sharded(Classifier):
    def configure_optimizers(self):
        return ZeroRedundancyOptimizer(self.parameters(), optimizer_class=torch.optim.SGD, lr=0.1)


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("make", [RankQuantization, SequentialFreezing])
def test_optimizer_that_shards_its_states_is_refused_by_name(make, tmp_path):
    module = Sharded()
    decompose(module, make_plan(module, None, ratio=2.0, method="fixed", include=["net.4"]))
    message = rf"{make.__name__} changes which .* ZeroRedundancyOptimizer would .* Use the optimizer that it wraps"
    with pytest.raises(MisconfigurationException, match=message):
        train(module, [make()], tmp_path)
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(
    ("freezing", "weights"),
    [
        ([], None),
        ([SequentialFreezing(weights=(3.0, 1.0))], (3.0, 1.0)),
        ([SequentialFreezing(mode="fixed", fixed_group=1)], (0.0, 1.0)),
        ([SequentialFreezing(mode="fixed")], (1.0, 0.0)),
        ([SequentialFreezing(mode="adaptive")], None),
        ([SequentialFreezing(mode="none")], None),
    ],
    ids=["alone", "sequential", "fixed 1", "fixed 0", "adaptive", "none"],
)
def test_ranks_are_planned_and_tried_for_the_phases_of_freezing(freezing, weights, tmp_path, monkeypatch, caplog):
    planned, timed = [], set()
    plan = _request.make_plan

    def remember(*args, phase_weights, **settings):
        planned.append(phase_weights)
        return plan(*args, phase_weights=phase_weights, **settings)

    def fake(candidates, *, rounds, **_):
        for step in candidates.values():
            step()
        timed.update(candidates)
        seconds = {"dense": 8.0, "low rank": 3.0, "low rank/0": 2.0, "low rank/1": 4.0}
        return {name: [seconds[name]] * rounds for name in candidates}

    monkeypatch.setattr(_request, "make_plan", remember)
    monkeypatch.setattr(_step_times, "time_interleaved", fake)
    callback = RankQuantization(ratio=2.0, method="fixed", when="setup", max_overhead=100.0, exclude=["net.6"])
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        train(Classifier(), [callback, *freezing], tmp_path)
    assert planned[-1] == weights
    phases = {"low rank"} if weights is None else {"low rank/0", "low rank/1"}
    assert timed == {"dense"} | phases
    share = 0.5 if weights is None else weights[0] / sum(weights)
    expected = 2000.0 * share + 4000.0 * (1.0 - share)
    assert f"a whole step takes {expected:.2f} ms instead of 8000.00 ms" in caplog.text


def test_patterns_must_not_be_one_string():
    for settings in ({"include": "net.*"}, {"exclude": "net.6"}):
        with pytest.raises(TypeError, match="must be a list of patterns, such as"):
            RankQuantization(**settings)


# --- the order in which modules run -----------------------------------------------------------------------------------


class Branched(Classifier):
    """Runs its layers in another order than it registers them, and owns a parameter itself."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.scale = nn.Parameter(torch.ones(()))
        self.never = nn.Linear(2, 2)
        self.first = nn.Linear(16, 16)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.scale * self.net(self.first(x)), y)


def test_adaptive_freezing_learns_the_order_in_which_modules_run(tmp_path):
    module, callback = Branched(), SequentialFreezing(mode="adaptive")
    decompose(module, make_plan(module, None, ratio=2.0, method="fixed", include=["net.4"]))
    train(module, [callback], tmp_path, epochs=1)
    assert callback.turns.adaptive.order == ("first", "net.0", "net.1", "net.4", "net.6")
    assert not any(m._forward_pre_hooks for m in module.modules())
    assert callback.state_dict()["adaptive"]["order"] == ["first", "net.0", "net.1", "net.4", "net.6"]


def test_an_error_in_the_step_that_is_watched_leaves_no_hook(tmp_path):
    class Breaks(Branched):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise RuntimeError("broken on purpose")

    module = Breaks()
    decompose(module, make_plan(module, None, ratio=2.0, method="fixed", include=["net.4"]))
    with pytest.raises(RuntimeError, match="broken on purpose"):
        train(module, [SequentialFreezing(mode="adaptive")], tmp_path, epochs=1)
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_compiled_parts_are_not_hooked():
    module = Branched()
    module.run = torch.compile(module.net)
    order = RunningOrder(module)
    assert not any(m._forward_pre_hooks for m in module.modules())
    assert order.stop()[:3] == ("", "net.0", "net.1")


def test_a_settled_prefix_ends_the_backward_pass_early(tmp_path):
    """The first layers rest by the user's learning rate of 0: then no gradient is computed for them or their input."""

    class Watch(Callback):
        def __init__(self):
            self.without_gradient = []

        def on_after_backward(self, trainer, pl_module):
            names = {name for name, p in pl_module.named_parameters() if p.grad is None}
            self.without_gradient.append(names)

    class TwoRates(Classifier):
        def configure_optimizers(self):
            rates = {"net.0": 0.0, "net.1": 0.0, "net.4": 0.0, "net.6": 0.5}
            groups = [{"params": self.net[int(n[4:])].parameters(), "lr": lr} for n, lr in rates.items()]
            return torch.optim.SGD(groups, lr=0.1)

        def training_step(self, batch, batch_idx):
            hidden = self.net[:5](batch[0])
            self.reached.append(hidden.requires_grad)
            return nn.functional.cross_entropy(self.net[5:](hidden), batch[1])

    module, watch = TwoRates(noisy=False), Watch()
    module.reached = []
    decompose(module, make_plan(module, None, ratio=2.0, method="fixed", include=["net.0", "net.4"]))
    train(module, [SequentialFreezing(mode="adaptive", window_steps=2), watch], tmp_path, epochs=2)
    before = {name for name, _ in module.named_parameters() if not name.startswith("net.6")}
    assert watch.without_gradient[0] == set()
    assert watch.without_gradient[-1] == before
    assert (module.reached[0], module.reached[-1]) == (True, False)
    assert all(parameter.requires_grad for parameter in module.parameters())
