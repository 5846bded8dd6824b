"""PyTorch Lightning plugins that make the training of any LightningModule faster or its result smaller.

Importing this package imports neither torch nor Lightning; public names load on first use (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING

from lightning_accel.strategies.registration import register_by_name

if TYPE_CHECKING:  # what type checkers and editors see; at run time names load on first use
    __version__: str
    from lightning_accel.callbacks import IntraStreamScheduling as IntraStreamScheduling
    from lightning_accel.callbacks import L1InfProjection as L1InfProjection
    from lightning_accel.callbacks import MultilevelProjection as MultilevelProjection
    from lightning_accel.callbacks import RankQuantization as RankQuantization
    from lightning_accel.callbacks import SequentialFreezing as SequentialFreezing
    from lightning_accel.callbacks import StatefulStreams as StatefulStreams
    from lightning_accel.callbacks import enable_low_rank_loading as enable_low_rank_loading
    from lightning_accel.callbacks import load_from_checkpoint as load_from_checkpoint
    from lightning_accel.cli.export.model_file import export as export
    from lightning_accel.strategies import AsyncSGDStrategy as AsyncSGDStrategy

_HOMES = {
    "AsyncSGDStrategy": "lightning_accel.strategies",
    "IntraStreamScheduling": "lightning_accel.callbacks",
    "L1InfProjection": "lightning_accel.callbacks",
    "MultilevelProjection": "lightning_accel.callbacks",
    "RankQuantization": "lightning_accel.callbacks",
    "SequentialFreezing": "lightning_accel.callbacks",
    "StatefulStreams": "lightning_accel.callbacks",
    "enable_low_rank_loading": "lightning_accel.callbacks",
    "export": "lightning_accel.cli.export.model_file",
    "load_from_checkpoint": "lightning_accel.callbacks",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604  # names of the table are strings

register_by_name()  # `strategy="async_sgd"`


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version  # takes as long as all else here, and every Hydra app imports this

        return version("lightning-accel")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
