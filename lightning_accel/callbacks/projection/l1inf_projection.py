"""l1,inf projection as a Lightning callback."""

import os
from collections.abc import Sequence

from lightning_accel.callbacks.projection.callback import ProjectionCallback
from lightning_accel.callbacks.projection.timing import Mode
from lightning_accel.projection.kernels.compiled import Compile
from lightning_accel.projection.multilevel import Method, Nonfinite
from lightning_accel.projection.training.ball_specification import Scope
from lightning_accel.projection.training.ramp import Curve


class L1InfProjection(ProjectionCallback):
    """Keep parameters in the l1,inf ball while they train, which clears whole rows or columns of them.

    The l1,inf case of `MultilevelProjection`: behaviour, checkpoints, logs (under ``l1inf_projection/``) and its
    arguments are explained there at length.

    Args:
        radius: Sum over the groups of the largest magnitude in each, >= 0.
        radius_fraction: Radius over the norm at the start of training, in [0, 1].
        target_sparsity: Fraction of the groups to clear, in [0, 1]; 0.5 where no size is given.
        parameters: Shell pattern or patterns of parameter names; the weights of hidden layers if None.
        module_types: Class names of the modules that own them; any if None.
        groups: ``"rows"`` (outputs), ``"columns"`` (inputs), ``"heads"``, or the dimensions that number the groups.
        num_heads: Attention heads, for ``groups="heads"`` where the module does not say.
        method: ``"bilevel"``, or ``"exact"`` for the nearest point, see `lightning_accel.projection.project_l1inf`.
        scope: ``"parameter"``: a ball for each; ``"global"``: one budget over all.
        min_groups: Groups of each parameter that stay whatever the size; 0 lets a layer be cleared whole.
        schedule: How the target rises: ``"constant"``, ``"linear"`` or ``"cubic"``; chosen with the target if None.
        start_step: Optimizer steps before the first projection.
        end_step: Optimizer step of the full projection.
        every_n_steps: Optimizer steps between projections; 1 unless another time is given.
        every_n_epochs: Epochs between projections.
        at_end: Whether to project when training ends, and only then.
        mode: ``"project"``, or ``"project_then_retrain"`` with the survivors alone.
        retrain_epoch: Epoch (from 0) that begins with the projection, for ``mode="project_then_retrain"``.
        rewind: What survivors go back to then: ``"none"``, ``"init"``, or the path of a checkpoint.
        freeze_zero_groups: Whether a cleared group never comes back; if None, where a target sparsity rises.
        nonfinite: ``"raise"``, or ``"skip"`` parameters that hold NaN or infinity.
        compile: True compiles at once, ``"auto"`` when it has paid, False never.

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

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_accel import L1InfProjection
        >>> from lightning_accel.zoo import MLP, Digits
        >>> off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
        >>> trainer = Trainer(max_epochs=1, limit_train_batches=4, accelerator="cpu", **dict.fromkeys(off, False),
        ...                   callbacks=[L1InfProjection(target_sparsity=0.5)])
        >>> trainer.fit(MLP(width=16, depth=2), Digits())
    """

    _prefix = "l1inf_projection"

    def __init__(
        self,
        radius: float | None = None,
        *,
        radius_fraction: float | None = None,
        target_sparsity: float | None = None,
        parameters: str | Sequence[str] | None = None,
        module_types: str | Sequence[str] | None = ("Linear", "Conv1d", "Conv2d", "Conv3d"),
        groups: str | Sequence[int] = "rows",
        num_heads: int | None = None,
        method: Method = "bilevel",
        scope: Scope = "parameter",
        min_groups: int = 1,
        schedule: Curve | None = None,
        start_step: int = 0,
        end_step: int | None = None,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        at_end: bool = False,
        mode: Mode = "project",
        retrain_epoch: int | None = None,
        rewind: str | os.PathLike[str] = "none",
        freeze_zero_groups: bool | None = None,
        nonfinite: Nonfinite = "raise",
        compile: Compile = "auto",
    ) -> None:
        super().__init__(
            radius=radius,
            radius_fraction=radius_fraction,
            target_sparsity=target_sparsity,
            parameters=parameters,
            module_types=module_types,
            groups=groups,
            num_heads=num_heads,
            norms=("l1", "linf"),
            dims=None,
            method=method,
            scope=scope,
            min_groups=min_groups,
            schedule=schedule,
            start_step=start_step,
            end_step=end_step,
            every_n_steps=every_n_steps,
            every_n_epochs=every_n_epochs,
            at_end=at_end,
            mode=mode,
            retrain_epoch=retrain_epoch,
            rewind=rewind,
            freeze_zero_groups=freeze_zero_groups,
            nonfinite=nonfinite,
            compile=compile,
        )
