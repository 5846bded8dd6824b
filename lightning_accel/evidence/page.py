"""One self-contained HTML page that shows a comparison: no script, no network, readable on a phone."""

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from lightning_accel.evidence.comparison import Comparison, write_pairs
from lightning_accel.evidence.formats import write_effect, write_value
from lightning_accel.evidence.plots import MissingPackageError
from lightning_accel.evidence.runs import Run
from lightning_accel.evidence.tables import BAD, GOOD


@dataclass(frozen=True)
class Report:
    """What a page shows.

    Attributes:
        comparisons: The one that decides first.
        runs: All measured rows, warm-ups and unpaired ones included.
        environment: Where it was measured; see `lightning_accel.measure.environment`.
        settings: What was compared, name to text, without machine paths.
        messages: What the accelerators said, without machine paths.
        note: Shown above the table: an interruption, an A/A run.
    """

    comparisons: Sequence[Comparison]
    runs: Sequence[Run]
    environment: Mapping[str, str | int]
    settings: Mapping[str, str] = field(default_factory=dict)
    messages: Sequence[str] = ()
    note: str = ""


def write_page(report: Report, path: Path, *, picture: Path | None = None) -> None:
    """Write the page.

    Args:
        report: What to show.
        path: Of the HTML file.
        picture: A PNG to show in it, stored within the page.

    Raises:
        MissingPackageError: Without jinja2.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingPackageError(
            "the page needs jinja2: pip install 'lightning-accel[examples]' (or jinja2)."
        ) from None
    source = files("lightning_accel.evidence").joinpath("report.html.j2").read_text(encoding="utf-8")
    jinja = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = jinja.from_string(source).render(
        report=report,
        picture=None if picture is None else base64.b64encode(picture.read_bytes()).decode("ascii"),
        value=write_value,
        effect=write_effect,
        tone=tone,
        pairs=write_pairs,
        kinds=[_Kind(c) for c in report.comparisons],
    )
    path.write_text(re.sub(r"\n\s*\n+", "\n", page), encoding="utf-8")


def tone(verdict: str) -> str:
    """Return the CSS class of a verdict."""
    return "good" if verdict in GOOD else "bad" if verdict in BAD else "even"


class _Kind:
    """A comparison with what only the page needs."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        ratio = comparison.fit.ratio
        assert ratio is not None
        # The bar spans 1/4 to 4 on a logarithmic axis, which is where almost all ratios are.
        self.low, self.middle, self.high = (_place(x) for x in (ratio.low, ratio.median, ratio.high))
        self.ratio = f"{ratio.median:.2f}"


def _place(ratio: float) -> float:
    if ratio <= 0.0 or math.isinf(ratio):
        return 0.0 if ratio <= 0.0 else 100.0
    return min(100.0, max(0.0, 50.0 + 50.0 * math.log(ratio) / math.log(4.0)))
