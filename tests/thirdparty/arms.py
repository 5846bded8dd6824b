"""The accelerators, each as somebody would add it to a package's training, and what each left in a trained module."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import lightning.pytorch as pl
from torch import nn

from lightning_accel import (
    IntraStreamScheduling,
    L1InfProjection,
    MultilevelProjection,
    RankQuantization,
    SequentialFreezing,
)
from lightning_accel.low_rank import low_rank_layers

ASYNC = "async_sgd"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: As the table shows it.
        callbacks: Makes new callbacks for one fit.
        strategy: Given to the package's Trainer.
        devices: Given to the package's Trainer.
    """

    name: str
    callbacks: Callable[[], list[pl.Callback]] = list
    strategy: str = "auto"
    devices: int = 1


def kept_low_rank() -> RankQuantization:
    """Low rank at ratio 2 from the second epoch on, although runs this short do not pay back what that takes."""
    return RankQuantization(2.0, when=1, on_loss="keep")


PLAIN = Arm("plain")
ARMS = (
    Arm("RankQuantization()", lambda: [RankQuantization()]),
    Arm("RankQuantization, kept", lambda: [kept_low_rank()]),
    Arm("... + SequentialFreezing", lambda: [kept_low_rank(), SequentialFreezing(period_steps=4)]),
    Arm("L1InfProjection()", lambda: [L1InfProjection()]),
    Arm("MultilevelProjection()", lambda: [MultilevelProjection()]),
    Arm("IntraStreamScheduling()", lambda: [IntraStreamScheduling()]),
    Arm("strategy='async_sgd', 2 workers", strategy=ASYNC, devices=2),
)


def low_rank_names(module: nn.Module) -> list[str]:
    return list(low_rank_layers(module))


def zero_rows(module: nn.Module) -> float:
    """Share of the rows of all matrices and filters that are zero, in [0, 1]."""
    rows = zeros = 0
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2 and name.endswith("weight"):
            flat = parameter.detach().flatten(1)
            rows, zeros = rows + len(flat), zeros + int((flat == 0).all(dim=1).sum())
    return zeros / max(rows, 1)


def is_finite(values: object) -> bool:
    return all(math.isfinite(value) for value in values)
