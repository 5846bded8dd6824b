"""Comparisons and benchmarks as tables: for the terminal (rich), a README (markdown), a program (JSON, CSV)."""

import csv
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from lightning_accel.evidence.budget import Share
from lightning_accel.evidence.comparison import Comparison, speed_verdict, write_pairs
from lightning_accel.evidence.formats import write_effect, write_ratio, write_value
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.evidence.stamp import stamp

GOOD = ("faster", "less", "better", "reached", "kept")
BAD = ("slower", "more", "worse", "missed")


def comparison_table(comparison: Comparison) -> Table:
    """Return the table of a comparison for the terminal."""
    table = Table(
        title=f"{comparison.candidate} against {comparison.baseline}, {write_pairs(comparison.pairs)}",
        caption="medians; ratio over 1: better; 95 % interval of the paired ratio",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("metric", min_width=15)
    table.add_column(comparison.baseline, justify="right", no_wrap=True)
    table.add_column(comparison.candidate, justify="right", no_wrap=True)
    table.add_column(Text("ratio [interval]"), justify="right", no_wrap=True)
    table.add_column("verdict")
    for line in comparison.lines:
        table.add_row(
            Text(line.name),
            write_value(line.baseline, line.unit),
            write_value(line.candidate, line.unit),
            Text(write_effect(line)),
            Text(line.verdict, style=style_of(line.verdict)),
        )
    return table


def budget_table(budgets: Mapping[str, Sequence[Share]]) -> Table:
    """Return where the time of each arm goes, for the terminal."""
    table = Table(title="Where the time goes", caption="means over the runs", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("arm", "part", "seconds", "share", ""):
        table.add_column(name, justify="right" if name in ("seconds", "share") else "left")
    for arm, shares in budgets.items():
        whole = sum(share.seconds for share in shares)
        for place, share in enumerate(shares):
            of_whole = f"{100.0 * share.seconds / whole:.0f} %" if whole else ""
            seconds = write_value(share.seconds, "seconds")
            table.add_row(arm if place == 0 else "", Text(share.name), seconds, of_whole, Text(share.note, style="dim"))
    return table


def bench_table(rows: Iterable[BenchRow], *, title: str = "") -> Table:
    """Return the table of a benchmark for the terminal."""
    table = Table(title=title or None, box=box.SIMPLE_HEAD)
    for name in _BENCH_HEAD:
        table.add_column(name, justify="right" if name in ("times", "ratio [interval]", "target") else "left")
    for row in rows:
        *cells, verdict = _bench_cells(row)
        table.add_row(*map(Text, cells), Text(verdict, style=style_of(verdict)))
    return table


def bench_markdown(rows: Iterable[BenchRow]) -> str:
    """Return the table of a benchmark in markdown, notes below it."""
    rows = list(rows)
    table = _markdown(list(_BENCH_HEAD), [_bench_cells(row) for row in rows], right=(3, 4, 5))
    notes = "".join(f"- {row.case}, {row.variant}: {row.note}\n" for row in rows if row.note)
    return f"{table}\n{notes}" if notes else table


def bench_dict(row: BenchRow) -> dict[str, object]:
    """Return a row as plain data, verdict and whether the target was reached included."""
    return {**dataclasses.asdict(row), "verdict": row.ratio.verdict, "reached": row.reached}


def write_bench(rows: Sequence[BenchRow], folder: Path, *, environment: dict[str, str | int]) -> list[Path]:
    """Write ``bench.json``, ``bench.csv`` and ``bench.md`` into ``folder``; return their paths.

    Raises:
        OSError: If the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "bench.json", folder / "bench.csv", folder / "bench.md"]
    plain = {"stamp": stamp(), "environment": environment, "rows": [bench_dict(row) for row in rows]}
    paths[0].write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    with paths[1].open("w", newline="", encoding="utf-8") as table:
        flat = [_flat(row) for row in rows]
        writer = csv.DictWriter(table, fieldnames=list(dict.fromkeys(name for line in flat for name in line)))
        writer.writeheader()
        writer.writerows(flat)
    taken = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in environment.items())
    paths[2].write_text(f"{bench_markdown(rows)}\nMeasured on: {taken}.\n", encoding="utf-8")
    return paths


def style_of(verdict: str) -> str:
    """Return the terminal's colour of a verdict."""
    verdict = "kept" if verdict.startswith("not worse") else verdict
    return "green" if verdict in GOOD else "red" if verdict in BAD else "dim"


_BENCH_HEAD = ("suite", "case", "variant against baseline", "times", "ratio [interval]", "target", "verdict")


def _bench_cells(row: BenchRow) -> list[str]:
    named = [row.seconds[name] for name in (row.baseline, row.variant) if name in row.seconds]
    times = [write_value(seconds, "seconds") for seconds in named or row.seconds.values()]
    target = "" if row.target is None else f"{'≥' if row.better == 'at least' else '≤'} {row.target:g}"
    if row.reached is None:
        verdict = speed_verdict(row.ratio) if row.better == "at least" else ""
    else:
        verdict = "reached" if row.reached else "missed"
    return [
        row.suite,
        row.case,
        f"{row.variant} against {row.baseline}",
        " → ".join(times),
        write_ratio(row.ratio),
        target,
        verdict,
    ]


def _flat(row: BenchRow) -> dict[str, object]:
    plain = bench_dict(row)
    ratio, seconds = plain.pop("ratio"), plain.pop("seconds")
    assert isinstance(ratio, dict)
    assert isinstance(seconds, dict)
    return {
        **plain,
        **{f"ratio/{name}": value for name, value in ratio.items()},
        **{f"seconds/{name}": value for name, value in seconds.items()},
    }


def _markdown(head: list[str], rows: list[list[str]], *, right: Sequence[int]) -> str:
    rule = ["---:" if column in right else "---" for column in range(len(head))]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (head, rule, *rows)]
    return "\n".join(lines) + "\n"
