"""The suite ``growth`` of ``lightning-accel bench``, at tiny sizes: no time is judged."""

import json

import pytest
from cli_calls import call, folders

from lightning_accel.bench.growth.points import time_prepared
from lightning_accel.bench.suites import growth
from lightning_accel.evidence.growth.curves import curves, knees


def check(rows, core, number_of_curves):
    found = curves(rows)
    assert len(found) == number_of_curves
    assert {row.core for row in rows} == {core}
    assert len({row.case for row in rows}) == len(rows)
    for points in found:
        assert len({(p.axis, p.better, p.baseline, p.variant, *p.seconds) for p in points}) == 1
        assert len({p.size for p in points}) == len(points) >= 2
        assert isinstance(knees(points), list)
        for p in points:
            assert {p.baseline, p.variant} <= set(p.seconds)
            assert all(seconds > 0.0 for seconds in p.seconds.values())
            assert p.setup_seconds is not None
            assert p.setup_seconds >= 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("core", "number_of_curves"),
    [("low_rank", 2), ("projection", 3), ("recurrent", 3), ("async_sgd", 3)],
)
def test_quick_run_has_points_of_every_curve(core, number_of_curves):
    check(list(growth.rows(quick=True, device="cpu", growth_of=[core])), core, number_of_curves)


def test_command_writes_tables_and_a_picture():
    assert call("bench", "growth", "quick=true", "device=cpu", "growth_of=[low_rank]") == 0
    (folder,) = folders("bench")
    written = {path.name for path in folder.iterdir()}
    assert written >= {"bench.json", "growth.json", "growth.md", "growth_low_rank.png", "growth_low_rank.dark.png"}
    plain = json.loads((folder / "growth.json").read_text())
    assert [curve["core"] for curve in plain] == ["low_rank"] * 2
    rows = json.loads((folder / "bench.json").read_text())["rows"]
    assert [row["size"] for row in rows] == [size for curve in plain for size in curve["sizes"]]
    assert [row["setup_seconds"] for row in rows] == [s for curve in plain for s in curve["setup_seconds"]]


def test_unknown_core_is_refused():
    with pytest.raises(ValueError, match=r"`growth_of` must name cores of low_rank, .*, got low_rnk\."):
        next(growth.rows(quick=True, device="cpu", growth_of=["low_rnk"]))


def test_what_prepares_a_call_runs_before_each():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    seconds = time_prepared(candidates, lambda: calls.append("prepare"), rounds=3, budget_seconds=60.0)
    assert calls[0::2] == ["prepare"] * 10
    assert sorted(calls[1::2]) == ["a"] * 5 + ["b"] * 5
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
