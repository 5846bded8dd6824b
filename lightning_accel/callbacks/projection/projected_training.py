"""What a projection callback does while a Trainer runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn

from lightning_accel.callbacks.projection.arguments import check_rewind
from lightning_accel.callbacks.projection.averages import ProjectedAverages
from lightning_accel.callbacks.projection.messages import nothing_found, takes_apart
from lightning_accel.callbacks.projection.roles import LayerRoles
from lightning_accel.callbacks.projection.selection import Selection
from lightning_accel.callbacks.projection.shortfalls import Shortfalls
from lightning_accel.callbacks.projection.sparsity_log import log_sparsity
from lightning_accel.callbacks.projection.timing import Timing, ends_now
from lightning_accel.callbacks.projection.watching import Changes, Steps
from lightning_accel.lightning_private import averaged_modules, every_callback, load_checkpoint_file, logging_period
from lightning_accel.projection.kernels.compiled import Compile, check_compile
from lightning_accel.projection.sharded import alike, gather
from lightning_accel.projection.training.ball_specification import Ball
from lightning_accel.projection.training.projector import Projector

_LOOKED_AT = 50  # optimizer steps from one look at a GPU's norms to the next
_REFUSED = {"FSDPStrategy", "DeepSpeedStrategy"}


@dataclass
class ProjectedTraining:
    """The state of one callback in one run; survives deep copies and pickling without the run.

    Attributes:
        name: Of the callback's class.
        projections: How often an optimizer step was followed by a projection; a step that a gradient scaler skipped
            counts, as it does in ``global_step``, and its projection changes no bit unless a ramp has moved on.
        steps: Of each optimizer that owns targets, by its place in the Trainer's list.
        position: The last one on the ramp.
    """

    name: str
    selection: Selection
    timing: Timing
    ball: Ball
    freeze_zero_groups: bool
    compile: Compile = "auto"
    projections: int = 0
    steps: dict[int, int] = field(default_factory=dict)
    position: int = 0
    masked: bool = False
    first_weights: dict[str, Tensor] | None = None
    projector: Projector | None = None
    _restored: Mapping[str, Any] | None = None
    _runs: bool = False
    _is_looked_at: bool = False
    _waits: bool = False
    _projected: bool = False
    _before_end: dict[str, Tensor] | None = None
    _logged_at: int = -1

    def __post_init__(self) -> None:
        check_compile(self.compile)
        # tells apart several callbacks of one class in a checkpoint; Lightning asks for it at every call of a hook
        self.state_key = f"{self.name}{self.selection}{self.ball}{self.timing}"
        self.averages = ProjectedAverages(self.selection)
        self.roles = LayerRoles(self.name, self.selection, self.ball)
        self.shortfalls = Shortfalls(self.name, self.timing, self.ball)
        self._watched, self._changes = Steps(self._after_step), Changes()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a run: hooks, and the model that targets point to."""
        return self.__dict__ | {"projector": None, "_runs": False}

    def refuse_strategies(self, strategy: object) -> None:
        """Refuse strategies that flatten or partition parameters out of their shapes."""
        found = _REFUSED & {kind.__name__ for kind in type(strategy).__mro__}
        if found:
            raise MisconfigurationException(takes_apart(self.name, min(found)))

    def start(self, trainer: "pl.Trainer", module: "pl.LightningModule") -> None:
        """Find what to project and watch the optimizers."""
        self.stop()
        check_rewind(self.timing.rewind)
        self.projector = Projector(
            [], self.ball, self.timing.ramp, self.freeze_zero_groups, self.compile, self.timing.over_fit
        )
        self._projected, self._before_end, self._logged_at = False, None, -1
        self.shortfalls.forget()
        self.roles.forget(None if self._restored is None else self._restored["roles"])
        self.resolve(trainer, module)
        if not self.roles.candidates:
            self._expect_layers(trainer, module)
        if self._restored is None:
            self.projections, self.steps, self.position, self.masked = 0, {}, 0, False
            self.first_weights = None
            if self.timing.rewind == "init":
                state = module.state_dict().items()
                self.first_weights = {k: v.detach().cpu().clone() for k, v in state if isinstance(v, Tensor)}
        else:
            self._restore(self.projector, self._restored)
            self._restored = None
        self.projector.remember_first_norms()
        self._runs, self._changes = True, Changes()
        self._changes.have_come(trainer, [])
        self._watched.watch(trainer)

    def resolve(self, trainer: "pl.Trainer", module: nn.Module) -> None:
        """Find the targets, anew after layers were exchanged, thawed or got their shapes."""
        if self.projector is not None:
            self.projector.aim_at(self.roles.resolve(trainer, module))

    def change_layers(self, trainer: "pl.Trainer", module: nn.Module) -> None:
        """Follow an exchange of layers in the middle of a run."""
        self.resolve(trainer, module)
        self._waits = self._waits and not self.roles.candidates

    def stop(self) -> None:
        """Stop watching the optimizers and the model."""
        self._watched.stop()
        self._runs, self._waits = False, False
        self.roles.look_away()

    def follow(self, trainer: "pl.Trainer") -> None:
        """Follow what was changed between steps: layers, optimizers, and what is frozen, which stays as it is."""
        if self.projector is None or not self._runs:
            return
        if self._changes.have_come(trainer, self.projector.targets):
            self._watched.watch(trainer)
            self.change_layers(trainer, trainer.lightning_module)
        self.projector.rest()

    def begin_training(self, trainer: "pl.Trainer", module: nn.Module) -> None:
        """Take up what a strategy that shards restored after `start`; say what this fit is too short for."""
        if self.projector is not None and self._restored is not None:
            self.roles.forget(self._restored["roles"])
            self.resolve(trainer, module)
            self._restore(self.projector, self._restored)
            self._restored = None
            self.projector.remember_first_norms()
        self.shortfalls.look_ahead(trainer)

    def at_batch_start(self, trainer: "pl.Trainer", module: nn.Module) -> None:
        """Watch the calls of the model where it is not known yet which layers write its output."""
        if self._runs:
            if trainer.fit_loop.batch_idx == 0:
                self.follow(trainer)
            self._watched.begin(trainer)
            self.roles.look(trainer, module)

    def before_backward(self, trainer: "pl.Trainer", module: nn.Module, loss: Tensor) -> None:
        """Read off the graph which layers write the output."""
        if self.projector is not None and self.roles.are_open:
            self.projector.aim_at(self.roles.sort_out(trainer, module, loss))

    def before_step(self, trainer: "pl.Trainer", optimizer: torch.optim.Optimizer) -> None:
        """Note that a step is due."""
        if self._runs:
            self._watched.expect(trainer, optimizer)

    def _after_step(self, trainer: "pl.Trainer", index: int) -> None:
        """Project what this optimizer has just moved."""
        if self.projector is None:
            return
        if self.roles.have_changed(trainer):
            self.resolve(trainer, trainer.lightning_module)
        if self.roles.are_open:  # nobody has said where the backward pass began
            self.projector.aim_at(self.roles.sort_out(trainer, trainer.lightning_module, None))
        if not self.roles.trains(index):
            return
        step = self.steps[index] = self.steps.get(index, 0) + 1
        self._before_end, self._projected = None, False
        mine = self.roles.owned_by(index)
        position = self.position = self.timing.position(trainer, step)
        period = self.timing.period
        if period and step % period == 0 and position > self.timing.ramp.start_step:
            if mine:
                self.projector.project(position, mine)
            self.projections += 1
            self._projected = True
        elif mine and (self.masked or self.freeze_zero_groups):
            self.projector.hold(mine)

    def at_epoch_start(self, trainer: "pl.Trainer", module: "pl.LightningModule") -> None:
        """Project, mask and rewind where retraining begins; thin out an average that was swapped in."""
        if self.projector is None:
            return
        if self.timing.retrain_epoch == trainer.current_epoch and not self.masked:
            self.follow(trainer)
            self.projector.project(self.position + 1)
            self.projector.mask()
            self.masked = True
            self._rewind(trainer, module)
            self.projector.hold()
        elif self.timing.mode == "project" and averaged_modules(trainer):
            self.projector.thin_out(self.projector.targets)

    def at_batch_end(self, trainer: "pl.Trainer") -> None:
        """Project at the end of an epoch or of the fit where that is due; look at a GPU's norms now and then."""
        epochs = self.timing.every_n_epochs
        if self.projector is None:
            return
        self.roles.look_away()
        self._watched.settle(trainer)
        if self._waits:
            self._expect_layers(trainer, trainer.lightning_module)
        if epochs is not None and trainer.is_last_batch and (trainer.current_epoch + 1) % epochs == 0:
            self.follow(trainer)
            self.projector.project(self.position)
            self._projected = True
        self.finish(trainer)
        if trainer.is_last_batch or trainer.global_step % _LOOKED_AT == 0:
            self.projector.check_finite(wait=trainer.is_last_batch)

    def finish(self, trainer: "pl.Trainer") -> None:
        """Project where the fit is about to end, so that the last checkpoint is projected in every mode.

        What was there before stays in that checkpoint too, for a fit that resumes and goes on further.
        """
        if self.projector is None or self._projected or self.timing.mode != "project" or not self._runs:
            return
        if ends_now(trainer) and self.timing.ramp.at(self.position) > 0.0:
            self.follow(trainer)
            self._before_end = {t.name: t.view().clone() for t in self.projector.targets}
            self.projector.project(self.position)
            self._projected = True

    def at_end(self, trainer: "pl.Trainer") -> None:
        """Leave feasible weights, whatever was written over the module last."""
        if self.projector is None:
            return
        self.projector.aim_at([target for target in self.projector.targets if not target.is_gone])
        self.projector.rest()
        self.roles.close(trainer)
        late = not self._projected
        if self.masked:
            self.projector.hold()
        elif self.timing.mode == "project":
            if averaged_modules(trainer):
                self.projector.thin_out(self.projector.targets)
            self.projector.project(self.position)
            self._projected = True
        self.projector.check_finite()
        self.shortfalls.look_back(trainer, self.projector, self.position, masked=self.masked, late=late)
        self.stop()

    def swap_in_averages(self, trainer: "pl.Trainer") -> None:
        """Project the averages, which a validation is about to use; `swap_out_averages` takes that back."""
        if self.projector is not None and self._runs:
            self.averages.swap_in(trainer, self.projector)

    def swap_out_averages(self) -> None:
        """Put the averages back as they were: they go on as averages of what was trained."""
        self.averages.swap_out()

    def save(self, trainer: "pl.Trainer", module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Project the average in a checkpoint, and note how far the projection was then."""
        if self.projector is None:
            return
        part = self.timing.ramp.at(self.position) if self._projected else 0.0
        self.shortfalls.note_checkpoint(trainer, part)
        if "averaging_state" in checkpoint:
            self.averages.save(trainer, module, checkpoint, self.projector, ended=not self._runs)

    def load(self, trainer: "pl.Trainer", checkpoint: Mapping[str, Any]) -> None:
        """Take averages up as they were."""
        self._is_looked_at = trainer.state.fn != "fit"  # whoever tests a checkpoint does not go on from there
        self.averages.load(trainer, checkpoint)

    def log(self, trainer: "pl.Trainer", log_dict: Callable[..., None], prefix: str) -> None:
        """Log how sparse the parameters are, no more often than the Trainer logs, and at the end.

        An epoch may be a single batch, and a value costs Lightning as much as a small layer's training step.
        """
        if self.projector is None or not self.projector.targets:
            return
        step = trainer.global_step
        if self._logged_at < 0 or step - self._logged_at >= logging_period(trainer) or ends_now(trainer):
            self.follow(trainer)
            if self.projector.targets:
                log_sparsity(self.projector, log_dict, prefix)
            self._logged_at = step

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        if self.projector is None:
            return {}
        return {
            "projector": self.projector.state_dict(),
            "projections": self.projections,
            "steps": dict(self.steps),
            "position": self.position,
            "masked": self.masked,
            "first_weights": None if self.masked or self.first_weights is None else _whole(self.first_weights),
            "roles": self.roles.state_dict(),
            "before_end": None if self._before_end is None else _whole(self._before_end),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep the state until the fit starts; strategies that shard restore after that, but before training begins."""
        if state and not self._is_looked_at:
            self._restored = state
            self.projections, self.steps = state["projections"], dict(state["steps"])
            self.position, self.masked = state["position"], state["masked"]
            self.first_weights = state["first_weights"]
        self._is_looked_at = False

    @torch.no_grad()
    def _restore(self, projector: Projector, state: Mapping[str, Any]) -> None:
        projector.load_state_dict(state["projector"])
        for target in projector.targets:  # this fit goes on behind the end of the one that saved
            before = (state["before_end"] or {}).get(target.name)
            if before is not None:
                target.view().copy_(alike(before, target.view()))

    def _expect_layers(self, trainer: "pl.Trainer", module: nn.Module) -> None:
        """Refuse to project nothing, unless another callback is still to make layers or to thaw some."""
        self._waits = True
        states = [getattr(callback, "structure_state", None) for callback in every_callback(trainer)]
        if any(state() == "pending" for state in states if state is not None):
            return
        if self.roles.waiting and any(isinstance(callback, BaseFinetuning) for callback in every_callback(trainer)):
            self._waits = False
            return
        chosen = self.selection
        raise MisconfigurationException(
            nothing_found(self.name, module, chosen.patterns, chosen.module_types, chosen.groups)
        )

    def _rewind(self, trainer: "pl.Trainer", module: "pl.LightningModule") -> None:
        if self.timing.rewind == "none":
            return
        if self.timing.rewind == "init":
            weights: Mapping[str, Tensor] = self.first_weights or {}
        else:
            weights = load_checkpoint_file(self.timing.rewind, "cpu", None)["state_dict"]
        now = module.state_dict()
        other = {name: value for name, value in now.items() if not isinstance(value, Tensor)}  # a module's extra state
        kept = {name: alike(w, now[name]) if name in now else w for name, w in weights.items() if name not in other}
        module.load_state_dict(kept | other)
        self.first_weights = None
        for optimizer in trainer.optimizers:  # moments of other weights would push the rewound ones about
            optimizer.state.clear()


def _whole(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather shards, for one process writes the checkpoint for all."""
    return {name: gather(weight).cpu() for name, weight in weights.items()}
