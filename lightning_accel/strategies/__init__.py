"""Strategies: how the processes of a Trainer work together. Public names load on first use."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_accel.strategies.for_lightning import AsyncSGDStrategy as AsyncSGDStrategy

__all__ = ["AsyncSGDStrategy"]  # loaded on first use


def __getattr__(name: str) -> object:
    if name == "AsyncSGDStrategy":
        return getattr(import_module("lightning_accel.strategies.for_lightning"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
