"""Models that reach, write, copy or hold weights in ways of their own train as they did, or stay dense by name."""

import contextlib
import copy
import threading
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.callbacks import RankQuantization, SequentialFreezing
from lightning_accel.low_rank import RankPlan, low_rank_layers
from lightning_accel.low_rank.plan import LayerPlan

WIDTH = 24


class Net(LightningModule):
    """Three layers; subclasses reach them in other ways."""

    automatic = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = self.automatic
        self.fc1, self.fc2, self.head = nn.Linear(16, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.head(torch.relu(self.fc2(torch.relu(self.fc1(x)))))

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def plan(ranks=None):
    """A plan that nobody measured, for `Net`."""
    shapes = {"fc1": (WIDTH, 16), "fc2": (WIDTH, WIDTH), "head": (4, WIDTH)}
    chosen = {"fc1": (8,), "fc2": (10,)} if ranks is None else ranks
    layers = tuple(
        LayerPlan(name, "Linear", shapes.get(name, (WIDTH, WIDTH)), rank, "low rank", "for the test")
        for name, rank in chosen.items()
    )
    return RankPlan(layers, "fixed", "ratio", 2.0)


@contextlib.contextmanager
def warned(words):
    """Ask for one warning with these words, and for no other one of ours."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    signs = ("RankQuantization", "written into", "plan stay")
    ours = [str(w.message) for w in caught if any(sign in str(w.message) for sign in signs)]
    assert [text for text in ours if words in text], ours
    assert len(ours) == 1, ours


def fit(module, *callbacks, epochs=3, **settings):
    x = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **quiet, **settings)
    torch.manual_seed(1)
    trainer.fit(module, DataLoader(TensorDataset(x, x[:, :4].argmax(1)), 8))
    return trainer


def low_rank(ranks=None, when=1):
    return RankQuantization(plan=plan(ranks), when=when)


def assert_equal(a, b):
    for (name, expected), actual in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(expected, actual), name


class Listed(Net):
    def __init__(self):
        super().__init__()
        self.stages = [self.fc1, self.fc2]

    def forward(self, x):
        for stage in self.stages:
            x = torch.relu(stage(x))
        return self.head(x)


class InADict(Net):
    def __init__(self):
        super().__init__()
        self.stages = {"first": (self.fc1,), "second": {"layer": self.fc2}}

    def forward(self, x):
        return self.head(torch.relu(self.stages["second"]["layer"](torch.relu(self.stages["first"][0](x)))))


class InAClosure(Net):
    def __init__(self):
        super().__init__()
        layer = self.fc2
        self.middle = lambda x: layer(x)

    def forward(self, x):
        return self.head(torch.relu(self.middle(torch.relu(self.fc1(x)))))


class BoundMethod(Net):
    def __init__(self):
        super().__init__()
        self.middle = self.fc2.forward

    def forward(self, x):
        return self.head(torch.relu(self.middle(torch.relu(self.fc1(x)))))


class HiddenParent(Net):
    def __init__(self):
        super().__init__()
        self.hidden = [nn.Sequential(self.fc1, nn.ReLU(), self.fc2)]

    def forward(self, x):
        return self.head(torch.relu(self.hidden[0](x)))


class WeightsInAList(Net):
    def __init__(self):
        super().__init__()
        self.weights = [self.fc1.weight, self.fc2.weight]

    def forward(self, x):
        for weight in self.weights:
            x = torch.relu(F.linear(x, weight))
        return self.head(x)


class AverageByName(Net):
    """Keeps an average of the weights, as `torch_ema` and many hand-written ones do."""

    def __init__(self):
        super().__init__()
        self.shadow = {name: p.detach().clone() for name, p in self.named_parameters()}

    def on_train_batch_end(self, *_):
        for name, p in self.named_parameters():
            self.shadow[name].mul_(0.9).add_(p.detach(), alpha=0.1)


class AverageByPosition(Net):
    def __init__(self):
        super().__init__()
        self.shadow = [p.detach().clone() for p in self.parameters()]

    def on_train_batch_end(self, *_):
        for average, p in zip(self.shadow, self.parameters(), strict=True):
            average.mul_(0.9).add_(p.detach(), alpha=0.1)


class HiddenCopy(Net):
    def __init__(self):
        super().__init__()
        self.teacher = [copy.deepcopy(self)]

    def on_train_batch_end(self, *_):
        for average, p in zip(self.teacher[0].parameters(), self.parameters(), strict=True):
            average.data.mul_(0.9).add_(p.detach(), alpha=0.1)


class AverageOfWhatTrains(Net):
    def __init__(self):
        super().__init__()
        self.fc1.bias.requires_grad_(False)
        self.shadow = [p.detach().clone() for p in self.trained()]

    def trained(self):
        return [p for p in self.parameters() if p.requires_grad]

    def on_train_batch_end(self, *_):
        for average, p in zip(self.shadow, self.trained(), strict=True):
            average.mul_(0.9).add_(p.detach(), alpha=0.1)


class Averages(nn.Module):
    """Keeps averages in buffers, whose names have no dots, as diffusion models do."""

    def __init__(self, model):
        super().__init__()
        self.name_of = {name: name.replace(".", "") for name, _ in model.named_parameters()}
        for name, p in model.named_parameters():
            self.register_buffer(self.name_of[name], p.detach().clone())

    @torch.no_grad()
    def update(self, model):
        for name, p in model.named_parameters():
            self.get_buffer(self.name_of[name]).mul_(0.9).add_(p, alpha=0.1)


class AverageInBuffers(Net):
    def __init__(self):
        super().__init__()
        self.averages = Averages(self)

    def on_train_batch_end(self, *_):
        self.averages.update(self)


class AverageInAParameterList(Net):
    def __init__(self):
        super().__init__()
        self.averages = nn.ParameterList(nn.Parameter(p.detach().clone(), False) for p in self.parameters())

    def on_train_batch_end(self, *_):
        for average, (_, p) in zip(self.averages, self.named_parameters(), strict=False):
            average.mul_(0.9).add_(p.detach(), alpha=0.1)


class ArraysByName(Net):
    """Keeps what the weights were at the beginning, to say how far they have moved."""

    def __init__(self):
        super().__init__()
        self.start = {name: p.detach().numpy().copy() for name, p in self.named_parameters()}

    def on_train_batch_end(self, *_):
        self.moved = {name: float((p.detach().numpy() - self.start[name]).max()) for name, p in self.named_parameters()}


class OwnWrapper(torch.optim.Optimizer):
    def __init__(self, parameters):
        self.inner = torch.optim.SGD(parameters, lr=0.1)
        super().__init__(self.inner.param_groups, {})

    def step(self, closure=None):
        return self.inner.step(closure)


class Wrapped(Net):
    def configure_optimizers(self):
        return OwnWrapper(self.parameters())


HELD = {
    "list": (Listed, "`stages` of Listed holds the layer `fc1`"),
    "dict": (InADict, "`stages` of InADict holds the layer `fc1`"),
    "closure": (InAClosure, "`middle` of InAClosure holds the layer `fc2`"),
    "bound method": (BoundMethod, "`middle` of BoundMethod holds the layer `fc2`"),
    "hidden parent": (HiddenParent, "`hidden` of HiddenParent holds the layer `fc1`"),
    "weights": (WeightsInAList, "`weights` of WeightsInAList holds the weight of `fc1`"),
    "average by name": (AverageByName, "`shadow` of AverageByName keeps values by the names"),
    "average by position": (AverageByPosition, "`shadow` of AverageByPosition keeps tensors like"),
    "average of what trains": (
        AverageOfWhatTrains,
        "`shadow` of AverageOfWhatTrains keeps tensors like",
    ),
    "buffers": (AverageInBuffers, "Averages `averages` in its buffers keeps tensors like"),
    "parameter list": (AverageInAParameterList, "ParameterList `averages` keeps tensors like"),
    "arrays by name": (ArraysByName, "`start` of ArraysByName keeps values by the names"),
    "hidden copy": (HiddenCopy, "`teacher` of HiddenCopy holds a HiddenCopy that has the parameters"),
    "optimizer": (Wrapped, "OwnWrapper keeps tensors of its own in `inner`"),
}


@pytest.mark.parametrize("case", HELD)
def test_model_whose_layers_or_weights_others_hold_trains_as_plain_and_says_who(case):
    kind, words = HELD[case]
    plain, module, callback = kind(), kind(), low_rank()
    fit(plain)
    with warned(f"leaves {kind.__name__} dense: {words}"):
        fit(module, callback)
    assert not low_rank_layers(module)
    assert words in callback.plan.reason
    assert_equal(plain, module)


class Lazy(Net):
    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyLinear(4))


def test_layers_without_a_shape_before_the_first_batch_are_no_problem_for_the_others():
    module = Lazy()
    fit(module, low_rank(when=0))
    assert set(low_rank_layers(module)) == {"fc1", "fc2"}


class OnlyLazy(Net):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.head = nn.LazyLinear(WIDTH), nn.LazyLinear(WIDTH), nn.LazyLinear(4)


def test_layers_that_have_a_shape_from_the_first_batch_on_can_be_low_rank_later():
    module = OnlyLazy()
    fit(module, low_rank(when=1))
    assert set(low_rank_layers(module)) == {"fc1", "fc2"}
    fit(OnlyLazy(), callback := RankQuantization(method="fixed", on_loss="keep", max_overhead=0.0))
    assert callback.decision.switch_epoch == 1, "their weights are random when they come into being"


class MadeOfAPart(Net):
    """Gets layers ready-made, as many do, and saves its arguments: Lightning keeps a copy of them for loggers."""

    def __init__(self, fc2):
        super().__init__()
        self.fc2 = fc2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice not to save modules
            self.save_hyperparameters("fc2")


def test_copy_that_saved_arguments_keep_for_loggers_is_no_reason_to_stay_dense():
    module = MadeOfAPart(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)))
    assert module.hparams_initial["fc2"] is not module.fc2
    fit(module, low_rank({"fc1": (8,), "fc2.0": (10,)}))
    assert list(low_rank_layers(module)) == ["fc1", "fc2.0"]


class Constrains(Callback):
    """Holds a weight and writes into it, out of the module's sight."""

    def setup(self, trainer, pl_module, stage):
        self.held = [pl_module.fc2.weight]

    def on_train_batch_end(self, *_):
        self.held[0].data.clamp_(-0.1, 0.1)


def test_weight_that_a_callback_holds_stays_dense_and_constrained():
    module = Net()
    with warned("`held` of Constrains holds the weight of `fc2`"):
        fit(module, low_rank(), Constrains())
    assert float(module.fc2.weight.detach().abs().max()) < 0.1001


def test_callbacks_of_packages_named_like_lightning_are_looked_through(monkeypatch):
    monkeypatch.setattr(Constrains, "__module__", "lightning_of_others.callbacks")
    module = Net()
    with warned("`held` of Constrains holds the weight of `fc2`"):
        fit(module, low_rank(), Constrains())
    assert not low_rank_layers(module)


class Shelf:
    """Something far from any module."""


HIDDEN = {"shelf": Shelf()}


class OutOfSight(Net):
    """Uses a weight that is held too far from any name to be seen: only the steps after the switch show it."""

    def __init__(self):
        super().__init__()
        HIDDEN["shelf"].weight = self.fc2.weight

    def forward(self, x):
        return self.head(torch.relu(F.linear(torch.relu(self.fc1(x)), HIDDEN["shelf"].weight, self.fc2.bias)))


@pytest.mark.parametrize("manual", [False, True])
def test_dense_weight_that_is_still_used_is_put_back_after_the_first_step(manual):
    class Module(OutOfSight):
        automatic = not manual

        def training_step(self, batch, index):
            if not manual:
                return super().training_step(batch, index)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()
            return None

    module, callback = Module(), low_rank()
    with warned("reaches the dense weight of `fc2` by another way"):
        trainer = fit(module, callback, epochs=4)
    assert module.fc2.weight is HIDDEN["shelf"].weight
    assert not low_rank_layers(module)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert all(trainer.optimizers[0].state[p]["step"] > 12 for p in module.parameters())
    assert "another way" in {layer.name: layer.reason for layer in callback.plan.layers}["fc2"]


VARIABLES, SHELF = {}, Shelf()


def in_a_container(weight):
    VARIABLES["weight"] = weight
    return "`VARIABLES` of `test_low_rank_other_ways` holds its weight"


def in_an_object(weight):
    SHELF.weight = weight
    return "`SHELF` of `test_low_rank_other_ways` holds its weight"


def in_a_variable(weight):
    globals()["_KEPT"] = weight
    return "a global variable of `test_low_rank_other_ways` holds its weight"


def in_a_closure(weight):
    VARIABLES["function"] = lambda: weight
    return "a closure holds its weight"


@pytest.mark.parametrize("hold", [in_a_container, in_an_object, in_a_variable, in_a_closure])
def test_weight_that_is_held_out_of_sight_and_not_read_in_time_stays_dense_by_name(hold):
    plain, module, callback = Net(), Net(), low_rank()
    words = hold(module.fc2.weight)
    try:
        with warned(f"leaves `fc2` dense: {words}"):
            fit(module, callback)
    finally:
        VARIABLES.clear()
        SHELF.__dict__.clear()
        globals().pop("_KEPT", None)
    fit(plain, low_rank({"fc1": (8,)}))
    assert set(low_rank_layers(module)) == {"fc1"}
    assert words in {layer.name: layer.reason for layer in callback.plan.layers}["fc2"]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))


class Clipped(Net):
    """Clips all parameters, as the critic of a Wasserstein GAN does."""

    def on_train_batch_end(self, *_):
        for p in self.parameters():
            p.data.clamp_(-0.05, 0.05)


def test_parameters_that_are_clipped_between_steps_are_weights_again():
    module = Clipped()
    with warned("writes into the parameters of `fc1` between steps"):
        fit(module, low_rank())
    assert not low_rank_layers(module)
    assert float(module.fc2.weight.detach().abs().max()) < 0.0501


class FreezesOnTheWay(Net):
    def on_train_batch_start(self, batch, index):
        if (self.current_epoch, index) == (1, 0):  # the batch of the switch
            self.fc2.requires_grad_(False)
            self.kept = self.fc2.weight.detach().clone()


class ClipsAndFreezes(Clipped, FreezesOnTheWay):
    pass


def test_layer_that_is_frozen_after_the_switch_rests_and_the_others_train():
    module = FreezesOnTheWay()
    fit(module, low_rank(), epochs=4)
    assert set(low_rank_layers(module)) == {"fc1", "fc2"}
    assert torch.equal(module.fc2.weight, module.kept)


def test_layer_that_goes_back_is_as_frozen_as_it_was():
    module = ClipsAndFreezes()
    with warned("writes into the parameters of"):
        fit(module, low_rank())
    assert not low_rank_layers(module)
    assert {name for name, p in module.named_parameters() if not p.requires_grad} == {"fc2.weight", "fc2.bias"}


class ReplacesALayer(Net):
    """Puts another layer in the place of one, and gives it to the optimizer, as for the classes of a next task."""

    def on_train_epoch_start(self):
        if self.current_epoch == 2:
            self.fc2 = nn.Linear(WIDTH, WIDTH)
            self.optimizers().add_param_group({"params": list(self.fc2.parameters())})


class RemovesALayer(Net):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(WIDTH, WIDTH)

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        return loss + self.extra(self.fc1(batch[0])).square().mean() if hasattr(self, "extra") else loss

    def on_train_epoch_start(self):
        if self.current_epoch == 2:
            del self.extra


def test_layer_that_is_replaced_or_removed_on_the_way_is_nobodys_concern():
    module = ReplacesALayer()
    trainer = fit(module, low_rank(), epochs=4)
    held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert sum(p is module.fc2.weight for p in held) == 1
    assert set(low_rank_layers(module)) == {"fc1"}
    other = RemovesALayer()
    fit(other, low_rank({"fc1": (8,), "extra": (10,)}), epochs=4)
    assert set(low_rank_layers(other)) == {"fc1"}


def test_layer_that_is_pruned_after_the_switch_is_dense_pruned_and_trained():
    class Module(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                prune.l1_unstructured(self.fc2, "weight", 0.5)
                self.start = self.fc2.weight_orig.detach().clone()

    module = Module()
    with warned("put fc2 back, dense from now on: its weight was written into"):
        fit(module, low_rank(), epochs=4)
    assert int((module.fc2.weight == 0.0).sum()) == WIDTH * WIDTH // 2
    assert not torch.equal(module.fc2.weight_orig, module.start)
    assert set(low_rank_layers(module)) == {"fc1"}


def test_weight_that_is_replaced_and_given_to_the_optimizer_is_updated_once_a_step():
    class Module(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                self.fc2.weight = nn.Parameter(0.1 * torch.randn(WIDTH, WIDTH))
                self.optimizers().add_param_group({"params": [self.fc2.weight]})

    module = Module()
    with warned("its weight was written into"):
        trainer = fit(module, low_rank(), epochs=4)
    held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert sum(p is module.fc2.weight for p in held) == 1


class NotesActivations(Callback):
    """Hooks a method of its own, and holds what can not be copied."""

    def on_train_start(self, trainer, pl_module):
        self.lock, self.seen = threading.Lock(), []
        pl_module.fc2.register_forward_hook(self.note)

    def note(self, module, args, y):
        self.seen.append(type(module).__name__)


@pytest.mark.parametrize("written", [False, True])
def test_weight_average_follows_layers_whose_hooks_can_not_be_copied(written):
    class Module(Net):
        def on_train_epoch_start(self):
            if written and self.current_epoch == 2:
                self.fc2.weight.data.mul_(0.5)

    module, notes = Module(), NotesActivations()
    average = EMAWeightAveraging(decay=0.5)
    with warned("its weight was written into") if written else contextlib.nullcontext():
        fit(module, average, notes, low_rank())
    assert ("fc2" in low_rank_layers(module)) != written
    assert set(notes.seen) == {"Linear", "LowRankLinear"}
    assert len(module.fc2._forward_hooks) == 1


@pytest.mark.parametrize("broken", [False, True])
def test_write_into_a_weight_after_the_fit_is_said_by_the_layer(broken):
    class Breaks(Callback):
        def on_train_epoch_start(self, trainer, _):
            if broken and trainer.current_epoch == 2:
                raise RuntimeError("broken on purpose")

    module = Net()
    with pytest.raises(RuntimeError, match="on purpose") if broken else contextlib.nullcontext():
        fit(module, low_rank(), Breaks())
    module.fc2.weight.data.mul_(0.5)
    with pytest.warns(UserWarning, match="low-rank layer `fc2` was written into"):
        module(torch.randn(2, 16))


class GroupsByName(Net):
    def configure_optimizers(self):
        weights = [p for name, p in self.named_parameters() if name.endswith("weight")]
        others = [p for name, p in self.named_parameters() if name.endswith("bias")]
        return torch.optim.AdamW([{"params": weights}, {"params": others, "weight_decay": 0.0}], 1e-2)


def test_second_fit_whose_groups_leave_the_factors_out_says_so():
    module, callback = GroupsByName(), low_rank()
    fit(module, callback)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(module, callback)
    assert [w for w in told if str(w.message).startswith("no optimizer holds the factors of `fc1`, `fc2`: this fit")]


class NeverCalled(Net):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(WIDTH, WIDTH)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_layer_that_no_step_uses_goes_back_alone_and_the_others_keep_their_training(optimizer):
    class Module(NeverCalled):
        def configure_optimizers(self):
            return optimizer(self.parameters(), 1e-2)

    module, without = Module(), Module()
    unused = module.unused.weight.detach().clone()
    with warned("put unused back, dense from now on: it got no gradient in 10 steps"):
        fit(module, low_rank({"fc1": (8,), "unused": (10,)}), epochs=4)
    fit(without, low_rank({"fc1": (8,)}), epochs=4)
    assert set(low_rank_layers(module)) == {"fc1"}
    assert torch.equal(module.unused.weight, unused)
    assert torch.equal(module.fc1.weight, without.fc1.weight)


def test_layers_that_got_no_gradient_since_the_first_step_of_all_go_back_with_the_others():
    module = NeverCalled()
    with warned("the factors of `unused` got no gradient in 10 steps"):
        fit(module, low_rank({"fc1": (8,), "unused": (10,)}, when=0), epochs=4)
    assert not low_rank_layers(module)


class AsksForTheType(Net):
    """Uses a layer only as long as it is what it was."""

    def forward(self, x):
        x = torch.relu(self.fc1(x))
        return self.head(torch.relu(self.fc2(x) if type(self.fc2) is nn.Linear else x))


def test_layer_that_was_used_until_it_became_low_rank_goes_back_with_all_others():
    module = AsksForTheType()
    with warned("the factors of `fc2` got no gradient in 10 steps"):
        fit(module, low_rank(), epochs=4)
    assert not low_rank_layers(module)


def test_layers_that_train_stay_low_rank_and_nothing_is_kept_of_the_dense_ones():
    module, callback = Net(), low_rank()
    fit(module, callback)
    assert set(low_rank_layers(module)) == {"fc1", "fc2"}
    assert callback._exchanged.first is None


class ReadsTheWeight(Net):
    """Calls a function with a layer's weight, as fast paths do, and adds a penalty on it."""

    def forward(self, x):
        h = torch.relu(self.fc1(x))
        return self.head(torch.relu(F.linear(h, self.fc2.weight, self.fc2.bias)))

    def training_step(self, batch, index):
        return super().training_step(batch, index) + 1e-3 * self.fc2.weight.square().sum()


def test_weight_that_is_read_in_the_step_trains_its_factors():
    module, before = ReadsTheWeight(), {}

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if low_rank_layers(pl_module) and not before:
                before.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    fit(module, low_rank(), Keep())
    assert set(low_rank_layers(module)) == {"fc1", "fc2"}
    assert all(not torch.equal(p, before[name]) for name, p in module.named_parameters())


class Writes(Net):
    """Writes into a weight after each step or before, by every idiom."""

    def write(self):
        raise NotImplementedError

    def on_train_batch_end(self, *_):
        self.write()


def row_norms(w):
    return w.norm(dim=1, keepdim=True)


def by_data(layer):
    layer.weight.data.div_(row_norms(layer.weight.data))


@torch.no_grad()
def by_copy(layer):
    layer.weight.copy_(layer.weight / row_norms(layer.weight))


@torch.no_grad()
def by_operator(layer):
    layer.weight /= row_norms(layer.weight)


@torch.no_grad()
def by_rows(layer):
    for row in layer.weight:
        row.div_(row.norm())


def by_new_data(layer):
    layer.weight.data = layer.weight.data / row_norms(layer.weight.data)


def by_numpy(layer):
    array = layer.weight.detach().numpy()
    array /= (array**2).sum(1, keepdims=True) ** 0.5


@torch.no_grad()
def by_foreach(layer):
    torch._foreach_div_([layer.weight], [row_norms(layer.weight)])


WRITES = [by_data, by_copy, by_operator, by_rows, by_new_data, by_numpy, by_foreach]


@pytest.mark.parametrize("write", WRITES)
def test_rows_that_a_model_normalizes_are_normal_after_the_switch_and_train(write):
    class Module(Net):
        def on_train_batch_end(self, *_):
            write(self.fc2)

    module = Module()
    with warned("RankQuantization put fc2 back"):
        trainer = fit(module, low_rank({"fc2": (10,)}), epochs=4)
    norms = module.fc2.weight.detach().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    assert any(p is module.fc2.weight for group in trainer.optimizers[0].param_groups for p in group["params"])


def test_weight_that_is_written_into_within_the_step_is_updated_in_that_step():
    class Module(Net):
        def training_step(self, batch, index):
            by_data(self.fc2)
            return super().training_step(batch, index)

    module, seen = Module(), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(bool((pl_module.fc2.weight.detach().norm(dim=1) - 1.0).abs().max() > 1e-6))

    with warned("RankQuantization put fc2 back"):
        fit(module, low_rank({"fc2": (10,)}), Watch())
    assert all(seen), "an update followed each write"


class Twins(Net):
    """A target network that follows by averages; frozen, or merely never trained."""

    frozen = True

    def __init__(self):
        super().__init__()
        self.online = nn.Sequential(nn.Linear(16, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.target = copy.deepcopy(self.online).requires_grad_(not self.frozen)

    def forward(self, x):
        return self.head(torch.relu(self.online(x) - self.target(x).detach()))

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        for p, average in zip(self.online.parameters(), self.target.parameters(), strict=True):
            average.mul_(0.9).add_(p, alpha=0.1)


@pytest.mark.parametrize("frozen", [True, False])
def test_network_and_its_moving_copy_train_as_plain(frozen):
    class Module(Twins):
        pass

    Module.frozen = frozen
    plain, module = Module(), Module()
    fit(plain)
    callback = RankQuantization(plan=plan({"online.2": (10,), "target.2": (10,)}), when=1)
    with warned("look like a network and a copy that follows it"):
        fit(module, callback)
    assert_equal(plain, module)


class Masked(Net):
    after = False

    def __init__(self):
        super().__init__()
        mask = torch.zeros(WIDTH, 1)
        mask[:4] = 1.0
        if self.after:
            self.fc2.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad * mask))
        else:
            self.fc2.weight.register_hook(lambda grad: grad * mask)


@pytest.mark.parametrize("after", [False, True])
def test_gradient_hooks_act_as_before(after):
    class Module(Masked):
        pass

    Module.after = after
    plain, module = Module(), Module()
    fit(plain)
    with warned("is registered on its weight"):
        fit(module, low_rank({"fc2": (10,)}))
    assert_equal(plain, module)


class ZeroBranch(Net):
    """A residual branch whose last layer starts at zero."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x):
        h = torch.relu(self.fc1(x))
        return self.head(h + self.last(torch.relu(self.fc2(h))))


def test_layer_that_starts_at_zero_trains_low_rank():
    module = ZeroBranch()
    fit(module, low_rank({"last": (10,), "fc2": (10,)}, when=0))
    assert set(low_rank_layers(module)) == {"last", "fc2"}
    assert float(module.last.weight.detach().norm()) > 0.1


def test_layer_that_starts_at_zero_under_a_frozen_zero_factor_goes_back():
    module = ZeroBranch()
    rests = SequentialFreezing(mode="fixed", fixed_group=0)
    with warned("the factors of `last` got no gradient"):
        fit(module, low_rank({"last": (10,)}, when=0), rests, epochs=4)
    assert float(module.last.weight.detach().norm()) > 0.1
    assert module.last.weight.requires_grad


def test_conditions_of_a_switch_hold_with_every_option_of_the_run():
    """Accumulation, clipping and several epochs after the switch."""
    module = Net()
    fit(module, low_rank(), accumulate_grad_batches=2, gradient_clip_val=0.5, epochs=4)
    assert set(low_rank_layers(module)) == {"fc1", "fc2"}
    assert all(torch.isfinite(p).all() for p in module.parameters())


class ByHand(Net):
    """Steps its optimizers itself: past the Trainer, which then counts no step, or two of them in a batch."""

    automatic = False
    raw = True

    def training_step(self, batch, index):
        optimizers = self.optimizers(use_pl_optimizer=not self.raw)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()

    def configure_optimizers(self):
        if self.raw:
            return super().configure_optimizers()
        layers = [*self.fc1.parameters(), *self.fc2.parameters()]
        return [torch.optim.AdamW(layers, 1e-2), torch.optim.AdamW(self.head.parameters(), 1e-2)], []


@pytest.mark.parametrize("raw", [True, False])
def test_factors_take_turns_however_a_module_counts_its_steps(raw):
    class Module(ByHand):
        pass

    Module.raw, rested = raw, []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if low_rank_layers(pl_module):
                rested.append(frozenset(n for n, p in pl_module.fc2.named_parameters() if not p.requires_grad))

    fit(Module(), low_rank(when=0), SequentialFreezing(period_steps=1), Watch())
    assert set(rested) == {frozenset({"factor_out"}), frozenset({"factor_in"})}


def test_freezing_steps_aside_where_the_optimizer_leaves_the_model_dense():
    class Module(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=2)

    module, plain = Module(), Module()
    fit(plain)
    with warned("LBFGS keeps directions over all its parameters together"):
        fit(module, low_rank(), SequentialFreezing())
    assert_equal(plain, module)
