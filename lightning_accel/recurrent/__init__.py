"""Intra-stream scheduling of recurrent networks (arXiv:1503.02852): only loops run step by step.

The graph part imports the standard library only, so public names load on first use (PEP 562).
"""

from importlib import import_module

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
