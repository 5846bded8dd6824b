"""What every recurrent layer would run as."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_accel.callbacks.recurrent.intra_stream_scheduling import IntraStreamScheduling
from lightning_accel.callbacks.recurrent.scheduled_layers import ScheduledLayers
from lightning_accel.cli.errors import UsageError
from lightning_accel.cli.plan import Scene
from lightning_accel.recurrent.deferred.deferred_cell import DeferredCell
from lightning_accel.recurrent.drawing import schedule_svg, schedule_text
from lightning_accel.recurrent.graph import RecurrentGraph
from lightning_accel.recurrent.graph_rnn import GraphCell
from lightning_accel.recurrent.module import Recurrent
from lightning_accel.recurrent.schedule_choice import ScheduleChoice


@dataclass
class Seen:
    """What was found in the step.

    Attributes:
        lines: A line a layer.
        graphs: Layers that were given as a graph.
        nothing: Whether there is no recurrent layer.
    """

    lines: list[str] = field(default_factory=list)
    graphs: dict[str, RecurrentGraph] = field(default_factory=dict)
    nothing: bool = False


@contextmanager
def watch(module: nn.Module, settings: dict[str, Any]) -> Iterator[Seen]:
    """Watch a training step as the callback does its first one, then measure what it would run in the next."""
    callback, seen, calls = IntraStreamScheduling(**settings), Seen(), _Calls(module)
    layers = ScheduledLayers(
        module, schedule=callback.schedule, packed=callback.packed, deferred_cells=callback.deferred_cells
    )
    try:
        with layers.training_step():
            try:
                yield seen
            finally:
                calls.stop()  # before cells are judged by the hooks they have
    finally:
        layers.remove()
    seen.nothing = layers.found_nothing and callback.schedule != "loop"
    for name, layer in layers.recurrent.items():
        if isinstance(layer.cell, GraphCell):
            seen.graphs[name] = layer.cell.graph
        seen.lines += [f"{name}: {_measured(choice)}" for choice in layer.schedules]
    for name in layers.layers:
        count = layers.padded.get(name, 0)
        packed = f"{count} packed calls a step would run padded"
        seen.lines.append(f"{name}: {packed if count else 'no packed call to speed up, runs as it is'}")
    if layers.deferred is not None:
        for name, cell in layers.deferred.cells.items():
            seen.lines.append(f"{name}: {_looped(cell, calls, name)}")
        seen.lines += [f"{name}: called in a loop, stays plain: {why}" for name, why in layers.deferred.reasons.items()]


def sketch(scene: Scene) -> None:
    """Print a line a layer, and the schedule of each layer that is a graph, which is drawn as SVG too.

    Raises:
        UsageError: If there is no recurrent layer.
    """
    seen: Seen = scene.seen
    if seen.nothing:
        raise UsageError(
            f"`callbacks.intra_stream_scheduling` finds no recurrent layer in {type(scene.module).__name__}: no "
            "Recurrent, GraphRNN, nn.LSTM, nn.GRU or nn.RNN, and no cell that is called in a loop."
        )

    def say(text: str) -> None:
        scene.console.print(text, markup=False, soft_wrap=True)

    for line in seen.lines or ["The plain loop everywhere: nothing would change."]:
        say(line)
    for name, graph in seen.graphs.items():
        path = scene.folder / f"schedule_{name}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(schedule_svg(graph), encoding="utf-8")
        say(f"{name}, layer by layer (drawn in {os.path.relpath(path)}):")
        say(schedule_text(graph))
    say("Schedules are chosen anew when training starts, once for each kind of call.")


class _Calls:
    """How often each module was called, and with what the last time.

    What lies inside a layer that schedules itself is not watched: with hooks on its parts it runs plainly.
    """

    def __init__(self, root: nn.Module) -> None:
        self.count: dict[str, int] = {}
        self.last: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        scheduled = {part for m in root.modules() if isinstance(m, Recurrent) for part in m.modules()}
        watched = [(n, m) for n, m in root.named_modules() if n and m not in scheduled]
        self._hooks = [m.register_forward_hook(self._noting(n), with_kwargs=True) for n, m in watched]

    def _noting(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
            self.count[name] = self.count.get(name, 0) + 1
            self.last[name] = args, kwargs

        return hook

    def stop(self) -> None:
        """Note no more."""
        for hook in self._hooks:
            hook.remove()


def _looped(cell: DeferredCell, calls: _Calls, name: str) -> str:
    count = calls.count[name]
    with torch.enable_grad():
        cell.choose(*calls.last[name], count)
    return f"called in a loop, {count} times a step; recorded calls: {_measured(cell.choice)}"


def _measured(choice: ScheduleChoice) -> str:
    """Say which schedule was chosen, what was measured, and why there is none of ours."""
    if not choice.choices:
        return "not called with gradients in this step"
    parts = []
    for key, used in choice.choices.items():
        speed = choice.speed.get(key)
        parts.append(used if speed is None else f"{used} ({speed:.1f} times as fast as the loop)")
    reason = choice.refusals.get("intra_stream")
    return ", ".join(parts) + (f"; no intra-stream schedule: {reason}" if reason else "")
