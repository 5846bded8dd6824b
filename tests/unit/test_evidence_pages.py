import dataclasses
import html
import json
import re
import sys
from html.parser import HTMLParser

import pytest
from evidence_rows import run, two_arms

from lightning_accel.evidence import plots
from lightning_accel.evidence.comparison import compare_runs
from lightning_accel.evidence.formats import write_effect, write_value
from lightning_accel.evidence.goal import Goal
from lightning_accel.evidence.page import Report, tone, write_page
from lightning_accel.evidence.plots import (
    MissingPackageError,
    middle_curve,
    plot_bench,
    plot_metric_against_time,
    plot_rank_plan,
)
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.measure import PairedRatio

GOAL = Goal("val/accuracy", "max", 0.88)
PNG = b"\x89PNG\r\n\x1a\n"


def _size(path):
    """Width and height in pixels, out of the header."""
    data = path.read_bytes()
    assert data.startswith(PNG)
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def _report(**changes):
    runs = two_arms([10, 11, 12, 13, 14, 15], [5, 5.5, 6, 6.5, 7, 7.6])
    comparison = compare_runs(runs, "plain", "accelerated", goal=GOAL, price_per_hour=changes.pop("price", None))
    rows = [run("plain", -1), *runs["plain"], *runs["accelerated"]]
    values = {"environment": {"device": "Some CPU", "threads": 1}, "settings": {"command": "compare a<b"}}
    return Report([comparison], rows, **{**values, **changes})


class _Cells(HTMLParser):
    """Collects the text of all table cells and the names of all tags."""

    def __init__(self):
        super().__init__()
        self.cells, self.tags, self.inside = [], [], False

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "td":
            self.cells.append("")
            self.inside = True

    def handle_endtag(self, tag):
        if tag == "td":
            self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.cells[-1] += data


def _parse(path):
    parser = _Cells()
    parser.feed(path.read_text())
    return parser


def test_page_holds_the_numbers_of_the_rows(tmp_path):
    report = _report()
    write_page(report, tmp_path / "report.html")
    cells = _parse(tmp_path / "report.html").cells
    for line in report.comparisons[0].lines:
        start = cells.index(line.name.strip())
        shown = [write_value(line.baseline, line.unit), write_value(line.candidate, line.unit), write_effect(line)]
        assert cells[start + 1 : start + 5] == [*shown, line.verdict], line.name
    for row in report.runs:
        assert f"{row.fit_seconds:.3f} s" in cells
    assert cells.count("warm-up") == 1
    assert report.comparisons[0].headline in html.unescape((tmp_path / "report.html").read_text())


def test_page_needs_nothing_but_itself(tmp_path):
    picture = tmp_path / "p.png"
    picture.write_bytes(PNG + b"rest")
    write_page(_report(), tmp_path / "report.html", picture=picture)
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)
    assert "<script" not in text
    assert "@import" not in text
    assert 'src="data:image/png;base64,iVBORw0KGgpyZXN0"' in text
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text
    tags = _parse(tmp_path / "report.html").tags
    assert "img" in tags


def test_page_without_picture_has_no_image(tmp_path):
    write_page(_report(), tmp_path / "report.html")
    assert "img" not in _parse(tmp_path / "report.html").tags


def test_what_users_wrote_is_escaped(tmp_path):
    write_page(_report(note="<b>note</b>", messages=["rank < 64"]), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "compare a&lt;b" in text
    assert "&lt;b&gt;note&lt;/b&gt;" in text
    assert "rank &lt; 64" in text


def test_page_turns_the_saving_into_money(tmp_path):
    write_page(_report(price=2.0), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "At 2.00 EUR a device-hour, every 100 device-hours of plain become 50.0: saves 100.00 EUR." in text
    assert "not established" not in text


def test_page_promises_no_money_for_an_unproven_speed_up(tmp_path):
    comparison = compare_runs(two_arms([10] * 5, [5] * 5), "plain", "accelerated", goal=None, price_per_hour=1.0)
    write_page(Report([comparison], [run()], {}), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "The speed-up is not established, so neither is this." in text


def test_bar_of_the_interval_stays_on_its_axis(tmp_path):
    for plain, other in (([1000.0] * 6, [1.0] * 6), ([1.0] * 6, [1000.0] * 6)):
        comparison = compare_runs(two_arms(plain, other), "plain", "accelerated", goal=None)
        write_page(Report([comparison], [run()], {}), tmp_path / "report.html")
        place = float(re.search(r"<u style=\"left:([0-9.]+)%", (tmp_path / "report.html").read_text())[1])
        assert place == (100.0 if plain[0] > other[0] else 0.0)


def test_tones():
    assert [tone(v) for v in ("faster", "worse", "no speed-up")] == ["good", "bad", "even"]


def test_missing_optional_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingPackageError, match=r"the page needs jinja2: pip install 'lightning-accel\[examples\]'"):
        write_page(_report(), tmp_path / "report.html")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match="pictures need matplotlib"):
        plot_metric_against_time({"plain": [run()]}, GOAL, tmp_path / "p.png")
    assert list(tmp_path.iterdir()) == []


def test_metric_against_time_is_drawn(tmp_path):
    plot_metric_against_time(two_arms([10, 11], [5, 6]), GOAL, tmp_path / "p.png")
    assert _size(tmp_path / "p.png") == (900, 600)


def test_a_run_without_a_curve_does_not_spoil_the_picture(tmp_path):
    runs = {"plain": [run(), run(curve=[])], "accelerated": [run(curve=[])]}
    plot_metric_against_time(runs, GOAL, tmp_path / "p.png")
    assert _size(tmp_path / "p.png") == (900, 600)


def test_middle_curve_is_the_median_as_far_as_all_go():
    curves = [([1.0, 2.0, 3.0], [5.0, 6.0, 7.0]), ([3.0, 4.0], [1.0, 8.0]), ([2.0, 9.0], [2.0, 9.0])]
    assert middle_curve(curves) == ([2.0, 4.0], [2.0, 8.0])
    assert middle_curve([]) == ([], [])


PLAN = {
    "layers": [
        {
            "name": "hidden.0",
            "dense_ms": 1.0,
            "rank": 32,
            "candidates": [{"rank": r, "ms": r / 40, "energy": r / 64} for r in (16, 32, 48)],
        },
        {"name": "conv", "dense_ms": None, "rank": None, "candidates": [{"rank": [8, 16], "ms": 2.0}]},
        {"name": "head", "dense_ms": 1.0, "rank": None, "candidates": []},
    ]
}


def test_rank_plan_is_drawn_one_panel_a_measured_layer(tmp_path):
    plot_rank_plan(json.loads(json.dumps(PLAN)), tmp_path / "two.png")
    plot_rank_plan({"layers": PLAN["layers"][:1]}, tmp_path / "one.png")
    plot_rank_plan({"layers": PLAN["layers"][:1] * 4}, tmp_path / "four.png")
    assert _size(tmp_path / "one.png") == (630, 435)
    assert _size(tmp_path / "two.png") == (1260, 435)
    assert _size(tmp_path / "four.png") == (1890, 870)


def test_plan_without_measured_layers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`plan` must hold at least one layer with measured candidates"):
        plot_rank_plan({"layers": PLAN["layers"][2:]}, tmp_path / "p.png")


def test_bench_is_drawn_one_line_a_row_under_headings_of_cases(tmp_path):
    ratio = PairedRatio(2.0, 1.8, 2.2, 0.01, 8)
    rows = [BenchRow("s", "case", "new", "old", ratio, target=target) for target in (None, 1.5, 3.0)]
    plot_bench(rows, tmp_path / "p.png")
    assert _size(tmp_path / "p.png") == (1350, round((1.0 + 0.21 * 4) * 150))
    plot_bench([*rows, dataclasses.replace(rows[0], case="other"), rows[0]], tmp_path / "q.png")
    assert _size(tmp_path / "q.png") == (1350, round((1.0 + 0.21 * 8) * 150))
    with pytest.raises(ValueError, match="`rows` must not be empty"):
        plot_bench([], tmp_path / "p.png")


@pytest.mark.parametrize(("largest", "scale"), [(15.9, "linear"), (16.1, "log")])
def test_bench_takes_a_logarithmic_axis_where_ratios_lie_far_apart(largest, scale, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure.axes[0]))
    ratios = [PairedRatio(r, 0.9 * r, 1.1 * r, 0.01, 8) for r in (2.0, largest)]
    plot_bench([BenchRow("s", "case", "new", "old", ratio) for ratio in ratios], tmp_path / "p.png")
    (axes,) = drawn
    assert axes.get_xscale() == scale
    axes.figure.canvas.draw()
    assert {"2", "5", "10"} <= {t.get_text().removesuffix(".0") for t in axes.get_xticklabels()} or scale == "linear"
    assert [t.get_text() for t in axes.get_yticklabels()] == ["case", "new / old", "new / old"]


@pytest.mark.parametrize(
    ("wanted", "median", "colour"),
    [
        (("at least", None), 2.0, "#009e73"),
        (("at least", None), 0.5, "#d55e00"),
        (("at least", None), 1.0, "#707070"),
        (("at most", None), 0.5, "#707070"),
        (("at most", 0.6), 0.5, "#009e73"),
        (("at most", 0.6), 0.7, "#d55e00"),
    ],
)
def test_bench_is_coloured_by_verdict(wanted, median, colour, tmp_path, monkeypatch):
    better, target = wanted
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure.axes[0]))
    ratio = PairedRatio(median, median - 0.05, median + 0.05, 1.0 if median == 1.0 else 0.01, 8)
    plot_bench([BenchRow("s", "case", "new", "old", ratio, target=target, better=better)], tmp_path / "p.png")
    assert drawn[0].lines[0].get_color() == colour
