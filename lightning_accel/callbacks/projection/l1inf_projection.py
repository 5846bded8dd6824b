"""l1,inf projection as a Lightning callback."""

import os
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override

from lightning_accel.callbacks.order import correct_order
from lightning_accel.callbacks.projection.arguments import check_kinds, dimensions, rewind_source, words
from lightning_accel.callbacks.projection.projected_training import Mode, ProjectedTraining, Timing, selection
from lightning_accel.projection.kernels.compiled import Compile
from lightning_accel.projection.multilevel import Method, Nonfinite
from lightning_accel.projection.training.ball_specification import Ball, Scope
from lightning_accel.projection.training.ramp import Curve, Ramp


class L1InfProjection(pl.Callback):
    """Keep parameters in the l1,inf ball while they train, which clears whole rows or columns of them.

    The l1,inf case of `MultilevelProjection`: behaviour, logs (under ``l1inf_projection/``) and all arguments but
    ``method`` are explained there.

    Args:
        radius: Sum over the groups of the largest magnitude in each, >= 0.
        radius_fraction: See `MultilevelProjection`.
        target_sparsity: See `MultilevelProjection`.
        parameters: See `MultilevelProjection`.
        module_types: See `MultilevelProjection`.
        groups: See `MultilevelProjection`.
        num_heads: See `MultilevelProjection`.
        method: ``"bilevel"``, or ``"exact"`` for the nearest point, see `lightning_accel.projection.project_l1inf`.
        scope: See `MultilevelProjection`.
        schedule: See `MultilevelProjection`.
        start_step: See `MultilevelProjection`.
        end_step: See `MultilevelProjection`.
        every_n_steps: See `MultilevelProjection`.
        every_n_epochs: See `MultilevelProjection`.
        at_end: See `MultilevelProjection`.
        mode: See `MultilevelProjection`.
        retrain_epoch: See `MultilevelProjection`.
        rewind: See `MultilevelProjection`.
        freeze_zero_groups: See `MultilevelProjection`.
        nonfinite: See `MultilevelProjection`.
        compile: See `MultilevelProjection`.

    Attributes:
        projections: Optimizer steps that were followed by a projection; equals ``trainer.global_step`` where all
            optimizers own some of the parameters and every step is projected.

    Raises:
        TypeError: As `MultilevelProjection`.
        ValueError: As `MultilevelProjection`.
        MisconfigurationException: As `MultilevelProjection`.

    References:
        Perez, Barlaud, arXiv:2407.16293 (bi-level), arXiv:2307.09836 (exact). *Deviations*: see
        `lightning_accel.projection`.
    """

    def __init__(
        self,
        radius: float | None = None,
        *,
        radius_fraction: float | None = None,
        target_sparsity: float | None = None,
        parameters: str | Sequence[str] = "*weight",
        module_types: str | Sequence[str] | None = ("Linear", "Conv1d", "Conv2d", "Conv3d"),
        groups: str | Sequence[int] = "rows",
        num_heads: int | None = None,
        method: Method = "bilevel",
        scope: Scope = "parameter",
        schedule: Curve = "constant",
        start_step: int = 0,
        end_step: int | None = None,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        at_end: bool = False,
        mode: Mode = "project",
        retrain_epoch: int | None = None,
        rewind: str | os.PathLike[str] = "none",
        freeze_zero_groups: bool = False,
        nonfinite: Nonfinite = "raise",
        compile: Compile = "auto",
    ) -> None:
        check_kinds(
            numbers={"radius": radius, "radius_fraction": radius_fraction, "target_sparsity": target_sparsity},
            counts={"start_step": start_step},
            optional_counts={
                "num_heads": num_heads,
                "end_step": end_step,
                "every_n_steps": every_n_steps,
                "every_n_epochs": every_n_epochs,
                "retrain_epoch": retrain_epoch,
            },
            switches={"at_end": at_end, "freeze_zero_groups": freeze_zero_groups},
        )
        parameters = words("parameters", parameters, "a shell pattern of parameter names, such as '*weight'")
        if module_types is not None:
            module_types = words("module_types", module_types, "a class name, such as 'Linear'; None stands for any")
        groups = groups if isinstance(groups, str) else dimensions("groups", groups)
        rewind = rewind_source(rewind)
        ramp = Ramp(schedule, start_step, end_step)
        ball = Ball(
            radius=radius,
            radius_fraction=radius_fraction,
            target_sparsity=target_sparsity,
            method=method,
            scope=scope,
            nonfinite=nonfinite,
        )
        self._run = ProjectedTraining(
            type(self).__name__,
            selection(parameters, module_types, groups, num_heads),
            Timing(every_n_steps, every_n_epochs, at_end, mode, retrain_epoch, rewind, ramp != Ramp()),
            ball,
            ramp,
            freeze_zero_groups,
            compile,
        )

    @property
    @override
    def state_key(self) -> str:
        """Tell several callbacks of this class apart."""
        return self._run.state_key

    @property
    def projections(self) -> int:
        """Optimizer steps that were followed by a projection."""
        return self._run.projections

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Put the callbacks in order and refuse strategies that take parameters apart."""
        if stage == "fit":
            self._run.refuse_strategies(trainer.strategy)
            correct_order(trainer)

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Find the parameters and watch the optimizers."""
        self._run.start(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Begin retraining where it is due."""
        self._run.at_epoch_start(trainer, pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: torch.optim.Optimizer
    ) -> None:
        """Count steps that a gradient scaler then skips."""
        self._run.before_step(trainer, optimizer)

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", *_: Any) -> None:
        """Project at the end of an epoch where that is due."""
        self._run.at_batch_end(trainer)

    @override
    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Project averaged weights before they are swapped in."""
        self._run.swap_in_averages(trainer)

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Let averages go on as they were."""
        self._run.swap_out_averages()

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Log how sparse the parameters are."""
        self._run.log(pl_module.log_dict, "l1inf_projection")

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Leave feasible weights."""
        self._run.at_end(trainer)

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Stop watching the optimizers."""
        self._run.stop()

    def on_structure_change(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: Any) -> None:
        """Find the parameters anew after layers were exchanged."""
        self._run.change_layers(trainer, pl_module)

    @override
    def on_save_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Put projected averages into the checkpoint."""
        self._run.save(trainer, checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Take averages up as they were."""
        self._run.load(trainer, checkpoint)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return counts, masks and what later projections start from."""
        return self._run.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._run.load_state_dict(state_dict)
