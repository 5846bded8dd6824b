"""Find what comparisons, sweeps and benchmarks left in folders, and bring it into one form."""

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_accel.evidence.comparison import Unit
from lightning_accel.evidence.formats import write_value

_FILES = ("comparison.json", "sweep.json", "bench.json")


@dataclass(frozen=True)
class Finding:
    """One result in words and numbers.

    Attributes:
        title: What was tried.
        kind: ``"comparison"``, ``"sweep"`` or ``"bench"``.
        verdict: In one sentence; the time to the target first, where there is one.
        rows: Lines of a table: name, baseline, candidate, effect, verdict.
        facts: Where, when, with which versions and settings.
        next_step: What to do about it.
        folder: Where the raw rows lie, relative to where the page is made.
    """

    title: str
    kind: str
    verdict: str
    rows: tuple[tuple[str, ...], ...]
    facts: Mapping[str, str]
    next_step: str
    folder: str


def gather(folders: Sequence[Path]) -> list[Finding]:
    """Read every result at or below the folders, in the order given.

    Raises:
        FileNotFoundError: If a folder is not there, or holds no result.
    """
    findings: list[Finding] = []
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"`{folder}` is no folder. Name folders that compare, a sweep or bench wrote.")
        found = [path for path in sorted(folder.rglob("*.json")) if path.name in _FILES]
        if not found:
            raise FileNotFoundError(
                f"`{folder}` holds no result ({', '.join(_FILES)}). Name folders that compare, a sweep or bench wrote."
            )
        for path in found:
            findings += _read(path)
    return findings


def _read(path: Path) -> Iterator[Finding]:
    plain = json.loads(path.read_text(encoding="utf-8"))
    reader = {"comparison.json": _comparisons, "sweep.json": _sweep, "bench.json": _bench}[path.name]
    yield from reader(plain, str(path.parent))


def _comparisons(plain: dict[str, Any], folder: str) -> Iterator[Finding]:
    settings = plain["settings"]
    what = " ".join(filter(None, (_short(settings.get("model", "")), "on", _short(settings.get("data", "")))))
    for found in [*plain["comparisons"][:1], *plain["alternatives"]]:
        lines = found["lines"]
        kept = [line for line in lines if line["name"].startswith(("fit, wall", "until ", "training step", "final "))]
        kept += [line for line in lines if line["name"] in ("parameters", "peak memory", "energy")]
        kept.sort(key=lambda line: not (line["name"].startswith("until ") and "first step" not in line["name"]))
        rows = [_line(line) for line in kept]
        if found["money"] is not None:
            money = found["money"]
            for name in ("baseline_hours", "candidate_hours"):
                money[name] = float(money[name])
            price = money["price_per_hour"]
            costs = [f"{price * money[n]:.4g} {money['currency']}" for n in ("baseline_hours", "candidate_hours")]
            rows.append(("price of a fit", *costs, "", ""))
        yield Finding(
            title=f"{found['candidate']} against {found['baseline']}: {what}",
            kind="comparison",
            verdict=found["headline"],
            rows=tuple(rows),
            facts=_facts(plain, settings),
            next_step=_next_step(found, plain.get("advice", ""), resumable(settings.get("command", "")), folder),
            folder=folder,
        )


def _next_step(found: dict[str, Any], advice: str, command: str, folder: str) -> str:
    if found["pairs"] < 6:
        return (
            f"Too few pairs to decide; go on with: {command} hydra.run.dir={folder} compare.resume=true compare.pairs=6"
        )
    verdict = found["verdict"]
    quality = [line["verdict"] for line in found["lines"] if line["name"].startswith("final ")]
    if verdict == "faster" and "not shown" in quality:
        return "Faster, but quality is not shown to be kept within the margin: more pairs, or a larger compare.margin."
    if verdict == "faster" and "worse" in quality:
        return "Faster at a loss of quality: a milder setting, or leave it out."
    if verdict == "faster":
        return f"Use it. {advice}".strip()
    return "Leave it out here: it costs set-up and gains nothing." if verdict == "slower" else "Leave it out here."


def resumable(command: str) -> str:
    """Return a command without the words that say where it runs and how far."""
    own = ("hydra.run.dir=", "compare.resume=", "compare.pairs=")
    return shlex.join(word for word in shlex.split(command) if not word.startswith(own))


def _sweep(plain: dict[str, Any], folder: str) -> Iterator[Finding]:
    speed = (plain["speed"] or "").replace("_", " ")
    rows = [
        (setting["name"], _estimate(setting["metric"]), _estimate(setting["speed"]), setting["front"], "")
        for setting in plain["settings"]
    ]
    alone = all(len(setting["jobs"]) == 1 for setting in plain["settings"])
    yield Finding(
        title=f"sweep of {len(rows)} settings: {plain['metric']}" + (f" against {speed}" if speed else ""),
        kind="sweep",
        verdict=plain["conclusion"],
        rows=tuple(rows),
        facts=_facts(plain, {"failed jobs": str(len(plain["failed"]))} if plain["failed"] else {}),
        next_step="Repeat the best settings with seeds: -m seed=1,2,3." if alone else "Compare the best with plain.",
        folder=folder,
    )


def _bench(plain: dict[str, Any], folder: str) -> Iterator[Finding]:
    suites: dict[str, list[dict[str, Any]]] = {}
    for row in plain["rows"]:
        suites.setdefault(row["suite"], []).append(row)
    for suite, rows in suites.items():
        aims = [row for row in rows if row["target"] is not None]
        missed = [row for row in aims if not row["reached"]]
        lines = [
            (
                f"{row['case']}: {row['variant']} against {row['baseline']}",
                "",
                "",
                f"{row['ratio']['median']:.2f} [{row['ratio']['low']:.2f}, {row['ratio']['high']:.2f}]",
                "" if row["reached"] is None else "reached" if row["reached"] else "missed",
            )
            for row in rows
        ]
        yield Finding(
            title=f"benchmark {suite}",
            kind="bench",
            verdict=f"{len(rows)} rows, {len(aims) - len(missed)} of {len(aims)} targets reached.",
            rows=tuple(lines),
            facts=_facts(plain, {}),
            next_step=f"Look at what was missed: {missed[0]['case']}." if missed else "Nothing.",
            folder=folder,
        )


def _facts(plain: dict[str, Any], settings: Mapping[str, str]) -> dict[str, str]:
    merged = {**plain.get("stamp", {}), **plain.get("environment", {}), **settings}
    return {name.replace("_", " "): str(value) for name, value in merged.items()}


def _line(line: dict[str, Any]) -> tuple[str, ...]:
    unit: Unit = line["unit"]
    values = [write_value(math.inf if line[side] is None else line[side], unit) for side in ("baseline", "candidate")]
    effect = line["ratio"] or line["difference"]
    sign = "+" if line["difference"] else ""
    digits = "4f" if line["difference"] else "2f"
    numbers = [] if effect is None else ["∞" if effect[k] is None else f"{effect[k]:{sign}.{digits}}" for k in _ENDS]
    text = f"{numbers[0]} [{numbers[1]}, {numbers[2]}]" if numbers else ""
    return line["name"].strip(), *values, text, line["verdict"]


_ENDS = ("median", "low", "high")


def _estimate(pair: list[float | None] | None) -> str:
    if pair is None or pair[0] is None:
        return ""
    return f"{pair[0]:.4g}" if pair[1] is None else f"{pair[0]:.4g} ± {pair[1]:.2g}"


def _short(target: str) -> str:
    return target.rpartition(".")[2]
