"""Averages of projected weights, which are not sparse: groups are zero there only where they always were."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_accel.callbacks.projection.selection import Selection
from lightning_accel.lightning_private import averaged_modules, every_callback
from lightning_accel.projection.training.projector import Projector
from lightning_accel.projection.training.targets import Target

RAW_AVERAGE = "lightning_accel_average_before_projection"


class ProjectedAverages:
    """What a projection callback does to the averages that `WeightAveraging` and its kind keep.

    They go on as averages of what was trained: they are thinned out only where they are used or saved.

    Args:
        selection: Finds the targets in an average.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self._swapped: list[tuple[Tensor, Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a run."""
        return {"selection": self.selection, "_swapped": []}

    def swap_in(self, trainer: "pl.Trainer", projector: Projector) -> None:
        """Project the averages, which a validation is about to use; `swap_out` takes that back."""
        self._swapped = []
        others = [o._swapped for o in _all_of(trainer) if o is not self]
        held = {id(average) for swapped in others for average, _ in swapped}
        for average in averaged_modules(trainer):
            targets = self._targets(average, projector)
            for target in targets:
                parameter = target.parameter
                if parameter is not None and id(parameter) not in held:  # another callback gives that back
                    self._swapped.append((parameter, parameter.detach().clone()))
            _project(projector, targets)

    @torch.no_grad()
    def swap_out(self) -> None:
        """Put the averages back as they were."""
        for average, before in self._swapped:
            average.copy_(before)
        self._swapped = []

    def save(
        self, trainer: "pl.Trainer", module: nn.Module, checkpoint: dict[str, Any], projector: Projector, *, ended: bool
    ) -> None:
        """Project the average in a checkpoint, and keep it as it was for those who resume.

        Args:
            trainer: Saves the checkpoint.
            module: Holds the average itself once the fit has ended.
            checkpoint: With the average's own tensors, which `WeightAveraging` put there.
            projector: Of the trained weights.
            ended: Whether the fit has.
        """
        weights = checkpoint["state_dict"]
        names = {
            name
            for average in averaged_modules(trainer)
            for target in self._targets(average, projector)
            for name, parameter in average.named_parameters()
            if parameter is target.parameter
        }
        raw = checkpoint.setdefault(RAW_AVERAGE, {})
        for name in names:
            raw.setdefault(name, weights[name].clone())  # another callback may have projected it since
        if ended:
            now = dict(module.named_parameters())
            weights |= {name: now[name].detach().clone() for name in names if name in now}
            return
        self.swap_in(trainer, projector)
        weights |= {name: weights[name].clone() for name in names}
        self.swap_out()

    def load(self, trainer: "pl.Trainer", checkpoint: Mapping[str, Any]) -> None:
        """Go on with the average as it was before it was projected into the checkpoint."""
        for average in averaged_modules(trainer):
            parameters = dict(average.named_parameters())
            for name, value in checkpoint.get(RAW_AVERAGE, {}).items():
                if name in parameters:
                    parameters[name].data.copy_(value)

    def _targets(self, average: nn.Module, projector: Projector) -> list[Target]:
        names = {target.name for target in projector.targets}
        return [target for target in self.selection.find(average) if target.name in names]


def _project(projector: Projector, targets: list[Target]) -> None:
    """Do to an average what was done to the weights: their mask, or as many zero groups."""
    if any(memory.kept is not None for memory in projector.memories.values()):
        Projector(targets, projector.ball, memories=projector.memories).hold()
    else:
        projector.thin_out(targets)


def _all_of(trainer: "pl.Trainer") -> list[ProjectedAverages]:
    runs = (getattr(callback, "_run", None) for callback in every_callback(trainer))
    found = (getattr(run, "averages", None) for run in runs)
    return [averages for averages in found if isinstance(averages, ProjectedAverages)]
