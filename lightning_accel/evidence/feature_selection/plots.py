"""Pictures of the study of selected features."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_accel.evidence.feature_selection.study import PLAIN, Summary
from lightning_accel.evidence.plots import COLOURS, MissingPackageError

_GREY = "#606060"
_MARKERS = "osD^v"
_NUMBERED = 40  # features at most whose indices stand at the axis
_CLOSE_UP = 0.25  # share of the features: if no more stay, they are drawn once more, larger


def plot_accuracy_against_features(summaries: Sequence[Summary], path: Path) -> None:
    """Draw mean accuracy, with its spread, against the number of kept features, and the informative ones among them.

    Raises:
        MissingPackageError: Without matplotlib.
    """
    (plain,) = (s for s in summaries if s.method == PLAIN)
    known = plain.informative is not None
    figure, axes = _figure(9.0 if not known else 11.0, 4.6, columns=1 + known)
    mean, spread = plain.accuracy
    everything = f"all {plain.features:,.0f} features, no projection"
    axes[0].axhspan(mean - spread, mean + spread, color=_GREY, alpha=0.12, linewidth=0.0)
    lines = [axes[0].axhline(mean, color=_GREY, linestyle="--", linewidth=1.2, label=everything)]
    methods = [m for m in dict.fromkeys(s.method for s in summaries) if m != PLAIN]
    for i, method in enumerate(methods):
        mine = sorted((s for s in summaries if s.method == method), key=lambda s: s.features)
        style: dict[str, Any] = {"color": COLOURS[i], "marker": _MARKERS[i], "label": method, "linewidth": 1.8}
        aside = 1.0 + 0.04 * (i - (len(methods) - 1) / 2)  # else the bars hide each other
        features = [s.features * aside for s in mine]
        means, spreads = [s.accuracy[0] for s in mine], [s.accuracy[1] for s in mine]
        lines.append(axes[0].errorbar(features, means, yerr=spreads, capsize=3, elinewidth=1.0, **style))
        if known:
            axes[1].plot(features, [s.informative for s in mine], **style)
    counts = sorted({s.features for s in summaries if s.method != PLAIN})
    seeds = plain.difference.pairs
    over = f"mean and standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    axes[0].set(ylabel="accuracy", title=f"Test accuracy: {over}")
    if known:
        of_all = sorted({(s.features, s.by_chance) for s in summaries if s.method != PLAIN})
        lines += axes[1].plot(*zip(*of_all, strict=True), color=_GREY, linestyle=":", linewidth=1.5, label="by chance")
        best = [min(count, plain.informative or 0.0) for count in counts]
        lines += axes[1].plot(counts, best, color=_GREY, linestyle="-.", linewidth=1.0, label="most there can be")
        mean_of = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
        axes[1].set(ylabel="informative features", ylim=(0.0, None), title=f"Informative among the kept: {mean_of}")
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xticks(counts, labels=[f"{count:,.0f}" for count in counts])
        axis.minorticks_off()
        axis.set_xlabel("features kept (logarithmic)")
    figure.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 4), frameon=False)
    _save(figure, path)


def plot_weights(weights: Mapping[str, Tensor], path: Path, *, informative: Tensor | None = None) -> None:
    """Draw the magnitudes of weights (units, features), one below the other; what is zero is white.

    Features stand in one order for all: informative ones first, where they are known, then by how many of the weights
    keep them and how large the last of those is. Where few stay, a second column shows them larger.

    Args:
        weights: Title to weight.
        path: Of the PNG to write.
        informative: Indices of the informative features.

    Raises:
        MissingPackageError: Without matplotlib.
    """
    order, last = _order(weights, informative)
    close_up = last <= _CLOSE_UP * len(order)
    figure, axes = _figure(
        12.0 if close_up else 10.0, 0.6 + 2.1 * len(weights), rows=len(weights), columns=1 + close_up
    )
    import matplotlib

    shades = matplotlib.colormaps["Blues"].resampled(256)(torch.linspace(0.15, 1.0, 256).numpy())
    # the smallest weight still differs from a zero
    blues = matplotlib.colors.ListedColormap(shades).with_extremes(bad="white")
    top = max(float(weight.abs().flatten().float().quantile(0.999)) for weight in weights.values())
    for row, (title, weight) in enumerate(weights.items()):
        for axis, count in zip(axes[row * (1 + close_up) :], (len(order), last)[: 1 + close_up], strict=False):
            shown = weight.abs().float()[:, order[:count]]
            shown = shown.masked_fill(shown == 0.0, torch.nan)
            image = axis.imshow(shown.numpy(), aspect="auto", vmin=0.0, vmax=top, interpolation="nearest", cmap=blues)
            axis.grid(False)
            axis.spines[["top", "right"]].set_visible(True)
            if informative is not None and 0 < len(informative) < count:
                axis.axvline(len(informative) - 0.5, color=COLOURS[1], linewidth=1.2)
            bottom = row == len(weights) - 1
            if count <= _NUMBERED:
                axis.set_xticks(range(count), labels=[str(int(i)) for i in order[:count]], fontsize=7)
            axis.tick_params(bottom=bottom, labelbottom=bottom)
            if bottom:
                part = f"all {count:,} features" if count == len(order) else f"the first {count:,} of them, larger"
                axis.set_xlabel(f"{part}, by their indices" if count <= _NUMBERED else part)
        first = axes[row * (1 + close_up)]
        first.set_title(title, loc="left", fontsize=10)
        first.set_ylabel("hidden unit")
    figure.colorbar(image, ax=axes, label="magnitude of the weight; white: zero", fraction=0.03, extend="max")
    stay = "those that stay stand first"
    if informative is not None:
        stay = f"the {len(informative):,} informative ones left of the line; on either side {stay}"
    figure.supxlabel(f"One order in all rows: {stay}.", fontsize=10)
    _save(figure, path)


def _order(weights: Mapping[str, Tensor], informative: Tensor | None) -> tuple[Tensor, int]:
    """Return the features in the order to draw, and how many of the first hold all that not every weight keeps."""
    reach = torch.stack([weight.abs().amax(0).double() for weight in weights.values()])
    sparse = reach[[bool((r == 0).any()) for r in reach]]
    keepers = (sparse > 0).sum(0)
    size = reach[-1] + 1e-3 * reach.mean(0)
    rank = keepers + 0.9 * size / size.max().clamp_min(torch.finfo(size.dtype).tiny)
    if informative is not None:
        rank[informative] += len(reach) + 1.0
    order = rank.argsort(descending=True)
    kept = torch.nonzero(keepers[order] > 0)
    return order, int(kept[-1]) + 1 if len(kept) else len(order)


def _figure(width: float, height: float, *, rows: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("pictures need matplotlib: pip install 'lightning-accel[examples]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150, metadata={"Software": None})
