"""Curves of cost: slopes, bends, what is paid back, tables and pictures."""

import json
import math

import pytest

from lightning_accel.evidence.growth.curves import GrowthRow, conclusion, curves, knees, slopes, write_size
from lightning_accel.evidence.growth.plot import plot_growth
from lightning_accel.evidence.growth.table import growth_markdown, write_growth
from lightning_accel.evidence.plots import dark_twin
from lightning_accel.measure import compare_paired


def point(size, old, new, *, curve="width", better="at least", setup=None, core="low_rank"):
    pair = [old] * 8, [new] * 8
    return GrowthRow(
        suite="growth",
        case=f"{curve} {size}",
        variant="new",
        baseline="old",
        ratio=compare_paired(*(pair if better == "at least" else pair[::-1])),
        seconds={"old": old, "new": new},
        better=better,
        core=core,
        curve=curve,
        axis="units",
        size=size,
        setup_seconds=setup,
    )


BENT = [point(10, 1.0, 2.0), point(100, 10.0, 2.0), point(1000, 100.0, 20.0), point(10_000, 1000.0, 200.0)]


def test_curves_are_told_apart_and_sorted_by_size():
    mixed = [point(100, 1.0, 1.0), point(5, 1.0, 1.0, curve="depth"), point(10, 1.0, 1.0)]
    assert [[row.size for row in points] for points in curves(mixed)] == [[10, 100], [5]]


def test_slopes_are_exponents_of_the_size():
    points = [point(size, size**2.0, size**0.5) for size in (2.0, 3.0, 7.0)]
    assert slopes(points, "old") == pytest.approx([2.0, 2.0])
    assert slopes(points, "new") == pytest.approx([0.5, 0.5])
    assert slopes(points[:1], "new") == []


def test_a_bend_is_where_the_slope_of_one_of_the_two_changes_by_more_than_a_half():
    (knee,) = knees(BENT)
    assert (knee.variant, knee.size) == ("new", 100)
    assert (knee.before, knee.after) == pytest.approx((0.0, 1.0))
    assert knees([point(size, size, size**1.4) for size in (1.0, 10.0, 100.0)]) == []
    nearly = [point(1.0, 1.0, 1.0), point(10.0, 1.0, 10.0), point(100.0, 1.0, 10.0 * 10.0**1.49)]
    assert knees(nearly) == []


def test_set_up_is_paid_back_by_whole_steps_or_never():
    assert point(1, 0.5, 0.25, setup=1.1).steps_to_pay_back == 5
    assert math.isinf(point(1, 0.25, 0.5, setup=1.0).steps_to_pay_back)
    assert point(1, 0.5, 0.25).steps_to_pay_back is None
    assert point(1, 0.25, 0.5, setup=1.0, better="at most").steps_to_pay_back is None


@pytest.mark.parametrize(
    ("new", "words"),
    [
        ((1.0, 1.0, 1.0), "new is faster than old at every size, 4 times at 3 units"),
        ((3.0, 4.0, 5.0), "new is faster than old nowhere, at best 0.8 times at 3 units"),
        ((3.0, 1.0, 1.0), "new is faster than old from 2 on, 4 times at 3 units"),
        ((1.0, 1.5, 5.0), "new is faster than old from 1 to 2, 2 times at 1 unit"),
        ((1.0, 5.0, 2.0), "new is faster than old at 1, 3, 2 times at 1 unit"),
    ],
)
def test_conclusion_says_where_it_pays(new, words):
    assert conclusion([point(i, old, n) for i, old, n in zip((1, 2, 3), (2.0, 3.0, 4.0), new, strict=True)]) == words


def test_conclusion_of_a_cost_names_both_ends():
    points = [point(1, 1.0, 14.0, better="at most"), point(30e6, 1.0, 1.25, better="at most")]
    assert conclusion(points) == "new takes 14 times as long as old at 1 unit, 1.25 times at 30M"


@pytest.mark.parametrize(
    ("size", "text"), [(0.1, "0.1"), (64, "64"), (4096, "4,096"), (99_856, "99.9k"), (29_997_529, "30M")]
)
def test_sizes_are_short(size, text):
    assert write_size(size) == text


def test_table_has_slopes_set_up_and_bends():
    text = growth_markdown([point(10, 1.0, 2.0, setup=3.0), *BENT[1:]])
    lines = text.splitlines()
    assert lines[0] == "**low_rank: width:** new is faster than old from 100 on, 5 times at 100 units."
    assert "| 10 | 1.00 s | 2.00 s | 0.50 [0.50, 0.50] |  | 3.00 s | never |  |" in lines
    assert any(line.endswith("| 1.00, 0.00 |  |  | new: 0.00 to 1.00 |") for line in lines)
    assert sum("to 1.00" in line for line in lines) == 1
    assert lines[2] == "| units | old | new | ratio [interval] | slopes | set-up | paid back after | bends |"
    costs = growth_markdown([point(size, 1.0, 2.0, better="at most") for size in (1, 2)]).splitlines()
    assert costs[2] == "| units | old | new | ratio [interval] | slopes |"


def test_curves_are_written_for_programs(tmp_path):
    markdown, plain = write_growth(BENT, tmp_path)
    assert markdown.read_text() == growth_markdown(BENT)
    (curve,) = json.loads(plain.read_text())
    assert curve["sizes"] == [10, 100, 1000, 10_000]
    assert curve["slopes"]["new"] == pytest.approx([0.0, 1.0, 1.0])
    (knee,) = curve["knees"]
    assert (knee["variant"], knee["size"]) == ("new", 100)
    assert (knee["before"], knee["after"]) == pytest.approx((0.0, 1.0))


def test_each_core_is_one_picture_for_light_and_one_for_dark_pages(tmp_path):
    other = [point(size, 1.0, 2.0, better="at most", core="projection", setup=0.1) for size in (1, 2)]
    paths = plot_growth([*BENT, *other, point(3, 1.0, 1.0, curve="depth")], tmp_path)
    assert [path.name for path in paths] == ["growth_low_rank.png", "growth_projection.png"]
    for path in paths:
        assert path.read_bytes()[:4] == b"\x89PNG"
        assert dark_twin(path).read_bytes() != path.read_bytes()
    assert plot_growth([], tmp_path) == []
