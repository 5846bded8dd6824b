"""Which parameters would be kept in a ball of nested norms, and what that takes."""

import contextlib
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from rich.table import Table

from lightning_accel.callbacks.projection.l1inf_projection import L1InfProjection
from lightning_accel.callbacks.projection.multilevel_projection import MultilevelProjection
from lightning_accel.callbacks.projection.timing import Timing
from lightning_accel.cli.errors import UsageError
from lightning_accel.cli.plan import Scene
from lightning_accel.measure import time_interleaved, undisturbed
from lightning_accel.projection.balls.norm_pyramid import check_levels, fibre_norms, pyramid
from lightning_accel.projection.training.ball_specification import Ball
from lightning_accel.projection.training.output_layers import OutputLayers
from lightning_accel.projection.training.projector import Projector
from lightning_accel.projection.training.targets import Target

_ROUNDS = 7  # timed projections, after one that is not


@contextlib.contextmanager
def watch(module: LightningModule, _: Mapping[str, object]) -> Iterator[OutputLayers]:
    """Watch which layers write the output, for as long as a step goes on."""
    seen = OutputLayers(module)
    try:
        yield seen
    finally:
        seen.close()


def sketch(scene: Scene) -> None:
    """Print the table of `show`.

    Raises:
        UsageError: If no parameter fits, or one holds NaN or infinity.
    """
    show(scene, "multilevel_projection", MultilevelProjection(**scene.settings))


@dataclass(frozen=True)
class Row:
    """What one projection of a parameter as it is now would do.

    Attributes:
        name: Of the parameter.
        shape: Of the parameter, as it is viewed.
        groups: How many it has.
        norm: Before; in the unit of the parameter.
        norm_after: The radius of its ball, where the norm was above it.
        zero_groups: Groups that are zero afterwards.
    """

    name: str
    shape: tuple[int, ...]
    groups: int
    norm: float
    norm_after: float
    zero_groups: int


def show(scene: Scene, name: str, callback: L1InfProjection | MultilevelProjection) -> None:
    """Print what a full projection would do to each parameter now, and the milliseconds of one.

    Args:
        scene: The model as it starts to train.
        name: Of the callback in the configuration.
        callback: Tells which parameters, which ball and when.

    Raises:
        UsageError: If no parameter fits, or one holds NaN or infinity.
    """
    run = callback._run
    try:
        run.start(scene.trainer, scene.module)
        assert run.projector is not None
        if scene.seen is not None:
            run.roles.adopt(scene.seen)
            run.projector.targets = run.roles.sort_out(scene.trainer, scene.module, scene.loss)
        alone = dict(run.roles.alone)
        run.stop()
        if not run.projector.targets:
            reasons = ", ".join(f"{name} {why}" for name, why in alone.items())
            raise MisconfigurationException(f"nothing would be projected: {reasons}. Name it in `parameters`.")
        projector = Projector(run.projector.targets, run.ball)
        with undisturbed(scene.module):
            rows, milliseconds = _project(projector)
    except (MisconfigurationException, ValueError) as error:
        raise UsageError(f"`callbacks.{name}`: {error}") from error
    table = Table()
    table.add_column("parameter", overflow="fold")  # a name that is cut short is of no use in `parameters`
    for column in ("shape", "groups", "norm", "radius", "zero groups"):
        table.add_column(column, justify="right", no_wrap=True)
    together = run.ball.scope == "global"
    for row in rows:
        radius = "shared" if together else f"{_radius(run.ball, row):.4g}"
        table.add_row(
            row.name,
            "x".join(map(str, row.shape)),
            str(row.groups),
            f"{row.norm:.4g}",
            radius,
            _part(row.zero_groups, row),
        )
    whole = Row(
        "all",
        (),
        sum(row.groups for row in rows),
        sum(row.norm for row in rows),
        sum(row.norm_after for row in rows),
        sum(row.zero_groups for row in rows),
    )
    radius = f"{_radius(run.ball, whole):.4g}" if together else ""
    norm = f"{whole.norm:.4g}" if together else ""
    table.add_row("all", "", str(whole.groups), norm, radius, _part(whole.zero_groups, whole), style="bold")
    scene.console.print(table)
    lines = [
        f"{_size(run.ball)}; zero groups are those after one full projection of the weights as they are now.",
        f"One projection of all takes {milliseconds:.3f} ms here, {_when(run.timing)}.",
    ]
    cleared = [row.name for row in rows if row.zero_groups == row.groups]
    if alone:
        lines.append("Left alone: " + ", ".join(f"{name} ({why})" for name, why in alone.items()) + ".")
    if cleared:
        lines.append(f"Nothing would be left of {', '.join(cleared)}: leave it out of `parameters`, or ask for less.")
    for line in lines:
        scene.console.print(line, markup=False, soft_wrap=True)


@torch.no_grad()
def _project(projector: Projector) -> tuple[list[Row], float]:
    """Project once for the rows, and again from the same weights for the median of the milliseconds."""
    targets, ball = projector.targets, projector.ball
    weights = [target.view().clone() for target in targets]
    projector.remember_first_norms()
    norms = [_norm(target, ball) for target in targets]
    projector.project(1)
    rows = [
        Row(target.name, target.shape, len(tops), norm, _norm(target, ball), int((tops == 0).sum()))
        for target, norm in zip(targets, norms, strict=True)
        for tops in [_largest(target)]
    ]
    seconds: list[float] = []
    for _ in range(_ROUNDS):
        for target, weight in zip(targets, weights, strict=True):
            target.view().copy_(weight)
        timed = time_interleaved({"": lambda: projector.project(1)}, rounds=1, warmup=0, device=weights[0].device)
        seconds += timed[""]
    return rows, 1e3 * statistics.median(seconds)


def _norm(target: Target, ball: Ball) -> float:
    x = target.view()
    tops = pyramid(x, check_levels(ball.norms, ball.dims or (target.group_dims, target.rest_dims), x.ndim), x).tops()
    return float(fibre_norms(tops, ball.norms[0], (0,)))


def _largest(target: Target) -> torch.Tensor:
    """Return the largest magnitude of each group, flat."""
    x = target.view().abs()
    return (x.amax(target.rest_dims) if target.rest_dims else x).flatten()


def _radius(ball: Ball, row: Row) -> float:
    """Return the radius that was asked for; of a sparsity, the norm that it left."""
    if ball.radius is not None:
        return ball.radius
    return row.norm_after if ball.radius_fraction is None else ball.radius_fraction * row.norm


def _size(ball: Ball) -> str:
    budget = "one budget over all" if ball.scope == "global" else "a ball for each parameter"
    if ball.radius is not None:
        return f"Radius {ball.radius:g}, {budget}"
    if ball.radius_fraction is not None:
        return f"Radius {ball.radius_fraction:g} of the norm at the start, {budget}"
    return f"Target sparsity {ball.target_sparsity:g}, {budget}; its radius follows the weights"


def _when(timing: Timing) -> str:
    if timing.mode == "project_then_retrain":
        return f"once, when epoch {timing.retrain_epoch} begins"
    if timing.at_end:
        return "once, when training ends"
    if timing.every_n_epochs is not None:
        return f"at the end of every {_nth(timing.every_n_epochs)}epoch"
    return f"after every {_nth(timing.every_n_steps or 1)}optimizer step"


def _nth(n: int) -> str:
    return "" if n == 1 else "2nd " if n == 2 else f"{n}-th "


def _part(count: int, row: Row) -> str:
    return f"{count} ({count / max(row.groups, 1):.1%})"
