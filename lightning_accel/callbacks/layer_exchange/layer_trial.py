"""Whether a model lets its layers be exchanged: does a step still run, and does it compute the same."""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_accel.callbacks.layer_exchange.step_trial import StepTrial
from lightning_accel.low_rank import eligible_layers
from lightning_accel.low_rank.decompose import swap
from lightning_accel.low_rank.factors.factorize import empty_like, identity_factors

Ranks = Mapping[str, tuple[int, ...]]


def failure(trial: StepTrial, ranks: Ranks) -> str | None:
    """Say how a step fails with these layers low rank, or return None."""
    try:
        trial.changed(functools.partial(with_shapes_of, ranks)).step()
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # it is the model's own code that meets a layer it does not know
        return f"fails with it low rank: {type(problem).__name__}: {problem}".splitlines()[0]
    return None


def other_loss(trial: StepTrial, ranks: Ranks) -> str | None:
    """Say how the loss differs with layers that stand for the same weights, or return None.

    A step whose loss is not the same twice (random states beyond torch's, numpy's and Python's) can not be judged.
    """

    def loss(change: Callable[[nn.Module], list[str]]) -> float:
        with isolate_rng():  # new layers draw their values
            changed = trial.changed_for_forward(change)
        with isolate_rng():
            return float(changed.forward().detach())

    dense = loss(lambda _: [])
    if dense != loss(lambda _: []):
        return None
    low_rank = loss(functools.partial(_with_identities, tuple(ranks)))
    if low_rank == dense or abs(low_rank - dense) <= trial.tolerance * max(abs(dense), abs(low_rank)):
        return None
    return (
        f"has another loss with it low rank, although nothing is cut off: {low_rank:.6g} instead of {dense:.6g}. "
        "Does the model ask for the layer's type?"
    )


def _with_identities(names: Sequence[str], module: nn.Module) -> list[str]:
    layers, _ = eligible_layers(module)
    for name in names:
        swap(module, name, identity_factors(layers[name]))
    return list(names)


def with_shapes_of(ranks: Ranks, module: nn.Module) -> list[str]:
    """Exchange layers for low-rank ones of these ranks with arbitrary values, which take as long as any others."""
    layers, _ = eligible_layers(module)
    for name, layer_ranks in ranks.items():
        swap(module, name, empty_like(layers[name], layer_ranks))
    return list(ranks)
