"""Multi-level projection as a Lightning callback."""

import os
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override

from lightning_accel.callbacks.order import correct_order
from lightning_accel.callbacks.projection.arguments import check_kinds, dimensions, levels, rewind_source, words
from lightning_accel.callbacks.projection.projected_training import Mode, ProjectedTraining, Timing, selection
from lightning_accel.projection.kernels.compiled import Compile
from lightning_accel.projection.multilevel import Nonfinite
from lightning_accel.projection.training.ball_specification import Ball, Scope
from lightning_accel.projection.training.ramp import Curve, Ramp


class MultilevelProjection(pl.Callback):
    """Keep parameters in a ball of nested norms while they train, which clears whole groups of them.

    Projects after the optimizer's own step (a post-step hook), so it is right under accumulation, manual optimization,
    several optimizers and skipped steps, and checkpoints are feasible. DDP needs no communication, shards of FSDP2 only
    the group norms. Averages of weights (`WeightAveraging`, `StochasticWeightAveraging`) are thinned out to as many
    zero groups before they are swapped in. The state resumes exactly.

    Logs, at the end of each epoch and for each parameter, ``multilevel_projection/<name>/`` ``zero_groups``,
    ``zero_entries``, ``norm`` (before the last projection) and ``tau``; remove the zeros with
    `lightning_accel.projection.shrink.shrink`. For the l1,inf ball alone see `L1InfProjection`.

    Args:
        radius: See `lightning_accel.projection.project_multilevel`. Give one of the three sizes.
        radius_fraction: Radius over the norm at the start of training, in [0, 1].
        target_sparsity: Fraction of the groups to clear, in [0, 1].
        parameters: Shell pattern(s) of parameter names.
        module_types: Class names of the modules that own them; None for any.
        groups: ``"rows"`` (output neurons, channels), ``"columns"`` (input features, channels), ``"heads"``, or the
            dimensions that number the groups.
        num_heads: Attention heads, where the module does not say.
        norms: Levels from the outermost in, see `project_multilevel`.
        dims: Dimensions of each level; by default ``groups`` outside and the rest inside.
        scope: ``"parameter"``: a ball for each parameter; ``"global"``: one budget over all.
        schedule: ``"constant"``, or a ``"linear"`` or ``"cubic"`` rise to the full projection.
        start_step: Optimizer steps before the first projection, >= 0.
        end_step: Optimizer step from which on the projection is full.
        every_n_steps: Project after every n-th optimizer step; 1 unless another time is given.
        every_n_epochs: Project at the end of every n-th epoch instead.
        at_end: Project once, when training ends, instead.
        mode: ``"project"``; or ``"project_then_retrain"``: train, project once, keep all zeros, train on.
        retrain_epoch: Epoch (from 0) that begins with that projection.
        rewind: What the surviving weights go back to then: ``"none"``, ``"init"``, or the path of a checkpoint.
            Optimizer states start anew; schedules of the learning rate go on.
        freeze_zero_groups: Never let a cleared group come back. What the first projection clears is then gone for good:
            give a ``schedule`` or a ``start_step`` with it, else the initial weights choose the groups.
        nonfinite: ``"raise"`` or ``"skip"`` where a parameter holds NaN or infinity.
        compile: As in `lightning_accel.projection.project_l1inf`.

    Attributes:
        projections: Optimizer steps that were followed by a projection; equals ``trainer.global_step`` where all
            optimizers own some of the parameters and every step is projected.

    Raises:
        TypeError: If a value is of another kind, such as text for a number.
        ValueError: If a value is out of range or values exclude each other; in ``fit``, for NaN and infinity.
        MisconfigurationException: When ``fit`` starts: no trained parameter fits, FSDP1 or DeepSpeed.

    References:
        Perez, Barlaud, arXiv:2405.02086. *Deviations*: see `lightning_accel.projection`.
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
        norms: Sequence[str] = ("l1", "linf"),
        dims: Sequence[Sequence[int]] | None = None,
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
            norms=words("norms", norms, "a level, from the outermost in"),  # type: ignore[arg-type]  # checked in `Ball`
            dims=None if dims is None else levels(dims),
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
        self._run.log(pl_module.log_dict, "multilevel_projection")

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
