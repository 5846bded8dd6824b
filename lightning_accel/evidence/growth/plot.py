"""Curves of cost as pictures: one a core, a column a curve, times above and what is gained below."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_accel.evidence.formats import write_value
from lightning_accel.evidence.growth.curves import GrowthRow, conclusion, curves, knees, write_size
from lightning_accel.evidence.plots import COLOURS, new_figure, save_for_page

_INK = "#808080"  # readable on white and on dark
_FAR = 5.0  # largest over smallest ratio from which on they are drawn on a logarithmic axis
_STYLES, _MARKERS = ("-", "--", "-."), ("o", "s", "^")


def plot_growth(rows: Sequence[GrowthRow], folder: Path) -> list[Path]:
    """Draw ``growth_CORE.png`` for each core, and again for dark pages; return the paths of those for light ones.

    Rings are the knees of `lightning_accel.evidence.growth.curves.knees`; dots below are medians, bars intervals.

    Raises:
        MissingPackageError: Without matplotlib.
    """
    paths = []
    for core in dict.fromkeys(row.core for row in rows):
        paths.append(folder / f"growth_{core}.png")
        _plot_core([row for row in rows if row.core == core], paths[-1])
    return paths


def _plot_core(rows: Sequence[GrowthRow], path: Path) -> None:
    of_core = curves(rows)
    names = list(dict.fromkeys(name for row in rows for name in (row.baseline, row.variant, *row.seconds)))
    width = 4.4 * len(of_core)
    figure, panels = new_figure(width, 6.4, rows=2, columns=len(of_core))
    upper, lower = panels[: len(of_core)], panels[len(of_core) :]
    for times, ratios, points in zip(upper, lower, of_core, strict=True):
        _draw_times(times, points, names)
        _draw_ratios(ratios, points)
        for axes in (times, ratios):
            axes.set_xscale("log")
            axes.set_xticks([p.size for p in points], [write_size(p.size) for p in points], fontsize=8)
            axes.minorticks_off()
    found = [axes.get_legend_handles_labels() for axes in upper]
    handles = {label: handle for pair in found for handle, label in zip(*pair, strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    clauses = [conclusion(points) for points in of_core]
    sentence = f"How {rows[0].core.replace('_', ' ')} grows: {'; '.join(clauses)}."
    figure.suptitle("\n".join(textwrap.wrap(sentence, int(12 * width))), fontsize=10)
    save_for_page(figure, path)


def _draw_times(axes: Any, points: Sequence[GrowthRow], names: Sequence[str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    sizes = [point.size for point in points]
    for name in points[0].seconds:
        place = names.index(name)
        axes.plot(
            sizes,
            [point.seconds[name] for point in points],
            color=COLOURS[place % len(COLOURS)],
            linestyle=_STYLES[place % len(_STYLES)],
            marker=_MARKERS[place % len(_MARKERS)],
            markersize=4,
            linewidth=1.6,
            label=name,
        )
    at = {point.size: point for point in points}
    for knee in knees(points):
        seconds = at[knee.size].seconds[knee.variant]
        axes.plot([knee.size], [seconds], "o", markersize=11, mfc="none", mec=_INK, label="bend")
    paid = [(point.size, point.setup_seconds) for point in points if point.setup_seconds]
    if paid:
        places, setups = zip(*paid, strict=True)
        axes.plot(places, setups, "d:", color=_INK, markersize=4, linewidth=1.2, label="set-up, once")
    axes.set_yscale("log")
    bottom, top = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if top > 50.0 * bottom else (1.0, 2.0, 5.0), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: write_value(value, "seconds")))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("time")
    axes.set_title("\n".join(textwrap.wrap(points[0].curve, 48)), fontsize=9)


def _draw_ratios(axes: Any, points: Sequence[GrowthRow]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for point in points:
        axes.plot([point.size] * 2, [point.ratio.low, point.ratio.high], color=COLOURS[2], linewidth=2.0)
    axes.plot([p.size for p in points], [p.ratio.median for p in points], "o-", color=COLOURS[2], markersize=4)
    axes.axhline(1.0, color=_INK, linestyle="--", linewidth=1.0)
    ratios = [point.ratio.median for point in points]
    if max(ratios) > _FAR * min(ratios):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0.0, 1.1 * max(1.0, *(point.ratio.high for point in points)))
    axes.set_xlabel(points[0].axis)
    first = points[0]
    axes.set_ylabel("times as fast" if first.better == "at least" else f"times the time of\n{first.baseline}")
