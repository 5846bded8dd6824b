"""The one place that touches private attributes of Lightning, each with its reason."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.cloud_io import _load
from torch import nn
from torch.optim.swa_utils import AveragedModel


def callbacks_of(trainer: "pl.Trainer") -> list["pl.Callback"]:
    """Return the Trainer's list of callbacks: a public attribute, but set where no type checker sees it."""
    return trainer.callbacks  # type: ignore[attr-defined]


def averaged_modules(trainer: "pl.Trainer") -> list[nn.Module]:
    """Return the copies of the module that weight-averaging callbacks keep.

    `WeightAveraging` and `StochasticWeightAveraging` make them in ``setup`` and pair parameters by position, so they
    must follow when layers are exchanged; there is no public way to reach them.
    """
    averages = (getattr(callback, "_average_model", None) for callback in callbacks_of(trainer))
    return [a.module if isinstance(a, AveragedModel) else a for a in averages if isinstance(a, nn.Module)]


@contextlib.contextmanager
def uncompiled(module: "pl.LightningModule") -> Iterator[Callable[[Any], Any] | None]:
    """Show a compiled LightningModule without its compiled methods; yield what compiles a function like them.

    The compiled methods are instance attributes bound to this very module, so a deep copy would run the original;
    Lightning's `to_uncompiled` can not be undone.
    """
    context = getattr(module, "_compiler_ctx", None)
    if context is None:
        yield None
        return
    names = [key.removeprefix("original_") for key in context if key.startswith("original_")]
    compiled = {name: module.__dict__.pop(name) for name in names if name in module.__dict__}
    module._compiler_ctx = None
    try:
        yield context["dynamo_ctx"]
    finally:
        module.__dict__.update(compiled)
        module._compiler_ctx = context


def load_checkpoint_file(
    path: str | Path, map_location: torch.device | str | None, weights_only: bool | None
) -> dict[str, Any]:
    """Read a checkpoint file by the loader of ``load_from_checkpoint``, so that both trust alike.

    Lightning's default for ``weights_only`` depends on where the file lies; it is decided in `_load` alone.
    """
    return _load(path, map_location=map_location or "cpu", weights_only=weights_only)


def callbacks_of_new_trainer() -> list[Any]:
    """Return the callbacks that the Trainer which is being made right now got from its caller.

    Lightning calls the ``callbacks_factory`` entry points without an argument, from the connector's
    ``on_trainer_init``: what the script passed by itself can only be seen there.
    """
    frame = inspect.currentframe()
    while frame is not None:
        trainer = getattr(frame.f_locals.get("self"), "trainer", None)
        if trainer is not None and frame.f_code.co_name == "on_trainer_init":
            return list(trainer.callbacks)
        frame = frame.f_back
    return []
