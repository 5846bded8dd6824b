"""One self-contained HTML page that shows the study of selected features."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_accel.evidence.feature_selection.overhead import Overhead
from lightning_accel.evidence.feature_selection.study import PLAIN, Selection, Summary, headline
from lightning_accel.evidence.page import render_page


@dataclass(frozen=True)
class SelectionReport:
    """What the page shows.

    Attributes:
        summaries: Of all methods and sparsities.
        overheads: Of a projection after each step.
        runs: All of them.
        environment: Where it was measured; see `lightning_accel.measure.environment`.
        settings: What was compared, name to text, without machine paths.
    """

    summaries: Sequence[Summary]
    overheads: Sequence[Overhead]
    runs: Sequence[Selection]
    environment: Mapping[str, str | int]
    settings: Mapping[str, str] = field(default_factory=dict)

    def rows(self, *, short: bool = False) -> list[list[str]]:
        """Return the cells of the table, as text; see `header`. ``short``: without intervals and verdicts."""
        overheads = {(o.method, o.sparsity): o for o in self.overheads}
        return [
            _cells(s, overheads.get((s.method, s.sparsity)), known=self._known, short=short) for s in self.summaries
        ]

    @property
    def header(self) -> list[str]:
        """The names of the columns."""
        found = ["informative (by chance)"] if self._known else []
        return ["method", "cleared", "features", "accuracy", "change", *found, "step time (added)"]

    @property
    def _known(self) -> bool:
        return any(s.informative is not None for s in self.summaries)


def write_selection_page(report: SelectionReport, path: Path, *, pictures: Mapping[str, Path]) -> None:
    """Write the page.

    Args:
        report: What to show.
        path: Of the HTML file.
        pictures: Heading to PNG, stored within the page.

    Raises:
        MissingPackageError: Without jinja2.
    """
    shown = {title: base64.b64encode(picture.read_bytes()).decode("ascii") for title, picture in pictures.items()}
    render_page(
        "selection.html.j2",
        path,
        report=report,
        pictures=shown,
        headline=headline(report.summaries),
        seeds=len({r.seed for r in report.runs}),
    )


def _cells(s: Summary, overhead: Overhead | None, *, known: bool, short: bool) -> list[str]:
    cells = [s.method, f"{s.sparsity:.0%}", f"{s.features:.0f}", f"{s.accuracy[0]:.3f} ± {s.accuracy[1]:.3f}"]
    d = s.difference
    difference = f"{d.median:+.3f}" + ("" if short else f" [{d.low:+.3f}, {d.high:+.3f}] {d.verdict}")
    cells.append("" if s.method == PLAIN else difference)
    if known:
        chance = "" if s.by_chance is None or s.method == PLAIN else f" ({s.by_chance:.1f})"
        cells.append("" if s.informative is None else f"{s.informative:.1f}{chance}")
    if overhead is None:
        return [*cells, ""]
    low, middle, high = (100.0 * (r - 1.0) for r in (overhead.ratio.low, overhead.ratio.median, overhead.ratio.high))
    return [*cells, f"{middle:+.1f} %" + ("" if short else f" [{low:+.1f}, {high:+.1f}]")]
