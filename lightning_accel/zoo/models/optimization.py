"""Optimizer and learning-rate schedule of the zoo, built from a model's hyper-parameters."""

import math
from functools import partial
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim.lr_scheduler import LambdaLR

from lightning_accel.zoo.arguments import check_choice, check_integers, check_numbers

OptimizerName = Literal["sgd", "adam", "adamw"]
ScheduleName = Literal["constant", "linear", "cosine"]

SGD_MOMENTUM = 0.9
_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")  # where torch has fused kernels of all three


def check_optimization(
    *, lr: float, optimizer: str, weight_decay: float, schedule: str = "constant", warmup_steps: int = 0
) -> None:
    """Check the hyper-parameters that `configure` reads.

    Raises:
        ValueError: If ``lr`` is not positive, ``weight_decay`` or ``warmup_steps`` is negative, or a name is unknown.
    """
    check_numbers(0.0, above=True, lr=lr)
    check_numbers(0.0, weight_decay=weight_decay)
    check_choice("optimizer", optimizer, ("sgd", "adam", "adamw"))
    check_choice("schedule", schedule, ("constant", "linear", "cosine"))
    check_integers(0, warmup_steps=warmup_steps)


def make_optimizer(module: torch.nn.Module, name: str, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return the named optimizer over all parameters of ``module``, frozen ones included, in one group.

    ``"sgd"`` runs with Nesterov momentum 0.9. All are fused, as a knowing user would have them: torch's default takes
    half of the step of a large MLP.
    """
    parameters = list(module.parameters())
    fused = all(p.device.type in _FUSED_DEVICES for p in parameters)
    if name == "sgd":
        return torch.optim.SGD(
            parameters, lr=lr, momentum=SGD_MOMENTUM, nesterov=True, weight_decay=weight_decay, fused=fused
        )
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(parameters, lr=lr, weight_decay=weight_decay, fused=fused)


def learning_rate_factor(step: int, *, schedule: str, warmup_steps: int, total_steps: float) -> float:
    """Return what the learning rate is multiplied by before optimizer step ``step`` (zero-based).

    It rises linearly over ``warmup_steps`` steps, then stays at 1 (``"constant"``) or falls to 0 at ``total_steps``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps))
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def configure(module: LightningModule) -> OptimizerLRScheduler:
    """Return what ``configure_optimizers`` of a zoo model returns.

    Reads the hyper-parameters ``lr``, ``optimizer``, ``weight_decay``, ``schedule`` and ``warmup_steps``. The horizon
    of a falling schedule is the Trainer's number of optimizer steps, so it is not part of the checkpoint.

    Raises:
        ValueError: If a falling schedule is wanted in a Trainer without an end.
    """
    hparams = module.hparams
    optimizer = make_optimizer(module, hparams["optimizer"], lr=hparams["lr"], weight_decay=hparams["weight_decay"])
    schedule, warmup_steps = hparams["schedule"], hparams["warmup_steps"]
    if schedule == "constant" and warmup_steps == 0:
        return optimizer
    total_steps = math.inf if schedule == "constant" else module.trainer.estimated_stepping_batches
    if schedule != "constant" and math.isinf(total_steps):
        raise ValueError(
            f"`schedule={schedule!r}` needs an end, got a Trainer without one. Set `max_epochs` or `max_steps`, or use "
            "`schedule='constant'`."
        )
    # A partial of a module's function, unlike a closure, can be pickled; LambdaLR stores none of its arguments.
    factor = partial(learning_rate_factor, schedule=schedule, warmup_steps=warmup_steps, total_steps=total_steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}
