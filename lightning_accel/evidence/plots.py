"""Pictures of measurements. Matplotlib is needed here only, and imported here only."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_accel.evidence.goal import Goal
from lightning_accel.evidence.measured_runs.runs import Run

# Readable on white and on dark pages, and told apart by colour-blind readers (Okabe, Ito).
_NIGHT, _NIGHT_INK = "#1f2225", "#e9eaec"  # a card of the dark page and what is written on it
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
    figure, axes = new_figure(6.0, 4.0)
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
    save_for_page(figure, path)


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
    figure, panels = new_figure(4.2 * columns, 2.9 * lines, rows=lines, columns=columns)
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
    """Draw every `BenchRow`'s ratio with its interval and target, one line a row, under headings of cases.

    Green is a reached target or faster, orange the opposite; without a target and without a verdict, dots are grey.

    Raises:
        MissingPackageError: Without matplotlib.
        ValueError: If there is no row.
    """
    if not rows:
        raise ValueError("`rows` must not be empty.")
    labels: list[str] = []
    drawn: dict[int, Any] = {}
    for i, row in enumerate(rows):
        if i == 0 or row.case != rows[i - 1].case:
            labels.append(row.case)
        drawn[len(labels)] = row
        labels.append(f"{row.variant} / {row.baseline}")
    figure, axes = new_figure(9.0, 1.0 + 0.21 * len(labels))
    for place, row in drawn.items():
        ratio, colour = row.ratio, _colour_of(row)
        axes.plot([ratio.low, ratio.high], [place, place], color=colour, linewidth=2.0)
        axes.plot([ratio.median], [place], "o", color=colour, markersize=5)
        if row.target is not None:
            axes.plot([row.target], [place], "|", color="#404040", markersize=11)
    axes.axvline(1.0, color="#808080", linestyle="--", linewidth=1.0)
    _scale_ratios(axes, [row.ratio.median for row in rows])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    for place, label in enumerate(axes.get_yticklabels()):
        label.set_fontweight("normal" if place in drawn else "bold")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("ratio (dot: median, bar: interval, tick: target)")
    _save(figure, path)


def _colour_of(row: Any) -> str:
    if row.reached is not None:
        return COLOURS[2] if row.reached else COLOURS[1]
    verdict = row.ratio.verdict if row.better == "at least" else ""
    return {"faster": COLOURS[2], "slower": COLOURS[1]}.get(verdict, "#707070")


def _scale_ratios(axes: Any, ratios: Sequence[float]) -> None:
    """Take a logarithmic axis, with plain numbers, where ratios lie too far apart to be read on one of equal steps."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if min(ratios) > 0.0 and max(ratios) > 8.0 * min(ratios):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def new_figure(width: float, height: float, *, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """Return a figure and its axes (a list, where there are several) without touching pyplot's global state.

    Raises:
        MissingPackageError: Without matplotlib.
    """
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


def save_for_page(figure: Any, path: Path) -> None:
    """Write a picture twice, for light pages and, beside it as ``NAME.dark.png``, for dark ones."""
    _save(figure, path)
    figure.set_facecolor(_NIGHT)
    for axes in figure.axes:
        axes.set_facecolor(_NIGHT)
        axes.tick_params(colors=_NIGHT_INK, which="both")
        for text in (axes.xaxis.label, axes.yaxis.label, axes.title, *axes.texts):
            text.set_color(_NIGHT_INK)
        for spine in axes.spines.values():
            spine.set_color(_NIGHT_INK)
        legend = axes.get_legend()
        for text in legend.get_texts() if legend is not None else []:
            text.set_color(_NIGHT_INK)
    for text in (*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())):
        text.set_color(_NIGHT_INK)
    _save(figure, dark_twin(path))


def dark_twin(path: Path) -> Path:
    """Return where the picture for dark pages lies."""
    return path.with_suffix(f".dark{path.suffix}")


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
