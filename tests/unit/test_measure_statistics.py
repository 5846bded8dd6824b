import math
import random
import statistics

import pytest

from lightning_accel.measure import (
    PairedDifference,
    PairedRatio,
    bootstrap_interval,
    compare_paired,
    sign_flip_p_value,
    subtract_paired,
)

INF = math.inf


def test_median_ratio_says_how_many_times_faster_the_candidate_is():
    ratio = compare_paired([2.0, 4.0, 6.0, 2.2, 4.2, 6.6], [1.0, 2.0, 3.0, 1.0, 2.0, 3.0])
    assert 2.0 <= ratio.low <= ratio.median <= ratio.high <= 2.2
    assert ratio.p_value == pytest.approx(2 / 2**6)
    assert ratio.verdict == "faster"
    assert compare_paired([1.0] * 6, [2.0] * 6).verdict == "slower"


@pytest.mark.parametrize(("pairs", "verdict"), [(1, "undecided"), (5, "undecided"), (6, "faster"), (8, "faster")])
def test_fewer_than_six_pairs_never_decide(pairs, verdict):
    assert compare_paired([2.0] * pairs, [1.0] * pairs).verdict == verdict


def test_more_confidence_needs_more_pairs():
    assert compare_paired([2.0] * 6, [1.0] * 6, confidence=0.99).verdict == "undecided"
    assert compare_paired([2.0] * 8, [1.0] * 8, confidence=0.99).verdict == "faster"


def test_interval_and_exact_test_must_agree():
    significant_but_wide = PairedRatio(median=1.1, low=0.9, high=1.3, p_value=0.01, pairs=8)
    narrow_but_insignificant = PairedRatio(median=1.1, low=1.05, high=1.3, p_value=0.2, pairs=8)
    assert significant_but_wide.verdict == narrow_but_insignificant.verdict == "no difference"


def test_one_outlier_does_not_move_the_median():
    assert compare_paired([1.0] * 9 + [1000.0], [1.0] * 10).median == 1.0


def test_a_run_that_never_ends_weighs_heavily_and_two_of_them_cancel():
    assert compare_paired([INF] * 6, [1.0] * 6).median == INF
    assert compare_paired([INF] * 6, [1.0] * 6).verdict == "faster"
    assert compare_paired([1.0] * 6, [INF] * 6).median == 0.0
    assert compare_paired([INF] * 6, [INF] * 6) == PairedRatio(1.0, 1.0, 1.0, p_value=1.0, pairs=6)


def test_half_won_for_ever_and_half_lost_is_a_draw_and_no_nan():
    ratio = compare_paired([INF, 1.0, INF, 1.0], [1.0, INF, 1.0, INF])
    assert ratio.median == 1.0
    assert (ratio.low, ratio.high) == (0.0, INF)
    assert ratio.p_value == 1.0


@pytest.mark.parametrize(
    ("baseline", "candidate", "message"),
    [
        ([1.0], [1.0, 2.0], "must be of one length >= 1, got 1 and 2"),
        ([], [], "must be of one length >= 1, got 0 and 0"),
        ([1.0, 0.0], [1.0, 1.0], "times must be > 0 seconds"),
        ([1.0, 1.0], [1.0, -1.0], "times must be > 0 seconds"),
        ([1.0, 1.0], [1.0, math.nan], "times must be > 0 seconds"),
    ],
)
def test_times_are_checked(baseline, candidate, message):
    with pytest.raises(ValueError, match=message):
        compare_paired(baseline, candidate)


def test_bootstrap_interval_is_repeatable_and_covers_the_median():
    rng = random.Random(1)
    values = [rng.gauss(3.0, 1.0) for _ in range(20)]
    low, high = bootstrap_interval(values, seed=4)
    assert (low, high) == bootstrap_interval(values, seed=4)
    assert low < statistics.median(values) < high
    narrow = bootstrap_interval(values, confidence=0.5)
    assert narrow[1] - narrow[0] < high - low


def test_bootstrap_interval_checks_its_arguments():
    with pytest.raises(ValueError, match="`values` must not be empty"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match=r"`confidence` must be in \(0, 1\), got 1.0"):
        bootstrap_interval([1.0], confidence=1.0)


def test_sign_flips_are_exact_up_to_sixteen_values():
    # {1, 2, 4}: eight sums, of which only +7 and -7 are as extreme as 7, and 7, 5, -5, -7 as 5.
    assert sign_flip_p_value([1.0, 2.0, 4.0]) == 2 / 8
    assert sign_flip_p_value([-1.0, 2.0, 4.0]) == 4 / 8
    assert sign_flip_p_value([0.0, 0.0]) == 1.0


def test_random_sign_flips_agree_with_the_exact_test():
    values = [0.9, -0.3, 0.5, 0.4, -0.2, 0.7, 0.1, 0.3, -0.6, 0.2, 0.5, -0.1, 0.4, 0.2, -0.3, 0.6]
    exact = sign_flip_p_value(values)
    assert sign_flip_p_value([*values, 0.0]) == pytest.approx(exact, abs=0.02)  # 17 values: flipped at random


def test_sign_flips_need_values():
    with pytest.raises(ValueError, match="`values` must not be empty"):
        sign_flip_p_value([])


def test_paired_difference_is_candidate_minus_baseline():
    difference = subtract_paired([0.9, 0.8, 0.7, 0.9, 0.8, 0.7], [0.95, 0.86, 0.75, 0.95, 0.86, 0.75])
    assert difference.median == pytest.approx(0.05)
    assert difference.verdict == "higher"
    assert subtract_paired([1.0] * 6, [0.5] * 6).verdict == "lower"
    assert subtract_paired([1.0] * 6, [1.0] * 6).verdict == "no difference"
    assert subtract_paired([1.0] * 5, [0.5] * 5).verdict == "undecided"
    assert PairedDifference(0.1, -0.1, 0.3, p_value=0.01, pairs=9).verdict == "no difference"


def test_paired_differences_are_checked():
    with pytest.raises(ValueError, match="must be of one length >= 1, got 1 and 0"):
        subtract_paired([1.0], [])
    with pytest.raises(ValueError, match="values must be finite"):
        subtract_paired([1.0], [INF])


def _times(rng, pairs, seconds):
    """Times as they come on a machine that others use: drift over the pairs, 3 % noise, now and then a hiccup."""
    drift = 1.0
    for _ in range(pairs):
        drift *= math.exp(rng.gauss(0.0, 0.05))
        yield [s * drift * math.exp(rng.gauss(0.0, 0.03)) * (1.15 if rng.random() < 0.02 else 1.0) for s in seconds]


def _verdicts(pairs, seconds, *, trials):
    rng = random.Random(0)
    measured = [list(zip(*_times(rng, pairs, seconds), strict=True)) for _ in range(trials)]
    return [compare_paired(baseline, candidate).verdict for baseline, candidate in measured]


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [6, 8])
def test_equal_arms_pay_falsely_in_at_most_one_of_twenty_comparisons(pairs):
    verdicts = _verdicts(pairs, (1.0, 1.0), trials=400)
    assert verdicts.count("faster") / 400 <= 0.05
    assert verdicts.count("slower") / 400 <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [6, 8])
def test_a_tenth_slower_is_found_in_at_least_four_of_five_comparisons(pairs):
    verdicts = _verdicts(pairs, (1.0, 1.1), trials=400)
    assert verdicts.count("slower") / 400 >= 0.8
    assert "faster" not in verdicts
