"""What a comparison, a sweep or a benchmark leaves for other programs: one JSON file each, with where and when."""

import json
import math
from pathlib import Path
from typing import Any

from lightning_accel.evidence.page import Report
from lightning_accel.evidence.stamp import stamp
from lightning_accel.evidence.sweeps.page import SweepReport


def write_summary(report: Report, path: Path) -> Path:
    """Write ``comparison.json``; return its path."""
    return _write(
        path,
        {
            "kind": "comparison",
            "stamp": stamp(),
            "environment": dict(report.environment),
            "settings": dict(report.settings),
            "messages": list(report.messages),
            "note": report.note,
            "advice": report.advice,
            "comparisons": [comparison.to_dict() for comparison in report.comparisons],
            "alternatives": [comparison.to_dict() for comparison in report.alternatives],
        },
    )


def write_sweep_summary(report: SweepReport, path: Path) -> Path:
    """Write ``sweep.json``; return its path."""
    rows = []
    for setting in report.settings:
        speed = None if setting.speed is None else [setting.speed.mean, setting.speed.half_width]
        metric = [setting.metric.mean, setting.metric.half_width]
        rows.append(
            {
                "name": setting.name,
                "jobs": list(setting.jobs),
                "metric": [_number(v) for v in metric],
                "speed": None if speed is None else [_number(v) for v in speed],
                "front": report.mark(setting),
            }
        )
    return _write(
        path,
        {
            "kind": "sweep",
            "stamp": stamp(),
            "environment": dict(report.environment),
            "metric": report.metric,
            "mode": report.mode,
            "speed": report.speed,
            "conclusion": report.conclusion,
            "settings": rows,
            "failed": [{"job": run.job, "reason": run.failure} for run in report.runs if run.failure],
        },
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _write(path: Path, plain: dict[str, Any]) -> Path:
    path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    return path
