"""``export`` of projected models: zero groups are gone, outputs and speed are told."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_calls import call, folders
from onnx.reference import ReferenceEvaluator

from lightning_accel.zoo import SupervisedAutoencoder

SETTINGS = ["target_sparsity=0.5", "parameters=encoder.0.weight", "groups=columns"]


@pytest.fixture
def projected_checkpoint(capsys):
    """Train, with half of the features cleared, and return the path and the model with its zeros."""
    words = ["model=sae", "model.hidden_size=20", "data=breast_cancer", "debug=limit", "monitoring=[checkpoint]"]
    words += ["callbacks=[l1inf_projection]", *(f"callbacks.l1inf_projection.{word}" for word in SETTINGS)]
    assert call("train", *words, "logger=[]", "test=false") == 0
    path = folders("train")[0] / "checkpoints" / "last.ckpt"
    model = SupervisedAutoencoder.load_from_checkpoint(path)
    assert int((model.encoder[0].weight == 0).all(0).sum()) == 15
    with torch.no_grad():
        model.decoder[0].weight[:10] = 0.0  # rows as well
    checkpoint = torch.load(path, weights_only=False)
    torch.save(checkpoint | {"state_dict": model.state_dict()}, path)
    capsys.readouterr()
    return path, model.eval()


def samples():
    return torch.randn(5, 30, generator=torch.Generator().manual_seed(0))


def test_program_is_smaller_computes_the_same_and_its_speed_is_told(projected_checkpoint, capsys):
    path, model = projected_checkpoint
    assert call("export", f"ckpt={path}", "out=model.pt2", "format=torch_export") == 0
    out = capsys.readouterr().out
    assert "10 zero rows and 15 zero columns of weights" in out
    assert "It reads 15 of 30 input features." in out
    assert re.search(
        r"A forward pass of \d+ samples took [\d.]+ ms and takes [\d.]+ ms here: [\d.]+ times as fast", out
    )
    program = torch.export.load("model.pt2")
    entries = sum(value.numel() for name, value in program.state_dict.items() if "index" not in name)
    gone = 15 * 20 + 10 * (2 + 1 + 30)
    assert entries == sum(p.numel() for p in model.parameters()) - gone
    assert f"{gone:,} parameters removed" in out
    for actual, expected in zip(program.module()(samples()), model(samples()), strict=True):
        torch.testing.assert_close(actual, expected)
    kept = json.loads(Path("model.kept.json").read_text())
    alive = (model.encoder[0].weight != 0).any(0)
    assert kept["input_features"] == torch.nonzero(alive)[:, 0].tolist()
    assert kept["output_channels"]["decoder.0"] == list(range(10, 20))


STRANGER = """
import sys
for name in ("lightning_accel", "lightning", "pytorch_lightning"):
    sys.modules[name] = None  # importing one is an error
import torch
from torch import nn
class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(30, 20), nn.SiLU(), nn.Linear(20, 2))
        self.decoder = nn.Sequential(nn.Linear(2, 20), nn.SiLU(), nn.Linear(20, 30))
model = Plain()
model.load_state_dict(torch.load("plain.ckpt", weights_only=True)["state_dict"], strict=True)
x = torch.load("x.pt")
with torch.no_grad():
    codes = model.encoder(x)
    torch.save({"program": torch.export.load("model.pt2").module()(x), "plain": (codes, model.decoder(codes))}, "y.pt")
"""


def test_exported_files_load_strictly_where_this_package_is_not(projected_checkpoint):
    path, model = projected_checkpoint
    assert call("export", f"ckpt={path}", "out=model.pt2", "format=torch_export") == 0
    assert call("export", f"ckpt={path}", "out=plain.ckpt") == 0
    torch.save(samples(), "x.pt")
    subprocess.run([sys.executable, "-c", STRANGER], check=True, timeout=120)
    for outputs in torch.load("y.pt").values():
        for actual, expected in zip(outputs, model(samples()), strict=True):
            torch.testing.assert_close(actual, expected.detach())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning:torch.*")
def test_onnx_is_smaller_and_computes_the_same(projected_checkpoint, capsys):
    path, model = projected_checkpoint
    assert call("export", f"ckpt={path}", "out=model.onnx", "format=onnx", "zero_groups=remove") == 0
    assert "parameters removed" in capsys.readouterr().out
    evaluator = ReferenceEvaluator("model.onnx")
    actual = evaluator.run(None, {evaluator.input_names[0]: samples().numpy()})
    torch.testing.assert_close(torch.as_tensor(actual[0]), model(samples())[0].detach())


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "format=torch_export or onnx removes them"),
        (["format=torch_export", "zero_groups=keep"], "zero_groups=keep"),
    ],
)
def test_zeros_that_stay_are_named(projected_checkpoint, capsys, words, why):
    path, model = projected_checkpoint
    assert call("export", f"ckpt={path}", "out=plain", *words) == 0
    out = capsys.readouterr().out
    assert f"10 zero rows and 15 zero columns of weights stay: {why}" in out
    assert "A forward pass" not in out
    if not words:
        plain = SupervisedAutoencoder.load_from_checkpoint("plain", weights_only=True).eval()
        assert torch.equal(plain(samples())[0], model(samples())[0])


def test_without_torch_pruning_zeros_stay_unless_they_must_go(projected_checkpoint, capsys, monkeypatch):
    path, _ = projected_checkpoint
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    assert call("export", f"ckpt={path}", "out=model.pt2", "format=torch_export") == 0
    assert "columns of weights stay: `shrink` needs torch-pruning: pip install" in capsys.readouterr().out
    assert call("export", f"ckpt={path}", "out=model.pt2", "format=torch_export", "zero_groups=remove") == 2
    assert "pip install 'lightning-accel[shrink]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["zero_groups=burn"], "`zero_groups` must be remove, keep or null, got burn."),
        (["zero_groups=remove"], "zero_groups=remove needs format=torch_export or onnx"),
    ],
)
def test_settings_that_make_no_sense_are_refused(words, message, capsys):
    assert call("export", "ckpt=x", *words) == 2
    assert message in capsys.readouterr().err
