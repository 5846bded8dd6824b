"""One self-contained HTML page that shows a comparison: no script, no network, readable on a phone."""

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning_accel.evidence.budget import CALLBACKS, LOADING, REST, SETUP, VALIDATION, Share
from lightning_accel.evidence.comparison import Comparison, write_pairs
from lightning_accel.evidence.formats import write_effect, write_value
from lightning_accel.evidence.measured_runs.runs import Run
from lightning_accel.evidence.plots import MissingPackageError, dark_twin
from lightning_accel.evidence.tables import BAD, GOOD

STAGE_COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#7fc8a9", "#00517f", "#2f8f8f")
_COLOURS = {SETUP: "#8a8f94", CALLBACKS: "#d55e00", VALIDATION: "#e69f00", LOADING: "#cc79a7", REST: "#c3c7cb"}


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
        budgets: Arm to where its time goes; see `lightning_accel.evidence.budget.write_budgets`.
        alternatives: Of what anyone can do without this package with the plain run.
        advice: Whether one of them is all that the run needs; see `lightning_accel.evidence.alternatives.advise`.
    """

    comparisons: Sequence[Comparison]
    runs: Sequence[Run]
    environment: Mapping[str, str | int]
    settings: Mapping[str, str] = field(default_factory=dict)
    messages: Sequence[str] = ()
    note: str = ""
    budgets: Mapping[str, Sequence[Share]] = field(default_factory=dict)
    alternatives: Sequence[Comparison] = ()
    advice: str = ""


def write_page(report: Report, path: Path, *, picture: Path | None = None) -> None:
    """Write the page.

    Args:
        report: What to show.
        path: Of the HTML file.
        picture: A PNG to show in it, stored within the page.

    Raises:
        MissingPackageError: Without jinja2.
    """
    longest = max((sum(s.seconds for s in shares) for shares in report.budgets.values()), default=0.0)
    render_page(
        "report.html.j2",
        path,
        report=report,
        pictures=embed(picture),
        value=write_value,
        effect=write_effect,
        tone=tone,
        pairs=write_pairs,
        kinds=[_Kind(c) for c in report.comparisons],
        bars=[_Bar(arm, shares, longest) for arm, shares in report.budgets.items()],
    )


def embed(picture: Path | None) -> dict[str, str]:
    """Return a PNG as text for a page: ``"light"`` and, where there is a twin for dark pages, ``"dark"``."""
    if picture is None:
        return {}
    kinds = {"light": picture, "dark": dark_twin(picture)}
    return {kind: base64.b64encode(path.read_bytes()).decode("ascii") for kind, path in kinds.items() if path.exists()}


def render_page(template: str, path: Path, **values: Any) -> None:
    """Write a page from a template of this package, without its blank lines.

    Args:
        template: File name of the template.
        path: Of the HTML file.
        **values: What the template shows.

    Raises:
        MissingPackageError: Without jinja2.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingPackageError(
            "the page needs jinja2: pip install 'lightning-accel[examples]' (or jinja2)."
        ) from None
    folder = files("lightning_accel.evidence")
    jinja = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    page = jinja.get_template(template).render(**values)
    path.write_text(re.sub(r"\n\s*\n+", "\n", page), encoding="utf-8")


def tone(verdict: str) -> str:
    """Return the CSS class of a verdict."""
    verdict = "kept" if verdict.startswith("not worse") else verdict
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


class _Bar:
    """An arm's time as a bar: its parts, each with a colour and a width in per cent of the longest arm."""

    def __init__(self, arm: str, shares: Sequence[Share], longest: float) -> None:
        self.arm = arm
        self.seconds = sum(share.seconds for share in shares)
        self.parts = []
        stages = 0
        for share in shares:
            if share.is_training:
                stages += 1
            colour = STAGE_COLOURS[(stages - 1) % len(STAGE_COLOURS)] if share.is_training else _COLOURS[share.name]
            width = 100.0 * share.seconds / longest if longest else 0.0
            of_arm = 100.0 * share.seconds / self.seconds if self.seconds else 0.0
            self.parts.append((share, colour, f"{width:.2f}", f"{of_arm:.0f}"))


def _place(ratio: float) -> float:
    if ratio <= 0.0 or math.isinf(ratio):
        return 0.0 if ratio <= 0.0 else 100.0
    return min(100.0, max(0.0, 50.0 + 50.0 * math.log(ratio) / math.log(4.0)))
