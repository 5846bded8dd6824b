import csv
import io
import json
import math

import pytest
from evidence_rows import run, two_arms
from rich.console import Console

from lightning_accel.evidence.comparison import compare_runs
from lightning_accel.evidence.formats import write_difference, write_effect, write_ratio, write_value
from lightning_accel.evidence.goal import Goal
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.evidence.tables import (
    bench_dict,
    bench_markdown,
    bench_table,
    comparison_table,
    style_of,
    write_bench,
)
from lightning_accel.measure import PairedDifference, PairedRatio


def _text(table, width=120):
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(table)
    return console.export_text()


def _comparison(**changes):
    runs = two_arms([10, 11, 12, 13, 14, 15], [5, 5, 6, 6, 7, 7], **changes)
    return compare_runs(runs, "plain", "accelerated", goal=Goal("val/accuracy", "max", 0.88))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0000004, "seconds", "400 ns"),
        (0.0000425, "seconds", "42.5 µs"),
        (0.00512, "seconds", "5.12 ms"),
        (1.5, "seconds", "1.50 s"),
        (99.0, "seconds", "99.0 s"),
        (125.0, "seconds", "2 min 05 s"),
        (7322.0, "seconds", "2 h 02 min"),
        (0.0, "seconds", "0 s"),
        (math.inf, "seconds", "never"),
        (999, "bytes", "999 B"),
        (38_700_000, "bytes", "38.7 MB"),
        (2.5e9, "bytes", "2.50 GB"),
        (10, "count", "10"),
        (3_230_000, "count", "3.23M"),
        (1.2e12, "count", "1.20T"),
        (2130.0, "per second", "2.13k /s"),
        (0.98765, "metric", "0.9877"),
    ],
)
def test_values_have_few_digits_and_a_unit(value, unit, text):
    assert write_value(value, unit) == text


def test_ratios_and_differences_come_with_their_interval():
    assert write_ratio(PairedRatio(1.417, 1.38, 1.471, 0.03, 6)) == "1.42 [1.38, 1.47]"
    assert write_ratio(PairedRatio(0.0, 0.0, math.inf, 0.03, 6)) == "0.00 [0.00, ∞]"
    assert write_ratio(PairedRatio(123.4, 99.999, 200.0, 0.03, 6)) == "123 [100.00, 200]"
    assert write_difference(PairedDifference(-0.01, -0.02, 0.03, 0.03, 6)) == "-0.0100 [-0.0200, +0.0300]"


def test_counted_ratios_have_no_interval_and_nothing_is_empty():
    lines = {line.name: line for line in _comparison(parameters=500).lines}
    assert write_effect(lines["parameters"]) == "2.00"
    assert write_effect(lines["  optimizer"]) == ""
    assert write_effect(lines["final val/accuracy"]) == "+0.0000 [+0.0000, +0.0000]"


def test_comparison_for_the_terminal_fits_eighty_columns():
    text = _text(comparison_table(_comparison()), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "accelerated against plain, 6 pairs" in text
    line = next(li for li in text.splitlines() if "fit, wall clock" in li)
    assert line.split() == ["fit,", "wall", "clock", "12.5", "s", "6.00", "s", "2.07", "[2.00,", "2.18]", "faster"]


def _bench():
    faster = PairedRatio(3.1, 3.0, 3.2, 0.01, 8)
    slower = PairedRatio(1.2, 1.1, 1.3, 0.01, 8)
    return [
        BenchRow("low_rank", "MLP 4x1024 | b64", "knapsack", "dense", faster, {"dense": 0.03, "knapsack": 0.01}, 3.0),
        BenchRow("projection", "1e6", "bilevel", "copy_", slower, {"copy_": 1e-3, "bilevel": 1.2e-3}, 1.1, "at most"),
        BenchRow("recurrent", "LSTM", "scheduled", "loop", slower, note="one thread"),
    ]


def test_bench_for_the_terminal_says_whether_targets_are_reached():
    lines = _text(bench_table(_bench(), title="all"), width=160).splitlines()
    assert lines[0].strip() == "all"
    first, second, third = (next(li for li in lines if name in li) for name in ("low_rank", "projection", "recurrent"))
    assert first.split()[-3:] == ["≥", "3", "reached"]
    assert "30.0 ms → 10.0 ms" in first
    assert second.split()[-3:] == ["≤", "1.1", "missed"]
    assert third.split()[-1] == "faster"


def test_bench_in_markdown_escapes_bars_and_lists_notes():
    text = bench_markdown(_bench())
    assert "| low_rank | MLP 4x1024 \\| b64 | knapsack against dense | 30.0 ms → 10.0 ms | 3.10 [3.00, 3.20] |" in text
    assert text.endswith("- LSTM, scheduled: one thread\n")
    assert "- MLP" not in text


def test_bench_is_written_for_programs_and_readers(tmp_path):
    rows = _bench()
    as_json, as_csv, as_markdown = write_bench(rows, tmp_path / "new", environment={"torch": "2", "device_type": "cpu"})
    plain = json.loads(as_json.read_text())
    assert plain["environment"] == {"torch": "2", "device_type": "cpu"}
    assert plain["rows"] == [bench_dict(row) for row in rows]
    assert [r["reached"] for r in plain["rows"]] == [True, False, None]
    with as_csv.open(newline="") as table:
        first, second, _ = csv.DictReader(table)
    assert (first["ratio/median"], first["seconds/dense"], first["seconds/copy_"]) == ("3.1", "0.03", "")
    assert second["reached"] == "False"
    assert as_markdown.read_text() == bench_markdown(rows) + "\nMeasured on: torch 2, device type cpu.\n"


def test_colours_follow_the_verdict():
    assert [style_of(v) for v in ("faster", "reached", "worse", "no speed-up", "")] == [
        "green",
        "green",
        "red",
        "dim",
        "dim",
    ]


def test_row_knows_whether_its_target_is_reached():
    assert [row.reached for row in _bench()] == [True, False, None]
    assert run().is_warmup is False
