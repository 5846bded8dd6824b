"""What both projection callbacks do while a Trainer runs."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_accel.callbacks.projection.group_sparsity import GroupSparsity
from lightning_accel.callbacks.projection.nothing_found import nothing_found
from lightning_accel.decision_line import say_decision
from lightning_accel.lightning_private import averaged_modules, callbacks_of, load_checkpoint_file
from lightning_accel.projection.kernels.compiled import Compile, check_compile
from lightning_accel.projection.sharded import alike, gather
from lightning_accel.projection.training.ball_specification import Ball
from lightning_accel.projection.training.projector import Projector
from lightning_accel.projection.training.ramp import Ramp
from lightning_accel.projection.training.targets import NAMED_GROUPS, Target, find_targets

_REFUSED = {"FSDPStrategy", "DeepSpeedStrategy"}
_RAW_AVERAGE = "lightning_accel_average_before_projection"

Mode = Literal["project", "project_then_retrain"]


@dataclass(frozen=True)
class Selection:
    """Which parameters; the arguments of `lightning_accel.projection.training.targets.find_targets`."""

    parameters: tuple[str, ...]
    module_types: tuple[str, ...] | None
    groups: str | tuple[int, ...]
    num_heads: int | None

    def __post_init__(self) -> None:
        if isinstance(self.groups, str) and self.groups not in NAMED_GROUPS:
            raise ValueError(f"`groups` must be of {NAMED_GROUPS} or dimensions, got {self.groups!r}.")
        if self.num_heads is not None and self.num_heads < 1:
            raise ValueError(f"`num_heads` must be >= 1, got {self.num_heads}.")

    def find(self, model: nn.Module) -> list[Target]:
        """Find the targets in ``model``."""
        return find_targets(
            model, self.parameters, module_types=self.module_types, groups=self.groups, num_heads=self.num_heads
        )


def selection(
    parameters: str | Sequence[str],
    module_types: Sequence[str] | None,
    groups: str | Sequence[int],
    num_heads: int | None,
) -> Selection:
    """Make a `Selection` of what users and configuration files give."""
    return Selection(
        (parameters,) if isinstance(parameters, str) else tuple(parameters),
        None if module_types is None else tuple(module_types),
        groups if isinstance(groups, str) else tuple(groups),
        num_heads,
    )


@dataclass(frozen=True)
class Timing:
    """When to project; see `MultilevelProjection`.

    Raises:
        ValueError: If a value is out of range, or values exclude each other.
    """

    every_n_steps: int | None = None
    every_n_epochs: int | None = None
    at_end: bool = False
    mode: Mode = "project"
    retrain_epoch: int | None = None
    rewind: str = "none"
    ramped: bool = False

    def __post_init__(self) -> None:
        for name in ("every_n_steps", "every_n_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value}.")
        given = [bool(self.every_n_steps), bool(self.every_n_epochs), self.at_end]
        if sum(given) > 1:
            raise ValueError("give at most one of `every_n_steps`, `every_n_epochs` and `at_end`.")
        if self.mode not in get_args(Mode):
            raise ValueError(f"`mode` must be of {get_args(Mode)}, got {self.mode!r}.")
        retrains = self.mode == "project_then_retrain"
        if retrains and (any(given) or self.ramped):
            raise ValueError(
                "mode 'project_then_retrain' projects once, at `retrain_epoch`; give no other time or schedule."
            )
        if retrains != (self.retrain_epoch is not None):
            raise ValueError("`retrain_epoch` must be given for mode 'project_then_retrain', and only for it.")
        if self.retrain_epoch is not None and self.retrain_epoch < 0:
            raise ValueError(f"`retrain_epoch` must be >= 0, got {self.retrain_epoch}.")
        if not retrains and self.rewind != "none":
            raise ValueError("`rewind` needs mode 'project_then_retrain'.")

    @functools.cached_property
    def period(self) -> int:
        """Optimizer steps from one projection to the next; 0: none follows a step."""
        if self.mode != "project" or self.at_end or self.every_n_epochs is not None:
            return 0
        return self.every_n_steps or 1


@dataclass
class ProjectedTraining:
    """The state of one callback in one run; survives deep copies and pickling without the run.

    Attributes:
        name: Of the callback's class.
        projections: How often an optimizer step was followed by a projection; a step that a gradient scaler skipped
            counts, as it does in ``global_step``, and its projection changes no bit unless a ramp has moved on.
        steps: Of each optimizer that owns targets, by its place in the Trainer's list.
    """

    name: str
    selection: Selection
    timing: Timing
    ball: Ball
    ramp: Ramp
    freeze_zero_groups: bool
    compile: Compile = "auto"
    projections: int = 0
    steps: dict[int, int] = field(default_factory=dict)
    masked: bool = False
    first_weights: dict[str, Tensor] | None = None
    projector: Projector | None = None
    _restored: Mapping[str, Any] | None = None
    _owned: dict[int, list[Target]] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)
    _averages: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _begun: set[int] = field(default_factory=set)
    _waits: bool = False

    def __post_init__(self) -> None:
        check_compile(self.compile)
        # tells apart several callbacks of one class in a checkpoint; Lightning asks for it at every call of a hook
        self.state_key = f"{self.name}{self.selection}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a run: hooks, and the model that targets point to."""
        empty: dict[str, Any] = {"projector": None, "_owned": {}, "_handles": [], "_averages": [], "_begun": set()}
        return self.__dict__ | empty

    def refuse_strategies(self, strategy: object) -> None:
        """Refuse strategies that flatten or partition parameters out of their shapes."""
        found = _REFUSED & {kind.__name__ for kind in type(strategy).__mro__}
        if found:
            raise MisconfigurationException(
                f"{self.name} needs parameters in their own shapes, which {min(found)} takes apart. Use 'ddp', or "
                "FSDP2 through ModelParallelStrategy, whose shards can be projected."
            )

    def start(self, trainer: "pl.Trainer", module: "pl.LightningModule") -> None:
        """Find what to project and watch the optimizers."""
        self.stop()
        source = self.timing.rewind
        if source not in ("none", "init") and "://" not in source and not Path(source).exists():
            raise ValueError(
                f"`rewind` must be 'none', 'init' or the path of a checkpoint, got {source!r}, where there is no file."
            )
        self.projector = Projector([], self.ball, self.ramp, self.freeze_zero_groups, self.compile)
        self.resolve(trainer, module)
        if not self.projector.targets:
            self._expect_layers(trainer, module)
        if self._restored is None:
            self.projections, self.steps, self.masked = 0, {}, False
            self.first_weights = None
            if self.timing.rewind == "init":
                self.first_weights = {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}
        else:
            self.projector.load_state_dict(self._restored["projector"])
            self._restored = None
        self.projector.remember_first_norms()
        for index, optimizer in enumerate(trainer.optimizers):
            self._handles.append(optimizer.register_step_post_hook(functools.partial(self._after_step, index)))

    def resolve(self, trainer: "pl.Trainer", module: nn.Module) -> None:
        """Find the targets (anew, after layers were exchanged) that some optimizer trains."""
        if self.projector is None:
            return
        self._owned, had = {}, bool(self.projector.targets)
        found = self.selection.find(module)
        for index, optimizer in enumerate(trainer.optimizers):
            owned = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
            mine = [t for t in found if id(t.parameter) in owned]
            if mine:
                self._owned[index] = mine
        trained = {id(t) for mine in self._owned.values() for t in mine}
        self.projector.targets = [t for t in found if id(t) in trained]
        names = ", ".join(t.name for t in self.projector.targets)
        if names or had:
            say_decision(trainer, self.name, f"projects {names or 'nothing any more'}.")

    def change_layers(self, trainer: "pl.Trainer", module: nn.Module) -> None:
        """Follow an exchange of layers in the middle of a run."""
        self.resolve(trainer, module)
        if self.projector is not None:
            self._waits = self._waits and not self.projector.targets
            self.projector.remember_first_norms()

    def stop(self) -> None:
        """Stop watching the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._begun, self._waits = [], set(), False

    def before_step(self, trainer: "pl.Trainer", optimizer: torch.optim.Optimizer) -> None:
        """Note that a step begins: one that a gradient scaler skips never gets to the optimizer's own hook."""
        if self._handles:
            index = [id(other) for other in trainer.optimizers].index(id(optimizer))
            if index in self._begun:  # several steps a batch, by hand
                self._after_step(index)
            self._begun.add(index)

    def _after_step(self, index: int, *_: Any) -> None:
        """Project what this optimizer has just moved."""
        if self._begun:
            self._begun.discard(index)
        mine = self._owned.get(index)
        if not mine or self.projector is None:
            return
        step = self.steps[index] = self.steps.get(index, 0) + 1
        period = self.timing.period
        if period and step % period == 0 and step > self.ramp.start_step:
            self.projector.project(step, mine)
            self.projections += 1
        elif self.masked or self.freeze_zero_groups:
            self.projector.hold(mine)

    def at_epoch_start(self, trainer: "pl.Trainer", module: "pl.LightningModule") -> None:
        """Project, mask and rewind where retraining begins; thin out an average that was swapped in."""
        if self.projector is None:
            return
        if self.timing.retrain_epoch == trainer.current_epoch and not self.masked:
            self.projector.project(self._last_step() + 1)
            self.projector.mask()
            self.masked = True
            self._rewind(trainer, module)
            self.projector.hold()
        elif averaged_modules(trainer) and self.timing.mode == "project":
            self.projector.thin_out(self.projector.targets)

    def at_batch_end(self, trainer: "pl.Trainer") -> None:
        """Project at the end of an epoch where that is due; look at a GPU's norms now and then."""
        epochs = self.timing.every_n_epochs
        if self.projector is None:
            return
        for index in sorted(self._begun):
            self._after_step(index)
        if self._waits:
            self._expect_layers(trainer, trainer.lightning_module)
        if epochs is not None and trainer.is_last_batch and (trainer.current_epoch + 1) % epochs == 0:
            self.projector.project(self._last_step())
        if trainer.is_last_batch or trainer.global_step % 50 == 0:
            self.projector.check_finite()

    def at_end(self, trainer: "pl.Trainer") -> None:
        """Leave feasible weights, whatever was written over the module last."""
        if self.projector is None:
            return
        if self.masked:
            self.projector.hold()
        elif self.timing.mode == "project":
            if averaged_modules(trainer):
                self.projector.thin_out(self.projector.targets)
            self.projector.project(self._last_step())
        self.projector.check_finite()
        self.stop()

    def swap_in_averages(self, trainer: "pl.Trainer") -> None:
        """Project the averages, which a validation is about to use; `swap_out_averages` takes that back."""
        self._averages = []
        for average in averaged_modules(trainer):
            targets = self._average_targets(average)
            self._averages += [(t.view(), t.view().clone()) for t in targets]
            self._project_average(targets)

    def swap_out_averages(self) -> None:
        """Put the averages back as they were: they go on as averages of what was trained."""
        for average, before in self._averages:
            average.copy_(before)
        self._averages = []

    def save(self, trainer: "pl.Trainer", checkpoint: dict[str, Any]) -> None:
        """Project the average in a checkpoint, and keep it as it was for those who resume."""
        if "averaging_state" not in checkpoint or self.projector is None:
            return
        weights = checkpoint["state_dict"]  # WeightAveraging put the average's own tensors there
        names = {
            name
            for average in averaged_modules(trainer)
            for target in self._average_targets(average)
            for name, parameter in average.named_parameters()
            if parameter is target.parameter
        }
        checkpoint[_RAW_AVERAGE] = {name: weights[name].clone() for name in names}
        self.swap_in_averages(trainer)
        weights |= {name: weights[name].clone() for name in names}
        self.swap_out_averages()

    def load(self, trainer: "pl.Trainer", checkpoint: Mapping[str, Any]) -> None:
        """Go on with the average as it was before it was projected into the checkpoint."""
        for average in averaged_modules(trainer):
            parameters = dict(average.named_parameters())
            for name, value in checkpoint.get(_RAW_AVERAGE, {}).items():
                if name in parameters:
                    parameters[name].data.copy_(value)

    def log(self, log_dict: Callable[..., None], prefix: str) -> None:
        """Log norm, tau, zero groups and zero entries of each parameter, and the zero groups of all."""
        if self.projector is None or not self.projector.targets:
            return
        overall, values = GroupSparsity(), dict[str, Any]()
        for target in self.projector.targets:
            weight = gather(target.view())
            overall.to(weight.device).update(weight, target.group_dims)
            single = GroupSparsity().to(weight.device)
            single.update(weight, target.group_dims)
            values |= {f"{prefix}/{target.name}/{k}": v.float() for k, v in single.compute().items()}
        values |= {f"{prefix}/{k}": v.float() for k, v in overall.compute().items()}
        for name, found in self.projector.last.items():
            values |= {f"{prefix}/{name}/norm": found.norm.float(), f"{prefix}/{name}/tau": found.tau.float()}
        # every process has the same values: the maximum is theirs, to the bit
        log_dict(values, sync_dist=True, reduce_fx="max")

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        if self.projector is None:
            return {}
        return {
            "projector": self.projector.state_dict(),
            "projections": self.projections,
            "steps": dict(self.steps),
            "masked": self.masked,
            "first_weights": None if self.masked or self.first_weights is None else _whole(self.first_weights),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep the state until the model's parameters are known; strategies that shard restore after that."""
        if state:
            if self.projector is not None and self._handles:
                self.projector.load_state_dict(state["projector"])
            else:
                self._restored = state
            self.projections, self.steps = state["projections"], dict(state["steps"])
            self.masked, self.first_weights = state["masked"], state["first_weights"]

    def _expect_layers(self, trainer: "pl.Trainer", module: nn.Module) -> None:
        """Refuse to project nothing, unless another callback is still to make layers."""
        self._waits = True
        states = [getattr(callback, "structure_state", None) for callback in callbacks_of(trainer)]
        if any(state() == "pending" for state in states if state is not None):
            return
        chosen = self.selection
        raise MisconfigurationException(
            nothing_found(self.name, module, chosen.parameters, chosen.module_types, chosen.groups)
        )

    def _last_step(self) -> int:
        return max(self.steps.values(), default=0)

    def _rewind(self, trainer: "pl.Trainer", module: "pl.LightningModule") -> None:
        if self.timing.rewind == "none":
            return
        if self.timing.rewind == "init":
            weights: Mapping[str, Tensor] = self.first_weights or {}
        else:
            weights = load_checkpoint_file(self.timing.rewind, "cpu", None)["state_dict"]
        now = module.state_dict()
        module.load_state_dict({name: alike(w, now[name]) if name in now else w for name, w in weights.items()})
        self.first_weights = None
        for optimizer in trainer.optimizers:  # moments of other weights would push the rewound ones about
            optimizer.state.clear()

    def _average_targets(self, average: nn.Module) -> list[Target]:
        names = {t.name for t in self.projector.targets} if self.projector is not None else set()
        return [t for t in self.selection.find(average) if t.name in names]

    def _project_average(self, targets: Sequence[Target]) -> None:
        if self.projector is None:
            return
        if self.masked:
            Projector(list(targets), self.ball, memories=self.projector.memories).hold()
        elif self.timing.mode == "project":
            self.projector.thin_out(targets)


def _whole(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather shards, for one process writes the checkpoint for all."""
    return {name: gather(weight).cpu() for name, weight in weights.items()}
