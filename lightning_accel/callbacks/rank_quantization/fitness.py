"""Which layers a model lets go."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl

from lightning_accel.callbacks.layer_exchange.layer_trial import Ranks, failure, other_loss
from lightning_accel.callbacks.layer_exchange.step_trial import StepTrial
from lightning_accel.low_rank import eligible_layers, theoretical_ranks

_log = logging.getLogger(__name__)

Problem = Callable[[StepTrial, Ranks], str | None]
PROBLEMS: tuple[Problem, ...] = (failure, other_loss)


def find_unfit(trainer: "pl.Trainer", trial: StepTrial, layers: Mapping[str, object], problem: Problem) -> set[str]:
    """Return the layers that the model does not let go, and say how that shows.

    Some models ask for a layer's type or read its weight, and go another way if it is not the one they made: the step
    fails, or silently computes something else.

    Args:
        trainer: Of the run.
        trial: Makes the steps.
        layers: Names of the layers to be looked at.
        problem: Says what is wrong with some layers low rank, if anything.
    """
    eligible, _ = eligible_layers(trial.module)
    ranks = {name: theoretical_ranks(tuple(eligible[name].weight.shape), 2.0) for name in layers}
    together: str | None = trainer.strategy.broadcast(problem(trial, ranks) if ranks else None)
    if together is None:
        return set()
    alone = {name: problem(trial, {name: ranks[name]}) for name in ranks}
    found = {name: why for name, why in alone.items() if why is not None}
    unfit: dict[str, str] = trainer.strategy.broadcast(found or dict.fromkeys(ranks, together))
    if trainer.is_global_zero:
        for name, why in unfit.items():
            _log.warning("%s stays dense, because the training step %s", name, why)
    return set(unfit)


def find_unfit_by_hand(
    trainer: "pl.Trainer", module: "pl.LightningModule", layers: Mapping[str, object], batch: Any, batch_idx: int
) -> set[str]:
    """Return the layers with which a step of manual optimization fails, as far as one can be made on copies.

    Its losses are not compared: it need not return one.

    Args:
        trainer: Of the run.
        module: Of the run; only read.
        layers: Names of the layers to be looked at.
        batch: As ``training_step`` gets it.
        batch_idx: As ``training_step`` gets it.
    """
    try:
        trial = StepTrial(trainer, module, batch, batch_idx)
        trial.changed(lambda _: []).step()
        return find_unfit(trainer, trial, layers, failure)
    except Exception:  # user code may refuse to be copied or called twice, for any reason
        return set()
