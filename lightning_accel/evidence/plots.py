"""Pictures of measurements. Matplotlib is needed here only, and imported here only."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_accel.evidence.goal import Goal
from lightning_accel.evidence.runs import Run

# Readable on white and on dark pages, and told apart by colour-blind readers (Okabe, Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


class MissingPackageError(ImportError):
    """An optional package is not there; the message says how to get it."""


def plot_metric_against_time(runs: Mapping[str, Sequence[Run]], goal: Goal, path: Path) -> None:
    """Draw the goal's metric against wall-clock seconds: every run a thin line, each arm's middle a thick one.

    Args:
        runs: Arm to runs.
        goal: Its metric is drawn, its target as a dashed line (not if every pair has its own), and a ring around each
            run's first validation that reaches the target.
        path: Of the PNG to write.

    Raises:
        MissingPackageError: Without matplotlib.
    """
    figure, axes = _figure(6.0, 4.0)
    for colour, (arm, arm_runs) in zip(_cycle(len(runs)), runs.items(), strict=True):
        curves = [_curve(run, goal.metric) for run in arm_runs]
        for run, (seconds, values) in zip(arm_runs, curves, strict=True):
            axes.plot(seconds, values, color=colour, alpha=0.25, linewidth=1.0)
            reached = goal.seconds(run)
            if reached in seconds:
                at = values[seconds.index(reached)]
                axes.plot([reached], [at], "o", markersize=7, markerfacecolor="none", markeredgecolor=colour)
        seconds, values = middle_curve(curves)
        axes.plot(seconds, values, color=colour, linewidth=2.2, marker="o" if len(seconds) <= 15 else None, label=arm)
    if not goal.by_pair:
        label = f"target {goal.target:.4g}"
        axes.axhline(goal.target, color="#808080", linestyle="--", linewidth=1.0, label=label)
    axes.set_xlabel("seconds since the start of fit, set-up included")
    axes.set_ylabel(goal.metric)
    axes.set_xlim(left=0.0)
    axes.legend(frameon=False)
    _save(figure, path)


def middle_curve(curves: Sequence[tuple[list[float], list[float]]]) -> tuple[list[float], list[float]]:
    """Return point by point the medians of several curves, as far as the shortest goes."""
    from statistics import median

    length = min((len(seconds) for seconds, _ in curves), default=0)
    return (
        [median(seconds[i] for seconds, _ in curves) for i in range(length)],
        [median(values[i] for _, values in curves) for i in range(length)],
    )


def plot_rank_plan(plan: Mapping[str, Any], path: Path) -> None:
    """Draw measured time against rank for every layer of a rank plan, one panel a layer.

    Args:
        plan: ``{"layers": [...]}``; a layer has ``name``, ``dense_ms``, ``candidates`` (each ``rank``, ``ms`` and,
            where known, ``energy``) and ``rank``, the chosen one (or list of two, or ``None`` for dense). Layers
            without candidates are left out. Ranks of two numbers (Tucker-2) are drawn apart, at the larger one.
        path: Of the PNG to write.

    Raises:
        MissingPackageError: Without matplotlib.
        ValueError: If no layer has candidates.
    """
    layers = [layer for layer in plan["layers"] if layer.get("candidates")]
    if not layers:
        raise ValueError("`plan` must hold at least one layer with measured candidates; none was decomposed.")
    columns = min(3, len(layers))
    lines = math.ceil(len(layers) / columns)
    figure, panels = _figure(4.2 * columns, 2.9 * lines, rows=lines, columns=columns)
    grid = panels if isinstance(panels, list) else [panels]
    for axes, layer in zip(grid, layers, strict=False):
        _draw_ranks(axes, layer)
    for axes in grid[len(layers) :]:
        axes.set_visible(False)
    handles = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(  # one for all, where it hides nothing
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(columns, 5),
        frameon=False,
        fontsize=9,
    )
    _save(figure, path)


def plot_bench(rows: Sequence[Any], path: Path) -> None:
    """Draw every `BenchRow`'s ratio with its interval and target, one line a row.

    Raises:
        MissingPackageError: Without matplotlib.
        ValueError: If there is no row.
    """
    if not rows:
        raise ValueError("`rows` must not be empty.")
    figure, axes = _figure(8.0, 1.0 + 0.5 * len(rows))
    for place, row in enumerate(reversed(rows)):
        ratio = row.ratio
        good = row.reached if row.reached is not None else ratio.verdict != "slower"
        colour = COLOURS[2] if good else COLOURS[1]
        axes.plot([ratio.low, ratio.high], [place, place], color=colour, linewidth=2.0)
        axes.plot([ratio.median], [place], "o", color=colour, markersize=6)
        if row.target is not None:
            axes.plot([row.target], [place], "|", color="#404040", markersize=16)
    axes.axvline(1.0, color="#808080", linestyle="--", linewidth=1.0)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_yticks(range(len(rows)))
    axes.set_yticklabels([f"{row.case}\n{row.variant} / {row.baseline}" for row in reversed(rows)], fontsize=8)
    axes.set_xlabel("ratio (dot: median, bar: interval, tick: target)")
    _save(figure, path)


def _figure(width: float, height: float, *, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """Return a figure and its axes (a list, where there are several) without touching pyplot's global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError(
            "pictures need matplotlib: pip install 'lightning-accel[examples]' (or matplotlib)."
        ) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, list(grid) if rows * columns > 1 else grid[0]


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _curve(run: Run, metric: str) -> tuple[list[float], list[float]]:
    points = [(p["seconds"], v) for p in run.curve if (v := p["metrics"].get(metric)) is not None]
    return [seconds for seconds, _ in points], [value for _, value in points]


def _draw_ranks(axes: Any, layer: Mapping[str, Any]) -> None:
    """Draw a layer's times, each form of factors by itself; a candidate is the upper end of its plateau."""
    chosen = None if layer.get("rank") is None else _ranks(layer["rank"])
    right = axes.twinx() if all(c.get("energy") is not None for c in layer["candidates"]) else None
    for form, colour, marker, line in ((1, COLOURS[0], "o", "-"), (2, COLOURS[3], "s", ":")):
        candidates = [c for c in layer["candidates"] if len(_ranks(c["rank"])) == form]
        points = sorted(((max(_ranks(c["rank"])), c) for c in candidates), key=lambda point: point[0])
        if not points:
            continue
        ranks, times = [rank for rank, _ in points], [c["ms"] for _, c in points]
        label = "two factors" if form == 1 else "Tucker-2, by the larger rank"
        axes.step(ranks, times, where="pre", color=colour, linewidth=1.0, alpha=0.6)
        axes.plot(ranks, times, marker, color=colour, markersize=3.5, label=label)
        if right is not None:
            right.plot(ranks, [c["energy"] for _, c in points], line, color=COLOURS[2], linewidth=1.0)
        for rank, candidate in points:
            if _ranks(candidate["rank"]) == chosen:
                axes.plot([rank], [candidate["ms"]], marker, color=COLOURS[1], markersize=8, label="chosen rank")
                axes.axvline(rank, color=COLOURS[1], linewidth=1.0, alpha=0.5)
    if layer.get("dense_ms") is not None:
        label = "dense" if chosen is not None else "dense (chosen)"
        colour = "#808080" if chosen is not None else COLOURS[1]
        axes.axhline(layer["dense_ms"], color=colour, linestyle="--", linewidth=1.0, label=label)
    if right is not None:
        right.set_ylim(0.0, 1.05)
        right.set_ylabel("energy kept", color=COLOURS[2])
        right.spines["top"].set_visible(False)
    axes.set_title(
        f"{layer['name']}\n{'dense' if chosen is None else 'rank ' + 'x'.join(map(str, chosen))}", fontsize=9
    )
    axes.set_xlabel("rank")
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0.0)


def _ranks(rank: Any) -> list[int]:
    return list(rank) if isinstance(rank, list | tuple) else [int(rank)]
