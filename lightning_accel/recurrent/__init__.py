"""Intra-stream scheduling of recurrent networks (arXiv:1503.02852): only loops run step by step.

The graph part imports the standard library only, so public names load on first use (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors see; at run time names load on first use
    from lightning_accel.recurrent.cells import CoupledGateLSTMCell as CoupledGateLSTMCell
    from lightning_accel.recurrent.cells import FeedbackLSTMCell as FeedbackLSTMCell
    from lightning_accel.recurrent.cells import LayerNormLSTMCell as LayerNormLSTMCell
    from lightning_accel.recurrent.cells import MinGRUCell as MinGRUCell
    from lightning_accel.recurrent.cells import OutputGRUCell as OutputGRUCell
    from lightning_accel.recurrent.cells import PeepholeLSTMCell as PeepholeLSTMCell
    from lightning_accel.recurrent.cells import ZoneoutLSTMCell as ZoneoutLSTMCell
    from lightning_accel.recurrent.compiler.executor import StepSchedule as StepSchedule
    from lightning_accel.recurrent.drawing import schedule_svg as schedule_svg
    from lightning_accel.recurrent.drawing import schedule_text as schedule_text
    from lightning_accel.recurrent.graph import Edge as Edge
    from lightning_accel.recurrent.graph import Node as Node
    from lightning_accel.recurrent.graph import RecurrentGraph as RecurrentGraph
    from lightning_accel.recurrent.graph import Stage as Stage
    from lightning_accel.recurrent.graph_rnn import GraphCell as GraphCell
    from lightning_accel.recurrent.graph_rnn import GraphRNN as GraphRNN
    from lightning_accel.recurrent.module import Recurrent as Recurrent
    from lightning_accel.recurrent.packed.run_padded import RunPackedPadded as RunPackedPadded
    from lightning_accel.recurrent.scan import linear_scan as linear_scan

_HOMES = {
    "CoupledGateLSTMCell": "cells",
    "Edge": "graph",
    "FeedbackLSTMCell": "cells",
    "GraphCell": "graph_rnn",
    "GraphRNN": "graph_rnn",
    "LayerNormLSTMCell": "cells",
    "MinGRUCell": "cells",
    "Node": "graph",
    "OutputGRUCell": "cells",
    "PeepholeLSTMCell": "cells",
    "Recurrent": "module",
    "RecurrentGraph": "graph",
    "RunPackedPadded": "packed.run_padded",
    "Stage": "graph",
    "StepSchedule": "compiler.executor",
    "ZoneoutLSTMCell": "cells",
    "linear_scan": "scan",
    "schedule_svg": "drawing",
    "schedule_text": "drawing",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
