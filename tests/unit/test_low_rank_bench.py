"""The suite's peers follow their rules, and its rows name what a reader needs. No time is judged."""

import pytest
import torch
from torch import nn

from lightning_accel.cli.bench import low_rank
from lightning_accel.cli.bench._low_rank_peers import mac_guarded, theoretical, weight_parameters
from lightning_accel.low_rank import low_rank_layers

TINY = low_rank.Case(
    "tiny MLP",
    lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
    (8, 64),
    speedup=1.1,
    train_target=1.0,
    inference_target=1.0,
)


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    timed = low_rank.time_interleaved
    monkeypatch.setattr(
        low_rank, "time_interleaved", lambda steps, **_: timed(steps, rounds=6, warmup=1, budget_seconds=2.0)
    )


def test_operation_count_replaces_large_layers_only_where_it_saves_operations():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "wide": nn.Linear(512, 512),
            "narrow": nn.Linear(512, 128),
            "no gain": nn.Linear(256, 256),  # 128 (256 + 256) operations are not fewer than 256 * 256
            "conv": nn.Conv2d(256, 256, 3, stride=2, padding=1, bias=False),
            "small conv": nn.Conv2d(64, 64, 3),
            "sequence": nn.Conv1d(512, 512, 3),
        }
    )
    changed, energy = mac_guarded(model)
    replaced = {name for name, module in changed.named_children() if isinstance(module, nn.Sequential)}
    assert replaced == {"wide", "conv"}
    assert changed["wide"][0].out_features == 128
    assert changed["conv"][0].out_channels == 64
    assert 0.0 < energy < 1.0
    assert weight_parameters(changed) < weight_parameters(model)
    x = torch.randn(2, 256, 8, 8)
    assert changed["conv"](x).shape == model["conv"](x).shape
    assert all(type(module) is not nn.Sequential for module in model.children())  # the original is kept


def test_operation_count_is_the_truncated_svd():
    torch.manual_seed(0)
    dense = nn.Linear(512, 300)
    changed, energy = mac_guarded(nn.ModuleDict({"x": dense}))
    product = changed["x"][1].weight @ changed["x"][0].weight
    error = (product - dense.weight).square().sum() / dense.weight.square().sum()
    assert 1.0 - error.item() == pytest.approx(energy, abs=1e-4)
    assert changed["x"][1].bias is dense.bias or torch.equal(changed["x"][1].bias, dense.bias)


def test_theoretical_ranks_are_put_into_a_copy():
    model = TINY.make()
    assert set(low_rank_layers(theoretical(model, 2.0))) == {"0", "2", "4"}
    assert not low_rank_layers(model)


def test_training_rows_compare_with_dense_and_at_equal_energy():
    rows = list(low_rank._training(TINY, quick=True, device="cpu"))
    assert all(row.suite == "low_rank" and row.ratio.pairs == 6 for row in rows)
    against_dense = [row.variant for row in rows if row.baseline == "dense"]
    assert len(against_dense) == len(set(against_dense)) == 10
    assert sum(row.target is not None for row in rows) == 2
    assert rows[-1].baseline == "operation count"
    assert rows[-1].target == 1.2
    assert "energy" in rows[-1].note
    assert set(rows[-1].seconds) == {"dense", *against_dense}


def test_inference_and_planning_rows():
    rows = list(low_rank._inference(TINY, quick=True, device="cpu"))
    assert [row.target for row in rows] == [None, 1.0, None]
    first, cached = low_rank._planning(TINY, device="cpu")
    assert (first.better, first.target, cached.baseline) == ("at most", 1.0, "1 s")
    assert first.ratio.median == pytest.approx(first.seconds["first time"] / 60.0)


def test_default_settings_row_says_what_the_gate_decided():
    (row,) = low_rank._defaults("tiny", TINY.make, TINY.shape, quick=True, device="cpu")
    assert row.variant == "stays dense" or row.variant.endswith("layers low rank")
    assert row.note


def test_quick_rows_cover_training_inference_planning_and_defaults(monkeypatch):
    monkeypatch.setattr(low_rank, "_CASES", (TINY,))
    monkeypatch.setattr(low_rank, "_DEFAULTS", (("tiny", TINY.make, TINY.shape),))
    cases = {row.case for row in low_rank.rows(quick=True, device="cpu")}
    assert {case.split(",")[-1].strip() for case in cases} == {
        "training step",
        "training step at equal energy",
        "inference",
        "plan of tiny MLP",
        "default settings with the gate",
    }
