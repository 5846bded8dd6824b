"""Curves of cost as tables: markdown for a reader, JSON for a program."""

import json
from collections.abc import Sequence
from pathlib import Path

from lightning_accel.evidence.formats import write_ratio, write_value
from lightning_accel.evidence.growth.curves import GrowthRow, Knee, conclusion, curves, knees, slopes, write_size

_HEAD = ("ratio [interval]", "slopes", "set-up", "paid back after", "bends", "note")


def growth_markdown(rows: Sequence[GrowthRow]) -> str:
    """Return a table a curve: times, their ratio, the slopes up to each point, what is spent once, where it bends.

    Columns that would be empty are left out.
    """
    return "\n".join(_curve_markdown(points) for points in curves(rows))


def write_growth(rows: Sequence[GrowthRow], folder: Path) -> list[Path]:
    """Write ``growth.md`` and ``growth.json`` into ``folder``, which exists; return their paths.

    Raises:
        OSError: If the folder cannot be written.
    """
    paths = [folder / "growth.md", folder / "growth.json"]
    paths[0].write_text(growth_markdown(rows), encoding="utf-8")
    plain = [_plain_curve(points) for points in curves(rows)]
    paths[1].write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    return paths


def _plain_curve(points: Sequence[GrowthRow]) -> dict[str, object]:
    first = points[0]
    return {
        "core": first.core,
        "curve": first.curve,
        "axis": first.axis,
        "baseline": first.baseline,
        "variant": first.variant,
        "conclusion": conclusion(points),
        "sizes": [point.size for point in points],
        "seconds": {name: [point.seconds[name] for point in points] for name in first.seconds},
        "ratios": [[point.ratio.low, point.ratio.median, point.ratio.high] for point in points],
        "slopes": {name: slopes(points, name) for name in first.seconds},
        "setup_seconds": [point.setup_seconds for point in points],
        "knees": [{"variant": k.variant, "size": k.size, "before": k.before, "after": k.after} for k in knees(points)],
    }


def _curve_markdown(points: Sequence[GrowthRow]) -> str:
    first, bends = points[0], knees(points)
    names = list(dict.fromkeys([first.baseline, first.variant, *first.seconds]))
    steep = {name: slopes(points, name) for name in (first.baseline, first.variant)}
    head = [first.axis, *names, *_HEAD]
    lines = []
    for place, point in enumerate(points):
        here = [knee for knee in bends if knee.size == point.size]
        lines.append(
            [
                write_size(point.size),
                *(write_value(point.seconds[name], "seconds") for name in names),
                write_ratio(point.ratio),
                ", ".join(f"{values[place - 1]:.2f}" for values in steep.values()) if place else "",
                "" if point.setup_seconds is None else write_value(point.setup_seconds, "seconds"),
                _paid_back(point),
                "; ".join(map(_written, here)),
                point.note,
            ]
        )
    filled = [place for place in range(len(head)) if any(line[place] for line in lines)]
    whole = [head, ["---:"] * len(head), *lines]
    table = "\n".join("| " + " | ".join(line[place] for place in filled) + " |" for line in whole)
    return f"**{first.core}: {first.curve}:** {conclusion(points)}.\n\n{table}\n"


def _paid_back(point: GrowthRow) -> str:
    steps = point.steps_to_pay_back
    return "" if steps is None else "never" if steps == float("inf") else f"{steps:,.0f} steps"


def _written(knee: Knee) -> str:
    return f"{knee.variant}: {knee.before:.2f} to {knee.after:.2f}"
