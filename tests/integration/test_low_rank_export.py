"""What is exported of low-rank convolutions computes the same elsewhere, and weights load strictly without us."""

import subprocess
import sys

import pytest
import torch
from cli_calls import call
from onnx.reference import ReferenceEvaluator

from lightning_accel.low_rank import LowRankConv, TuckerConv, decompose, low_rank_layers, make_plan
from lightning_accel.low_rank.plan import LayerPlan, RankPlan
from lightning_accel.zoo import CNN

PLAIN = """
import sys
for name in ("lightning_accel", "lightning", "pytorch_lightning"):
    sys.modules[name] = None  # importing it fails
import torch
from torch import nn

state = torch.load(sys.argv[1], weights_only=True)["state_dict"]


def module_of(keys):
    weight = state[keys + "weight"]
    if weight.dim() == 4:
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:])
    elif weight.dim() == 2:
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    else:
        layer = nn.BatchNorm2d(len(weight))
    return layer


root = nn.Module()
for key in state:
    if not key.endswith(".weight"):
        continue
    *path, last = key.removesuffix(".weight").split(".")
    parent = root
    for part in path:
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent._modules[part]
    parent.add_module(last, module_of(key.removesuffix("weight")))
root.load_state_dict(state, strict=True)
print("loaded", len(state))
"""


@pytest.fixture
def checkpoint(tmp_path):
    """A CNN with both forms of factored convolutions and a low-rank linear layer, saved as Lightning does."""
    torch.manual_seed(0)
    model = CNN()
    plan = make_plan(model, None, ratio=1.5, method="fixed")
    last = max(name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d))
    layers = [
        layer
        if layer.name != last
        else LayerPlan(layer.name, layer.kind, layer.shape, (7,), "low rank", "the two-factor form")
        for layer in plan.layers
    ]
    decompose(model, RankPlan(layers=tuple(layers), method="fixed", target="ratio", value=1.5))
    assert {type(layer) for layer in low_rank_layers(model).values()} >= {LowRankConv}
    path = tmp_path / "low_rank.ckpt"
    saved = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    torch.save({**saved, "pytorch-lightning_version": "2.6.6", "epoch": 0, "global_step": 0}, path)
    return path, model.eval()


def images(count):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_exported_weights_load_strictly_where_this_package_can_not_be_imported(checkpoint, tmp_path):
    path, model = checkpoint
    plain = tmp_path / "plain.ckpt"
    assert call("export", f"ckpt={path}", "model=cnn", "data=digits", f"out={plain}") == 0
    (tmp_path / "plain.py").write_text(PLAIN)
    done = subprocess.run([sys.executable, "plain.py", str(plain)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["loaded", str(len(CNN().state_dict()))]
    dense = CNN.load_from_checkpoint(plain, weights_only=True).eval()
    torch.testing.assert_close(dense(images(3)), model(images(3)))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning:torch.*")
def test_kept_factors_of_convolutions_become_onnx_of_any_batch(checkpoint, tmp_path):
    path, model = checkpoint
    out = tmp_path / "model.onnx"
    assert call("export", f"ckpt={path}", "model=cnn", "data=digits", f"out={out}", "format=onnx", "low_rank=keep") == 0
    evaluator = ReferenceEvaluator(str(out))
    (actual,) = evaluator.run(None, {evaluator.input_names[0]: images(5).numpy()})
    torch.testing.assert_close(torch.as_tensor(actual), model(images(5)).detach())


@pytest.mark.parametrize("size", [12, 5])
def test_factored_convolutions_become_programs_of_any_batch(size):
    torch.manual_seed(0)
    model = torch.nn.Sequential(TuckerConv(3, 6, (3, 3), (2, 4)), LowRankConv(6, 5, (1, 1), 3, stride=(2, 2))).eval()
    x = torch.rand(4, 3, size, size)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    for batch in (2, 9):
        x = torch.rand(batch, 3, size, size)
        torch.testing.assert_close(program(x), model(x))
