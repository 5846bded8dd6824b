"""What becomes low rank in a running fit, and what can not."""

import logging
import traceback
from collections.abc import Iterable, Sequence

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_accel.callbacks.layer_exchange.globals_and_closures import held_out_of_sight
from lightning_accel.callbacks.layer_exchange.recorded_inputs import RecordedInputs
from lightning_accel.callbacks.layer_exchange.structure import FACTORS
from lightning_accel.lightning_private import pruned_layers, rename_in_finetuning
from lightning_accel.low_rank import RankPlan, SharedVectors, decompose, eligible_layers, low_rank_layers
from lightning_accel.low_rank.calls import input_second_moments
from lightning_accel.low_rank.eligibility import lazy, left_alone
from lightning_accel.low_rank.optimizers.exchange import orphans

_log = logging.getLogger(__name__)


def check_something_to_factor(module: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> None:
    """Refuse a module without layers that could be low rank, or are so already.

    Raises:
        MisconfigurationException: Says what was looked for and what was found.
    """
    eligible, skipped = eligible_layers(module, include=include, exclude=exclude)
    if not eligible and not left_alone(skipped) and not lazy(skipped) and not low_rank_layers(module):
        found = "; ".join(f"`{name}`: {reason}" for name, reason in skipped.items()) or "no such layer at all"
        raise MisconfigurationException(
            f"no layer of {type(module).__name__} can be factored. Looked for nn.Linear, nn.Conv1d and nn.Conv2d whose "
            f"name matches include={list(include)} and not exclude={list(exclude)}; found: {found}. "
            "Widen `include`, or leave RankQuantization out."
        )


def keep_held_dense(plan: RankPlan, trainer: "pl.Trainer", module: nn.Module) -> RankPlan:
    """Return the plan without layers whose weights nobody would train, or that a pruning callback holds."""
    pruned = pruned_layers(trainer, module)
    untrained = _untrained(plan, trainer, module) - pruned
    if untrained:
        _log.warning("no optimizer holds the weights of %s: these layers stay dense.", sorted(untrained))
    plan = plan.dense(pruned, "a pruning callback holds its weight")
    plan = plan.dense(untrained, "its weight is in no optimizer's groups")
    return _keep_hidden_dense(plan, trainer, module)


def still_dense(plan: RankPlan, module: nn.Module) -> list[str]:
    """Return the layers that a plan makes low rank, without those that are so already (in a module trained before)."""
    factored = low_rank_layers(module)
    return [layer.name for layer in plan.layers if layer.ranks is not None and layer.name not in factored]


def _untrained(plan: RankPlan, trainer: "pl.Trainer", module: nn.Module) -> set[str]:
    """Return the low-rank layers of a plan whose trainable weights no optimizer holds."""
    planned = still_dense(plan, module)
    return set(orphans(trainer.optimizers, {name: module.get_parameter(f"{name}.weight") for name in planned}))


def _keep_hidden_dense(plan: RankPlan, trainer: "pl.Trainer", module: nn.Module) -> RankPlan:
    """Return the plan without layers whose weights something holds that no search through the module finds."""
    # no variable may hold a weight by itself here: one that a comprehension assigns to is a closure's
    planned = [layer.name for layer in plan.layers if layer.ranks is not None]
    eligible, _ = eligible_layers(module)
    weights = {name: eligible[name]._parameters["weight"] for name in planned if name in eligible}
    if not weights:
        return plan
    known: list[object] = [part._parameters for part in module.modules()]
    for optimizer in trainer.optimizers:
        known += [optimizer.state, *(group["params"] for group in optimizer.param_groups)]
    hidden = held_out_of_sight(weights, known)
    for name, why in hidden.items():
        plan = plan.dense({name}, why)
    if hidden:
        layers, why = ", ".join(f"`{name}`" for name in hidden), next(iter(hidden.values()))
        rank_zero_warn(f"RankQuantization leaves {layers} dense: {why}, and would go on with the dense one.")
    return plan


def factor_as_planned(
    plan: RankPlan, inputs: RecordedInputs | None, shared: SharedVectors | None, module: nn.Module
) -> list[str]:
    """Decompose ``module``; ``inputs`` weigh it where the plan says so, ``shared`` is what planning found out."""
    if plan.weighting != "activation" or inputs is None:
        return decompose(module, plan, shared=shared)
    eligible, _ = eligible_layers(module)
    planned = {layer.name: eligible[layer.name] for layer in plan.layers if layer.ranks and layer.name in eligible}
    return decompose(module, plan, second_moments=input_second_moments(module, planned, inputs.replay, shrink=True))


def follow_in_finetuning(trainer: "pl.Trainer", module: nn.Module, names: Iterable[str]) -> None:
    """Let callbacks that thaw parameters later know those of layers that are low rank now."""
    layers = low_rank_layers(module)
    rename_in_finetuning(
        trainer, {f"{n}.weight": [f"{n}.{factor}" for factor in layers[n].factor_names] for n in names}
    )


def follow_back_in_finetuning(trainer: "pl.Trainer", names: Iterable[str]) -> None:
    """Let them know the weights of layers that are dense again."""
    rename_in_finetuning(
        trainer,
        {f"{n}.{part}": [f"{n}.weight"] if part == "factor_in" else [] for n in names for part in FACTORS},
    )


def explain_failure(module: nn.Module, names: Sequence[str], problem: BaseException) -> None:
    """Log what to do where the first step with the layers ``names`` low rank failed, and in which one it did."""
    layers = {id(layer): name for name, layer in low_rank_layers(module).items()}
    frames = (frame for frame, _ in traceback.walk_tb(problem.__traceback__))
    culprit = next((layers[id(f.f_locals["self"])] for f in frames if id(f.f_locals.get("self")) in layers), None)
    _log.error(
        "the first step with low-rank layers failed%s: %s. Models that ask for a layer's type or read its weight need "
        "it as it was: give RankQuantization exclude=[...] with such layers. Low rank are: %s",
        f" in {culprit}" if culprit else "",
        problem,
        ", ".join(names),
    )
