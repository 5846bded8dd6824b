"""The gradients of a training step of manual optimization on a copy of the module."""

import lightning.pytorch as pl
from torch import Tensor

from lightning_accel.callbacks.layer_exchange.step_by_hand import step_by_hand
from lightning_accel.callbacks.layer_exchange.step_trial import StepTrial


def manual_step(trial: StepTrial, trainer: "pl.Trainer") -> dict[str, Tensor | None]:
    """Make one whole training step of manual optimization, updates included.

    Args:
        trial: Holds the copies of module and optimizers.
        trainer: Of the run.

    Returns:
        The gradients that every update got, and those left at the end, by name.
    """
    module = trial.module
    gradients: dict[str, Tensor | None] = {}

    def note() -> None:
        update = sum(name.startswith("update ") for name in gradients) // max(1, len(names))
        for name, parameter in zip(names, module.parameters(), strict=True):
            gradients[f"update {update}: {name}"] = None if parameter.grad is None else parameter.grad.clone()

    names = [name for name, _ in module.named_parameters()]
    step_by_hand(module, trial.optimizers, trainer, trial.run, after_update=note)
    left = {name: p.grad for name, p in zip(names, module.parameters(), strict=True)}
    return {**gradients, **left}
