"""What projections leave alone, and what they say: layers live, requests that a fit cannot meet are told."""

import copy
import logging

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.callbacks import L1InfProjection, MultilevelProjection
from lightning_accel.callbacks.projection import roles
from lightning_accel.projection import project_l1inf

BOTH = pytest.mark.parametrize("kind", [L1InfProjection, MultilevelProjection])
x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))


class Net(LightningModule):
    def __init__(self, net=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = net or nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch, _):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, _):
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-2)


def fit(net, *callbacks, epochs=2, validate=False, batch_size=8, **settings):
    data = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1.0 if validate else 0,
        **settings,
    )
    trainer.fit(net, data, data)
    return trainer


def zero_rows(net):
    return [int((m.weight == 0).all(1).sum()) for m in net.net if isinstance(m, nn.Linear)]


@BOTH
def test_without_arguments_half_of_the_hidden_rows_go_and_no_class(kind):
    net = Net()
    fit(net, kind())
    assert zero_rows(net) == [8, 4, 0]


@BOTH
@pytest.mark.parametrize("options", [{"target_sparsity": 1.0}, {"radius": 0.0}, {"radius_fraction": 0.0}])
@pytest.mark.parametrize("floor", [1, 3])
def test_the_floor_keeps_layers_alive(kind, options, floor):
    net = Net()
    fit(net, kind(**options, parameters="*weight", min_groups=floor))
    assert zero_rows(net) == [16 - floor, 8 - floor, 3 - min(floor, 3) if floor < 3 or "radius" in str(options) else 0]


@pytest.mark.parametrize("method", ["bilevel", "exact"])
@pytest.mark.parametrize("schedule", [None, "constant"])
def test_a_shared_budget_keeps_the_floor_of_every_layer(method, schedule):
    net = Net()
    with torch.no_grad():
        net.net[2].weight.mul_(1e-3)
    options = {"scope": "global", "method": method, "schedule": schedule, "min_groups": 2}
    fit(net, L1InfProjection(target_sparsity=0.6, **options))
    zero = zero_rows(net)
    assert zero[1] <= 6
    assert zero[0] <= 14
    assert zero[0] + zero[1] == round(0.6 * 24)


def test_ties_do_not_overshoot_a_target():
    net = Net()
    with torch.no_grad():
        for layer in (net.net[0], net.net[2]):
            layer.weight.copy_(layer.weight.sign() * 0.25)
    fit(net, L1InfProjection(target_sparsity=0.5, at_end=True), max_steps=1)
    assert zero_rows(net)[:2] == [8, 4] or max(zero_rows(net)[:2]) <= 8


def test_an_identity_of_equal_rows_keeps_what_was_not_asked_for():
    net = Net()
    nn.init.eye_(net.net[2].weight)
    before = net.net[2].weight.detach().clone()
    net.net[2].weight.register_hook(torch.zeros_like)
    fit(net, L1InfProjection(target_sparsity=0.5, parameters="net.2.weight", schedule="constant"))
    assert zero_rows(net)[1] == 4
    assert torch.equal(before.ne(0).sum(1), torch.ones(8, dtype=torch.long))


def test_what_is_left_alone_is_said(caplog):
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        fit(Net(nn.Sequential(nn.Linear(12, 1), nn.Linear(1, 8), nn.Linear(8, 3))), L1InfProjection())
    assert "leaves alone net.0.weight (only 1 group), net.2.weight (writes the model's output)." in caplog.text


def test_levels_with_columns_outermost_clear_and_count_columns(caplog):
    net = Net()
    fit(net, MultilevelProjection(target_sparsity=0.5, norms=("l1", "linf"), dims=((1,), (0,))))
    assert [int((net.net[k].weight == 0).all(0).sum()) for k in (0, 2)] == [6, 8]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


class Complex(nn.Module):
    """Reads as complex numbers what has another layer before it, and one behind it."""

    def __init__(self):
        super().__init__()
        self.waves = nn.Linear(12, 16, dtype=torch.complex64)
        self.net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, features):
        return self.net(self.waves(features.to(torch.complex64)).abs())


IMAGES = (
    nn.Unflatten(1, (1, 3, 4)),
    nn.Conv2d(1, 8, 2),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(48, 6),
    nn.Linear(6, 3),
)
UNKNOWN = {
    "numbers": (Complex, {}, "net.waves.weight (holds complex64 numbers)", "net.net.0"),
    "levels": (
        lambda: nn.Sequential(*copy.deepcopy(IMAGES)),
        {"norms": ("l1", "l1", "linf"), "dims": ((0,), (1,), (2, 3))},
        "net.4.weight (is 2-dimensional, and `dims` name 4)",
        "net.1",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("asked", [{}, {"parameters": "*weight"}])
def test_weights_that_have_no_projection_are_left_alone_and_named(name, asked, caplog):
    make, settings, said, projected = UNKNOWN[name]
    net = Net(make())
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        fit(net, MultilevelProjection(target_sparsity=0.5, **settings, **asked))
    assert said in caplog.text
    assert int((net.get_submodule(projected).weight == 0).flatten(1).all(1).sum()) == 4


@pytest.mark.parametrize("epochs", [1, 3])
def test_layers_that_are_never_called_are_left_alone_and_named(epochs, caplog):
    net = Net()
    net.unused = nn.Linear(5, 5)
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        fit(net, L1InfProjection(), epochs=epochs)
    assert zero_rows(net) == [8, 4, 0]
    assert "unused.weight (took no part in the steps of its first epoch)" in caplog.text
    assert int((net.unused.weight == 0).sum()) == 0


def test_in_a_long_epoch_few_steps_are_watched_and_a_layer_that_comes_late_is_found(monkeypatch):
    class Late(Net):
        def training_step(self, batch, batch_idx):
            self.extra = nn.functional.relu(self.more(batch[0])) if batch_idx >= 20 else batch[0]
            return nn.functional.cross_entropy(self.net(self.extra), batch[1])

    net, watched = Late(), []
    net.more, net.unused = nn.Linear(12, 12), nn.Linear(5, 5)
    look = roles.OutputLayers
    monkeypatch.setattr(
        roles, "OutputLayers", lambda module: (watched.append(module.trainer.fit_loop.batch_idx), look(module))[1]
    )
    fit(net, L1InfProjection(), batch_size=1, epochs=2)
    assert watched == [*range(16), 26, 39, 52], "of 64 steps"
    assert int((net.more.weight == 0).all(1).sum()) == 6
    assert int((net.unused.weight == 0).sum()) == 0


def test_a_model_of_one_layer_trains_plainly_with_a_warning(caplog):
    plain = Net(nn.Sequential(nn.Linear(12, 3)))
    net = copy.deepcopy(plain)
    fit(net, L1InfProjection())
    fit(plain)
    assert torch.equal(net.net[0].weight, plain.net[0].weight)
    assert "projects nothing. It leaves alone net.0.weight (writes the model's output)." in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"end_step": 100}, "`end_step`=100 lies beyond this fit of 16 optimizer steps, which ends at 41% of the way"),
        ({"start_step": 100}, "`start_step`=100 is not before the end of this fit of 16 optimizer steps"),
        ({"every_n_steps": 50}, "`every_n_steps`=50 is more than this fit of 16 optimizer steps"),
        ({"every_n_epochs": 5}, "`every_n_epochs`=5 is more than this fit of 2 epochs"),
        (
            {"mode": "project_then_retrain", "retrain_epoch": 7},
            "`retrain_epoch`=7 never begins in this fit of 2 epochs",
        ),
        ({"parameters": ["net.0.*", "nowhere*"]}, "No parameter fits 'nowhere*'"),
    ],
)
def test_a_request_that_a_fit_is_too_short_for_is_told_once(options, said, caplog):
    with caplog.at_level(logging.WARNING, logger="lightning_accel"):
        fit(Net(), L1InfProjection(target_sparsity=0.5, **options))
    assert said in caplog.text
    assert len([r for r in caplog.records if r.name.startswith("lightning_accel")]) == 1


def test_a_fit_that_stops_early_says_how_far_the_projection_came(caplog):
    stop = EarlyStopping("loss", patience=0, mode="max")
    fit(Net(), L1InfProjection(), stop, epochs=10)
    assert "of the way to the full projection, with " in caplog.text


class Thaw(BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.net[0])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net[0], optimizer, lr=1e-2)


@pytest.mark.parametrize("thaw_first", [True, False])
@pytest.mark.parametrize("parameters", [None, "net.0.weight"])
def test_layers_that_are_thawed_later_are_projected_from_then_on(thaw_first, parameters):
    net, mine = Net(), L1InfProjection(radius=0.5, parameters=parameters)
    fit(net, *((Thaw(), mine) if thaw_first else (mine, Thaw())), epochs=3)
    assert float(net.net[0].weight.detach().abs().amax(1).sum()) <= 0.5


@pytest.mark.parametrize("parameters", [None, "*weight"])
def test_lazy_layers_join_when_they_have_a_shape(parameters):
    lazy = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3))
    net = Net(lazy)
    fit(net, L1InfProjection(target_sparsity=0.5, parameters=parameters))
    assert zero_rows(net)[:2] == [8, 4]


@pytest.mark.parametrize("when", [{"at_end": True}, {"every_n_steps": 7}, {"every_n_epochs": 3}, {}])
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("limit", [{"epochs": 4}, {"epochs": 9, "max_steps": 20}])
def test_the_last_checkpoint_is_projected_in_every_mode(when, validate, limit, tmp_path):
    net = Net()
    last = ModelCheckpoint(tmp_path, save_last=True)
    trainer = fit(net, L1InfProjection(target_sparsity=0.5, **when), last, validate=validate, **limit)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    for name in ("last.ckpt", "after.ckpt"):
        saved = torch.load(tmp_path / name, weights_only=False)["state_dict"]
        assert [int((saved[f"net.{i}.weight"] == 0).all(1).sum()) for i in (0, 2, 4)] == [8, 4, 0], name
        assert all(torch.equal(saved[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize("order", ["abe", "aeb", "eab"])
def test_two_callbacks_and_an_average_keep_apart(order, tmp_path):
    net = Net()
    parts = {
        "a": L1InfProjection(target_sparsity=0.5, parameters="net.0.weight"),
        "b": L1InfProjection(target_sparsity=0.75, parameters="net.2.weight"),
        "e": EMAWeightAveraging(decay=0.9),
    }
    trainer = fit(net, *(parts[c] for c in order), validate=True, epochs=3)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=False)["state_dict"]
    assert zero_rows(net)[:2] == [8, 6]
    assert all(torch.equal(saved[k], v) for k, v in net.state_dict().items())


def test_two_callbacks_of_one_selection_have_states_of_their_own():
    first, second = L1InfProjection(1.0), L1InfProjection(2.0)
    assert first.state_key != second.state_key
    assert first.state_key == L1InfProjection(1.0).state_key
    fit(Net(), first, second)


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.slow
def test_compiled_models_are_sorted_out_in_one_eager_step():
    net = Net()
    net.net.compile()
    fit(net, L1InfProjection())
    assert zero_rows(net) == [8, 4, 0]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(x, x[:, :3].argmax(1)))


@pytest.mark.parametrize(
    "options", [{"start_step": 2}, {"end_step": 8}, {"every_n_steps": 2}, {"radius_fraction": 0.5}]
)
def test_a_request_is_no_complaint_where_the_length_of_the_fit_is_unknown(options, caplog):
    target = {} if "radius_fraction" in options else {"target_sparsity": 0.5}
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    net, callback = Net(), L1InfProjection(**target, **options)
    with caplog.at_level(logging.WARNING, logger="lightning_accel"):
        trainer = Trainer(max_epochs=4, accelerator="cpu", callbacks=[callback], **off)
        trainer.fit(net, DataLoader(Stream(), 8), DataLoader(Stream(), 8))
    assert "optimizer steps" not in caplog.text
    if target:
        assert zero_rows(net)[0] > 0


def test_data_without_a_length_has_a_rise_all_the_same():
    net = Net()
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        callbacks=[L1InfProjection()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, DataLoader(Stream(), 8), DataLoader(Stream(), 8))
    assert zero_rows(net) == [8, 4, 0]


class Changing(Callback):
    """Changes a module as an epoch begins."""

    def __init__(self, change, epoch=2):
        self.change, self.epoch = change, epoch

    def on_train_epoch_start(self, trainer, net):
        if trainer.current_epoch == self.epoch:
            self.change(trainer, net)
            self.weight = net.net[0].weight.detach().clone()


ALL_AT_ONCE = {
    "at every step": {},
    "at the end": {"at_end": True},
    "one budget": {"scope": "global"},
    "epoch by epoch": {"every_n_epochs": 1, "schedule": "linear", "end_step": 60},
    "retraining": {"mode": "project_then_retrain", "retrain_epoch": 6},
}


@pytest.mark.parametrize("name", ALL_AT_ONCE)
@pytest.mark.parametrize("first", [True, False])
def test_layers_that_are_frozen_later_stay_as_they_are_and_others_are_projected(name, first):
    net, freezing = Net(), Changing(lambda _, net: net.net[0].requires_grad_(False))
    ours = L1InfProjection(**ALL_AT_ONCE[name])
    fit(net, *((freezing, ours) if first else (ours, freezing)), epochs=10)
    assert torch.equal(net.net[0].weight, freezing.weight)
    assert zero_rows(net)[1] >= 4


def exchange(trainer, net):
    net.net[0], net.net[2] = nn.Linear(12, 20), nn.Linear(20, 8)
    trainer.strategy.setup_optimizers(trainer)


def widen(trainer, net):
    with torch.no_grad():
        for layer, shape in ((net.net[0], (20, 12)), (net.net[2], (8, 20))):
            layer.weight = nn.Parameter(torch.randn(shape))
        net.net[0].bias = nn.Parameter(torch.zeros(20))
    trainer.strategy.setup_optimizers(trainer)


@pytest.mark.parametrize("change", [exchange, widen])
@pytest.mark.parametrize("epoch", [1, 5])
def test_layers_that_are_exchanged_between_epochs_are_projected(change, epoch):
    net = Net()
    fit(net, Changing(change, epoch), L1InfProjection(), epochs=10)
    assert zero_rows(net) == [10, 4, 0]


def test_other_optimizers_between_epochs_are_watched():
    class Raw(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, _):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.net(batch[0]), batch[1]).backward()
            optimizer.step()

    net, anew = Raw(), Changing(lambda trainer, _: trainer.strategy.setup_optimizers(trainer))
    fit(net, L1InfProjection(), anew, epochs=10)
    assert zero_rows(net) == [8, 4, 0]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("settings", [{}, {"radius": 1.0}])
def test_pruning_of_a_projected_weight_takes_it_over(first, settings, caplog):
    net = Net()
    pruning = ModelPruning(
        "l1_unstructured", [(net.net[0], "weight")], amount=0.25, use_lottery_ticket_hypothesis=False
    )
    ours = L1InfProjection(**settings)
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        fit(net, *((pruning, ours) if first else (ours, pruning)), epochs=4)
    assert "projects net.2.weight." in caplog.text
    assert float((net.net[0].weight == 0).double().mean()) > 0.25
    assert zero_rows(net)[0] < 8, "pruned after the first epoch, before half of the rows have gone"
    if settings:
        assert float(net.net[2].weight.detach().abs().amax(1).sum()) <= 1.0
    else:
        assert zero_rows(net)[1] == 4


class Wrapper:
    """Makes the steps of another optimizer, and is none itself."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, optimizer.defaults

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)


class DerivedWrapper(Wrapper, torch.optim.Optimizer):
    """The same, which calls itself an optimizer but was not made like one."""


@pytest.mark.parametrize("wrapper", [Wrapper, DerivedWrapper])
def test_optimizers_that_take_no_hooks_are_followed(wrapper):
    class Wrapped(Net):
        def configure_optimizers(self):
            return wrapper(super().configure_optimizers())

    net, plain = Wrapped(), Net()
    ours = L1InfProjection()
    trainer = fit(net, ours)
    fit(plain, L1InfProjection())
    assert ours.projections > 0
    assert trainer.global_step == 16
    assert torch.equal(net.net[0].weight, plain.net[0].weight)


class TwoSteps(torch.optim.Optimizer):
    """Sharpness-aware: climbs first, and steps from where it was by another optimizer, both by methods of its own."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.base = torch.optim.SGD(self.param_groups, 0.1)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self):
        for weight in self.param_groups[0]["params"]:
            self.state[weight]["climb"] = 0.05 * weight.grad
            weight += self.state[weight]["climb"]
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for weight in self.param_groups[0]["params"]:
            weight -= self.state[weight]["climb"]
        self.base.step()
        self.zero_grad()


@pytest.mark.parametrize(("every", "projections"), [(1, 15), (2, 8)])  # a ramp that rises each step begins at 0
def test_steps_that_come_by_another_method_are_seen_by_the_weights(every, projections):
    class ByHand(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return TwoSteps(self.parameters())

        def training_step(self, batch, index):
            optimizer = self.optimizers(use_pl_optimizer=False)
            for climbs in (True, False):
                self.manual_backward(super().training_step(batch, index))
                if (index + 1) % every == 0:
                    optimizer.first_step() if climbs else optimizer.second_step()

    net, ours = ByHand(), L1InfProjection(target_sparsity=0.5)
    fit(net, ours)
    assert ours.projections == projections
    assert zero_rows(net)[0] == 8


def test_closures_that_are_called_several_times_within_a_step_are_one_step():
    class LBFGS(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=5)

    class AfterEachStep(Callback):
        def on_fit_start(self, trainer, net):
            trainer.optimizers[0].register_step_post_hook(lambda *_: self.project(net))

        def project(self, net):
            for weight in (net.net[0].weight, net.net[2].weight):
                project_l1inf(weight, 1.0, out=weight)

    net, other = LBFGS(), LBFGS()
    ours = L1InfProjection(1.0, parameters=["net.0.weight", "net.2.weight"])
    trainer = fit(net, ours, epochs=1)
    fit(other, AfterEachStep(), epochs=1)
    assert ours.projections == trainer.global_step
    torch.testing.assert_close(net.state_dict(), other.state_dict())


def test_a_checkpoint_that_was_only_tested_says_nothing_to_the_next_fit(tmp_path):
    ours, path = L1InfProjection(), tmp_path / "sparse.ckpt"
    fit(Net(), ours).save_checkpoint(path)
    data = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 8)
    settings = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    tester = Trainer(accelerator="cpu", max_epochs=2, callbacks=[ours], **settings)
    tester.validate(Net(), data, ckpt_path=path, verbose=False)
    net, fresh = Net(), Net()
    tester.fit(net, data, data)
    fit(fresh, L1InfProjection())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("rewind", ["init", "file"])
def test_modules_with_an_extra_state_are_rewound(rewind, tmp_path):
    class Extra(Net):
        def get_extra_state(self):
            return {"notes": "kept"}

        def set_extra_state(self, state):
            assert state == {"notes": "kept"}

    net, path = Extra(), tmp_path / "first.ckpt"
    if rewind == "file":
        torch.save({"state_dict": Extra().state_dict()}, path)
    first = net.net[2].weight.detach().clone()
    source = "init" if rewind == "init" else path
    fit(net, L1InfProjection(mode="project_then_retrain", retrain_epoch=1, rewind=source), max_steps=9)
    assert zero_rows(net) == [8, 4, 0]
    last = net.net[2].weight.detach()
    assert float((last - first)[last != 0].abs().max()) < 0.02, "one step later"
