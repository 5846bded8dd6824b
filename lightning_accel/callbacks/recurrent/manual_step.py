"""A training step of manual optimization on a copy of the module, which steps copies of optimizers and schedulers."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.callbacks.layer_exchange.step_trial import StepTrial
from lightning_accel.lightning_private import wrapped_optimizer


def manual_step(trial: StepTrial, trainer: "pl.Trainer") -> dict[str, Tensor | None]:
    """Make one whole training step of manual optimization, updates included.

    What the step asks its module for (``optimizers``, ``lr_schedulers``, ``manual_backward``) are copies that know
    nothing of the run.

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
    optimizers = [wrapped_optimizer(copied, _Updates(module, note)) for copied in trial.optimizers]
    memo = {id(original): copied for original, copied in zip(trainer.optimizers, trial.optimizers, strict=True)}
    schedulers = [copy.deepcopy(config.scheduler, dict(memo)) for config in trainer.lr_scheduler_configs]
    module.__dict__.update(
        optimizers=_giving(optimizers),
        lr_schedulers=_giving(schedulers) if schedulers else lambda: None,
        manual_backward=module.backward,
    )
    trial.run()
    left = {name: p.grad for name, p in zip(names, module.parameters(), strict=True)}
    return {**gradients, **left}


def _giving(found: Sequence[Any]) -> Callable[..., Any]:
    """Return what `LightningModule` has under this name: one alone, several as a list."""
    return lambda *_, **__: found[0] if len(found) == 1 else list(found)


class _Updates:
    """What an optimizer of Lightning asks its strategy for."""

    def __init__(self, module: nn.Module, note: Callable[[], None]) -> None:
        self.lightning_module, self._note = module, note

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], **kwargs: Any) -> Any:
        """Make the update, and note what it got."""
        result = optimizer.step(closure, **kwargs)
        self._note()
        return result
