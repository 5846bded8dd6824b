"""The page of a dossier: what was tried, what it gained and at what price, and what to do next."""

from collections.abc import Sequence
from pathlib import Path

from lightning_accel.evidence.dossier.gather import Finding
from lightning_accel.evidence.page import render_page, tone


def write_dossier(findings: Sequence[Finding], path: Path) -> None:
    """Write one self-contained HTML page.

    Raises:
        MissingPackageError: Without jinja2.
    """
    heads = {
        "comparison": ("metric", "baseline", "candidate", "ratio or difference [interval]", "verdict"),
        "sweep": ("setting", "metric", "speed", "Pareto front", ""),
        "bench": ("row", "", "", "ratio [interval]", "target"),
    }
    render_page("dossier.html.j2", path, findings=findings, heads=heads, tone=tone, said=headline(findings))


def headline(findings: Sequence[Finding]) -> str:
    """Count what the findings say."""
    comparisons = [finding for finding in findings if finding.kind == "comparison"]
    worth = [finding for finding in comparisons if finding.next_step.startswith("Use it")]
    parts = [f"{len(worth)} of {len(comparisons)} comparisons say that it pays here"] if comparisons else []
    for kind, word in (("sweep", "sweep"), ("bench", "benchmark suite")):
        count = sum(finding.kind == kind for finding in findings)
        if count:
            parts.append(f"{count} {word}{'' if count == 1 else 's'}")
    return "; ".join(parts) + "."
