"""Lightning callbacks, one accelerator a file; each loads on first use (PEP 562)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors see; at run time names load on first use
    from lightning_accel.callbacks.layer_exchange.loading import load_from_checkpoint as load_from_checkpoint
    from lightning_accel.callbacks.layer_exchange.structure import enable_low_rank_loading as enable_low_rank_loading
    from lightning_accel.callbacks.projection.group_sparsity import GroupSparsity as GroupSparsity
    from lightning_accel.callbacks.projection.l1inf_projection import L1InfProjection as L1InfProjection
    from lightning_accel.callbacks.projection.multilevel_projection import MultilevelProjection as MultilevelProjection
    from lightning_accel.callbacks.rank_quantization.callback import RankQuantization as RankQuantization
    from lightning_accel.callbacks.recurrent.intra_stream_scheduling import (
        IntraStreamScheduling as IntraStreamScheduling,
    )
    from lightning_accel.callbacks.recurrent.stateful_streams import StatefulStreams as StatefulStreams
    from lightning_accel.callbacks.sequential_freezing.callback import SequentialFreezing as SequentialFreezing

_HOMES = {
    "GroupSparsity": "projection.group_sparsity",
    "IntraStreamScheduling": "recurrent.intra_stream_scheduling",
    "L1InfProjection": "projection.l1inf_projection",
    "MultilevelProjection": "projection.multilevel_projection",
    "RankQuantization": "rank_quantization.callback",
    "SequentialFreezing": "sequential_freezing.callback",
    "StatefulStreams": "recurrent.stateful_streams",
    "enable_low_rank_loading": "layer_exchange.structure",
    "load_from_checkpoint": "layer_exchange.loading",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
