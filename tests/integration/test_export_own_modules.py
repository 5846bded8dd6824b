"""Export of anybody's module, from Python and from the command line by its class, checked by running both."""

import argparse
import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from cli_calls import call
from onnx.reference import ReferenceEvaluator
from torch import nn

import lightning_accel
from lightning_accel.cli.export.formats import CannotWriteError
from lightning_accel.cli.export.model_file import ExportError
from lightning_accel.low_rank import decompose, low_rank_layers, make_plan

ONNX = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning:torch.*")

SOURCE = """
import argparse
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    def __init__(self, width=24, classes=3):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout())
        self.head = nn.Linear(width, classes)
        self.example_input_array = torch.randn(4, 6)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return self.head(self.layer(x)) * self.scale

    def validation_step(self, batch, index):
        self.log("loss", self(batch[0]).square().mean())


class Renaming(Net):
    def on_save_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k.replace("head.", "head._wrapped."): v for k, v in state.items()}
        checkpoint["own"] = 3

    def on_load_checkpoint(self, checkpoint):
        self.own = checkpoint["own"]
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k.replace("head._wrapped.", "head."): v for k, v in state.items()}


class Loose(Net):
    strict_loading = False

    def __init__(self, width=24):
        super().__init__(width)
        self.metric = nn.Linear(2, 2)

    def state_dict(self, *args, **kwargs):
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if "metric" not in k}


class Late(Net):
    def __init__(self, width=24):
        super().__init__(width)
        self.tail = None

    def configure_model(self):
        if self.tail is None:
            self.tail = nn.Linear(3, 3)

    def forward(self, x):
        return self.tail(super().forward(x))


class Needy(LightningModule):
    def __init__(self, width):
        super().__init__()
        self.layer, self.example_input_array = nn.Linear(6, width), torch.randn(4, 6)

    def forward(self, x):
        return self.layer(x)


class Wrapped(LightningModule):
    def __init__(self, hparams):
        super().__init__()
        self.save_hyperparameters(hparams)
        self.layer, self.example_input_array = nn.Linear(6, hparams["width"]), torch.randn(4, 6)

    def forward(self, x):
        return self.layer(x)


class Masked(Net):
    def __init__(self):
        super().__init__()
        self.example_input_array = {"x": torch.randn(4, 6), "mask": torch.ones(4, dtype=torch.bool)}

    def forward(self, x, mask):
        return {"logits": super().forward(x).masked_fill(~mask.unsqueeze(-1), -float("inf")), "mask": mask}


class Silent(Net):
    def __init__(self):
        super().__init__()
        self.example_input_array = None


class Data(LightningDataModule):
    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 6)), 4)


class NotAModule:
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A file of the user's in the working directory, as a module."""
    Path("own_models.py").write_text(SOURCE)
    monkeypatch.setattr(sys, "path", [str(Path.cwd()), *sys.path])
    sys.modules.pop("own_models", None)
    yield importlib.import_module("own_models")
    sys.modules.pop("own_models", None)


def trained(model):
    """Return a module whose weights, buffers and running statistics are not the first ones."""
    torch.manual_seed(3)
    model.configure_model()
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point():
                value.uniform_(0.1, 1.0)
    return model


def save(model, path="last.ckpt"):
    checkpoint = {"state_dict": model.state_dict(), "epoch": 2, "global_step": 7, "pytorch-lightning_version": "2.6.6"}
    checkpoint |= {"optimizer_states": [{"state": {}}], "loops": {}, "callbacks": {}}
    if model.hparams:
        checkpoint |= {"hyper_parameters": dict(model.hparams), "hparams_name": model._hparams_name}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return path


def run(model, *args, **kwargs):
    with torch.no_grad():
        return model.eval()(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict:UserWarning")
@pytest.mark.parametrize("name", ["Net", "Renaming", "Loose", "Late", "Wrapped"])
@pytest.mark.parametrize("by", ["class", "instance"])
def test_plain_checkpoint_of_a_class_loads_through_its_own_hooks(own, name, by):
    kind = getattr(own, name)
    model = trained(kind({"width": 5}) if name == "Wrapped" else kind(width=16) if name != "Needy" else kind(5))
    low = make_plan(model, None, ratio=1.2, method="fixed") if name == "Net" else None
    if low is not None:
        decompose(model, low)
        assert low_rank_layers(model)
    path = save(model)
    if by == "class":
        done = lightning_accel.export(kind, "plain.ckpt", checkpoint=path)
    else:
        done = lightning_accel.export(model, "plain.ckpt")
    assert done.inputs_compared > 3
    assert done.largest_difference < 1e-5
    plain = kind.load_from_checkpoint("plain.ckpt", weights_only=True)
    assert not low_rank_layers(plain)
    x = torch.randn(5, 6)
    torch.testing.assert_close(run(plain, x), run(model, x), rtol=1e-4, atol=1e-5)
    assert "optimizer_states" not in torch.load("plain.ckpt", weights_only=True)
    if name == "Renaming":
        assert plain.own == 3


@pytest.mark.parametrize("file_format", ["plain.ckpt", "model.pt2", pytest.param("model.onnx", marks=ONNX)])
def test_module_is_left_as_it_was_and_frozen_parameters_stay_frozen(own, file_format):
    model = trained(own.Net())
    model.layer[0].requires_grad_(False)
    model.layer[1].eval()
    with torch.no_grad():
        model.layer[0].weight[:8] = 0.0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = lightning_accel.export(model, file_format)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.training, model.layer[1].training) == (True, False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in done.model.named_parameters()} == flags
    assert (done.model.training, done.model.layer[1].training) == (True, False)
    assert (done.parameters_after < done.parameters_before) == (file_format != "plain.ckpt")
    assert any("8 zero rows" in note for note in done.notes)


@ONNX
def test_programs_of_named_arguments_masks_and_infinities_are_those_of_the_model(own):
    model = trained(own.Masked())
    x, mask = torch.randn(7, 6), torch.arange(7) % 2 == 0
    expected = run(model, x=x, mask=mask)["logits"]
    assert bool(expected.isinf().any())
    lightning_accel.export(model, "model.pt2")
    actual = torch.export.load("model.pt2").module()(x, mask)["logits"]
    torch.testing.assert_close(actual, expected)
    done = lightning_accel.export(model, "model.onnx")
    assert done.inputs_compared > 3
    evaluator = ReferenceEvaluator("model.onnx")
    found = evaluator.run(None, dict(zip(evaluator.input_names, (x.numpy(), mask.numpy()), strict=True)))
    torch.testing.assert_close(torch.as_tensor(found[0]), expected)


def test_plain_modules_without_lightning_are_exported_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    done = lightning_accel.export(model, "plain.pt", torch.randn(3, 4))
    fresh = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    fresh.load_state_dict(torch.load("plain.pt", weights_only=True)["state_dict"])
    assert torch.equal(run(fresh, x := torch.randn(2, 4)), run(model, x))
    assert done.largest_difference == 0.0


class OfItsBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x).view(3, 4) + torch.arange(3.0).unsqueeze(1) if len(x) == 3 else self.layer(x)


def test_program_that_takes_one_size_only_says_so():
    done = lightning_accel.export(OfItsBatch(), "model.pt2", torch.randn(3, 4))
    assert any("batches of the example's size only" in note for note in done.notes)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) if float(x.sum()) > 0 else -self.layer(x)


class Frozen(nn.Module):
    """Reads a value that tracing takes for a constant."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) * float(x.detach().numpy().sum()) if not torch.compiler.is_exporting() else self.layer(x)


def test_what_can_not_be_traced_or_computes_otherwise_is_refused_and_leaves_no_file():
    with pytest.raises(CannotWriteError, match=r"Branching can not be written as torch_export: .* takes every model"):
        lightning_accel.export(Branching(), "model.pt2", torch.randn(3, 4))
    with pytest.raises(ExportError, match="outputs differ by"):
        lightning_accel.export(Frozen(), "model.pt2", torch.randn(3, 4))
    assert not Path("model.pt2").exists()


@pytest.mark.parametrize(("module", "error"), [(Branching, CannotWriteError), (Frozen, ExportError)])
def test_a_file_of_that_name_stays_when_an_export_fails(module, error):
    Path("model.pt2").write_text("the last good one")
    with pytest.raises(error):
        lightning_accel.export(module(), "model.pt2", torch.randn(3, 4))
    assert Path("model.pt2").read_text() == "the last good one"
    assert not list(Path().glob(".export-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "zip"}, "`format` must be one of"),
        ({"low_rank": "burn"}, "`low_rank` must be one of"),
        ({"zero_groups": "burn"}, "`zero_groups` must be remove, keep or null"),
        ({"zero_groups": "remove"}, "zero_groups=remove needs format"),
        ({"checkpoint": "none.ckpt"}, "There is no checkpoint none.ckpt"),
        ({"checkpoint": "other.ckpt"}, "other.ckpt does not fit Linear"),
        ({"example_inputs": None}, "There is no input to check Linear with"),
        ({"model": nn.Linear}, "`checkpoint` must be given for a class"),
        ({"model": nn.Linear, "checkpoint": "other.ckpt"}, "must be the class of a LightningModule, got Linear"),
        ({"model": 3}, "`model` must be a module"),
    ],
)
def test_arguments_out_of_range_are_value_errors(arguments, message):
    torch.save({"state_dict": {"w": torch.zeros(1)}}, "other.ckpt")
    given = {"model": nn.Linear(2, 2), "out": "plain.ckpt", "example_inputs": torch.randn(2, 2)} | arguments
    with pytest.raises(ValueError, match=message):
        lightning_accel.export(**given)


@pytest.mark.parametrize("words", [["model=own_models.Renaming"], ["model._target_=own_models.Renaming"]])
def test_command_takes_a_class_of_the_users_by_its_path(own, capsys, words):
    model = trained(own.Renaming(width=16))
    assert call("export", f"ckpt={save(model)}", "out=plain.ckpt", *words) == 0
    assert "Written: plain.ckpt" in capsys.readouterr().out
    plain = own.Renaming.load_from_checkpoint("plain.ckpt", weights_only=True)
    torch.testing.assert_close(run(plain, x := torch.randn(5, 6)), run(model, x))


def test_command_takes_arguments_of_the_class_and_data_by_path(own, capsys):
    model = trained(own.Needy(5))
    words = ["model=own_models.Needy", "model.width=5", "format=torch_export", "out=model.pt2"]
    assert call("export", f"ckpt={save(model)}", *words) == 0
    torch.testing.assert_close(torch.export.load("model.pt2").module()(x := torch.randn(5, 6)), run(model, x))
    net = trained(own.Silent())
    words = ["model=own_models.Silent", "data=own_models.Data", "out=plain.ckpt"]
    assert call("export", f"ckpt={save(net)}", *words) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=own_models.Nowhere"], "own_models.Nowhere, which can not be imported"),
        (["model=nowhere.Net"], "nowhere.Net, which can not be imported"),
        (["model=own_models.NotAModule"], "must name the class of a LightningModule, got own_models.NotAModule"),
        (["model=own_models.Needy"], "does not fit Needy: RuntimeError"),
        (
            ["model=own_models.Net", "model.depth=3"],
            "`model.depth`: own_models.Net takes no `depth`. Did you mean `width`?",
        ),
        (["model=own_models.Silent"], "There is no input to check Silent with: give data="),
        (["model=own_models.Net", "ckpt=code.ckpt"], "weights_only=false"),
        (["model=own_models.Net", "ckpt=none.ckpt"], "There is no checkpoint none.ckpt"),
        (["model=nix"], "`nix` is no option of the group `model`"),
    ],
)
def test_command_ends_with_one_sentence_and_exit_code_two(own, capsys, words, message):
    save(trained(own.Net()))
    torch.save({"state_dict": {}, "x": argparse.Namespace()}, "code.ckpt")
    assert call("export", "ckpt=last.ckpt", "out=plain.ckpt", *words) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert len(said.splitlines()) == 1
    assert not Path("plain.ckpt").exists()


def test_command_says_in_one_sentence_what_a_format_can_not_hold(own, capsys):
    Path("branching.py").write_text(
        "import torch\nfrom own_models import Net\n\n\nclass Branching(Net):\n    def forward(self, x):\n"
        "        return super().forward(x) if float(x.sum()) > 0 else x\n"
    )
    sys.modules.pop("branching", None)
    save(trained(own.Net()))
    assert call("export", "ckpt=last.ckpt", "model=branching.Branching", "format=torch_export") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "Branching can not be written as torch_export" in said[0]


def test_checkpoint_with_code_is_read_where_it_is_trusted(own, capsys):
    model = trained(own.Net())
    path = save(model)
    torch.save(torch.load(path, weights_only=False) | {"x": Path("x")}, path)
    assert call("export", f"ckpt={path}", "model=own_models.Net", "out=plain.ckpt") == 2
    assert "weights_only=false" in capsys.readouterr().err
    assert call("export", f"ckpt={path}", "model=own_models.Net", "out=plain.ckpt", "weights_only=false") == 0
    with pytest.raises(ValueError, match="weights_only=false"):
        lightning_accel.export(own.Net, "plain.ckpt", checkpoint=path)
    assert lightning_accel.export(own.Net, "plain.ckpt", checkpoint=path, weights_only=False).inputs_compared


def test_outputs_that_are_not_finite_count(own):
    model = trained(own.Masked())
    assert math.isinf(float(run(model, torch.randn(4, 6), torch.zeros(4, dtype=torch.bool))["logits"][0, 0]))
    assert lightning_accel.export(model, "plain.ckpt").largest_difference == 0.0
