"""The report at the end of a sweep, on runs whose best is known."""

import csv
import json

from lightning_accel.cli.sweep import SweepRun, choose_metric, draw, pareto, read_runs, write_table


def make(job, speed, accuracy, **more):
    return SweepRun(job, (f"x={job}",), {"samples_per_second": speed, "val/accuracy": accuracy, **more})


RUNS = [make("0", 100.0, 0.9), make("1", 200.0, 0.8), make("2", 150.0, 0.7), make("3", 100.0, 0.95)]


def test_pareto_points_are_those_no_other_beats():
    assert pareto(RUNS, "val/accuracy", "max", "samples_per_second") == {"1", "3"}
    assert pareto(RUNS, "val/accuracy", "min", "samples_per_second") == {"1", "2"}


def test_equal_points_do_not_beat_each_other():
    twins = [make("0", 1.0, 1.0), make("1", 1.0, 1.0)]
    assert pareto(twins, "val/accuracy", "max", "samples_per_second") == {"0", "1"}


def test_the_wanted_metric_counts_only_if_all_runs_logged_it():
    assert choose_metric(RUNS, "val/accuracy", "max") == ("val/accuracy", "max")
    runs = [*RUNS, SweepRun("4", (), {"val/loss": 1.0})]
    assert choose_metric(runs, "val/accuracy", "max") == (None, "max")
    assert choose_metric([SweepRun("0", (), {"val/loss": 1.0})], None, "max") == ("val/loss", "min")


def test_runs_are_read_in_order_and_written_as_a_table(tmp_path):
    for job in ("10", "2"):
        (tmp_path / job).mkdir()
        record = {"overrides": [f"seed={job}"], "metrics": {"val/loss": 0.5, "test/loss": None}}
        (tmp_path / job / "metrics.json").write_text(json.dumps(record))
    runs = read_runs(tmp_path)
    assert [run.job for run in runs] == ["2", "10"]
    assert runs[0].metrics == {"val/loss": 0.5}
    write_table(runs, tmp_path / "sweep.csv")
    with (tmp_path / "sweep.csv").open() as file:
        assert list(csv.reader(file)) == [
            ["job", "overrides", "val/loss"],
            ["2", "seed=2", "0.5"],
            ["10", "seed=10", "0.5"],
        ]


def test_the_trade_off_is_drawn(tmp_path):
    assert draw(RUNS, "val/accuracy", "samples_per_second", {"1", "3"}, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
