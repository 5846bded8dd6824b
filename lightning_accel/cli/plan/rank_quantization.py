"""The ranks that would be chosen, with what was measured for every layer."""

import dataclasses
import inspect
import os
from typing import Any

from rich.table import Table
from torch import nn

from lightning_accel.cli.errors import UsageError
from lightning_accel.cli.plan import Scene
from lightning_accel.evidence.plots import MissingPackageError, plot_rank_plan
from lightning_accel.low_rank import RankPlan, make_plan
from lightning_accel.low_rank.plan import LayerPlan
from lightning_accel.low_rank.rank_search.timing import default_cache_dir
from lightning_accel.measure import undisturbed


def sketch(scene: Scene) -> None:
    """Print the rank table and write ``rank_plan.json`` (for ``plan=`` of the callback) and ``rank_plan.png``.

    Raises:
        UsageError: If a setting is out of range or no layer can be factored.
    """
    known = inspect.signature(make_plan).parameters
    settings = {name: value for name, value in scene.settings.items() if name in known and value is not None}
    if not {"ratio", "energy", "speedup"} & settings.keys():
        settings["ratio"] = 2.0
    settings.setdefault("cache_dir", default_cache_dir())
    context = scene.trainer.precision_plugin.train_step_context

    def run_batch(module: nn.Module) -> None:
        with context():
            scene.inputs.replay(module)

    try:
        with undisturbed(scene.module):
            ranks = make_plan(scene.module, run_batch, **settings)
    except ValueError as error:
        raise UsageError(f"`callbacks.rank_quantization`: {error}") from error
    scene.console.print(rank_table(ranks))
    for layer in ranks.layers:
        if layer.ranks is None:
            scene.console.print(f"{layer.name}: {layer.reason}", markup=False, style="dim", soft_wrap=True)
    before, after = ranks.parameters_before, ranks.parameters_after
    speed = f", {ranks.predicted_speedup:.2f} times faster by single layers" if ranks.predicted_speedup else ""
    scene.console.print(
        f"{before:,} -> {after:,} weights, {ranks.energy:.1%} of the energy{speed}.", markup=False, soft_wrap=True
    )
    scene.console.print(
        "Whether whole training steps become faster is tried when training starts.", markup=False, soft_wrap=True
    )
    path = scene.folder / "rank_plan.json"
    ranks.save(path)
    again = os.path.relpath(path)
    scene.console.print(
        f"Use it as it is: callbacks=[rank_quantization] callbacks.rank_quantization.plan={again}",
        markup=False,
        soft_wrap=True,
    )
    try:
        plot_rank_plan(drawable(ranks), scene.folder / "rank_plan.png")
    except (MissingPackageError, ValueError) as error:
        scene.console.print(f"No picture: {error}", markup=False, style="dim", soft_wrap=True)


def rank_table(plan: RankPlan) -> Table:
    """Return a row a layer: what it is, what was chosen, and what that keeps and takes."""
    table = Table("layer", "shape", "ranks", "energy", "dense ms", "low-rank ms", "decision")
    for layer in plan.layers:
        table.add_row(
            layer.name,
            "x".join(map(str, layer.shape)),
            "-" if layer.ranks is None else "x".join(map(str, layer.ranks)),
            "-" if layer.ranks is None else f"{layer.energy:.1%}",
            _ms(layer.dense_ms),
            _ms(layer.low_rank_ms),
            layer.decision,
            style="bold" if layer.decision == "low rank" else "dim" if layer.decision == "skipped" else None,
        )
    return table


def drawable(plan: RankPlan) -> dict[str, Any]:
    """Return the plan as `plot_rank_plan` takes it: measured candidates only, equal layers together."""
    alike: dict[object, list[LayerPlan]] = {}
    for layer in plan.layers:
        times = tuple((candidate.ranks, candidate.ms) for candidate in layer.candidates)
        alike.setdefault((layer.kind, layer.shape, layer.input_shape, layer.ranks, times), []).append(layer)
    return {"layers": [_drawable(layers[0], len(layers) - 1) for layers in alike.values()]}


def _drawable(layer: LayerPlan, more: int) -> dict[str, Any]:
    candidates = [
        {"rank": list(candidate.ranks), "ms": candidate.ms, "energy": candidate.energy}
        for candidate in layer.candidates
        if candidate.ms is not None
    ]
    rank = None if layer.ranks is None else list(layer.ranks)
    name = f"{layer.name}{f' and {more} more' if more else ''}: {' x '.join(map(str, layer.shape))}"
    return {**dataclasses.asdict(layer), "name": name, "rank": rank, "candidates": candidates}


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
