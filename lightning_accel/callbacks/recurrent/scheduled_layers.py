"""What intra-stream scheduling finds in a model and does to it, apart from when."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_accel.recurrent.deferred.find_cells import DeferredCells
from lightning_accel.recurrent.instance_forward import InstanceForward
from lightning_accel.recurrent.module import Recurrent
from lightning_accel.recurrent.packed.run_padded import RunPackedPadded
from lightning_accel.recurrent.schedule_choice import Schedule


class ScheduledLayers:
    """The recurrent layers of one model, attached to their schedules.

    Args:
        model: Whose layers.
        schedule: For `Recurrent` layers and deferred cells.
        packed: Whether packed ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` run padded.
        deferred_cells: Whether loops over cells are deferred.
        calls_left: How many batches are to come; schedules that have to be compiled must pay within them.
    """

    def __init__(
        self, model: nn.Module, *, schedule: Schedule, packed: bool, deferred_cells: bool, calls_left: float = math.inf
    ) -> None:
        named = dict(model.named_modules())
        self.recurrent = {n: m for n, m in named.items() if isinstance(m, Recurrent)}
        self.layers = {n: m for n, m in named.items() if isinstance(m, nn.RNNBase)}
        self.padded: dict[str, int] = {}
        self._forwards: list[InstanceForward] = []
        self.deferred: DeferredCells | None = None
        self._schedule_of = {n: [choice.schedule for choice in layer.schedules] for n, layer in self.recurrent.items()}
        for layer in self.recurrent.values():
            for choice in layer.schedules:
                choice.calls_left = calls_left
                if choice.schedule == "auto":
                    choice.schedule = schedule
        if packed and schedule != "loop":
            self._forwards = [self._padded(name, layer) for name, layer in self.layers.items()]
        if deferred_cells and schedule != "loop":
            self.deferred = DeferredCells(model, schedule, apart_from=tuple(self.recurrent))
            self.deferred.calls_left = calls_left

    @contextmanager
    def training_step(self) -> Iterator[None]:
        """Watch the first step, defer cells in the later ones."""
        if self.deferred is None:
            yield
            return
        with self.deferred.active() if self.deferred.decided else self.deferred.watch():
            yield

    @property
    def found_nothing(self) -> bool:
        """Whether there is no recurrent layer, as far as is known after the first step."""
        cells = self.deferred is not None and bool(self.deferred.cells or self.deferred.reasons)
        return not (self.recurrent or self.layers or cells)

    def state(self) -> dict[str, Any]:
        """Return what was chosen, as plain values."""
        chosen = {n: [dict(c.choices) for c in layer.schedules] for n, layer in self.recurrent.items()}
        decided = self.deferred.state() if self.deferred is not None and self.deferred.decided else None
        return {"recurrent": chosen, "deferred": decided}

    def restore(self, state: dict[str, Any]) -> None:
        """Repeat what was chosen."""
        for name, choices in state["recurrent"].items():
            if name in self.recurrent:
                for choice, saved in zip(self.recurrent[name].schedules, choices, strict=True):
                    choice.choices.update(saved)
        if self.deferred is not None and state["deferred"] is not None:
            self.deferred.restore(state["deferred"])

    def report(self) -> list[str]:
        """Say what runs how, one line a layer."""
        lines = []
        for name, layer in self.recurrent.items():
            for choice in layer.schedules:
                lines += [f"{name}: {used} ({key})" for key, used in choice.choices.items()]
        for name in self.layers:
            calls = self.padded.get(name, 0)
            lines.append(
                f"{name}: {calls} packed calls run padded" if calls else f"{name}: torch's kernel, nothing to gain"
            )
        if self.deferred is not None:
            for name, cell in self.deferred.cells.items():
                used = ", ".join(sorted(set(cell.choice.choices.values())))
                speed = max(cell.choice.speed.values(), default=float("nan"))
                said = f"{cell.chains} chains of {cell.steps} steps, {used} (measured {speed:.1f} times the loop)"
                lines.append(f"{name}: plain, {cell.reason}" if cell.reason else f"{name}: {said}")
            lines += [f"{name}: plain, {reason}" for name, reason in self.deferred.reasons.items()]
        return lines

    def remove(self) -> None:
        """Leave the model as it was."""
        for forward in self._forwards:
            forward.remove()
        if self.deferred is not None:
            self.deferred.remove()
        for name, schedules in self._schedule_of.items():
            for choice, schedule in zip(self.recurrent[name].schedules, schedules, strict=True):
                choice.schedule = schedule

    def _padded(self, name: str, layer: nn.Module) -> InstanceForward:
        def call(*args: Any, **kwargs: Any) -> Any:
            with RunPackedPadded() as mode:
                result = forward.original(*args, **kwargs)
            if mode.replaced:
                self.padded[name] = self.padded.get(name, 0) + mode.replaced
            return result

        forward = InstanceForward(layer, call)
        return forward
