"""What intra-stream scheduling finds in a model and does to it, apart from when."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.utils.rnn import PackedSequence

from lightning_accel.recurrent.deferred.deferred_cell import DeferredCell
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
        deferred_cells: Whether loops over cells are computed at their first calls.
        calls_left: How many batches are to come; schedules that have to be compiled must pay within them.
        checked: Whether `Recurrent` layers and packed ones wait until a whole training step with them was compared.

    Attributes:
        waiting: Whether they still do.
        reason: Why they run plainly; empty if they do not.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        schedule: Schedule,
        packed: bool,
        deferred_cells: bool,
        calls_left: float = math.inf,
        checked: bool = False,
    ) -> None:
        named = dict(model.named_modules())
        self.recurrent = {n: m for n, m in named.items() if isinstance(m, Recurrent)}
        self.layers = {n: m for n, m in named.items() if isinstance(m, nn.RNNBase)}
        self.padded: dict[str, int] = {}
        self._forwards: list[InstanceForward] = []
        self.deferred: DeferredCells | None = None
        self._compared: set[str] = set()
        self._schedule_of = {n: [choice.schedule for choice in layer.schedules] for n, layer in self.recurrent.items()}
        for layer in self.recurrent.values():
            for choice in layer.schedules:
                choice.calls_left = calls_left
                if choice.schedule == "auto":
                    choice.schedule = schedule
        self._wanted = {n: [choice.schedule for choice in layer.schedules] for n, layer in self.recurrent.items()}
        self._packed: set[str] = set()
        self.waiting, self.reason = False, ""
        if checked and schedule != "loop":
            self._wait()
        if packed and schedule != "loop":
            self._forwards = [self._padded(name, layer) for name, layer in self.layers.items()]
        if deferred_cells and schedule != "loop":
            self.deferred = DeferredCells(model, schedule, apart_from=tuple(self.recurrent))
            self.deferred.calls_left = calls_left

    @contextmanager
    def training_step(self) -> Iterator[None]:
        """Watch modules of which nothing is known yet; compute the loops of those that were compared."""
        if self.deferred is None:
            yield
            return
        with self.deferred.watch(), self.deferred.active(tuple(self._compared)):
            yield

    def _wait(self) -> None:
        self.waiting = True
        for layer in self.recurrent.values():
            for choice in layer.schedules:
                choice.schedule = "loop"

    @property
    def layers_to_compare(self) -> list[str]:
        """Return the `Recurrent` layers, and those seen to get packed sequences, that wait for a comparison."""
        if not self.waiting:
            return []
        gain = [name for name, wanted in self._wanted.items() if set(wanted) != {"loop"}]
        return [*gain, *sorted(self._packed)]

    @contextmanager
    def layers_scheduled(self, copy: nn.Module) -> Iterator[None]:
        """Run the layers of a copy of the model as those of the model would, compared or not."""
        for name, layer in self.recurrent.items():
            for choice, schedule in zip(layer.schedules, self._wanted[name], strict=True):
                choice.schedule = schedule
            twin = copy.get_submodule(name)
            assert isinstance(twin, Recurrent)
            twin.ask(layer)
        padded = [self._padded(n, copy.get_submodule(n), apart=True) for n in (self.layers if self._forwards else ())]
        try:
            yield
        finally:
            for forward in padded:
                forward.remove()
            if self.waiting:
                self._wait()

    def decide_layers(self, reason: str | None) -> None:
        """Let the layers run scheduled from now on; with a reason, plainly for good."""
        self.waiting, self.reason = False, reason or ""
        for name, layer in self.recurrent.items():
            for choice, schedule in zip(layer.schedules, self._wanted[name], strict=True):
                choice.schedule = "loop" if reason else schedule
        if reason:
            for forward in self._forwards:
                forward.remove()

    @property
    def to_compare(self) -> dict[str, DeferredCell]:
        """Return the cells that must not be computed before a whole training step was compared."""
        cells = {} if self.deferred is None else self.deferred.cells
        for name, cell in cells.items():
            if cell.doubt and not cell.reason:
                self._compared.discard(name)
        return {name: cell for name, cell in cells.items() if name not in self._compared and not cell.reason}

    @contextmanager
    def scheduled(self, copy: nn.Module) -> Iterator[None]:
        """Compute the loops of a copy of the model as those of the model would be, compared or not."""
        if self.deferred is None:
            yield
            return
        twin = self.deferred.twin(copy)
        try:
            with twin.active():
                yield
        finally:
            twin.remove()
        failed = [f"`{name}`: {cell.reason}" for name, cell in twin.cells.items() if cell.is_fault]
        if failed:
            raise RuntimeError("; ".join(failed))

    def expect(self, calls_left: float) -> None:
        """Note anew how many batches are to come."""
        for layer in self.recurrent.values():
            for choice in layer.schedules:
                choice.calls_left = calls_left
        if self.deferred is not None:
            self.deferred.calls_left = calls_left
            for cell in self.deferred.cells.values():
                cell.choice.calls_left = calls_left

    def confirm(self) -> None:
        """Note that a whole training step was compared, and that it computes the same."""
        for name, cell in self.to_compare.items():
            cell.doubt = ""
            self._compared.add(name)

    def refuse(self, reason: str) -> list[str]:
        """Leave what was not compared plain; return its names."""
        cells = self.to_compare
        for cell in cells.values():
            cell.remove(reason)
        return list(cells)

    @property
    def may_find(self) -> bool:
        """Whether there is anything that is, or may turn out to be, recurrent."""
        return bool(self.recurrent or self.layers or self.deferred is None or self.deferred.candidates)

    @property
    def found_nothing(self) -> bool:
        """Whether no recurrent layer was seen so far."""
        deferred = self.deferred
        cells = deferred is not None and bool(deferred.cells or deferred.reasons or deferred.torch_cells)
        return not (self.recurrent or self.layers or cells)

    def state(self) -> dict[str, Any]:
        """Return what was chosen, as plain values."""
        chosen = {n: [dict(c.choices) for c in layer.schedules] for n, layer in self.recurrent.items()}
        layers = {"waiting": self.waiting, "reason": self.reason}
        deferred = None if self.deferred is None else self.deferred.state()
        return {"recurrent": chosen, "layers": layers, "deferred": deferred}

    def restore(self, state: dict[str, Any]) -> None:
        """Repeat what was chosen."""
        for name, choices in state["recurrent"].items():
            if name in self.recurrent:
                for choice, saved in zip(self.recurrent[name].schedules, choices, strict=True):
                    choice.choices.update(saved)
        layers = state.get("layers", {"waiting": False, "reason": ""})
        if layers["waiting"]:
            self._wait()
        else:
            self.decide_layers(layers["reason"])
        if self.deferred is not None and state["deferred"] is not None:
            self.deferred.restore(state["deferred"])

    def report(self) -> list[str]:
        """Say what runs how, one line a layer."""
        lines = []
        for name, layer in self.recurrent.items():
            if self.reason:
                lines.append(f"{name}: plain, {self.reason}")
                continue
            for choice in layer.schedules:
                lines += [f"{name}: {used} ({key})" for key, used in choice.choices.items()]
        for name in self.layers:
            calls = self.padded.get(name, 0)
            if self.reason and name in self._packed:
                lines.append(f"{name}: plain, {self.reason}")
                continue
            lines.append(
                f"{name}: {calls} packed calls run padded" if calls else f"{name}: torch's kernel, nothing to gain"
            )
        if self.deferred is not None:
            lines += [f"{name}: {_said(cell)}" for name, cell in self.deferred.cells.items()]
            lines += [f"{name}: plain, {reason}" for name, reason in self.deferred.reasons.items()]
            known = {**self.deferred.cells, **self.deferred.reasons}
            for name in self.deferred.torch_cells:
                if name not in known:
                    calls = self.deferred.called.get(name, 0)
                    seen = f"called {calls} times in a step, not in a loop" if calls else "not called with gradients"
                    lines.append(f"{name}: plain, {seen}")
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

    def _padded(self, name: str, layer: nn.Module, *, apart: bool = False) -> InstanceForward:
        """Stand before a layer's forward; ``apart`` neither waits nor counts, for a copy."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.waiting and not apart:
                if any(isinstance(value, PackedSequence) for value in (*args, *kwargs.values())):
                    self._packed.add(name)
                return forward.original(*args, **kwargs)
            with RunPackedPadded() as mode:
                result = forward.original(*args, **kwargs)
            if mode.replaced and not apart:
                self._packed.add(name)
                self.padded[name] = self.padded.get(name, 0) + mode.replaced
            return result

        forward = InstanceForward(layer, call)
        return forward


def _said(cell: DeferredCell) -> str:
    if cell.reason:
        return f"plain, {cell.reason}"
    if not cell.chains:
        return f"plain, {cell.idle or 'its loops are not compared with the plain ones yet'}"
    used = ", ".join(sorted(set(cell.choice.choices.values())))
    speed = max(cell.choice.speed.values(), default=None)
    measured = "" if speed is None else f" (measured {speed:.1f} times the loop)"
    return f"{cell.chains} chains of {cell.steps} steps, {used}{measured}"
