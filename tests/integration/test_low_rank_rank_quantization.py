"""What the callback decides, what it leaves alone, and what it says."""

import copy
import logging
import pickle
import threading
import warnings

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, LambdaCallback, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from low_rank_models import Classifier, train
from torch import nn

from lightning_accel import enable_low_rank_loading
from lightning_accel.callbacks import RankQuantization, SequentialFreezing
from lightning_accel.callbacks.layer_exchange import globals_and_closures as _globals_and_closures
from lightning_accel.callbacks.layer_exchange import structure as _structure
from lightning_accel.callbacks.layer_exchange.structure import refuse_sharded
from lightning_accel.callbacks.rank_quantization import decide as _decide
from lightning_accel.callbacks.rank_quantization import decision as _decision
from lightning_accel.callbacks.rank_quantization import request as _request
from lightning_accel.callbacks.rank_quantization import step_times as _step_times
from lightning_accel.callbacks.rank_quantization import switch as _switch
from lightning_accel.low_rank import (
    LowRankLinear,
    RankPlan,
    eligible_layers,
    factorize,
    low_rank_layers,
    make_plan,
    merge,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")


def fake_clock(monkeypatch, seconds_of):
    """Let `time_interleaved` run every candidate once and return what ``seconds_of(name)`` says."""

    def fake(candidates, *, rounds, **_):
        for step in candidates.values():
            step()
        return {name: [seconds_of(name)] * rounds for name in candidates}

    monkeypatch.setattr(_step_times, "time_interleaved", fake)


def fixed(**settings):
    defaults = {"ratio": 2.0, "method": "fixed", "when": "setup", "max_overhead": 100.0, "exclude": ["net.6"]}
    return RankQuantization(**defaults | settings)


def equal_states(one, other):
    assert list(one) == list(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def test_stays_low_rank_where_the_whole_step_is_faster(tmp_path, monkeypatch, caplog):
    fake_clock(monkeypatch, lambda name: 8.0 if name == "dense" else 4.0)
    module, callback = Classifier(), fixed()
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        trainer = train(module, [callback], tmp_path)
    assert set(low_rank_layers(module)) == {"net.0", "net.4"}
    assert (
        "2 layers are low rank now (net.0, net.4): a whole step takes 4000.00 ms instead of 8000.00 ms, x2.00"
        in caplog.text
    )
    assert "12 remaining steps save 48.00 s" in caplog.text
    assert [layer.name for layer in callback.plan.layers if layer.ranks] == ["net.0", "net.4"]
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}


@pytest.mark.parametrize("written", [False, True])
def test_the_switch_takes_what_planning_found_out_only_for_weights_that_are_the_same(written, tmp_path, monkeypatch):
    fake_clock(monkeypatch, lambda name: 8.0 if name == "dense" else 4.0)
    module, sizes, expected = Classifier(), [], {}
    eigh, decompose = torch.linalg.eigh, _switch.decompose

    def watched(module, plan, **settings):
        if written:
            module.net[4].weight.data[0] += 1.0  # which no version counter tells
        expected.update(weight=module.net[4].weight.detach().clone(), ranks=plan.layers[1].ranks)
        sizes.clear()
        names = decompose(module, plan, **settings)
        expected.update(sizes=list(sizes), made=module.net[4].weight.detach().clone())
        return names

    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: sizes.append(len(matrix)) or eigh(matrix))
    monkeypatch.setattr(_switch, "decompose", watched)
    callback = fixed(cache_dir=tmp_path / "times", when=1)
    train(module, [callback], tmp_path)
    assert set(low_rank_layers(module)) == {"net.0", "net.4"}
    assert expected["sizes"] == ([32] if written else [])
    dense = nn.Linear(32, 32)
    dense.weight.data = expected["weight"]
    torch.testing.assert_close(factorize(dense, expected["ranks"]).weight, expected["made"])
    assert callback.decision.shared is None


def test_global_variables_are_searched_only_where_something_unknown_holds_a_weight(tmp_path, monkeypatch):
    fake_clock(monkeypatch, lambda name: 8.0 if name == "dense" else 4.0)
    searched = []
    monkeypatch.setattr(_globals_and_closures, "_places", lambda: searched.append(True) or ())
    module = Classifier()
    train(module, [fixed()], tmp_path)
    assert low_rank_layers(module)
    assert not searched


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "RMSprop"])
def test_trying_leaves_no_trace(optimizer, tmp_path, monkeypatch, caplog):
    settings = {"lr": 0.01}
    plain = Classifier(optimizer=optimizer, settings=settings)
    plain_trainer = train(plain, [], tmp_path)
    fake_clock(monkeypatch, lambda name: 1.0 if name == "dense" else 2.0)
    module = Classifier(optimizer=optimizer, settings=settings)
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        trainer = train(module, [fixed()], tmp_path)
    assert "the model stays dense: low rank does not pay" in caplog.text
    assert equal_states(plain.state_dict(), module.state_dict())
    assert (plain.steps, plain.seen) == (module.steps, module.seen)
    for one, other in zip(plain.parameters(), module.parameters(), strict=True):
        for key, value in plain_trainer.optimizers[0].state[one].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(trainer.optimizers[0].state[other][key]))


def test_layers_that_do_not_pay_are_reverted(tmp_path, monkeypatch):
    # as a whole slower; without the group 0 ("net.0") twice as fast as dense
    times = {"dense": 2.0, "all": 2.5, "without 0": 1.0, "without 1": 3.0}
    calls = []

    def seconds(name):
        calls.append(name)
        if name == "low rank":
            return 1.0 if "without 0" in calls else 2.5
        if name == "all" and calls.count("all") > 1:
            return 1.0
        return times[name]

    fake_clock(monkeypatch, seconds)
    module, callback = Classifier(), fixed()
    train(module, [callback], tmp_path)
    assert set(low_rank_layers(module)) == {"net.4"}
    (reverted,) = [layer for layer in callback.plan.layers if layer.name == "net.0"]
    assert "costs time in the whole step" in reverted.reason


def test_stays_dense_where_set_up_is_not_paid_back(tmp_path, monkeypatch, caplog):
    fake_clock(monkeypatch, lambda name: 2e-7 if name == "dense" else 1e-7)
    module = Classifier()
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        train(module, [fixed()], tmp_path)
    assert not low_rank_layers(module)
    assert "more than 12 remaining steps can be expected to give back" in caplog.text or "pay back" in caplog.text


@pytest.mark.parametrize(("min_energy", "expected"), [(0.0, {"net.0", "net.4", "net.6"}), (1.0, set())])
def test_theoretical_ranks_are_taken_where_measuring_takes_too_long(
    min_energy, expected, tmp_path, monkeypatch, caplog
):
    fake_clock(monkeypatch, lambda name: 8.0 if name == "dense" else 4.0)
    monkeypatch.setattr(_request, "_STEPS_TO_PLAN", 1e6)
    monkeypatch.setattr(_request, "_SECONDS_A_LAYER", 1e6)
    module = Classifier()
    callback = RankQuantization(when="setup", min_energy=min_energy, max_overhead=20.0)
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        train(module, [callback], tmp_path)
    assert set(low_rank_layers(module)) == expected
    assert callback.plan.method == "snapped"
    assert "so theoretical ranks are taken" in caplog.text
    if not expected:
        assert "because they would retain less than min_energy=1 of their energy: lower it" in caplog.text
        assert {layer.reason for layer in callback.plan.layers} >= {"retains less than 100% of its energy"}


def test_neither_making_the_callback_nor_leaving_a_short_run_alone_draws_random_numbers(tmp_path):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    callback = RankQuantization()
    assert torch.equal(torch.get_rng_state(), state)

    def states(*callbacks):
        seen = []
        watch = LambdaCallback(on_train_batch_start=lambda *_: seen.append(torch.get_rng_state()))
        module = Classifier()
        torch.manual_seed(1)
        train(module, [*callbacks, watch], tmp_path)
        return seen

    assert all(torch.equal(a, b) for a, b in zip(states(callback), states(), strict=True))
    assert callback.structure_state() == "dense"


@pytest.mark.parametrize(("low_rank", "rounds"), [(7.9, [2, 3]), (4.0, [2, 3, 5, 3, 5])])
def test_a_trial_that_promises_nothing_ends_early(low_rank, rounds, tmp_path, monkeypatch, caplog):
    asked = []

    def fake(candidates, *, rounds, **_):
        asked.append(rounds)
        return {name: [8.0 if name == "dense" else low_rank] * rounds for name in candidates}

    monkeypatch.setattr(_step_times, "time_interleaved", fake)
    monkeypatch.setattr(_decide, "_GAIN_TO_GO_ON", 5.0)  # of 12 steps
    monkeypatch.setattr(_request.RankRequest, "planning_seconds", lambda *_: 1920.0)  # all that 12 steps may take
    module = Classifier()
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        train(module, [RankQuantization(when="setup", min_energy=0.0, max_overhead=20.0)], tmp_path)
    assert asked == rounds
    assert bool(low_rank_layers(module)) == (low_rank == 4.0)
    assert f"with unmeasured ranks a whole step takes {1000 * low_rank:.2f} ms instead of 8000.00 ms" in caplog.text


def test_a_trial_of_theoretical_ranks_ends_early_where_they_are_no_faster(tmp_path, monkeypatch):
    asked = []

    def fake(candidates, *, rounds, **_):
        asked.append(rounds)
        return {name: [8.0 if name == "dense" else 8.1] * rounds for name in candidates}

    monkeypatch.setattr(_step_times, "time_interleaved", fake)
    monkeypatch.setattr(_request.RankRequest, "planning_seconds", lambda *_: 1e9)
    module = Classifier()
    train(module, [RankQuantization(when="setup", min_energy=0.0, max_overhead=20.0)], tmp_path)
    assert asked == [2, 3]
    assert not low_rank_layers(module)


@pytest.mark.parametrize(("ratio", "looked"), [(2.0, False), (8.0, True)])
def test_a_first_look_is_left_out_where_no_gain_that_the_entries_promise_pays_for_measuring(
    ratio, looked, tmp_path, monkeypatch
):
    asked = []

    def fake(candidates, *, rounds, **_):
        asked.append(rounds)
        return {name: [8.0 if name == "dense" else 4.0] * rounds for name in candidates}

    monkeypatch.setattr(_step_times, "time_interleaved", fake)
    monkeypatch.setattr(_decide, "_GAIN_TO_GO_ON", 0.1)
    monkeypatch.setattr(_decide, "_STEPS_OF_TRIALS", 0.0)
    monkeypatch.setattr(_decision, "too_short", lambda *_, **__: None)
    monkeypatch.setattr(_request.RankRequest, "planning_seconds", lambda *_: 12 * 8.0 * 0.3)  # of the steps that remain
    train(Classifier(), [RankQuantization(ratio, when="setup", min_energy=0.0, max_overhead=0.0)], tmp_path)
    assert asked == [2, *([3, 5] if looked else []), 3, 5]


@pytest.mark.parametrize("freezing", [False, True])
def test_short_run_whose_layers_gain_nothing_tries_no_step(freezing, tmp_path, monkeypatch, caplog):
    timed = []

    def fake(candidates, *, rounds, **_):
        timed.append(list(candidates))
        for call in candidates.values():
            call()
        return {name: [8.0 if name == "dense" else 7.9] * rounds for name in candidates}

    monkeypatch.setattr(_step_times, "time_interleaved", fake)
    module = Classifier()
    before = copy.deepcopy(module.state_dict())
    callbacks = [RankQuantization(when="setup", max_overhead=2.0), *([SequentialFreezing()] if freezing else [])]
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        train(module, callbacks, tmp_path)
    assert timed == [["dense", "low rank/0", "low rank/1"] if freezing else ["dense", "low rank"]]
    assert not low_rank_layers(module)
    assert "its layers alone take 7900.00 ms with theoretical ranks and 8000.00 ms dense" in caplog.text
    plain = Classifier()
    plain.load_state_dict(before)
    train(plain, [], tmp_path)
    assert equal_states(module.state_dict(), plain.state_dict())


def test_short_run_is_not_even_tried(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(_step_times, "time_interleaved", lambda *_, **__: pytest.fail("nothing is to be timed"))
    module = Classifier()
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        train(module, [RankQuantization(when="setup")], tmp_path)
    assert not low_rank_layers(module)
    assert "the model stays dense: 12 steps remain" in caplog.text


def test_keep_overrides_the_loss(tmp_path, monkeypatch):
    fake_clock(monkeypatch, lambda name: 1.0 if name == "dense" else 2.0)
    module = Classifier()
    train(module, [fixed(on_loss="keep")], tmp_path)
    assert set(low_rank_layers(module)) == {"net.0", "net.4"}


def test_measured_knapsack_runs_in_a_fit(tmp_path):
    module = Classifier(width=64)
    callback = RankQuantization(energy=0.9, when="setup", on_loss="keep", cache_dir=tmp_path / "cache")
    train(module, [callback], tmp_path)
    assert callback.plan.method == "knapsack"
    assert all(layer.dense_ms is not None for layer in callback.plan.considered if layer.candidates)
    assert list((tmp_path / "cache").glob("*.json"))
    chosen = {layer.name: layer.ranks for layer in callback.plan.layers if layer.ranks is not None}
    assert {name: layer.ranks for name, layer in low_rank_layers(module).items()} == chosen


def test_saved_plan_repeats_the_run(tmp_path):
    first, callback = Classifier(), fixed(on_loss="keep")
    train(first, [callback], tmp_path)
    callback.plan.save(tmp_path / "plan.json")
    again, repeat = Classifier(), RankQuantization(plan=str(tmp_path / "plan.json"))
    train(again, [repeat], tmp_path)
    assert equal_states(first.state_dict(), again.state_dict())
    assert repeat.plan == callback.plan


@pytest.mark.parametrize("merged", [[], ["net.4"]])
def test_a_plan_goes_on_with_layers_that_are_low_rank_already(merged, tmp_path, caplog):
    module, callback = Classifier(), fixed(on_loss="keep")
    train(module, [callback], tmp_path)
    merge(module, merged)
    kept = {name: layer.factor_in for name, layer in low_rank_layers(module).items()}
    with caplog.at_level(logging.INFO):
        train(module, [RankQuantization(plan=callback.plan, when=0)], tmp_path)
    layers = low_rank_layers(module)
    assert set(layers) == {layer.name for layer in callback.plan.layers if layer.ranks is not None}
    assert all(layers[name].factor_in is factor for name, factor in kept.items())
    assert f"{len(merged) or len(layers)} layers are low rank now" in caplog.text


def test_plan_of_another_model_leaves_the_module_as_it_was(tmp_path):
    other = make_plan(Classifier(width=48), None, ratio=2.0, method="fixed")
    module = Classifier()
    with pytest.raises(ValueError, match="the plan was made for"):
        train(module, [RankQuantization(plan=other)], tmp_path)
    assert not low_rank_layers(module)


def test_untrained_weights_warn_at_setup(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(Classifier(trained=False), [fixed(on_loss="keep")], tmp_path)
    assert any("weights that look untrained" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(("trained", "low_rank_after"), [(True, 1), (False, 2)])
def test_auto_warms_up_untrained_weights_only(trained, low_rank_after, tmp_path):
    module = Classifier(trained=trained)
    train(module, [fixed(when="auto", on_loss="keep")], tmp_path, epochs=1)
    assert bool(low_rank_layers(module)) == (low_rank_after == 1)
    module = Classifier(trained=trained)
    train(module, [fixed(when="auto", on_loss="keep")], tmp_path, epochs=2)
    assert low_rank_layers(module)


def test_switch_that_never_comes_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        train(Classifier(), [fixed(when=5)], tmp_path, epochs=1)
    assert "training ended before epoch 5" in caplog.text


def test_switch_projects_moments(tmp_path):
    class Seen(RankQuantization):
        states = None

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before = self.structure_state()
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if before == "pending" and self.structure_state() == "low rank":
                optimizer = trainer.optimizers[0]
                self.states = [sorted(optimizer.state[p]) for p in pl_module.net[0].parameters()]

    callback = Seen(ratio=2.0, method="fixed", when=1, on_loss="keep")
    train(Classifier(optimizer="AdamW", settings={"lr": 0.01}), [callback], tmp_path, epochs=2)
    assert callback.states == [["exp_avg", "exp_avg_sq", "step"]] * 3


def test_manual_optimization_is_judged_by_layers(tmp_path, caplog):
    module = Classifier(manual=True)
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        train(module, [fixed(on_loss="keep")], tmp_path)
    assert low_rank_layers(module)
    assert "judged by single layers" in caplog.text
    assert "manual optimization" in caplog.text


def test_module_that_can_not_be_copied_is_judged_by_layers(tmp_path, caplog):
    module = Classifier()
    module.not_to_be_copied = (number for number in range(3))
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        train(module, [fixed(on_loss="keep")], tmp_path)
    assert low_rank_layers(module)
    assert "a copy of the module can not make its training step" in caplog.text
    assert module.steps == 12


def test_module_that_keeps_its_last_loss_is_tried(tmp_path, caplog):
    class Keeping(Classifier):
        def training_step(self, batch, batch_idx):
            self.last = super().training_step(batch, batch_idx)["loss"]
            return self.last

    module = Keeping()
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        train(module, [fixed(on_loss="keep", when=1)], tmp_path)
    assert low_rank_layers(module)
    assert "a whole step takes" in caplog.text


class AsksForType(Classifier):
    """Goes another way, a wrong one, where a layer is not what it made."""

    def __init__(self, layers, manual):
        super().__init__(manual=manual)
        self.asked = layers

    def training_step(self, batch, batch_idx):
        if not all(type(self.net[index]) is torch.nn.Linear for index in self.asked):
            raise RuntimeError("shapes cannot be multiplied")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize(("asked", "low_rank"), [((0,), {"net.4"}), ((0, 4), set())])
def test_layers_whose_type_the_model_asks_for_stay_dense(asked, low_rank, manual, tmp_path, caplog):
    module = AsksForType(asked, manual)
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        train(module, [fixed(on_loss="keep")], tmp_path)
    assert set(low_rank_layers(module)) == low_rank
    assert "net.0 stays dense, because the training step fails with it low rank: RuntimeError: shapes" in caplog.text
    assert ("with any of its layers low rank" in caplog.text) == (not low_rank)


@pytest.mark.parametrize("manual", [False, True])
def test_layers_that_a_step_differentiates_with_respect_to_stay_dense(manual, tmp_path, caplog):
    class Balances(Classifier):
        """Weighs its losses by their gradients at one weight, as adversarial autoencoders do."""

        def training_step(self, batch, batch_idx):
            loss = self.net(batch[0]).square().mean()
            torch.autograd.grad(loss, self.net[4].weight, retain_graph=True)
            return super().training_step(batch, batch_idx)

    module = Balances(manual=manual)
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        train(module, [fixed(on_loss="keep")], tmp_path)
    assert set(low_rank_layers(module)) == {"net.0"}
    assert "net.4 stays dense, because the training step fails with it low rank: RuntimeError: " in caplog.text
    assert module.steps == 12, "a trial leaves no trace in the module"


def test_failure_that_could_not_be_tried_before_is_explained(tmp_path, caplog):
    class Narrow(Classifier):
        def __init__(self):
            super().__init__(manual=True)
            self.lock = threading.Lock()  # which can not be copied

        def training_step(self, batch, batch_idx):
            if type(self.net[4]) is not torch.nn.Linear:
                self.net[4](torch.zeros(2, 3))
            return super().training_step(batch, batch_idx)

    module = Narrow()
    with caplog.at_level(logging.ERROR, logger="lightning_accel"), pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(module, [fixed(on_loss="keep")], tmp_path)
    assert "the first step with low-rank layers failed in net.4: mat1 and mat2 shapes" in caplog.text
    assert "exclude=[...]" in caplog.text
    assert "Low rank are: net.0, net.4" in caplog.text


def test_later_failure_is_not_explained(tmp_path, caplog):
    class FailsLate(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("on its own")
            return super().training_step(batch, batch_idx)

    with caplog.at_level(logging.ERROR, logger="lightning_accel"), pytest.raises(RuntimeError, match="on its own"):
        train(FailsLate(), [fixed(on_loss="keep")], tmp_path)
    assert "the first step with low-rank" not in caplog.text


def test_layers_that_fail_together_stay_dense_together(tmp_path, caplog):
    class AsksForOneOfTwo(Classifier):
        def training_step(self, batch, batch_idx):
            if not any(type(self.net[index]) is torch.nn.Linear for index in (0, 4)):
                raise RuntimeError("no dense layer left")
            return super().training_step(batch, batch_idx)

    module = AsksForOneOfTwo()
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        train(module, [fixed(on_loss="keep")], tmp_path)
    assert not low_rank_layers(module)
    assert "net.4 stays dense, because the training step fails with it low rank: RuntimeError: no dense" in caplog.text


def test_orphans_stay_dense(tmp_path, caplog):
    class Partly(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[4:].parameters(), lr=0.1)

    module = Partly()
    with caplog.at_level(logging.WARNING, logger="lightning_accel"):
        train(module, [fixed(on_loss="keep")], tmp_path)
    assert set(low_rank_layers(module)) == {"net.4"}
    assert "no optimizer holds the weights of ['net.0']" in caplog.text


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_layers_made_late_are_found(hook, tmp_path):
    class Late(Classifier):
        def make(self):
            if len(self.net) == 7:
                self.net.insert(6, nn.Linear(32, 32))

        def setup(self, stage):
            if hook == "setup":
                self.make()

        def configure_model(self):
            if hook == "configure_model":
                self.make()

    module = Late()
    train(module, [fixed(on_loss="keep", exclude=["net.7"])], tmp_path)
    assert set(low_rank_layers(module)) == {"net.0", "net.4", "net.6"}


def test_groups_chosen_by_name_resume_exactly(tmp_path):
    class ByName(Classifier):
        def configure_optimizers(self):
            decayed = [p for name, p in self.named_parameters() if name.endswith("weight")]
            others = [p for name, p in self.named_parameters() if not name.endswith("weight")]
            groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
            return torch.optim.AdamW(groups, lr=0.01)

    every = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    module = ByName()
    trainer = train(module, [fixed(on_loss="keep"), every], tmp_path, enable_checkpointing=True)
    assert isinstance(module.net[0], LowRankLinear)
    decayed = {id(p) for p in trainer.optimizers[0].param_groups[0]["params"]}
    assert {id(module.net[0].factor_in), id(module.net[0].factor_out)} <= decayed

    resumed = ByName()
    resumed_trainer = train(resumed, [fixed(on_loss="keep")], tmp_path, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert equal_states(module.state_dict(), resumed.state_dict())
    one, other = trainer.optimizers[0].state_dict(), resumed_trainer.optimizers[0].state_dict()
    assert one["param_groups"] == other["param_groups"]
    assert all(torch.equal(one["state"][i]["exp_avg"], other["state"][i]["exp_avg"]) for i in one["state"])


def test_optimizer_built_before_the_trainer_keeps_every_parameter(tmp_path):
    class Prepared(Classifier):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.prepared = [torch.optim.SGD(self.parameters(), lr=0.1)]

        def configure_optimizers(self):
            return self.prepared[0]

    module = Prepared()
    last = ModelCheckpoint(dirpath=tmp_path, filename="last")
    train(module, [fixed(on_loss="keep"), last], tmp_path, enable_checkpointing=True)
    again = Prepared()
    trainer = train(again, [fixed(on_loss="keep")], tmp_path, epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert low_rank_layers(again)
    for fitted in (module, again):
        held = {id(p) for group in fitted.prepared[0].param_groups for p in group["params"]}
        assert held == {id(p) for p in fitted.parameters()}
    assert trainer.current_epoch == 3


@pytest.mark.parametrize("order", ["before", "behind"])
@pytest.mark.parametrize("when", ["setup", 1])
def test_weight_average_follows_and_resumes_exactly(order, when, tmp_path):
    def callbacks():
        pair = [EMAWeightAveraging(decay=0.5), fixed(when=when, on_loss="keep")]
        return pair if order == "before" else pair[::-1]

    every = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    whole = Classifier(noisy=False)
    train(whole, [*callbacks(), every], tmp_path, epochs=3, enable_checkpointing=True)
    assert low_rank_layers(whole)
    for epoch in (0, 1):
        resumed = Classifier(noisy=False)
        train(resumed, callbacks(), tmp_path, epochs=3, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert equal_states(whole.state_dict(), resumed.state_dict())


def test_activation_weighting_uses_the_real_inputs(tmp_path):
    module, callback = Classifier(), fixed(weighting="activation", on_loss="keep")
    train(module, [callback], tmp_path)
    assert callback.plan.weighting == "activation"
    assert low_rank_layers(module)
    again = Classifier()
    train(again, [RankQuantization(plan=callback.plan, when=0)], tmp_path)
    assert set(low_rank_layers(again)) == set(low_rank_layers(module))


def test_nan_weights_are_an_error_and_change_nothing(tmp_path):
    module = Classifier()
    with torch.no_grad():
        module.net[4].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN|nan|finite"):
        train(module, [fixed(on_loss="keep")], tmp_path)
    assert not low_rank_layers(module)


def test_hand_made_layers_are_kept_and_the_rest_considered(tmp_path):
    module = Classifier()
    module.net[4] = LowRankLinear(32, 32, 4)
    made = module.net[4]
    train(module, [fixed(on_loss="keep")], tmp_path)
    assert module.net[4] is made
    assert set(low_rank_layers(module)) == {"net.0", "net.4"}


def test_callback_is_copyable_and_picklable(tmp_path):
    callback = fixed(on_loss="keep")
    train(Classifier(), [callback], tmp_path)
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert twin.plan == callback.plan
        module = Classifier()
        train(module, [twin], tmp_path)
        assert low_rank_layers(module)


def test_fitted_module_is_copyable_and_picklable(tmp_path):
    module = Classifier()
    train(module, [fixed(on_loss="keep")], tmp_path)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        twin.load_state_dict(module.state_dict())
        twin.load_state_dict(Classifier().state_dict())
        assert not low_rank_layers(twin)
        assert low_rank_layers(module)


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_sharding_strategies_are_refused(strategy):
    with pytest.raises(MisconfigurationException, match=r"strategy='ddp' or one device"):
        refuse_sharded(strategy(), "RankQuantization")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"when": -1}, "`when` must be"),
        ({"when": True}, "`when` must be"),
        ({"when": "later"}, "`when` must be"),
        ({"on_loss": "cry"}, "`on_loss` must be"),
        ({"max_overhead": -0.1}, "`max_overhead` must be >= 0"),
        ({"ratio": 2.0, "energy": 0.9}, "exactly one of"),
        ({"ratio": 0.5}, "`ratio` must be > 1"),
        ({"energy": 1.5}, "`energy` must be in"),
        ({"method": "guess"}, "`method` must be"),
        ({"method": "paper", "energy": 0.9}, "needs `ratio`"),
        ({"min_energy": 2.0}, "`min_energy` must be in"),
        ({"weighting": "heavy"}, "`weighting` must be"),
    ],
)
def test_constructor_says_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        RankQuantization(**settings)


def test_plan_file_without_a_plan_is_refused(tmp_path):
    (tmp_path / "no.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="no rank plan"):
        RankQuantization(plan=tmp_path / "no.json")


def test_defaults_are_those_of_the_configuration_file():
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    with initialize_config_module("lightning_accel.conf", version_base="1.3"):
        config = compose(overrides=["+callbacks=[rank_quantization]"])
    composed, plain = instantiate(config.callbacks.rank_quantization), RankQuantization()
    assert vars(composed) == vars(plain)


@pytest.mark.parametrize("override", ["ratio=3.0", "energy=0.9", "speedup=1.5"])
def test_one_override_of_the_target_is_enough(override):
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    with initialize_config_module("lightning_accel.conf", version_base="1.3"):
        config = compose(overrides=["+callbacks=[rank_quantization]", f"callbacks.rank_quantization.{override}"])
    search = instantiate(config.callbacks.rank_quantization).decision.request
    name, _, value = override.partition("=")
    assert {n: getattr(search, n) for n in ("ratio", "energy", "speedup") if getattr(search, n) is not None} == {
        name: float(value)
    }


def test_every_planned_layer_is_eligible():
    module = Classifier()
    plan = make_plan(module, None, ratio=2.0, method="fixed")
    assert isinstance(plan, RankPlan)
    assert {layer.name for layer in plan.considered} == set(eligible_layers(module)[0])


def test_strategy_that_can_not_switch_needs_a_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(_structure, "_SWITCHING", set())
    for callback in (RankQuantization(), fixed(), fixed(on_loss="keep", when=1)):
        with pytest.raises(MisconfigurationException, match="Pass `plan=`"):
            train(Classifier(), [callback], tmp_path)
    plan = make_plan(Classifier(), None, ratio=2.0, method="fixed")
    for callback in (fixed(on_loss="keep"), RankQuantization(plan=plan, when="setup")):
        module = Classifier()
        trainer = train(module, [callback], tmp_path)
        assert set(low_rank_layers(module)) >= {"net.0", "net.4"}
        held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        assert held == {id(p) for p in module.parameters()}


@pytest.mark.slow
def test_spawned_process_hands_low_rank_layers_back(tmp_path):
    plan = make_plan(Classifier(), None, ratio=2.0, method="fixed")
    with pytest.raises(Exception, match="enable_low_rank_loading"):
        train(Classifier(), [RankQuantization(plan=plan)], tmp_path, strategy="ddp_spawn", devices=1)
    module = enable_low_rank_loading(Classifier())
    train(module, [RankQuantization(plan=plan)], tmp_path, strategy="ddp_spawn", devices=1)
    assert set(low_rank_layers(module)) == {"net.0", "net.4", "net.6"}


def test_step_that_can_not_be_tried_is_watched_once_under_accumulation(tmp_path, monkeypatch, caplog):
    seconds = []
    judge = _decision.decide_by_layers

    def spy(terms, module, inputs, step_seconds, because):
        seconds.append(step_seconds)
        return judge(terms, module, inputs, step_seconds, because)

    monkeypatch.setattr(_decision, "decide_by_layers", spy)
    module = Classifier()
    module.not_to_be_copied = (number for number in range(3))
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        train(module, [fixed(on_loss="keep")], tmp_path, accumulate_grad_batches=3)
    assert low_rank_layers(module)
    assert len(seconds) == 1
    assert 0.0 < seconds[0] < 60.0, "the time of one step, not of the clock"


def test_optimizer_that_keeps_one_direction_for_all_parameters_leaves_the_model_dense(tmp_path):
    plain = Classifier(optimizer="LBFGS", settings={"lr": 0.1, "max_iter": 2}, noisy=False)
    train(plain, [], tmp_path / "plain")
    module = Classifier(optimizer="LBFGS", settings={"lr": 0.1, "max_iter": 2}, noisy=False)
    callback = fixed(on_loss="keep")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(module, [callback], tmp_path / "low rank")
    assert any("leaves Classifier dense: LBFGS keeps directions" in str(w.message) for w in caught)
    assert "LBFGS" in callback.plan.reason
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))


def test_no_memory_for_a_second_copy_leaves_the_run_alone(tmp_path, monkeypatch, caplog):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(_step_times, "time_interleaved", exhausted)
    plain, module = Classifier(), Classifier()
    train(plain, [], tmp_path)
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        train(module, [fixed()], tmp_path)
    assert "stays dense: memory does not suffice" in caplog.text
    assert equal_states(plain.state_dict(), module.state_dict())
