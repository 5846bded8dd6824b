"""Find the cells that a model loops over, by watching one batch, and defer their calls from then on."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.recurrent.cell_step import is_torch_cell
from lightning_accel.recurrent.deferred.call_layout import CallLayout, flatten, learn_layout
from lightning_accel.recurrent.deferred.deferred_cell import DeferredCell, result_shapes
from lightning_accel.recurrent.deferred.deferred_tensor import custom_functions_get_values
from lightning_accel.recurrent.schedule_choice import Schedule, ScheduleChoice

_SIDE_BY_SIDE = 4
_LOOP = 3  # chained calls in one batch that make a loop


class _Watch:
    """What was seen of one module during the watched batch."""

    def __init__(self) -> None:
        self.recent: list[list[Any]] = []  # results of the last calls; several chains may run side by side
        self.layout: CallLayout | None = None
        self.chained = 0
        self.same = True
        self.call: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None
        self.shapes: list[tuple[int, ...]] | None = None
        self.inputs: list[tuple[Tensor, int]] = []

    def see(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        leaves: list[Any] = []
        flatten((args, kwargs), leaves)
        self.inputs += [(t, t._version) for t in leaves if isinstance(t, Tensor)]
        before = next((r for r in self.recent if any(t is p for t in leaves for p in r if isinstance(t, Tensor))), None)
        if before is not None:
            layout = learn_layout(args, kwargs, result, before)
            self.chained += 1
            if self.layout is None:
                self.layout, self.shapes = layout, result_shapes(result)
            self.same = self.same and layout == self.layout
            self.call = layout.split(leaves) if layout is not None else None
        results: list[Any] = []
        flatten(result, results)
        self.recent = [results, *self.recent[: _SIDE_BY_SIDE - 1]]

    @property
    def inputs_changed(self) -> bool:
        """Whether an input was changed in place after the call that took it."""
        return any(t._version != version for t, version in self.inputs)


class DeferredCells:
    """Defer the cells of a model.

    Args:
        root: The model.
        schedule: For every cell.
        apart_from: Names of modules that schedule the cells inside them themselves.

    Attributes:
        cells: What is deferred, by name.
        reasons: Why a cell that is called in a loop is not.
        calls_left: How many batches are to come, see `ScheduleChoice`.
    """

    def __init__(self, root: nn.Module, schedule: Schedule = "auto", apart_from: tuple[str, ...] = ()) -> None:
        self.root, self.schedule, self._apart_from = root, schedule, apart_from
        self.cells: dict[str, DeferredCell] = {}
        self.reasons: dict[str, str] = {}
        self.calls_left = math.inf
        self._watches: dict[str, _Watch] | None = None

    @property
    def decided(self) -> bool:
        """Whether it is known which cells to defer, from a watched batch or a saved state."""
        return self._watches is not None

    def state(self) -> dict[str, Any]:
        """Return what was decided, as plain values; `restore` repeats it without watching and measuring anew."""
        found = {}
        for name, cell in self.cells.items():
            layout = None if cell.native else dataclasses.asdict(cell.layout)
            found[name] = {
                "layout": layout,
                "shapes": [list(shape) for shape in cell.shapes],
                "choices": dict(cell.choice.choices),
                "reason": cell.reason,
            }
        return {"cells": found, "reasons": dict(self.reasons)}

    def restore(self, state: dict[str, Any]) -> None:
        """Repeat what was decided."""
        self._watches = {}
        self.reasons = dict(state["reasons"])
        for name, saved in state["cells"].items():
            cell = self.root.get_submodule(name)
            choice = self._choice(name, cell)
            choice.choices.update(saved["choices"])
            layout = None if saved["layout"] is None else CallLayout(**_as_tuples(saved["layout"]))
            self.cells[name] = DeferredCell(cell, choice, layout, [tuple(shape) for shape in saved["shapes"]])
            if saved["reason"]:
                self.cells[name].remove(saved["reason"])

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch the calls of the model's own modules; decide at the end."""
        self._watches = {}
        handles = []
        for name, module in self.root.named_modules():
            apart = any(name == other or name.startswith(f"{other}.") for other in self._apart_from)
            if is_torch_cell(module) and _is_compiled(self.root, name):
                self.reasons[name] = "it is compiled"
            elif name and not apart and _may_be_cell(module) and not _is_compiled(self.root, name):
                self._watches[name] = watch = _Watch()
                handles.append(module.register_forward_hook(_seeing(watch), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        with torch.enable_grad():
            self._decide(self._watches)
        for watch in self._watches.values():
            watch.__init__()  # type: ignore[misc]  # let go of the batch's tensors

    @contextmanager
    def active(self) -> Iterator[None]:
        """Defer calls inside."""
        running = [cell for cell in self.cells.values() if not cell.reason]
        if not running:
            yield
            return
        for cell in running:
            cell.active = True
        try:
            with custom_functions_get_values():
                yield
        finally:
            for cell in running:
                cell.active = False

    def remove(self) -> None:
        """Give every cell its own forward back."""
        for cell in self.cells.values():
            cell.remove()

    def _decide(self, watches: dict[str, _Watch]) -> None:
        loops = {n: w for n, w in watches.items() if w.chained >= _LOOP}
        torchs = {n for n in loops if is_torch_cell(self.root.get_submodule(n))}
        for name, watch in loops.items():
            cell = self.root.get_submodule(name)
            if name not in torchs and any(other.startswith(f"{name}.") for other in torchs):
                continue  # torch's cells inside have better kernels than the whole
            if any(name.startswith(f"{other}.") for other in (*self.cells, *self.reasons)):
                continue  # part of a cell
            choice = self._choice(name, cell)
            reason = self._refusal(watch, choice)
            if reason is not None:
                self.reasons[name] = reason
                continue
            self.cells[name] = DeferredCell(cell, choice, watch.layout, watch.shapes or ())

    def _choice(self, name: str, cell: nn.Module) -> ScheduleChoice:
        choice = ScheduleChoice(cell, self.schedule, name=name)
        choice.calls_left = self.calls_left
        return choice

    def _refusal(self, watch: _Watch, choice: ScheduleChoice) -> str | None:
        cell = choice.module
        if watch.inputs_changed:
            return "its loop changes an input in place after the call"
        if cell._backward_hooks or cell._backward_pre_hooks:
            return "it has backward hooks"
        if is_torch_cell(cell):
            return None
        if watch.layout is None or not watch.same or watch.shapes is None or watch.call is None:
            return "its calls differ in form"
        if any(len(watch.shapes) <= slot or slot < 0 for slot in watch.layout.state_slots):
            return "its states are no tensors that it returned"
        xs, states = ([t.detach() for t in group] for group in watch.call)
        return choice.refusal(watch.layout, xs, states)


def _as_tuples(layout: dict[str, Any]) -> dict[str, Any]:
    def deep(value: Any) -> Any:
        return tuple(deep(v) for v in value) if isinstance(value, (list, tuple)) else value

    return {name: deep(value) for name, value in layout.items()}


def _seeing(watch: _Watch) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if torch.is_grad_enabled():
            watch.see(args, kwargs, result)

    return hook


def _may_be_cell(module: nn.Module) -> bool:
    """Tell torch's cells and modules of the user's own; torch's other layers hold no state that is passed on."""
    return is_torch_cell(module) or not type(module).__module__.startswith("torch.")


def _is_compiled(root: nn.Module, name: str) -> bool:
    """Tell whether a module or one around it is compiled: its calls are not Python's to record."""
    module, path = root, [root]
    for part in name.split("."):
        module = module.get_submodule(part)
        path.append(module)
    marks = (
        "_compiled_call_impl",
        "_orig_mod",
        "_compiler_ctx",
    )  # the last one: a Trainer took the compiled wrapper off
    return any(getattr(m, mark, None) is not None for m in path for mark in marks)
