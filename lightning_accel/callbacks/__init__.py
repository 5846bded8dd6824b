"""Lightning callbacks, one accelerator a file; each loads on first use (PEP 562)."""

from importlib import import_module

_HOMES = {
    "GroupSparsity": "projection.group_sparsity",
    "IntraStreamScheduling": "recurrent.intra_stream_scheduling",
    "L1InfProjection": "projection.l1inf_projection",
    "MultilevelProjection": "projection.multilevel_projection",
    "RankQuantization": "rank_quantization.callback",
    "SequentialFreezing": "sequential_freezing.callback",
    "StatefulStreams": "recurrent.stateful_streams",
    "enable_low_rank_loading": "layer_exchange.structure",
    "load_from_checkpoint": "layer_exchange.structure",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
