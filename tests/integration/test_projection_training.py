"""Projection callbacks in real fits."""

import copy
import itertools
import logging
import math
import pickle

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.callbacks import L1InfProjection, MultilevelProjection, RankQuantization
from lightning_accel.low_rank import RankPlan

FEATURES, HIDDEN = 12, 16
ALL = "*weight"  # by default the layer that writes the output is left alone


class Net(LightningModule):
    """A small classifier with every way to optimize."""

    def __init__(self, optimization="automatic", batch_norm=False, bad_step=None, hidden=HIDDEN):
        super().__init__()
        torch.manual_seed(0)
        norm = [nn.BatchNorm1d(hidden)] if batch_norm else []
        self.first = nn.Linear(FEATURES, hidden)
        self.body = nn.Sequential(*norm, nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 3))
        self.optimization, self.bad_step, self.optimizer_steps = optimization, bad_step, 0
        self.automatic_optimization = optimization == "automatic"

    def forward(self, x):
        return self.body(self.first(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        if batch_idx == self.bad_step:
            loss = loss * math.inf
        if self.automatic_optimization:
            return loss
        first, second = self.optimizers()
        for optimizer in (first, second) if batch_idx % 2 else (first,):
            optimizer.zero_grad()
            self.manual_backward(loss, retain_graph=True)
            optimizer.step()
            loss = nn.functional.cross_entropy(self(x), y)
        return None

    def validation_step(self, batch, batch_idx):
        self.seen_in_validation = weights(self)
        x, y = batch
        self.log("val/loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self):
        if self.optimization == "automatic":
            return torch.optim.Adam(self.parameters(), lr=1e-2)
        return torch.optim.Adam(self.first.parameters(), lr=1e-2), torch.optim.SGD(self.body.parameters(), lr=1e-1)


class SaveEachEpoch(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


def data(samples=48):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, FEATURES, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()), batch_size=8)


def fit(net, *callbacks, epochs=2, ckpt_path=None, validate=False, **settings):
    settings = {
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    } | settings
    trainer = Trainer(
        limit_val_batches=1.0 if validate else 0,
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(net, data(), data(), ckpt_path=ckpt_path)
    return trainer


def weights(net):
    return {n: p.detach().clone() for n, p in net.named_parameters() if n.endswith("weight") and p.ndim > 1}


def l1inf(weight, dim=0):
    return math.fsum(weight.double().abs().amax(1 - dim).tolist())


def zero_rows(weight, dim=0):
    return int((weight == 0).all(1 - dim).sum())


@pytest.mark.parametrize(
    "make",
    [
        lambda: L1InfProjection(2.0, parameters=ALL),
        lambda: L1InfProjection(2.0, method="exact", parameters=ALL),
        lambda: MultilevelProjection(2.0, parameters=ALL),
    ],
)
def test_every_weight_is_feasible_after_training(make):
    net = Net()
    fit(net, make())
    for name, weight in weights(net).items():
        assert l1inf(weight) <= 2.0, name


BOTH = pytest.mark.parametrize("kind", [L1InfProjection, MultilevelProjection])


class AfterSteps(Callback):
    """Look, after every optimizer step, at whether all that it has moved is in the ball."""

    def __init__(self, radius):
        self.radius, self.feasible = radius, []

    def on_train_start(self, trainer, pl_module):
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self.look)  # runs after the hooks of ``on_fit_start``

    def look(self, optimizer, *_):
        moved = [p.detach() for group in optimizer.param_groups for p in group["params"] if p.ndim > 1]
        assert moved
        self.feasible.append(all(l1inf(weight) <= self.radius for weight in moved))


def test_without_a_projection_every_step_leaves_the_ball():
    after = AfterSteps(2.0)
    fit(Net(), after)
    assert after.feasible == [False] * 12


@BOTH
def test_projections_equal_global_step_under_accumulation(kind):
    callback, after = kind(2.0), AfterSteps(2.0)
    trainer = fit(Net(), callback, after, accumulate_grad_batches=3)
    assert callback.projections == trainer.global_step == 4
    assert after.feasible == [True] * 4


@BOTH
def test_projections_equal_global_step_with_two_optimizers_by_hand(kind):
    callback, after = kind(2.0, parameters=ALL), AfterSteps(2.0)
    net = Net("manual")
    trainer = fit(net, callback, after)
    assert callback.projections == trainer.global_step == 18
    assert after.feasible == [True] * 18
    assert all(l1inf(w) <= 2.0 for w in weights(net).values())


@pytest.mark.parametrize("optimization", ["automatic", "manual"])
@pytest.mark.parametrize(
    "settings", [{"radius": 2.0}, {"target_sparsity": 0.5, "schedule": "constant", "freeze_zero_groups": True}]
)
@BOTH
def test_projections_equal_global_step_when_amp_skips_steps(kind, optimization, settings):
    steps, before, kept = [], {}, []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before.update(weights(pl_module))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                kept.append(all(torch.equal(w, before[n]) for n, w in weights(pl_module).items()))

    net, callback = Net(optimization, bad_step=1), kind(**settings)
    net.on_train_start = lambda: [o.register_step_post_hook(lambda *_: steps.append(1)) for o in net.trainer.optimizers]
    amp = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    trainer = fit(net, callback, Watch(), plugins=[amp])
    # two batches overflow: Lightning counts their steps, the optimizer does not take them; projecting again is free
    assert callback.projections == trainer.global_step == len(steps) + 2
    assert trainer.global_step == (12 if optimization == "automatic" else 18)
    if optimization == "automatic":
        assert kept == [True, True]


BALLS = {
    "bi-level": lambda **ball: L1InfProjection(**ball),
    "exact": lambda **ball: L1InfProjection(method="exact", **ball),
    "l1,2": lambda **ball: MultilevelProjection(norms=("l1", "l2"), **ball),
    "l1,1": lambda **ball: MultilevelProjection(norms=("l1", "l1"), **ball),
}


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("scope", ["parameter", "global"])
@pytest.mark.parametrize("groups", ["rows", "columns"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("when", [{}, {"mode": "project_then_retrain", "retrain_epoch": 1}])
def test_target_sparsity_is_met_within_one_group(ball, scope, groups, sparsity, when):
    net = Net(hidden=150)
    fit(net, BALLS[ball](target_sparsity=sparsity, scope=scope, groups=groups, parameters=ALL, **when))
    dim = ("rows", "columns").index(groups)
    found = {name: (zero_rows(w, dim=dim), w.shape[dim]) for name, w in weights(net).items()}
    if scope == "global":
        found = {"all": tuple(map(sum, zip(*found.values(), strict=True)))}
    for name, (cleared, total) in found.items():
        assert abs(cleared - round(sparsity * total)) <= 1, name


def test_columns_and_names_choose_what_is_projected():
    net, plain = Net(), Net()
    fit(plain)
    fit(net, L1InfProjection(target_sparsity=0.5, parameters="first.*", groups="columns"))
    found = weights(net)
    assert zero_rows(found["first.weight"], dim=1) == FEATURES // 2
    assert zero_rows(found["body.1.weight"], dim=0) == 0
    assert [zero_rows(w) for w in weights(plain).values()] == [0, 0, 0]


def test_infinite_radius_equals_plain_training_bit_for_bit():
    plain, net = Net(), Net()
    fit(plain)
    fit(net, L1InfProjection(math.inf))
    for (name, expected), actual in zip(plain.named_parameters(), net.parameters(), strict=True):
        assert torch.equal(expected, actual), name


def test_radius_fraction_is_of_the_norm_at_the_start():
    net = Net()
    before = {n: l1inf(w) for n, w in weights(net).items()}
    fit(net, L1InfProjection(radius_fraction=0.3, parameters=ALL))
    for name, weight in weights(net).items():
        assert l1inf(weight) == pytest.approx(0.3 * before[name], rel=1e-3)


def test_ramp_rises_to_the_full_projection():
    norms = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            norms.append(l1inf(pl_module.first.weight.detach()))

    net = Net()
    start = l1inf(net.first.weight.detach())
    fit(net, L1InfProjection(1.0, schedule="linear", start_step=2, end_step=10), Watch())
    assert len(norms) == 12
    for step in range(3, 11):
        assert norms[step - 1] <= start + (1.0 - start) * (step - 2) / 8 + 1e-9
    assert norms[1] > norms[5] > norms[9]
    assert norms[-1] <= 1.0


@pytest.mark.parametrize("method", ["bilevel", "exact"])
@pytest.mark.parametrize("scope", ["parameter", "global"])
def test_target_sparsity_rises_with_the_ramp(method, scope):
    cleared = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            cleared.append([zero_rows(w) for w in weights(pl_module).values()])

    settings = {"start_step": 2, "end_step": 10, "method": method, "scope": scope, "parameters": ALL}
    fit(Net(hidden=40), L1InfProjection(target_sparsity=0.5, **settings), Watch())
    parts = [1.0 - (1.0 - min(max(step - 2, 0), 8) / 8) ** 3 for step in range(1, 13)]
    if scope == "global":
        assert [sum(found) for found in cleared] == [round(0.5 * part * 83) for part in parts]
    else:
        assert cleared == [[round(0.5 * part * rows) for rows in (40, 40, 3)] for part in parts]


@pytest.mark.parametrize(
    ("when", "projected"),
    [
        ({"every_n_steps": 4}, [4, 8, 12, 16, 20, 24]),
        ({"every_n_epochs": 1}, [6, 12, 18, 24]),
        ({"every_n_epochs": 2}, [12, 24]),
        ({"at_end": True}, [24]),
    ],
)
def test_other_times_project_then_and_leave_feasible_weights_at_the_end(when, projected):
    feasible = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if all(l1inf(w) <= 1.0 for w in weights(pl_module).values()):
                feasible.append(trainer.global_step)

    net, callback = Net(), L1InfProjection(1.0, parameters=ALL, **when)
    fit(net, callback, Watch(), epochs=4)
    assert feasible == projected
    assert all(l1inf(w) <= 1.0 for w in weights(net).values())
    assert callback.projections == (6 if "every_n_steps" in when else 0)


def test_frozen_zero_groups_stay_zero_between_projections():
    counts = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            counts.append(zero_rows(pl_module.first.weight.detach()))

    fit(Net(), L1InfProjection(1.0, every_n_steps=4, freeze_zero_groups=True), Watch(), epochs=3)
    assert counts[3] > 0
    assert all(later >= earlier for earlier, later in itertools.pairwise(counts[3:]))
    counts.clear()
    fit(Net(), L1InfProjection(1.0, every_n_steps=4), Watch(), epochs=3)
    assert counts[4] < counts[3]


@pytest.mark.parametrize("rewind", ["none", "init", "checkpoint"])
def test_project_then_retrain_keeps_zeros_and_rewinds_survivors(rewind, tmp_path):
    net = Net()
    initial = weights(net)
    at_start, moments = {}, []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 0:
                at_start.update(weights(pl_module))
                moments.append(len(trainer.optimizers[0].state))

    source = rewind
    if rewind == "checkpoint":
        other = Net()
        trainer = fit(other, epochs=1)
        source = str(tmp_path / "rewind.ckpt")
        trainer.save_checkpoint(source)
        initial = weights(other)
    callback = L1InfProjection(
        target_sparsity=0.5, mode="project_then_retrain", retrain_epoch=1, rewind=source, parameters="first.*"
    )
    fit(net, callback, Watch(), epochs=3)
    masked = at_start["first.weight"]
    assert zero_rows(masked) == HIDDEN // 2
    assert torch.equal((net.first.weight == 0).all(1), (masked == 0).all(1))
    assert not torch.equal(net.first.weight, masked)
    assert moments == [6 if rewind == "none" else 0], "moments of other weights would push rewound ones about"
    if rewind != "none":
        assert torch.equal(masked, initial["first.weight"] * (masked != 0))
        assert torch.equal(at_start["body.1.weight"], initial["body.1.weight"])


@pytest.mark.parametrize(
    "settings",
    [
        {"radius_fraction": 0.3, "method": "exact"},
        {"target_sparsity": 0.5, "every_n_steps": 2, "freeze_zero_groups": True, "schedule": "constant"},
        {"radius": 1.0, "every_n_steps": 5},
        {"radius": 1.0, "every_n_epochs": 3},
        {"target_sparsity": 0.5, "at_end": True},
        {"radius": 1.0, "schedule": "cubic", "end_step": 15, "scope": "global"},
        {"target_sparsity": 0.5, "mode": "project_then_retrain", "retrain_epoch": 1, "rewind": "init"},
    ],
)
@pytest.mark.parametrize("at", [1, 2])
def test_a_fit_that_goes_on_further_equals_a_longer_one(settings, at, tmp_path):
    whole = Net()
    fit(whole, L1InfProjection(**settings), epochs=4)
    fit(Net(), L1InfProjection(**settings), SaveEachEpoch(tmp_path / "last.ckpt"), epochs=at)
    resumed = Net()
    fit(resumed, L1InfProjection(**settings), epochs=4, ckpt_path=tmp_path / "last.ckpt")
    for (name, expected), actual in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, actual), name


def test_a_callback_that_joins_a_fit_that_goes_on_projects_its_hidden_layers(tmp_path):
    fit(Net(), SaveEachEpoch(tmp_path / "last.ckpt"), epochs=2)
    net = Net()
    fit(net, L1InfProjection(), epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert zero_rows(net.first.weight.detach()) == net.first.out_features // 2


@pytest.mark.parametrize("settings", [{}, {"scope": "global", "every_n_steps": 4}, {"every_n_epochs": 2}])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_resumed_run_with_default_choices_equals_uninterrupted_run(settings, at, tmp_path):
    class SaveOnce(SaveEachEpoch):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch + 1 == at:
                super().on_train_epoch_end(trainer, pl_module)

    whole, resumed = Net(), Net()
    fit(whole, L1InfProjection(**settings), SaveOnce(tmp_path / "last.ckpt"), epochs=4)
    fit(resumed, L1InfProjection(**settings), epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert zero_rows(whole.first.weight.detach()) > 0
    for (name, expected), actual in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, actual), name


def test_checkpoint_in_the_middle_of_an_epoch_is_feasible(tmp_path):
    fit(Net(), L1InfProjection(1.0), ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1))
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 3
    for file in files:
        state = torch.load(file, weights_only=True)["state_dict"]
        assert l1inf(state["first.weight"]) <= 1.0


@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_are_thinned_out_before_validation_and_at_the_end(first, tmp_path):
    net = Net()
    mine = L1InfProjection(target_sparsity=0.5, parameters=ALL)
    averaging = EMAWeightAveraging(decay=0.9)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    fit(net, *((mine, averaging) if first else (averaging, mine)), checkpoint, epochs=3, validate=True)
    for found in (net.seen_in_validation, weights(net)):
        for name, weight in found.items():
            assert zero_rows(weight) >= len(weight) // 2, name
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert zero_rows(saved["state_dict"]["first.weight"]) == HIDDEN // 2
    raw = saved["lightning_accel_average_before_projection"]["first.weight"]
    assert not torch.equal(raw, saved["state_dict"]["first.weight"])


@BOTH
@pytest.mark.parametrize(
    "average", [lambda: EMAWeightAveraging(decay=0.9), lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1)]
)
def test_averaged_weights_are_feasible(kind, average, tmp_path):
    net = Net()
    fit(net, average(), kind(1.0, parameters=ALL), ModelCheckpoint(tmp_path, save_last=True), epochs=4, validate=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(l1inf(weight) <= 1.0 for weight in weights(net).values())
    for found in (net.seen_in_validation, {name: saved[name] for name in weights(net)}):
        for name, weight in found.items():
            assert l1inf(weight) <= 1.0 + 1e-6, name  # averaging in float32 rounds


def test_averages_of_weights_that_are_retrained_keep_the_zeros(tmp_path):
    net, average = Net(), EMAWeightAveraging(decay=0.9)
    mine = L1InfProjection(
        target_sparsity=0.5, mode="project_then_retrain", retrain_epoch=2, rewind="init", parameters=ALL
    )
    fit(net, average, mine, ModelCheckpoint(tmp_path, save_last=True), epochs=4, validate=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    raw = saved["lightning_accel_average_before_projection"]
    for found in (net.seen_in_validation, saved["state_dict"]):
        for name in weights(net):
            assert zero_rows(found[name]) == round(0.5 * len(found[name])), name
            assert zero_rows(raw[name]) == 0, name  # weights from before the projection are still in the average


def test_averages_resume_as_they_were_before_projection(tmp_path):
    def callbacks():
        return L1InfProjection(target_sparsity=0.5, schedule="constant"), EMAWeightAveraging(decay=0.9)

    whole, resumed = Net(), Net()
    fit(whole, *callbacks(), epochs=3, validate=True)
    fit(Net(), *callbacks(), SaveEachEpoch(tmp_path / "last.ckpt"), epochs=2, validate=True)
    fit(resumed, *callbacks(), epochs=3, validate=True, ckpt_path=tmp_path / "last.ckpt")
    for (name, expected), actual in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, actual), name


@pytest.mark.parametrize("batch_norm", [False, True])
def test_stochastic_weight_averages_are_thinned_out(batch_norm):
    net = Net(batch_norm=batch_norm)
    mine = L1InfProjection(target_sparsity=0.5, parameters=ALL)
    fit(net, mine, StochasticWeightAveraging(1e-2, swa_epoch_start=1), epochs=4)
    for name, weight in weights(net).items():
        assert zero_rows(weight) >= len(weight) // 2, name


@pytest.mark.parametrize("size", [{"radius_fraction": 0.2}, {"radius": 3.0}, {"target_sparsity": 0.5}])
@pytest.mark.parametrize("groups", ["rows", "columns"])
def test_all_weights_in_one_call_of_machine_code_train_bit_for_bit_as_one_by_one(groups, size, tmp_path):
    ends = {}
    for compile in (True, False):
        net, callback = Net(), L1InfProjection(parameters=ALL, groups=groups, compile=compile, **size)
        fit(net, callback, epochs=4, default_root_dir=tmp_path)
        projector = callback._run.projector
        ends[compile] = weights(net), callback.state_dict()["projector"], projector
    (ours, memory, quick), (theirs, other, slow) = ends[True], ends[False]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name, kept in other.items():
        for key, value in kept.items():
            same = memory[name][key]
            assert torch.equal(same, value) if isinstance(value, torch.Tensor) else same == value, (name, key)
    assert len(quick._at_once) == 1
    assert slow._at_once == {} or all(once._radii == [] for once in slow._at_once.values()), "no machine code"


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_nan_in_a_weight_raises_or_is_left_alone(nonfinite):
    net = Net()
    with torch.no_grad():
        net.first.weight[0, 0] = math.nan
    callback = L1InfProjection(1.0, parameters="first.*", nonfinite=nonfinite)
    if nonfinite == "raise":
        with pytest.raises(ValueError, match=r"`first\.weight` holds NaN"):
            fit(net, callback)
    else:
        fit(net, callback)
        assert zero_rows(net.first.weight.detach()) == 0


def test_what_the_user_has_frozen_stays_frozen():
    net = Net()
    net.first.weight.requires_grad_(False)
    before = net.first.weight.clone()
    fit(net, L1InfProjection(0.5))
    assert torch.equal(net.first.weight, before)
    assert l1inf(net.body[1].weight.detach()) <= 0.5


@pytest.mark.parametrize("kind", [L1InfProjection, MultilevelProjection])
def test_nothing_to_project_is_an_error_that_says_what_was_looked_for(kind):
    with pytest.raises(MisconfigurationException, match=r"found no parameter to project .* named 'decoder\.\*'"):
        fit(Net(), kind(1.0, parameters="decoder.*"))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"parameters": "frist.weight"}, r"No name fits\. There are first\.weight.* Pass `parameters` that fit"),
        ({"parameters": "layer9"}, r"There are first\.weight, body\.1\.weight, body\.3\.weight, last\.weight\."),
        ({"module_types": ["Conv2d"]}, r"not the modules: first\.weight of a Linear, .* Pass `module_types`, or null"),
        ({"groups": [2]}, r"with groups \(2,\)\. .* too few dimensions for the groups: first\.weight \(16, 12\)"),
        ({"parameters": "last.*"}, r"All of those are frozen: last\.weight, last\.bias"),
    ],
)
def test_nothing_to_project_names_what_comes_close(settings, match):
    net = Net()
    net.last = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=match):
        fit(net, L1InfProjection(1.0, **settings))


@BOTH
@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning])
@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_take_parameters_apart_are_refused(kind, package, name):
    chosen = getattr(package.strategies, name)

    class OfAUser(chosen):
        def __init__(self):  # the real ones want a GPU, or a package that is not here
            pass

    class Stub:
        strategy = OfAUser()

    with pytest.raises(
        MisconfigurationException, match=rf"{kind.__name__} needs .* which {name} takes apart\. Use 'ddp'"
    ):
        kind(1.0).setup(Stub(), Net(), "fit")


def test_values_are_logged_for_each_parameter():
    trainer = fit(Net(), L1InfProjection(target_sparsity=0.5), logger=False)
    logged = trainer.callback_metrics
    assert logged["l1inf_projection/first.weight/zero_groups"] == 0.5
    assert logged["l1inf_projection/first.weight/zero_entries"] >= 0.5
    assert logged["l1inf_projection/first.weight/norm"] > 0
    assert "l1inf_projection/first.weight/tau" in logged
    assert 0.4 < logged["l1inf_projection/zero_groups"] < 0.6


def test_hooks_are_gone_after_fit_and_after_an_error():
    net, callback = Net(), L1InfProjection(1.0)
    trainer = fit(net, callback)
    assert not trainer.optimizers[0]._optimizer_step_post_hooks

    class Fail(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("stop here")

    trainer = Trainer(
        max_epochs=1,
        callbacks=[callback, Fail()],
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.fit(net, data(), data())
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_callbacks_survive_copies_before_and_after_a_fit(duplicate):
    callback = duplicate(L1InfProjection(1.0))
    fit(Net(), callback)
    again, net = duplicate(callback), Net()
    fit(net, again)
    assert again.projections == 12
    assert l1inf(net.first.weight.detach()) <= 1.0


def test_two_callbacks_of_one_kind_project_different_parameters():
    net = Net()
    fit(
        net,
        L1InfProjection(target_sparsity=0.5, parameters="first.*", groups="columns"),
        L1InfProjection(target_sparsity=0.25, parameters="body.1.*"),
    )
    assert zero_rows(net.first.weight.detach(), dim=1) == FEATURES // 2
    assert zero_rows(net.body[1].weight.detach()) == HIDDEN // 4


def test_names_of_what_is_projected_go_to_the_log(caplog):
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        fit(Net(), L1InfProjection(1.0, parameters="first.*"))
    assert "L1InfProjection: projects first.weight." in caplog.text


def low_rank(**settings):
    return RankQuantization(**{"ratio": 2.0, "method": "fixed", "when": 1, "on_loss": "keep"} | settings)


def test_factors_that_another_callback_makes_later_are_projected(caplog):
    net = Net(hidden=64)
    mine = L1InfProjection(target_sparsity=0.5, parameters="*factor_in", module_types=None)
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        fit(net, mine, low_rank(), epochs=3)
    factors = {name: p for name, p in net.named_parameters() if name.endswith("factor_in")}
    assert factors
    for name, factor in factors.items():
        assert zero_rows(factor.detach()) == len(factor) // 2, name
    assert "nothing any more" not in caplog.text


def test_layers_that_are_factored_away_end_the_projection(caplog):
    net = Net(hidden=64)
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        fit(net, L1InfProjection(target_sparsity=0.5, parameters="body.1.weight"), low_rank(), epochs=3)
    assert "L1InfProjection: projects nothing any more." in caplog.text


def test_factors_that_never_come_are_an_error():
    plan = RankPlan(layers=(), method="fixed", target="ratio", value=1.0)
    with pytest.raises(MisconfigurationException, match=r"found no parameter to project .* No name fits"):
        fit(Net(), L1InfProjection(1.0, parameters="*factor_in"), RankQuantization(plan=plan, when=1), epochs=3)


def test_a_checkpoint_to_rewind_to_must_be_there_before_training_starts():
    callback = L1InfProjection(1.0, mode="project_then_retrain", retrain_epoch=1, rewind="nowhere.ckpt")
    with pytest.raises(ValueError, match=r"`rewind` must be .* got 'nowhere\.ckpt', where there is no file"):
        fit(Net(), callback)
