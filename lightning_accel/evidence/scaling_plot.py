"""Picture of a study over numbers of workers: what they make in a second, and what they learn."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_accel.evidence.plots import COLOURS, new_figure, save_for_page

_INK = "#808080"  # readable on white and on dark
_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
_APART = 0.05  # doublings of the number of workers between two curves, so that equal ones are seen side by side


@dataclass(frozen=True)
class Curve:
    """One way to train, over the number of workers.

    Attributes:
        throughput: Workers to batches a second.
        accuracy: Workers to accuracy in [0, 1].
        is_reference: Whether the others are compared with it: drawn in grey.
    """

    throughput: Mapping[int, float] = field(default_factory=dict)
    accuracy: Mapping[int, float] = field(default_factory=dict)
    is_reference: bool = False


def plot_scaling(
    curves: Mapping[str, Curve],
    path: Path,
    *,
    conclusion: str,
    what: str,
    ideal: Mapping[int, float],
    reach: float | None = None,
    alone: float | None = None,
) -> None:
    """Draw throughput, and accuracy where there is any, over the number of workers; and again for dark pages.

    Points of one number of workers stand side by side, for curves may be equal.

    Args:
        curves: By name.
        path: Of the PNG to write.
        conclusion: One sentence over the picture.
        what: What the accuracy is of.
        ideal: Batches a second if nobody waited for anything.
        reach: Workers from which on one server holds them up; None: not marked.
        alone: Accuracy of one process.

    Raises:
        MissingPackageError: Without matplotlib.
    """
    judged = any(curve.accuracy for curve in curves.values())
    figure, panels = new_figure(11.0 if judged else 6.5, 5.4, columns=2 if judged else 1)
    left, *right = panels if isinstance(panels, list) else [panels]
    _draw(left, {name: curve.throughput for name, curve in curves.items()}, curves)
    left.plot(list(ideal), list(ideal.values()), color=_INK, linewidth=1.0, linestyle=":", label="nobody waits")
    left.set_yscale("log")
    left.set_ylabel("batches a second, all workers")
    left.set_title("Throughput", fontsize=11)
    if reach is not None and reach <= max(ideal):
        left.axvline(reach, color=COLOURS[1], linewidth=1.0, alpha=0.7)
        left.annotate(
            f" one server is busy\n from {reach:.0f} workers on",
            (reach, 0.03),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            color=_INK,
        )
    for axes in right:
        _draw(axes, {name: curve.accuracy for name, curve in curves.items()}, curves)
        if alone is not None:
            axes.axhline(alone, color=_INK, linewidth=1.0)
            axes.annotate("one process", (1.0, alone), (0, -3), xycoords=("axes fraction", "data"), color=_INK,
                          textcoords="offset points", fontsize=8, ha="right", va="top")  # fmt: skip
        axes.set_ylim(0.0, 1.02)
        axes.set_ylabel("test accuracy")
        axes.set_title(what, fontsize=11)
    trained = sorted({count for curve in curves.values() for count in curve.accuracy})
    for axes in (left, *right):
        counts = list(ideal) if axes is left else trained
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("workers")
    left.set_yscale("log")
    found = [axes.get_legend_handles_labels() for axes in (left, *right)]
    handles = {label: handle for pair in found for handle, label in zip(*pair, strict=True)}
    columns = 4 if right else 3  # more of them are wider than one panel
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    figure.suptitle("\n".join(textwrap.wrap(conclusion, 100 if judged else 60)), fontsize=12)
    save_for_page(figure, path)


def _beside(workers: int, curve: int, curves: int) -> float:
    """Return where to draw a point: near its number of workers, beside the points of the other curves."""
    return float(workers * 2.0 ** (_APART * (curve - (curves - 1) / 2)))


def _draw(axes: Any, values: Mapping[str, Mapping[int, float]], curves: Mapping[str, Curve]) -> None:
    for i, (name, points) in enumerate(values.items()):
        if not points:
            continue
        reference = curves[name].is_reference
        axes.plot(
            [_beside(workers, i, len(values)) for workers in points],
            list(points.values()),
            color=_INK if reference else COLOURS[i % len(COLOURS)],
            linestyle="--" if reference else _STYLES[(i // len(COLOURS) + i) % len(_STYLES)],
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=5,
            linewidth=1.6,
            alpha=0.9,
            label=name,
        )
