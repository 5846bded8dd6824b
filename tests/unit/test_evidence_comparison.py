import math

import pytest
from evidence_rows import run, two_arms

from lightning_accel.evidence.comparison import compare_runs, speed_verdict
from lightning_accel.evidence.goal import Goal, derive_goal
from lightning_accel.evidence.non_inferiority import quality_verdict
from lightning_accel.measure import PairedDifference, PairedRatio

GOAL = Goal("val/accuracy", "max", 0.88)


def _compare(runs, **changes):
    return compare_runs(runs, "plain", "accelerated", goal=changes.pop("goal", GOAL), **changes)


def _line(comparison, name):
    return next(line for line in comparison.lines if line.name == name)


def test_twice_as_fast_in_six_pairs_is_faster():
    comparison = _compare(two_arms([10, 11, 12, 13, 14, 15], [5, 5.5, 6, 6.5, 7, 7.5]))
    assert comparison.fit.verdict == "faster"
    assert comparison.fit.ratio.median == pytest.approx(2.0)
    assert comparison.headline.startswith(
        "Time until val/accuracy >= 0.88: shorter than plain's, ratio 2.00 [2.00, 2.00]"
    )
    assert "final val/accuracy not worse than 0.5 points" in comparison.headline
    assert "Accelerated is 2.00 times as fast as plain (95% interval 2.00 to 2.00" in comparison.headline
    assert _line(comparison, "training step").ratio.median == pytest.approx(2.0)
    assert _line(comparison, "samples").ratio.median == pytest.approx(2.0)
    assert _line(comparison, "  backward").candidate == pytest.approx(6.25 / 150)


def test_interval_that_covers_one_is_no_speed_up():
    comparison = _compare(two_arms([10] * 6, [9, 11, 9.5, 10.5, 9.9, 10.1]))
    assert comparison.fit.ratio.low < 1 < comparison.fit.ratio.high
    assert comparison.fit.verdict == "no speed-up"
    assert "Time until val/accuracy >= 0.88: no shorter than plain's" in comparison.headline
    assert "No speed-up: accelerated, compared with plain, is 1.0" in comparison.headline


def test_too_few_pairs_are_undecided_whatever_they_say():
    comparison = _compare(two_arms([10] * 5, [1] * 5))
    assert comparison.fit.verdict == "undecided"
    assert "5 pairs are too few for 95% confidence, take at least 6" in comparison.headline
    assert "Undecided: 1 pair is too few" in _compare(two_arms([10], [1])).headline
    assert "takes 0.10 times as long" in comparison.headline


def test_slower_is_said():
    comparison = _compare(two_arms([10] * 6, [20] * 6))
    assert comparison.fit.verdict == "slower"
    assert comparison.headline.startswith("Time until val/accuracy >= 0.88: longer than plain's, ratio 0.50")
    assert comparison.headline.endswith(
        "Accelerated is slower than plain: 0.50 times as fast (95% interval 0.50 to 0.50, 6 pairs)."
    )


@pytest.mark.parametrize(
    ("difference", "mode", "verdict"),
    [
        (PairedDifference(0.0, -0.004, 0.004, 0.9, 6), "max", "not worse than 0.5 points"),
        (PairedDifference(0.0, -0.006, 0.004, 0.9, 6), "max", "not shown"),
        (PairedDifference(-0.003, -0.004, -0.001, 0.03, 6), "max", "not worse than 0.5 points"),
        (PairedDifference(-0.02, -0.03, -0.01, 0.03, 6), "max", "worse"),
        (PairedDifference(0.02, 0.01, 0.03, 0.03, 6), "max", "better"),
        (PairedDifference(0.02, 0.01, 0.03, 0.03, 6), "min", "worse"),
        (PairedDifference(0.0, -0.1, 0.004, 0.9, 6), "min", "not worse than 0.5 points"),
        (PairedDifference(0.0, -0.001, 0.006, 0.9, 6), "min", "not shown"),
        (PairedDifference(0.0, 0.0, 0.0, 1.0, 5), "max", "undecided"),
    ],
)
def test_quality_is_kept_only_if_the_whole_interval_is_within_the_margin(difference, mode, verdict):
    assert quality_verdict(difference, mode, metric="val/accuracy", margin=0.005) == verdict


def test_margin_is_written_in_the_unit_of_the_metric():
    same = PairedDifference(0.0, 0.0, 0.0, 1.0, 6)
    assert quality_verdict(same, "min", metric="val/loss", margin=0.02) == "not worse than 0.02"
    with pytest.raises(ValueError, match="`margin` must be >= 0, got -1"):
        compare_runs(two_arms([1.0] * 6, [1.0] * 6), "plain", "accelerated", goal=None, margin=-1.0)


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (PairedRatio(1.2, 1.1, 1.3, 0.03, 6), "faster"),
        (PairedRatio(1.2, 0.9, 1.3, 0.03, 6), "no speed-up"),
        (PairedRatio(1.2, 1.1, 1.3, 0.2, 6), "no speed-up"),
        (PairedRatio(0.8, 0.7, 0.9, 0.03, 6), "slower"),
        (PairedRatio(1.2, 1.1, 1.3, 0.03, 5), "undecided"),
    ],
)
def test_verdict_in_words(ratio, verdict):
    assert speed_verdict(ratio) == verdict


def test_target_never_reached_is_infinite():
    runs = two_arms([10] * 6, [5] * 6, curve=[{"seconds": 5, "epoch": 0, "step": 1, "metrics": {"val/accuracy": 0.5}}])
    line = _line(_compare(runs), "until val/accuracy >= 0.88")
    assert (line.baseline, line.candidate) == (10.0, math.inf)
    assert line.ratio.median == 0.0
    assert line.verdict == "slower"


def test_quality_is_a_difference_and_knows_its_direction():
    worse = two_arms([10] * 6, [5] * 6, metrics={"val/accuracy": 0.8, "val/loss": 0.3})
    line = _line(_compare(worse), "final val/accuracy")
    assert line.difference.median == pytest.approx(-0.1)
    assert line.verdict == "worse"
    line = _line(_compare(worse, goal=Goal("val/loss", "min", 0.2)), "final val/loss")
    assert line.difference.median == pytest.approx(0.2)
    assert line.verdict == "worse"
    better = two_arms([10] * 6, [5] * 6, metrics={"val/loss": 0.05})
    assert _line(_compare(better, goal=Goal("val/loss", "min", 0.2)), "final val/loss").verdict == "better"


def test_sizes_are_compared_and_equal_ones_are_called_equal():
    comparison = _compare(two_arms([10] * 6, [5] * 6, parameters=500))
    assert _line(comparison, "parameters").ratio.median == 2.0
    assert _line(comparison, "parameters").verdict == "less"
    assert _line(comparison, "checkpoint").verdict == "equal"


def test_operations_come_from_the_pair_that_counted_them():
    runs = two_arms([10] * 6, [5] * 6)
    assert "FLOP a step" not in {line.name for line in _compare(runs).lines}
    runs["plain"][2] = run("plain", 2, flops=600.0)
    assert "FLOP a step" not in {line.name for line in _compare(runs).lines}
    runs["accelerated"][2] = run("accelerated", 2, fit_seconds=5.0, flops=400.0)
    line = _line(_compare(runs), "FLOP a step")
    assert (line.baseline, line.candidate, line.verdict) == (600.0, 400.0, "less")
    assert line.ratio.median == 1.5


def test_what_was_not_measured_makes_no_line():
    runs = two_arms(
        [10] * 6, [5] * 6, step_seconds=None, callback_seconds=None, samples_per_second=None, phase_seconds={}
    )
    names = {line.name for line in _compare(runs, goal=None).lines}
    assert "training step" not in names
    assert "callbacks, whole fit" not in names
    assert "samples" not in names
    assert not any(name.startswith(("  ", "until val", "final")) for name in names)


def test_a_phase_that_takes_no_time_has_no_ratio():
    line = _line(_compare(two_arms([10] * 6, [5] * 6)), "  optimizer")
    assert (line.ratio, line.verdict) == (None, "")


def test_money():
    runs = two_arms([3600] * 6, [1800] * 6, devices=2)
    money = _compare(runs, price_per_hour=3.0, currency="USD").money
    assert (money.baseline_hours, money.candidate_hours) == (1.0, 1.0)  # half the time on twice the devices
    assert money.saved_per_hour == 0.0
    money = _compare(two_arms([3600] * 6, [1800] * 6), price_per_hour=3.0).money
    assert money.saved_per_hour == 1.5
    assert _compare(runs).money is None
    with pytest.raises(ValueError, match=r"`price_per_hour` must be >= 0, got -1.0"):
        _compare(runs, price_per_hour=-1.0)


def test_pairs_must_be_complete():
    runs = two_arms([10, 10], [10])
    with pytest.raises(ValueError, match="`runs` must hold complete pairs, got 2 and 1 runs"):
        _compare(runs)
    with pytest.raises(ValueError, match="`runs` must hold complete pairs, got 0 and 0 runs"):
        _compare({"plain": [], "accelerated": []})


def test_plain_data_hold_no_infinity():
    runs = two_arms([10] * 6, [5] * 6, curve=[])
    plain = _compare(runs).to_dict()
    line = next(li for li in plain["lines"] if li["name"].startswith("until val"))
    assert line["candidate"] is None
    assert plain["verdict"] == "faster"


def test_goal_is_derived_from_the_baseline():
    runs = [run(pair=i) for i in range(3)]
    found = derive_goal(runs)
    assert (found.metric, found.mode, found.target) == ("val/accuracy", "max", pytest.approx(0.98 * 0.9))
    assert found.rule == "best value of the plain runs (median) x 0.98"
    found = derive_goal(runs, metric="val/loss")
    assert (found.metric, found.mode, found.target) == ("val/loss", "min", pytest.approx(0.1 / 0.98))
    assert derive_goal(runs, metric="val/loss", mode="max").target == pytest.approx(0.98 * 0.4)
    assert derive_goal(runs, target=0.5) == Goal(
        "val/accuracy", "max", 0.5, derived=False, rule="a value given by the user"
    )


def test_goal_below_zero_is_still_easier_than_the_best():
    curve = [{"seconds": 1.0, "epoch": 0, "step": 1, "metrics": {"elbo": -2.0, "val_loss": -3.0}}]
    assert derive_goal([run(curve=curve)], metric="elbo").target == pytest.approx(-2.0 / 0.98)
    assert derive_goal([run(curve=curve)]).target == pytest.approx(-3.0 * 0.98)


def test_no_goal_without_a_metric_that_could_serve():
    assert derive_goal([run(curve=[])]) is None


def test_metric_that_was_not_logged_is_refused_with_those_that_were():
    with pytest.raises(ValueError, match=r"got 'val/acc'; logged were: val/accuracy, val/loss\."):
        derive_goal([run()], metric="val/acc")
    with pytest.raises(ValueError, match=r"got 'x'; logged were: none\."):
        derive_goal([run(curve=[])], metric="x")
    with pytest.raises(ValueError, match="`mode` must be 'max' or 'min', got 'up'"):
        derive_goal([run()], mode="up")


def test_first_point_that_reaches_the_target_counts():
    assert Goal("val/accuracy", "max", 0.7).seconds(run(fit_seconds=8.0)) == 4.0
    assert Goal("val/loss", "min", 0.1).seconds(run(fit_seconds=8.0)) == 8.0
    assert Goal("val/loss", "min", 0.05).seconds(run()) == math.inf
    diverged = [{"seconds": 1.0, "epoch": 0, "step": 1, "metrics": {"val/accuracy": None}}]
    assert Goal("val/accuracy", "max", 0.1).seconds(run(curve=diverged)) == math.inf
    assert Goal("val/accuracy", "max", 0.1).best(run(curve=diverged)) is None


def _reaching(best, pair):
    curve = [
        {"seconds": 4.0 * (i + 1), "epoch": i, "step": i, "metrics": {"val/accuracy": best - 0.1 + 0.02 * i}}
        for i in range(6)
    ]
    return run(pair=pair, curve=curve)


def test_target_by_rule_is_computed_from_the_plain_runs():
    runs = [_reaching(best, pair) for pair, best in enumerate((0.9, 0.96, 0.93))]
    assert derive_goal(runs, target="plain_best").target == pytest.approx(0.93)
    assert derive_goal(runs, target="plain_best-0.005").target == pytest.approx(0.925)
    assert derive_goal(runs, target=" plain_best + 1e-2 ").target == pytest.approx(0.94)
    goal = derive_goal(runs, target="plain_best*0.9")
    assert goal.target == pytest.approx(0.837)
    assert goal.rule == "best value of the plain runs (median) x 0.9"
    assert goal.words == "val/accuracy >= 0.837"
    assert not goal.by_pair


def test_target_of_a_pair_is_the_same_for_both_of_its_runs_and_independent_of_others():
    runs = [_reaching(best, pair) for pair, best in enumerate((0.9, 0.96, 0.93))]
    goal = derive_goal(runs, target="pair_best-0.03")
    assert goal.by_pair == pytest.approx({0: 0.87, 1: 0.93, 2: 0.9})
    assert goal.target == pytest.approx(0.9)
    assert [goal.seconds(r) for r in runs] == [20.0] * 3  # one target for all would be reached at 24, 12 and 20 s
    assert goal.seconds(_reaching(0.9, 1)) == math.inf
    assert goal.words == "val/accuracy >= the pair's target, 0.9"
    assert goal.rule == "best value of the plain run of the same pair - 0.03"


@pytest.mark.parametrize("text", ["best-0.005", "plain_best-", "plain_best-x", "plain_best/2", "0.9%", ""])
def test_rule_that_is_none_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"`target` must be a number, or plain_best or pair_best .*plain_best-0\.005"):
        derive_goal([run()], target=text)
