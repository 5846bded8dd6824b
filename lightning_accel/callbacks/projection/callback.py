"""The hooks of both projection callbacks."""

import os
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_accel.callbacks.order import correct_order
from lightning_accel.callbacks.projection.arguments import check_kinds, dimensions, levels, rewind_source, words
from lightning_accel.callbacks.projection.projected_training import ProjectedTraining
from lightning_accel.callbacks.projection.selection import Selection
from lightning_accel.callbacks.projection.timing import Mode, Timing, ramp_of
from lightning_accel.projection.kernels.compiled import Compile
from lightning_accel.projection.multilevel import Method, Nonfinite
from lightning_accel.projection.training.ball_specification import DEFAULT_TARGET_SPARSITY, Ball, Scope
from lightning_accel.projection.training.ramp import Curve


class ProjectionCallback(pl.Callback):
    """Keep parameters in a ball while they train; see `MultilevelProjection`, which also explains the arguments."""

    _prefix: str  # of what is logged

    def __init__(
        self,
        *,
        radius: float | None,
        radius_fraction: float | None,
        target_sparsity: float | None,
        parameters: str | Sequence[str] | None,
        module_types: str | Sequence[str] | None,
        groups: str | Sequence[int],
        num_heads: int | None,
        norms: Sequence[str],
        dims: Sequence[Sequence[int]] | None,
        method: Method,
        scope: Scope,
        min_groups: int,
        schedule: Curve | None,
        start_step: int,
        end_step: int | None,
        every_n_steps: int | None,
        every_n_epochs: int | None,
        at_end: bool,
        mode: Mode,
        retrain_epoch: int | None,
        rewind: str | os.PathLike[str],
        freeze_zero_groups: bool | None,
        nonfinite: Nonfinite,
        compile: Compile,
    ) -> None:
        sizes = {"radius": radius, "radius_fraction": radius_fraction, "target_sparsity": target_sparsity}
        check_kinds(
            numbers=sizes,
            counts={"start_step": start_step, "min_groups": min_groups},
            optional_counts={
                "num_heads": num_heads,
                "end_step": end_step,
                "every_n_steps": every_n_steps,
                "every_n_epochs": every_n_epochs,
                "retrain_epoch": retrain_epoch,
            },
            switches={"at_end": at_end},
            optional_switches={"freeze_zero_groups": freeze_zero_groups},
        )
        if all(size is None for size in sizes.values()):
            target_sparsity = DEFAULT_TARGET_SPARSITY
        ball = Ball(
            radius=radius,
            radius_fraction=radius_fraction,
            target_sparsity=target_sparsity,
            norms=words("norms", norms, "a level, from the outermost in"),  # type: ignore[arg-type]  # checked in `Ball`
            dims=None if dims is None else levels(dims),
            method=method,
            scope=scope,
            nonfinite=nonfinite,
            min_groups=min_groups,
        )
        grouped = groups if isinstance(groups, str) else dimensions("groups", groups)
        if ball.dims is not None and (not isinstance(grouped, str) or grouped in ("rows", "columns")):
            grouped = ball.dims[0]  # what a projection clears, and what is counted
        sparse, once = target_sparsity is not None, at_end or mode == "project_then_retrain"
        ramp, over_fit = ramp_of(schedule, start_step, end_step, sparse=sparse, once=once)
        frozen = (sparse and ramp.curve != "constant") if freeze_zero_groups is None else freeze_zero_groups
        self._run = ProjectedTraining(
            type(self).__name__,
            Selection(
                None
                if parameters is None
                else words("parameters", parameters, "a shell pattern of parameter names, such as '*weight'"),
                None
                if module_types is None
                else words("module_types", module_types, "a class name, such as 'Linear'; None stands for any"),
                grouped,
                num_heads,
            ),
            Timing(every_n_steps, every_n_epochs, at_end, mode, retrain_epoch, rewind_source(rewind), ramp, over_fit),
            ball,
            frozen,
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
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Take up a state that was restored late, and say what this fit is too short for."""
        self._run.begin_training(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Begin retraining where it is due."""
        self._run.at_epoch_start(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: Any) -> None:
        """Watch the layers, as long as it is not known which of them write the model's output."""
        self._run.at_batch_start(trainer, pl_module)

    @override
    def on_before_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loss: Tensor) -> None:
        """Find the layers that write the model's output."""
        self._run.before_backward(trainer, pl_module, loss)

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: torch.optim.Optimizer
    ) -> None:
        """Count steps that a gradient scaler then skips."""
        self._run.before_step(trainer, optimizer)

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", *_: Any) -> None:
        """Project at the end of an epoch or of the fit where that is due."""
        self._run.at_batch_end(trainer)

    @override
    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Project averaged weights before they are swapped in."""
        self._run.swap_in_averages(trainer)

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Let averages go on as they were; leave feasible weights where the fit ends here."""
        self._run.swap_out_averages()
        self._run.finish(trainer)

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Leave feasible weights where the fit ends here, and log how sparse the parameters are."""
        self._run.finish(trainer)
        self._run.log(trainer, pl_module.log_dict, self._prefix)

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
        self._run.save(trainer, pl_module, checkpoint)

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
