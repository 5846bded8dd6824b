"""The suite's peers follow their rules, and its rows name what a reader needs. No time is judged."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_accel.bench.low_rank_peers import mac_guarded, weight_parameters
from lightning_accel.bench.suites import low_rank

TINY = low_rank.Case(
    "tiny MLP",
    lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
    (8, 64),
    speedup=1.1,
    inference_speedup=1.1,
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


@pytest.fixture
def suite(tmp_path):
    return low_rank._Suite(quick=True, device="cpu", cache=str(tmp_path))


def test_training_rows_compare_with_dense_and_at_equal_energy(suite):
    rows = list(suite.training(TINY))
    assert all(row.suite == "low_rank" and row.ratio.pairs == 6 for row in rows)
    against_dense = [row.variant for row in rows if row.baseline == "dense"]
    assert len(against_dense) == len(set(against_dense)) == 10
    assert sum(row.target is not None for row in rows) == 2
    assert rows[-1].baseline == "operation count"
    assert rows[-1].target == 1.2
    assert all("energy" in row.note for row in rows)
    assert set(rows[-1].seconds) == {"dense", *against_dense}


def test_the_target_belongs_to_sequential_freezing_of_the_fast_plan(suite):
    (row,) = (row for row in suite.training(TINY) if row.baseline == "dense" and row.target is not None)
    assert row.variant == "knapsack, predicted x1.1, sequential freezing"
    assert "phases 2:1" in row.note


def test_inference_and_planning_rows(suite):
    rows = list(suite.inference(TINY))
    assert {row.variant: row.target for row in rows if row.target is not None} == {"knapsack, predicted x1.1": 1.0}
    assert {"theoretical rank, a = 2", "largest drop in time, a = 2", "operation count"} <= {
        row.variant for row in rows
    }
    first, cached = suite.planning(TINY)
    assert (first.better, first.target, cached.baseline) == ("at most", 1.0, "1 s")
    assert first.ratio.median == pytest.approx(first.seconds["first time"] / 60.0)


def test_default_settings_row_says_what_the_gate_decided(suite):
    (row,) = suite.defaults("tiny", TINY.make, TINY.shape)
    assert (row.variant == "stays dense") == (row.target is None)
    assert re.fullmatch(r"stays dense|1 layer low rank|([2-9]|\d\d+) layers low rank", row.variant)
    assert row.note


def test_all_plans_of_a_run_read_one_cache_that_begins_empty(monkeypatch):
    seen = []
    plan = low_rank.make_plan

    def remember(*args, cache_dir, **settings):
        seen.append((cache_dir, bool(list(Path(cache_dir).iterdir()))))
        return plan(*args, cache_dir=cache_dir, **settings)

    monkeypatch.setattr(low_rank, "make_plan", remember)
    monkeypatch.setattr(low_rank, "_CASES", (TINY,))
    monkeypatch.setattr(low_rank, "_DEFAULTS", (("tiny", TINY.make, TINY.shape),))
    cases = {row.case for row in low_rank.rows(quick=True, device="cpu")}
    assert {case.split(",")[-1].strip() for case in cases} == {
        "training step",
        "training step at equal energy",
        "inference",
        "inference at equal energy",
        "plan of tiny MLP",
        "default settings with the gate",
    }
    assert len({folder for folder, _ in seen}) == 1
    assert [filled for _, filled in seen] == [False] + [True] * (len(seen) - 1)
    assert not Path(seen[0][0]).exists()
