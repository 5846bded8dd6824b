"""``plan``, ``bench`` and ``export``."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from cli_calls import SMALL, call, folders
from onnx.reference import ReferenceEvaluator

from lightning_accel.bench import suites as bench_package
from lightning_accel.cli.checkpoint import read_checkpoint
from lightning_accel.cli.errors import UsageError
from lightning_accel.cli.plan.sequential_freezing import frozen_phases
from lightning_accel.low_rank import FreezingSchedule, RankPlan, decompose, low_rank_layers, make_plan, merge
from lightning_accel.zoo import MLP

export_module = importlib.import_module("lightning_accel.cli.export.model_file")

SUITE = """
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.measure import compare_paired


def rows(*, quick, device):
    ratio = compare_paired([2.0] * 8, [1.0] * 8)
    yield BenchRow("tiny", f"quick={quick}", "ours", "theirs", ratio, {"ours": 1.0, "theirs": 2.0}, target=1.5)
    if not quick:
        raise KeyboardInterrupt
"""


@pytest.fixture
def tiny_suite(tmp_path, monkeypatch):
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "tiny.py").write_text(SUITE)
    monkeypatch.setattr(bench_package, "__path__", [str(tmp_path / "suites")])


@pytest.mark.usefixtures("tiny_suite")
def test_bench_prints_and_writes_the_rows_of_a_suite(capsys):
    assert call("bench", "tiny", "quick=true") == 0
    assert "tiny: quick=True: ours 2.00" in capsys.readouterr().out
    (folder,) = folders("bench")
    assert {path.name for path in folder.iterdir()} >= {"bench.json", "bench.csv", "bench.md", "bench.png"}
    row = json.loads((folder / "bench.json").read_text())["rows"][0]
    assert (row["case"], row["ratio"]["median"], row["reached"]) == ("quick=True", 2.0, True)


@pytest.mark.usefixtures("tiny_suite")
def test_bench_keeps_what_was_measured_before_an_interruption():
    assert call("bench", "tiny") == 130
    (folder,) = folders("bench")
    assert len(json.loads((folder / "bench.json").read_text())["rows"]) == 1


@pytest.mark.usefixtures("tiny_suite")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tinny"], "`tinny` is no suite. Did you mean `tiny`? There are: all, tiny."),
        (["tiny", "device=abacus"], "`device` must be a device of this machine, got abacus"),
    ],
)
def test_bench_explains_what_it_can_not_measure(words, message, capsys):
    assert call("bench", *words) == 2
    assert message in capsys.readouterr().err


def test_plan_shows_ranks_and_trains_nothing(capsys):
    settings = ["callbacks.rank_quantization.method=fixed", "callbacks.rank_quantization.ratio=2"]
    assert call("plan", "model.width=64", "model.depth=2", "data=digits", *settings) == 0
    out = capsys.readouterr().out
    assert "hidden.0" in out
    (folder,) = folders("plan")
    plan = RankPlan.load(folder / "rank_plan.json")
    assert plan.method == "fixed"
    assert plan.parameters_after < plan.parameters_before
    assert not list(folder.glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["callbacks=[]"], "No callback is chosen"),
        (["callbacks.rank_quantization.ratio=0.5"], "`ratio` must be > 1 or None, got 0.5"),
        (["--config-dir", "own", "callbacks=[timer]"], "`timer` has nothing to show before training."),
    ],
)
def test_plan_explains_what_it_can_not_show(words, message, capsys):
    Path("own/callbacks").mkdir(parents=True)
    Path("own/callbacks/timer.yaml").write_text("timer:\n  _target_: lightning.pytorch.callbacks.Timer\n")
    assert call("plan", "model.width=16", "model.depth=1", *words) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def low_rank_checkpoint():
    """Train, factor a layer by hand, and save as Lightning does."""
    assert call("train", *SMALL, "model.width=32", "logger=[]", "test=false") == 0
    path = folders("train")[0] / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    model = MLP.load_from_checkpoint(path)
    decompose(model, make_plan(model, None, ratio=1.5, method="fixed"))
    assert low_rank_layers(model)
    checkpoint["state_dict"] = model.state_dict()
    torch.save(checkpoint, path)
    return path, model.eval()


def test_export_writes_what_the_plain_class_loads_and_computes_the_same(low_rank_checkpoint, capsys):
    path, low_rank = low_rank_checkpoint
    assert call("export", f"ckpt={path}", "out=plain.ckpt") == 0
    assert "merged into dense ones" in capsys.readouterr().out
    plain = MLP.load_from_checkpoint("plain.ckpt", weights_only=True).eval()
    assert not low_rank_layers(plain)
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain(x), low_rank(x))
    assert "optimizer_states" not in torch.load("plain.ckpt", weights_only=True)


@pytest.mark.parametrize("low_rank", ["keep", "merge", "fastest"])
def test_export_writes_a_program(low_rank_checkpoint, low_rank, capsys):
    path, model = low_rank_checkpoint
    capsys.readouterr()
    assert call("export", f"ckpt={path}", "out=model.pt2", "format=torch_export", f"low_rank={low_rank}") == 0
    program = torch.export.load("model.pt2")
    out = capsys.readouterr().out
    kept = "0 merged" in out
    assert any("factor_in" in name for name in program.state_dict) == kept
    assert kept == {"keep": True, "merge": False}.get(low_rank, kept)
    assert ("times as fast as dense here" in out) == (low_rank == "fastest")
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))  # not the size it was traced with
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning:torch.*")
def test_export_writes_onnx_that_computes_the_same_for_any_batch(low_rank_checkpoint):
    path, model = low_rank_checkpoint
    assert call("export", f"ckpt={path}", "out=model.onnx", "format=onnx", "low_rank=keep") == 0
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    evaluator = ReferenceEvaluator("model.onnx")
    (actual,) = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.as_tensor(actual), model(x).detach())


def test_export_names_the_extra_for_onnx(low_rank_checkpoint, monkeypatch, capsys):
    path, _ = low_rank_checkpoint
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert call("export", f"ckpt={path}", "out=model.onnx", "format=onnx") == 2
    assert "pip install 'lightning-accel[onnx]'" in capsys.readouterr().err


@pytest.mark.parametrize("change", [("weight", 0.5), ("bias", float("nan"))])
def test_export_refuses_to_write_what_computes_something_else(low_rank_checkpoint, monkeypatch, capsys, change):
    path, _ = low_rank_checkpoint
    name, value = change

    def wrong_merge(model):
        merged = merge(model)
        getattr(model.head, name).data.fill_(value)
        return merged

    monkeypatch.setattr(export_module, "merge", wrong_merge)
    assert call("export", f"ckpt={path}", "out=plain.ckpt") == 1
    assert "ExportError: outputs differ by" in capsys.readouterr().err
    assert not Path("plain.ckpt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "`ckpt` is needed and has no default: add ckpt=VALUE."),
        (["ckpt=none.ckpt"], "There is no checkpoint none.ckpt"),
        (["ckpt=text.ckpt"], "text.ckpt can not be read as tensors and plain data alone"),
        (["ckpt=list.ckpt"], "list.ckpt is no Lightning checkpoint"),
        (["ckpt=other.ckpt", "model=mlp"], "other.ckpt does not fit MLP"),
        (["ckpt=x", "format=zip"], "`format` must be one of checkpoint, torch_export, onnx, got zip."),
        (["ckpt=x", "low_rank=burn"], "`low_rank` must be one of merge, keep, fastest, got burn."),
        (["ckpt=x", "low_rank=keep"], "A plain checkpoint has dense layers only"),
    ],
)
def test_export_explains_what_it_can_not_read(words, message, capsys):
    Path("text.ckpt").write_text("no pickle")
    torch.save([1], "list.ckpt")
    torch.save({"state_dict": {"w": torch.zeros(1)}}, "other.ckpt")
    assert call("export", *words) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_with_code_needs_trust(tmp_path):
    torch.save({"state_dict": {}, "path": Path("x")}, "code.ckpt")
    with pytest.raises(UsageError, match="weights_only=false"):
        read_checkpoint("code.ckpt")
    assert read_checkpoint("code.ckpt", weights_only=False)["path"] == Path("x")


def test_plan_shows_when_which_factors_rest(capsys):
    words = ["callbacks=[sequential_freezing]", "callbacks.sequential_freezing.start=1", "trainer.max_epochs=4"]
    assert call("plan", "model.width=16", "model.depth=1", "data=digits", *words) == 0
    out = capsys.readouterr().out
    rows = [line.replace("│", " ").split() for line in out.splitlines() if line.startswith("│")]
    assert rows == [["0-0", "none"], ["1-1", "0"], ["2-2", "1"], ["3-3", "0"]]
    final = ["callbacks.sequential_freezing.final_trainable=1", "trainer.max_epochs=-1"]
    assert call("plan", "model.width=16", "model.depth=1", "data=digits", *words[:2], *final) == 2
    assert "needs trainer.max_epochs" in capsys.readouterr().err


def test_phases_in_steps_merge_and_cover_the_training():
    schedule = FreezingSchedule(period_steps=2, final_trainable=2)
    assert frozen_phases(schedule, 8) == [(0, 1, 0), (2, 3, 1), (4, 5, 0), (6, 7, None)]
    assert frozen_phases(FreezingSchedule(mode="fixed", fixed_group=1), None) == [(0, 99, 1)]
