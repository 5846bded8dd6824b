"""Multi-level projection as a Lightning callback."""

import os
from collections.abc import Sequence

from lightning_accel.callbacks.projection.callback import ProjectionCallback
from lightning_accel.callbacks.projection.timing import Mode
from lightning_accel.projection.kernels.compiled import Compile
from lightning_accel.projection.multilevel import Nonfinite
from lightning_accel.projection.training.ball_specification import Scope
from lightning_accel.projection.training.ramp import Curve


class MultilevelProjection(ProjectionCallback):
    """Keep parameters in a ball of nested norms while they train, which clears whole groups of them.

    Without arguments it clears half of the rows (neurons, channels) of every hidden layer: none in the first tenth of
    the fit, in which the network learns, more and more until six tenths are over, and none after that, so that what is
    left recovers. In this rise of its own choice it clears the groups that the projection would clear and leaves all
    others as they are, as the papers keep no more than the zeros of theirs: again and again cut down to the ball, those
    that stay could not recover in time. With a ``schedule``, a step or a radius it projects. Cleared rows stay cleared.
    Layers that write the model's output are left alone; which they are is read off the autograd graph of the first
    training steps, not off their names.

    Projects after the optimizer's own step (a post-step hook), so it is right under accumulation, manual optimization,
    several optimizers and skipped steps. DDP needs no communication, shards of FSDP2 only the group norms. Parameters
    that are frozen are left alone until they are thawed; lazy ones join when they have a shape. The state resumes
    exactly.

    A checkpoint holds the weights as they are trained then: projected where a projection is due after every step, with
    ``every_n_steps`` and ``every_n_epochs`` as the last projection and the steps since have left them, with ``at_end``
    unprojected. In every mode the last checkpoint of a fit (``last.ckpt``) and what ``trainer.save_checkpoint`` writes
    after it hold the projected weights. Averages of weights (`WeightAveraging`, `StochasticWeightAveraging`) are
    thinned out to as many zero groups before they are used in validation, saved or left in the module.

    One line says what is projected and what is left alone; one warning, with the numbers, what a fit was too short for.
    Logs, at ends of epochs that are the Trainer's ``log_every_n_steps`` or more apart, at the first and the last one,
    ``multilevel_projection/zero_groups`` and ``zero_entries``, and for each parameter ``multilevel_projection/<name>/``
    ``zero_groups``, ``zero_entries``, ``norm`` (before the last projection) and ``tau``. Remove the zeros with
    `lightning_accel.projection.shrink`. For the l1,inf ball alone see `L1InfProjection`.

    Args:
        radius: Bound on the nested norm of each weight, >= 0, as in `lightning_accel.projection.project_multilevel`.
            Give at most one of the three sizes.
        radius_fraction: Radius over the norm at the start of training, in [0, 1].
        target_sparsity: Fraction of the groups to clear, in [0, 1]; 0.5 where no size is given.
        parameters: Shell pattern(s) of parameter names, output layers among them if they fit; by default the weights
            of hidden layers.
        module_types: Class names of the modules that own them; None for any.
        groups: ``"rows"`` (output neurons, channels), ``"columns"`` (input features, channels), ``"heads"``, or the
            dimensions that number the groups.
        num_heads: Attention heads, where the module does not say.
        norms: Levels from the outermost in, see `project_multilevel`.
        dims: Dimensions of each level; by default ``groups`` outside and the rest inside.
        scope: ``"parameter"``: a ball for each parameter; ``"global"``: one budget over all.
        min_groups: Groups of each parameter that stay whatever the size asks for, >= 0; 0 lets layers be cleared whole.
        schedule: ``"constant"``, or a ``"linear"`` or ``"cubic"`` rise to the full projection. By default the cubic
            rise over the fit that is described above, for a ``target_sparsity`` without ``start_step`` and
            ``end_step``; cubic with an ``end_step``; constant otherwise.
        start_step: Optimizer steps before the first projection, >= 0.
        end_step: Optimizer step from which on the projection is full.
        every_n_steps: Project after every n-th optimizer step; 1 unless another time is given.
        every_n_epochs: Project at the end of every n-th epoch instead.
        at_end: Project once, when training ends, instead.
        mode: ``"project"``; or ``"project_then_retrain"``: train, project once, keep all zeros, train on.
        retrain_epoch: Epoch (from 0) that begins with that projection.
        rewind: What the surviving weights go back to then: ``"none"``, ``"init"``, or the path of a checkpoint.
            Optimizer states start anew; schedules of the learning rate go on.
        freeze_zero_groups: Never let a cleared group come back; by default so for a ``target_sparsity`` that rises, and
            only then. With a constant schedule the initial weights would choose the groups.
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
        Perez, Barlaud, arXiv:2405.02086; Zhu, Gupta, arXiv:1710.01878 (the cubic rise). *Deviations*: see
        `lightning_accel.projection`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_accel import MultilevelProjection
        >>> from lightning_accel.zoo import MLP, Digits
        >>> off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
        >>> trainer = Trainer(max_epochs=1, limit_train_batches=4, accelerator="cpu", **dict.fromkeys(off, False),
        ...                   callbacks=[MultilevelProjection(target_sparsity=0.5)])
        >>> trainer.fit(MLP(width=16, depth=2), Digits())
    """

    _prefix = "multilevel_projection"

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
        norms: Sequence[str] = ("l1", "linf"),
        dims: Sequence[Sequence[int]] | None = None,
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
            norms=norms,
            dims=dims,
            method="bilevel",
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
