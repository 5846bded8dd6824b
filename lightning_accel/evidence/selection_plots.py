"""Pictures of the study of selected features."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_accel.evidence.feature_selection import PLAIN, Summary
from lightning_accel.evidence.plots import COLOURS, MissingPackageError

_GREY = "#606060"
_MARKERS = "osD^v"


def plot_accuracy_against_features(summaries: Sequence[Summary], path: Path) -> None:
    """Draw mean accuracy, with its spread, against the number of kept features, and the informative ones among them.

    Raises:
        MissingPackageError: Without matplotlib.
    """
    (plain,) = (s for s in summaries if s.method == PLAIN)
    known = plain.informative is not None
    figure, axes = _figure(9.0 if not known else 11.0, 4.2, columns=1 + known)
    mean, spread = plain.accuracy
    axes[0].axhspan(mean - spread, mean + spread, color=_GREY, alpha=0.12, linewidth=0.0)
    axes[0].axhline(mean, color=_GREY, linestyle="--", linewidth=1.2, label=f"all {plain.features:.0f} features")
    methods = [m for m in dict.fromkeys(s.method for s in summaries) if m != PLAIN]
    for i, method in enumerate(methods):
        mine = sorted((s for s in summaries if s.method == method), key=lambda s: s.features)
        style: dict[str, Any] = {"color": COLOURS[i], "marker": _MARKERS[i], "label": method, "linewidth": 1.8}
        aside = 1.0 + 0.04 * (i - (len(methods) - 1) / 2)  # else the bars hide each other
        features = [s.features * aside for s in mine]
        means, spreads = [s.accuracy[0] for s in mine], [s.accuracy[1] for s in mine]
        axes[0].errorbar(features, means, yerr=spreads, capsize=3, elinewidth=1.0, **style)
        if known:
            axes[1].plot(features, [s.informative for s in mine], **style)
    counts = sorted({s.features for s in summaries if s.method != PLAIN})
    axes[0].set(ylabel="test accuracy", title="mean and standard deviation over seeds")
    if known:
        of_all = sorted({(s.features, s.by_chance) for s in summaries if s.method != PLAIN})
        axes[1].plot(*zip(*of_all, strict=True), color=_GREY, linestyle=":", linewidth=1.5, label="drawn at random")
        best = [min(count, plain.informative or 0.0) for count in counts]
        axes[1].plot(counts, best, color=_GREY, linestyle="--", linewidth=1.0, label="most there can be")
        axes[1].set(ylabel="informative features among them", ylim=(0.0, None), title="mean over seeds")
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xticks(counts, labels=[f"{count:.0f}" for count in counts])
        axis.minorticks_off()
        axis.set_xlabel("features kept")
        axis.legend(frameon=False)
    _save(figure, path)


def plot_weights(weights: Mapping[str, Tensor], path: Path, *, informative: Tensor | None = None) -> None:
    """Draw the magnitudes of weights (units, features), one below the other; what is zero is white.

    Features stand in one order for all: informative ones first, where they are known, then by how large the last of
    the weights are.

    Args:
        weights: Title to weight.
        path: Of the PNG to write.
        informative: Indices of the informative features.

    Raises:
        MissingPackageError: Without matplotlib.
    """
    figure, axes = _figure(10.0, 0.6 + 2.1 * len(weights), rows=len(weights))
    reach = torch.stack([weight.abs().amax(0) for weight in weights.values()])[-1]
    reach = reach + 1e-3 * torch.stack([weight.abs().amax(0) for weight in weights.values()]).mean(0)
    if informative is not None:
        reach[informative] += 2.0 * reach.max()
    order = reach.argsort(descending=True)
    top = max(float(weight.abs().flatten().quantile(0.999)) for weight in weights.values())
    for axis, (title, weight) in zip(axes, weights.items(), strict=True):
        shown = weight.abs()[:, order].numpy()
        image = axis.imshow(shown, aspect="auto", vmin=0.0, vmax=top, interpolation="nearest", cmap="Blues")
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylabel("hidden unit")
        axis.grid(False)
        if informative is not None and len(informative) < weight.shape[1]:
            axis.axvline(len(informative) - 0.5, color=COLOURS[1], linewidth=1.2)
    for axis in axes[:-1]:
        axis.tick_params(labelbottom=False)
    text = "feature, those that stay first"
    if informative is not None:
        text = f"feature; the {len(informative)} informative ones left of the line, then those that stay first"
    axes[-1].set_xlabel(text)
    figure.colorbar(image, ax=axes, label="magnitude of the weight", fraction=0.03, extend="max")
    _save(figure, path)


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
