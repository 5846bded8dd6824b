"""A training step of manual optimization on a copy of the module, which steps copies of optimizers and schedulers."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer

from lightning_accel.lightning_private import wrapped_optimizer


def step_by_hand(
    module: "pl.LightningModule",
    optimizers: Sequence[Optimizer],
    trainer: "pl.Trainer",
    run: Callable[[], Any],
    *,
    after_update: Callable[[], None] = lambda: None,
) -> None:
    """Make one whole training step of manual optimization, updates included.

    What the step asks its module for (``optimizers``, ``lr_schedulers``, ``manual_backward``) are copies that know
    nothing of the run.

    Args:
        module: A copy of the run's.
        optimizers: Copies of the run's optimizers, of the copy's parameters.
        trainer: Of the run.
        run: Runs the copy's ``training_step``.
        after_update: Called after each update of an optimizer.
    """
    wrapped = [wrapped_optimizer(copied, _Updates(module, after_update)) for copied in optimizers]
    memo = {id(original): copied for original, copied in zip(trainer.optimizers, optimizers, strict=True)}
    schedulers = [copy.deepcopy(config.scheduler, dict(memo)) for config in trainer.lr_scheduler_configs]
    module.__dict__.update(
        optimizers=_giving(wrapped),
        lr_schedulers=_giving(schedulers) if schedulers else lambda: None,
        manual_backward=module.backward,
    )
    run()


def _giving(found: Sequence[Any]) -> Callable[..., Any]:
    """Return what `LightningModule` has under this name: one alone, several as a list."""
    return lambda *_, **__: found[0] if len(found) == 1 else list(found)


class _Updates:
    """What an optimizer of Lightning asks its strategy for."""

    def __init__(self, module: nn.Module, after_update: Callable[[], None]) -> None:
        self.lightning_module, self._after_update = module, after_update

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], **kwargs: Any) -> Any:
        """Make the update."""
        result = optimizer.step(closure, **kwargs)
        self._after_update()
        return result
