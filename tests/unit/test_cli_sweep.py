"""The report at the end of a sweep, on runs whose best is known."""

import csv
import json
import math

import pytest

from lightning_accel.cli.errors import UsageError
from lightning_accel.cli.results import save_failure, save_metrics
from lightning_accel.cli.sweep.search_space import grid_of, read_search_space
from lightning_accel.evidence.sweeps.page import SweepReport, draw_trade_off, write_sweep_page
from lightning_accel.evidence.sweeps.runs import (
    Estimate,
    SweepRun,
    choose_metric,
    conclusion,
    diverged_as_failed,
    read_runs,
    settings_of,
    trade_off,
    write_table,
)


def make(job, speed, accuracy, *overrides, **more):
    metrics = {"samples_per_second": speed, "val/accuracy": accuracy, **more}
    return SweepRun(job, overrides or (f"x={job}",), metrics)


RUNS = [make("0", 100.0, 0.9), make("1", 200.0, 0.8), make("2", 150.0, 0.7), make("3", 100.0, 0.95)]


def settings(runs):
    return settings_of(runs, "val/accuracy", "samples_per_second")


def test_pareto_points_are_those_no_other_beats():
    assert trade_off(settings(RUNS), "max") == ({"x=1", "x=3"}, set())
    assert trade_off(settings(RUNS), "min") == ({"x=1", "x=2"}, set())


def test_equal_points_do_not_beat_each_other():
    assert trade_off(settings([make("0", 1.0, 1.0), make("1", 1.0, 1.0)]), "max")[0] == {"x=0", "x=1"}


def seeds(name, speed, values, first):
    return [make(str(first + i), speed + i, v, f"x={name}", f"seed={i}") for i, v in enumerate(values)]


NOISY = [
    *seeds("a", 100.0, [0.90, 0.92, 0.94], 0),
    *seeds("b", 100.5, [0.91, 0.93, 0.95], 3),
    *seeds("c", 50.0, [0.50, 0.51, 0.52], 6),
]


def test_a_lone_setting_gets_no_star():
    (lone,) = settings(seeds("a", 100.0, [0.90, 0.92], 0))
    report = SweepReport([], [lone], "val/accuracy", "max", None, {lone.name}, set(), "", {})
    assert report.mark(lone) == ""


def test_seeds_are_one_point_with_an_interval_of_student():
    a, b, c = settings(NOISY)
    assert [s.name for s in (a, b, c)] == ["x=a", "x=b", "x=c"]
    assert a.jobs == ("0", "1", "2")
    assert a.metric.mean == pytest.approx(0.92)
    assert a.metric.half_width == pytest.approx(4.30 * 0.02 / math.sqrt(3))
    assert str(Estimate(0.5, math.nan)) == "0.5"


def test_what_is_beaten_by_no_more_than_the_noise_may_belong_to_the_front():
    assert trade_off(settings(NOISY), "max") == ({"x=b"}, {"x=a"})
    said = conclusion(settings(NOISY), "val/accuracy", "max")
    assert "1 more can not be told apart" in said
    assert "Best beyond the noise" in conclusion(settings(NOISY[3:]), "val/accuracy", "max")
    assert "one run each" in conclusion(settings(RUNS), "val/accuracy", "max")


def test_the_wanted_metric_counts_only_if_all_runs_logged_it():
    assert choose_metric(RUNS, "val/accuracy", "max") == ("val/accuracy", "max")
    runs = [*RUNS, SweepRun("4", (), {"val/loss": 1.0})]
    assert choose_metric(runs, "val/accuracy", "max") == (None, "max")
    assert choose_metric([SweepRun("0", (), {"val/loss": 1.0})], None, "max") == ("val/loss", "min")


def test_a_job_that_fails_where_one_before_it_ended_well_has_failed(tmp_path):
    folder = tmp_path / "0"
    folder.mkdir()
    save_metrics({"val/loss": 0.5}, ["x=0"], folder)
    save_failure("out of memory", ["x=1"], folder)
    (run,) = read_runs(tmp_path)
    assert (run.overrides, run.metrics, run.failure) == (("x=1",), {}, "out of memory")


def test_a_run_that_diverged_has_failed_and_does_not_change_what_decides(tmp_path):
    for job, (loss, accuracy) in {"0": (0.5, 0.9), "1": (None, 0.1), "2": (0.25, 0.8)}.items():
        (tmp_path / job).mkdir()
        record = {"overrides": [f"x={job}"], "metrics": {"val/loss": loss, "val/accuracy": accuracy}}
        (tmp_path / job / "metrics.json").write_text(json.dumps(record))
    runs = read_runs(tmp_path)
    assert choose_metric(runs, "val/loss", "min") == ("val/loss", "min")
    judged = diverged_as_failed(runs, "val/loss")
    assert [run.failure for run in judged] == ["", "its val/loss is not a finite number.", ""]
    assert "by x=2" in conclusion(settings_of(judged, "val/loss", None), "val/loss", "min")
    assert choose_metric([SweepRun("0", (), {}, not_finite=("val/loss",))], None, "max") == ("val/loss", "min")


def test_a_metric_of_the_test_set_decides_only_if_it_is_asked_for():
    runs = [SweepRun("0", (), {"test/accuracy": 0.9, "val/loss": 1.0}), SweepRun("1", (), {"test/accuracy": 0.8})]
    assert choose_metric(runs, None, "max") == (None, "max")
    assert choose_metric(runs[:1], None, "max") == ("val/loss", "min")
    assert choose_metric(runs, "test/accuracy", "max") == ("test/accuracy", "max")


def test_runs_are_read_in_order_failed_ones_included_and_written_as_a_table(tmp_path):
    for job in ("10", "2"):
        (tmp_path / job).mkdir()
        record = {"overrides": [f"seed={job}"], "metrics": {"val/loss": 0.5, "test/loss": None}}
        (tmp_path / job / "metrics.json").write_text(json.dumps(record))
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "failed.json").write_text(json.dumps({"overrides": ["seed=3"], "reason": "no memory"}))
    runs = read_runs(tmp_path)
    assert [run.job for run in runs] == ["2", "3", "10"]
    assert runs[0].metrics == {"val/loss": 0.5}
    assert choose_metric(runs, None, "max") == ("val/loss", "min")
    write_table(runs, tmp_path / "sweep.csv")
    with (tmp_path / "sweep.csv").open() as file:
        assert list(csv.reader(file)) == [
            ["job", "overrides", "val/loss", "failure"],
            ["2", "seed=2", "0.5", ""],
            ["3", "seed=3", "", "no memory"],
            ["10", "seed=10", "0.5", ""],
        ]


def test_picture_and_page_show_every_setting_whole(tmp_path):
    long = make("9", 10.0, 0.1, "callbacks.rank_quantization.ratio=2.5", "model._target_=a.very.long.name.of.a.Model")
    found = settings([*RUNS, long])
    on, near = trade_off(found, "max")
    said = conclusion(found, "val/accuracy", "max")
    report = SweepReport(
        [*RUNS, long, SweepRun("7", ("x=7",), {}, "it <broke>")],
        found,
        *("val/accuracy", "max", "samples_per_second"),
        *(on, near, said, {"processor": "none"}),
    )
    draw_trade_off(report, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    write_sweep_page(report, tmp_path / "sweep.html", picture=tmp_path / "x.png")
    page = (tmp_path / "sweep.html").read_text()
    assert "callbacks.rank_quantization.ratio=2.5 model._target_=a.very.long.name.of.a.Model" in page
    assert "it &lt;broke&gt;" in page
    assert said.split(" by ")[0] in page


WORDS = [
    *("a=1,2", "b=x,null,true", "c=range(1,10,3)", "d=interval(0.5,2)", "e=tag(log,interval(1e-4,1e-2))"),
    *("f=int(interval(1,8))", "fixed=3", "~gone", "+new=word"),
]


def test_search_space_reads_hydra_words():
    space = read_search_space(WORDS)
    shown = {key: str(distribution) for key, distribution in space.varied.items()}
    assert shown["a"] == "CategoricalDistribution(choices=(1, 2))"
    assert shown["b"] == "CategoricalDistribution(choices=('x', 'null', True))"
    assert shown["c"] == "IntDistribution(high=7, log=False, low=1, step=3)"
    assert shown["d"].startswith("FloatDistribution(high=2.0, log=False, low=0.5")
    assert "log=True" in shown["e"]
    assert shown["f"] == "IntDistribution(high=8, log=False, low=1, step=1)"
    assert space.fixed == ("fixed=3", "~gone", "+new=word")
    assert read_search_space(["a=1,2", "a=3"]).varied == {}


def test_grid_lists_every_value_and_refuses_intervals():
    assert grid_of(read_search_space(["a=1,2", "c=range(1,10,3)"])) == {"a": [1, 2], "c": [1, 4, 7]}
    with pytest.raises(UsageError, match="a grid needs listed values"):
        grid_of(read_search_space(["d=interval(0.5,2)"]))
    with pytest.raises(UsageError, match="must go from a low to a high end"):
        read_search_space(["d=interval(2,1)"])
