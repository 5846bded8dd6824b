"""Weights of a checkpoint into a freshly built module, whatever its layers became in training."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_accel.cli.errors import UsageError
from lightning_accel.low_rank import adapt_structure


def read_checkpoint(path: str | Path, *, weights_only: bool = True) -> dict[str, Any]:
    """Read a Lightning checkpoint onto the CPU.

    Args:
        path: Of the file.
        weights_only: Refuse everything but tensors and plain data, because other pickles can run code.

    Raises:
        UsageError: If the file does not exist, is no checkpoint, or holds more than ``weights_only`` allows.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"There is no checkpoint {path}. Runs keep theirs in checkpoints/.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} can not be read as tensors and plain data alone ({str(error).partition('.')[0]}). If you trust "
            "the file, which can run code: weights_only=false."
        ) from None
    except (RuntimeError, EOFError) as error:
        raise UsageError(f"{path} is no checkpoint: {str(error).partition(chr(10))[0]}") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UsageError(f"{path} is no Lightning checkpoint: it has no `state_dict`.")
    return checkpoint


def load_weights(module: nn.Module, path: str | Path, *, weights_only: bool = True) -> dict[str, Any]:
    """Load a checkpoint's weights as Lightning does, low-rank layers included; return the checkpoint.

    The module's own ``on_load_checkpoint`` sees it first, and its ``strict_loading`` counts.

    Raises:
        UsageError: As `read_checkpoint`, or if the weights do not fit the module.
    """
    checkpoint = read_checkpoint(path, weights_only=weights_only)
    prepare_layers(module)
    try:
        strict = loading_hooks(module, checkpoint)
        adapt_structure(module, checkpoint["state_dict"])
        module.load_state_dict(checkpoint["state_dict"], strict=strict)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        message = f"{path} does not fit {type(module).__name__}: choose the model it was made of, with its settings."
        raise UsageError(f"{message} {error}") from None
    return checkpoint


def prepare_layers(module: nn.Module) -> None:
    """Let a module that makes its layers in ``configure_model`` make them."""
    if is_lightning_module(module):
        module.configure_model()  # type: ignore[operator]


def loading_hooks(module: nn.Module, checkpoint: dict[str, Any]) -> bool:
    """Show a module the checkpoint that is about to be loaded; return whether all keys must fit."""
    if not is_lightning_module(module):
        return True
    module.on_load_checkpoint(checkpoint)  # type: ignore[operator]
    return bool(module.strict_loading)


def is_lightning_module(module: nn.Module) -> bool:
    """Whether it is a LightningModule of either distribution, whose classes have one name."""
    return "LightningModule" in {base.__name__ for base in type(module).__mro__}
