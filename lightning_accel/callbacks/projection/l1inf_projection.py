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

    The l1,inf case of `MultilevelProjection`: behaviour, checkpoints, logs (under ``l1inf_projection/``) and all
    arguments but ``method`` are explained there.

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
        min_groups: See `MultilevelProjection`.
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
