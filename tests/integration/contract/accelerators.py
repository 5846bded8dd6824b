"""The table of accelerators; every entry inherits all rows of the contract.

A new accelerator adds ONE entry to `ACCELERATORS`. Each `test_row_*.py` in this folder is one row of the contract and
is parametrized over the table; the modules, data and loops are in `contract_models.py` and `contract_runs.py`.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from _pytest.mark import ParameterSet
from contract_models import (
    classification_data,
    convolutional,
    decoder,
    embedding_only,
    everything,
    image_data,
    loop_over_cell,
    mlp,
)
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.utils.data import TensorDataset

from lightning_accel.callbacks import (
    IntraStreamScheduling,
    L1InfProjection,
    MultilevelProjection,
    RankQuantization,
    SequentialFreezing,
)
from lightning_accel.lightning_private import every_callback
from lightning_accel.low_rank import RankPlan, decompose, eligible_layers, low_rank_layers
from lightning_accel.low_rank.freezing import factor_parameter_names
from lightning_accel.low_rank.plan import LayerPlan
from lightning_accel.strategies import AsyncSGDStrategy
from lightning_accel.strategies.for_pytorch_lightning import AsyncSGDStrategy as OtherAsyncSGDStrategy


@dataclass(frozen=True)
class Accelerator:
    """One accelerator as the contract sees it; every callable makes new objects.

    Attributes:
        name: Unique; also the key under which `ContractModule` finds ``network``.
        network: Seeded network it acts on; input and output as ``data`` wants them.
        data: Samples and labels.
        callbacks: The accelerator, switched on, with settings that make its decisions without a clock.
        neutral: The same with the setting that must not change results (row 2).
        acted: Says of the module after ``fit`` (row 1, 3, 4) whether the accelerator did something.
        nothing_to_act_on: Pattern of the error for a network without anything to act on (row 7), or None if it acts on
            any network.
        nothing_is_a_warning: Whether that is a warning when training ends, since only training can show it.
        hopeless_network: Such a network; the same data must fit.
        steps_aside: Callbacks that find, without a fake clock, that acting does not pay, or None if it always acts
            (row 9). The run must equal plain training bit for bit.
        aside_log: Pattern of what it logs then.
        conf: Names in ``conf/callbacks`` it is composed of through Hydra (row 5), in any order.
        overrides: Hydra overrides that make the composed callbacks decide without a clock.
        strategy: Of the Trainer, for accelerators that are strategies.
        other_strategy: The same for a Trainer of ``pytorch_lightning``.
        neutral_strategy: The same for the neutral setting.
        neutral_tolerance: Relative tolerance of row 2; 0.0 is bit for bit.
        resume_tolerance: Relative tolerance of row 1; 0.0 is bit for bit.
        ddp_refusal: Pattern of the error in a DDP run, or None if two processes stay equal (row 4).
        epochs: Length of the contract's runs; long enough for several phases.
        optimizations: Ways to optimize it supports (row 6); another way is refused as ``optimization_refusal`` says.
        left_alone: Features of row 6 under which it does nothing, by their names; the run is then the plain one, and
            the value is the pattern of what it says.
        refused: Features of row 6 that are refused alike, by their names.
        optimization_refusal: Pattern of that refusal.
    """

    name: str
    network: Callable[[], nn.Module]
    callbacks: Callable[[], list[Callback]]
    neutral: Callable[[], list[Callback]]
    acted: Callable[[LightningModule], bool]
    nothing_to_act_on: str | None
    data: Callable[[], TensorDataset] = classification_data
    nothing_is_a_warning: bool = False
    hopeless_network: Callable[[], nn.Module] = embedding_only
    steps_aside: Callable[[], list[Callback]] | None = None
    aside_log: str = ""
    conf: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    strategy: Callable[[], Strategy | str] = field(default=lambda: "auto")
    other_strategy: Callable[[], object] = field(default=lambda: "auto")
    neutral_strategy: Callable[[], Strategy | str] = field(default=lambda: "auto")
    neutral_tolerance: float = 0.0
    resume_tolerance: float = 0.0
    ddp_refusal: str | None = None
    epochs: int = 4
    optimizations: tuple[str, ...] = ("automatic", "manual", "two optimizers")
    left_alone: dict[str, str] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    optimization_refusal: str = ""


def trained_by_workers(module: LightningModule) -> bool:
    """Say whether worker processes made all the steps of the module's last Trainer."""
    statistics = getattr(module.trainer.strategy, "statistics", None)
    return statistics is not None and sum(statistics.worker_pushes) > 0


def all_dense_plan() -> RankPlan:
    """Plan that leaves every layer as it is: the neutral setting of rank quantization."""
    return RankPlan(layers=(), method="fixed", target="ratio", value=1.0)


def low_rank_mlp() -> nn.Module:
    """The contract's MLP, decomposed by hand at rank 8."""
    network = mlp()
    eligible, _ = eligible_layers(network)
    layers = tuple(
        LayerPlan(name, "Linear", tuple(layer.weight.shape), (8,), "low rank", "by hand")
        for name, layer in eligible.items()
        if min(layer.weight.shape) > 8
    )
    decompose(network, RankPlan(layers=layers, method="fixed", target="ratio", value=2.0))
    return network


def is_low_rank(module: LightningModule) -> bool:
    """Say whether the module has factored layers."""
    return bool(low_rank_layers(module))


def rank_quantization(**settings: object) -> RankQuantization:
    """Theoretical ranks: nothing is timed, so every run decides alike."""
    return RankQuantization(**{"ratio": 2.0, "method": "fixed", "when": "setup", "on_loss": "keep"} | settings)


# two projections of one weight do not commute: each gets layers of its own, which low rank may have factored
FIRST_LAYERS = ("network.0.*", "network.2.*", "*convolution.*")
LAST_LAYERS = ("network.4.*", "*head.*")


def has_zero_rows(patterns: tuple[str, ...]) -> Callable[[LightningModule], bool]:
    """Return what says whether a weight of those names has a row of zeros."""

    def look(module: LightningModule) -> bool:
        weights = [
            p
            for name, p in module.named_parameters()
            if p.ndim > 1 and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        ]
        return any(bool((weight == 0).flatten(1).all(1).any()) for weight in weights)

    return look


def factors_rested(module: LightningModule) -> bool:
    """Say whether factors, and nothing else, were frozen in training steps of the module's last Trainer."""
    witnesses = [callback for callback in module.trainer.callbacks if hasattr(callback, "rested")]
    rested = {name for witness in witnesses for name in witness.rested}
    return bool(rested) and rested <= factor_parameter_names(module)


def low_rank_and_rested(module: LightningModule) -> bool:
    """Say whether layers were factored, and their factors took turns."""
    return is_low_rank(module) and factors_rested(module)


def _scheduling(module: LightningModule) -> list[IntraStreamScheduling]:
    return [callback for callback in every_callback(module.trainer) if isinstance(callback, IntraStreamScheduling)]


def decided_about_loops(module: LightningModule) -> bool:
    """Say whether the callback of the module's last Trainer tells what its loops ran with, or why they are plain."""
    # the report stays in the process that trained; the state comes back
    told = [line for callback in _scheduling(module) for line in callback.report if line.startswith("network.")]
    return bool(told or schedules_chosen(module))


def ran_with_a_schedule(module: LightningModule) -> bool:
    """Say whether loops of the module's last Trainer ran with another schedule than the plain loop."""
    return any(name != "loop" for name in schedules_chosen(module))


def schedules_chosen(module: LightningModule) -> list[str]:
    """Return the schedules that were chosen for loops of the module's last Trainer, maybe the plain one."""
    chosen: list[str] = []
    for callback in _scheduling(module):
        state = callback.state_dict()
        for choices in state.get("recurrent", {}).values():
            chosen += [name for choice in choices for name in choice.values()]
        for cell in (state.get("deferred") or {"cells": {}})["cells"].values():
            chosen += cell["choices"].values()
    return chosen


QUICK_START: dict[str, Any] = {"start_method": "forkserver", "heartbeat_seconds": 300.0}  # a busy machine is no death

NO_AUTOCAST = {"bf16-mixed": "IntraStreamScheduling: network.cell: plain, "}
# Calls inside a compiled module are not Python's to answer.
NOT_COMPILED = {"compiled": "IntraStreamScheduling: network.cell: plain, it is compiled"}

ACCELERATORS = (
    Accelerator(
        name="rank_quantization",
        network=mlp,
        callbacks=lambda: [rank_quantization()],
        neutral=lambda: [RankQuantization(plan=all_dense_plan())],
        acted=is_low_rank,
        nothing_to_act_on="no layer .* can be factored",
        steps_aside=lambda: [RankQuantization(when="setup"), SequentialFreezing()],
        aside_log="stays dense",
        conf=("rank_quantization",),
        overrides=(
            "callbacks.rank_quantization.method=fixed",
            "callbacks.rank_quantization.when=setup",
            "callbacks.rank_quantization.on_loss=keep",
        ),
    ),
    Accelerator(
        name="rank_quantization_after_warm_up",
        network=convolutional,
        data=image_data,
        callbacks=lambda: [rank_quantization(when=1)],
        neutral=lambda: [RankQuantization(plan=all_dense_plan(), when=1)],
        acted=is_low_rank,
        nothing_to_act_on="no layer .* can be factored",
        steps_aside=lambda: [RankQuantization(when=1)],
        aside_log="stays dense",
    ),
    Accelerator(
        name="sequential_freezing",
        network=low_rank_mlp,
        callbacks=lambda: [SequentialFreezing()],
        neutral=lambda: [SequentialFreezing(mode="none")],
        acted=factors_rested,
        nothing_to_act_on="no low-rank layer",
        conf=("sequential_freezing",),
    ),
    Accelerator(
        name="rank_quantization_and_sequential_freezing",
        network=mlp,
        callbacks=lambda: [rank_quantization(when=1), SequentialFreezing(period_steps=4)],
        neutral=lambda: [RankQuantization(plan=all_dense_plan()), SequentialFreezing()],
        acted=low_rank_and_rested,
        nothing_to_act_on="no layer .* can be factored",
    ),
    Accelerator(
        name="l1inf_projection",
        network=mlp,
        callbacks=lambda: [L1InfProjection(target_sparsity=0.5, parameters=FIRST_LAYERS, module_types=None)],
        neutral=lambda: [L1InfProjection(math.inf)],
        acted=has_zero_rows(FIRST_LAYERS),
        nothing_to_act_on="found no parameter to project",
        conf=("l1inf_projection",),
        overrides=(
            f"callbacks.l1inf_projection.parameters=[{','.join(FIRST_LAYERS)}]",
            "callbacks.l1inf_projection.module_types=null",
        ),
    ),
    Accelerator(
        name="multilevel_projection",
        network=mlp,
        callbacks=lambda: [
            MultilevelProjection(
                radius_fraction=0.05,
                norms=("l1", "l2"),
                parameters=LAST_LAYERS,
                module_types=None,
                scope="global",
                schedule="cubic",
                end_step=5,
                freeze_zero_groups=True,
            )
        ],
        neutral=lambda: [MultilevelProjection(math.inf, norms=("l1", "l1"), freeze_zero_groups=True)],
        acted=has_zero_rows(LAST_LAYERS),
        nothing_to_act_on="found no parameter to project",
        conf=("multilevel_projection",),
        overrides=(
            f"callbacks.multilevel_projection.parameters=[{','.join(LAST_LAYERS)}]",
            "callbacks.multilevel_projection.module_types=null",
            "callbacks.multilevel_projection.norms=[l1,l2]",
            "callbacks.multilevel_projection.target_sparsity=0.4",
        ),
    ),
    Accelerator(
        name="intra_stream_scheduling",
        network=loop_over_cell,
        callbacks=lambda: [IntraStreamScheduling("native")],
        neutral=lambda: [IntraStreamScheduling("loop")],
        acted=ran_with_a_schedule,
        left_alone=NO_AUTOCAST | NOT_COMPILED,
        nothing_to_act_on="found no recurrent layer",
        nothing_is_a_warning=True,
        conf=("intra_stream_scheduling",),
        overrides=("callbacks.intra_stream_scheduling.schedule=native",),
    ),
    Accelerator(
        name="intra_stream_scheduling_by_measurement",
        network=loop_over_cell,
        callbacks=lambda: [IntraStreamScheduling()],
        neutral=lambda: [IntraStreamScheduling("loop")],
        acted=decided_about_loops,
        left_alone=NO_AUTOCAST | NOT_COMPILED,
        nothing_to_act_on="found no recurrent layer",
        nothing_is_a_warning=True,
    ),
    Accelerator(
        name="intra_stream_scheduling_of_a_decoder",
        network=decoder,
        callbacks=lambda: [IntraStreamScheduling("intra_stream")],
        neutral=lambda: [IntraStreamScheduling("loop")],
        acted=decided_about_loops,
        left_alone=NO_AUTOCAST | NOT_COMPILED,
        nothing_to_act_on="found no recurrent layer",
        nothing_is_a_warning=True,
        steps_aside=lambda: [IntraStreamScheduling()],
        aside_log="may use every step's result before the next step",
    ),
    Accelerator(
        name="async_sgd",
        network=convolutional,
        data=image_data,
        callbacks=list,
        neutral=list,
        acted=trained_by_workers,
        nothing_to_act_on=None,
        strategy=lambda: AsyncSGDStrategy(**QUICK_START),
        other_strategy=lambda: OtherAsyncSGDStrategy(**QUICK_START),
        neutral_strategy=lambda: AsyncSGDStrategy(**QUICK_START),
        refused=("compiled",),  # by Lightning, which knows of no strategy but its own
        optimization_refusal="compiled model is incompatible with the current strategy",
    ),
)


def cases(where: Callable[[Accelerator], bool] = lambda _: True) -> list[ParameterSet]:
    """Return the entries as parameters of a test; those that start processes for every fit are slow."""
    return [pytest.param(e, id=e.name, marks=slow_if_processes(e)) for e in ACCELERATORS if where(e)]


def slow_if_processes(*entries: Accelerator) -> list[pytest.MarkDecorator]:
    """Return the mark of tests that start processes."""
    return [pytest.mark.slow] if any(entry.strategy() != "auto" for entry in entries) else []


def by_name(name: str) -> Accelerator:
    """Return the entry ``name`` of the table."""
    return next(entry for entry in ACCELERATORS if entry.name == name)


def network_of(name: str) -> Callable[[], nn.Module]:
    """Return what makes a network: ``"everything"``, ``"hopeless ENTRY"`` or ``"ENTRY"``."""
    if name == "everything":
        return everything
    return by_name(name.removeprefix("hopeless ")).hopeless_network if " " in name else by_name(name).network
