"""What Lightning keeps in modules and how it reads checkpoints."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.cloud_io import _load
from torch import nn
from torch._dynamo import OptimizedModule

RECORDS = ("_hparams_initial",)
"""Attributes of a LightningModule that hold copies of what it was made of, networks included, for loggers alone.

`save_hyperparameters` makes them, and no public name tells them from what a module's author keeps.
"""


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


def has_compiled_parts(module: nn.Module) -> bool:
    """Say whether a module or a part of it is compiled: by Lightning's `from_compiled`, ``compile()`` or a wrapper.

    Lightning marks its own way by a private attribute alone, torch ``Module.compile`` as well.
    """
    return getattr(module, "_compiler_ctx", None) is not None or any(
        m._compiled_call_impl is not None or isinstance(m, OptimizedModule) for m in module.modules()
    )


def load_checkpoint_file(
    path: str | Path, map_location: torch.device | str | None, weights_only: bool | None
) -> dict[str, Any]:
    """Read a checkpoint file by the loader of ``load_from_checkpoint``, so that both trust alike.

    Lightning's default for ``weights_only`` depends on where the file lies; it is decided in `_load` alone.
    """
    return _load(path, map_location=map_location or "cpu", weights_only=weights_only)


def hparams_name(module: "pl.LightningModule") -> str:
    """Return the constructor's argument that ``hparams`` are saved under, which only `load_from_checkpoint` reads."""
    return str(getattr(module, "_hparams_name", None) or "kwargs")


def give_device_mesh(module: "pl.LightningModule", mesh: Any) -> None:
    """Let a module's ``configure_model`` find its mesh as ``self.device_mesh``, for which there is no public setter."""
    module._device_mesh = mesh
