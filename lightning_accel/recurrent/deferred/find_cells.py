"""Find the cells that a model loops over, by watching its training steps, and answer their calls from then on."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_accel.recurrent.cell_step import is_torch_cell
from lightning_accel.recurrent.deferred.call_layout import CallLayout, as_plain, as_tuples, torch_layout
from lightning_accel.recurrent.deferred.deferred_cell import DeferredCell
from lightning_accel.recurrent.deferred.feeds import FeedForm
from lightning_accel.recurrent.deferred.kernel import Kernel
from lightning_accel.recurrent.deferred.watch import LOOP, Origins, Watch, seeing
from lightning_accel.recurrent.schedule_choice import Schedule, ScheduleChoice
from lightning_accel.torch_private import HOOK_DICTIONARIES, global_hooks

_ALWAYS = 8  # batches that are watched; of the later ones, those whose number is a power of two
_WEIGHTS = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}
_CELL_TYPES = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)


class DeferredCells:
    """Find the loops of a model over its cells and compute them at their first calls.

    Args:
        root: The model.
        schedule: For every cell.
        apart_from: Names of modules that schedule the cells inside them themselves.

    Attributes:
        cells: What is computed so, by name.
        reasons: Why a cell that is called in a loop is not.
        torch_cells: Names of all of torch's cells.
        called: How often the others that are cells, or look like ones, were called in a batch, by name.
        calls_left: How many batches are to come, see `ScheduleChoice`.
    """

    def __init__(self, root: nn.Module, schedule: Schedule = "auto", apart_from: tuple[str, ...] = ()) -> None:
        self.root, self.schedule, self._apart_from = root, schedule, apart_from
        self.cells: dict[str, DeferredCell] = {}
        self.reasons: dict[str, str] = {}
        self.called: dict[str, int] = {}
        self.calls_left = math.inf
        self.torch_cells = [
            name
            for name, module in root.named_modules()
            if isinstance(module, _CELL_TYPES) and not any(name.startswith(f"{other}.") for other in apart_from)
        ]
        self._batches = 0

    @property
    def candidates(self) -> dict[str, nn.Module]:
        """Return the modules of which nothing is known yet and that may be cells."""
        known = {**self.cells, **self.reasons}
        return {
            name: module
            for name, module in self.root.named_modules()
            if name
            and _may_be_cell(module)
            and not any(name == other or name.startswith(f"{other}.") for other in (*self._apart_from, *known))
        }

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch the calls of the model's own modules, if this batch is one to watch; decide at the end."""
        self._batches += 1
        due = self._batches <= _ALWAYS or self._batches & (self._batches - 1) == 0
        watches, handles, origins = [], [], Origins()
        for name, module in self.candidates.items() if due else ():
            if is_compiled(self.root, name):
                if isinstance(module, _CELL_TYPES):
                    self.reasons[name] = "it is compiled"
                continue
            watch = Watch(name, module, origins)
            watches.append(watch)
            before, after = seeing(watch)
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._decide(watches)
            for watch in watches:
                watch.forget()

    @contextmanager
    def active(self, names: Sequence[str] | None = None) -> Iterator[None]:
        """Answer calls inside; of the cells with these names, by default of all."""
        running = [c for name, c in self.cells.items() if not c.reason and (names is None or name in names)]
        for cell in running:
            cell.begin()
        try:
            yield
        finally:
            for cell in running:
                cell.end()

    def remove(self) -> None:
        """Give every cell its own forward back."""
        for cell in self.cells.values():
            cell.remove()

    def twin(self, root: nn.Module) -> "DeferredCells":
        """Return the same for a copy of the model; what was compiled serves both."""
        twin = DeferredCells(root, self.schedule, self._apart_from)
        for name, cell in self.cells.items():
            if not cell.reason:
                copied = root.get_submodule(name)
                twin.cells[name] = DeferredCell(copied, cell.kernel.for_copy(copied), cell.forms)
                twin.cells[name].lengths = list(cell.lengths)
        return twin

    def state(self) -> dict[str, Any]:
        """Return what was decided, as plain values; `restore` repeats it without watching and measuring anew."""
        found = {}
        for name, cell in self.cells.items():
            found[name] = {
                "layout": None if cell.native else as_plain(dataclasses.asdict(cell.layout)),
                "forms": [[[form.kind, form.stride] for form in forms] for forms in cell.forms],
                "lengths": [list(length) for length in cell.lengths],
                "choices": dict(cell.choice.choices),
                "reason": cell.reason,
            }
        return {"cells": found, "reasons": dict(self.reasons), "batches": self._batches}

    def restore(self, state: dict[str, Any]) -> None:
        """Repeat what was decided, of the cells that the model still has."""
        self._batches = state["batches"]
        self.reasons = dict(state["reasons"])
        modules = dict(self.root.named_modules())
        for name, saved in state["cells"].items():
            if name not in modules or is_compiled(self.root, name):
                continue
            cell = modules[name]
            try:
                layout = torch_layout(cell) if saved["layout"] is None else _layout_of(saved["layout"])
            except (AttributeError, ImportError):  # a class that calls hold is gone
                continue
            choice = self._choice(name, cell)
            choice.choices.update(saved["choices"])
            forms = [tuple(FeedForm(kind, stride) for kind, stride in loop) for loop in saved["forms"]]
            self.cells[name] = made = DeferredCell(cell, Kernel(layout, choice), forms)
            made.lengths = [(used, over) for used, over in saved["lengths"]]
            if saved["reason"]:
                made.remove(saved["reason"])

    def _decide(self, watches: list[Watch]) -> None:
        loops = {w.name: w for w in watches if w.chained >= LOOP}
        inner = {name for name in loops if isinstance(self.root.get_submodule(name), _CELL_TYPES)}
        for name, watch in loops.items():
            if name not in inner and any(other.startswith(f"{name}.") for other in inner):
                continue  # torch's cells inside have better kernels than the whole
            if any(name.startswith(f"{other}.") for other in (*self.cells, *self.reasons)):
                continue  # part of a cell
            choice = self._choice(name, watch.module)
            try:
                reason = _refusal(watch)
            except Exception as error:
                reason = f"looking at it failed: {type(error).__name__}: {error}"
            if reason:
                self.reasons[name] = reason
                continue
            assert watch.layout is not None
            self.cells[name] = made = DeferredCell(watch.module, Kernel(watch.layout, choice), watch.forms())
            made.lengths = watch.lengths()
        for watch in watches:
            if watch.name in self.cells or watch.name in self.reasons:
                self.called.pop(watch.name, None)
            elif watch.is_changed:
                self.reasons[watch.name] = (
                    "its state is changed between the steps (masked, detached, scaled or copied), "
                    "so that a step is not known before the one before it"
                )
            elif watch.calls and isinstance(watch.module, _CELL_TYPES):
                self.called[watch.name] = watch.calls

    def _choice(self, name: str, cell: nn.Module) -> ScheduleChoice:
        choice = ScheduleChoice(cell, self.schedule, name=name)
        choice.calls_left = self.calls_left
        return choice


def _refusal(watch: Watch) -> str | None:
    """Say why a module that is called in a loop can not be computed at once."""
    cell = watch.module
    if heard := listeners(cell):
        return heard
    if is_torch_cell(cell) and (set(cell._parameters) != _WEIGHTS or list(cell.children())):
        return "its weights are computed from others"
    if any(dim < 2 or streams != watch.specs[0][1] or kind != watch.specs[0][2] for dim, streams, kind in watch.specs):
        return "its results are not all of one type and shape (B, ...)"
    if watch.problem:
        return watch.problem
    return None if watch.forms() else "its calls differ in form"


def listeners(cell: nn.Module) -> str | None:
    """Say which hooks see every call of a cell or of a module inside it."""
    for name, module in cell.named_modules():
        for kind in HOOK_DICTIONARIES:
            if module.__dict__.get(kind) and (name or kind != "_forward_hooks"):
                return f"{f'`{name}` inside it' if name else 'it'} has {kind.strip('_').replace('_', ' ')}"
    everywhere = global_hooks()
    return None if everywhere is None else f"there are {everywhere}"


def is_compiled(root: nn.Module, name: str) -> bool:
    """Tell whether a module or one around it is compiled: its calls are not Python's to answer."""
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


def _may_be_cell(module: nn.Module) -> bool:
    """Tell torch's cells and modules of the user's own; torch's other layers hold no state that is passed on."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return isinstance(module, _CELL_TYPES) or not type(module).__module__.startswith("torch.")


def _layout_of(saved: dict[str, Any]) -> CallLayout:
    return CallLayout(**{name: as_tuples(value) for name, value in saved.items()})
