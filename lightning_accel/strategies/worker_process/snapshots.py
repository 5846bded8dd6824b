"""Snapshots of a run that is under way: whole at any time, although the writer may be killed at any time."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

NAME = "async_sgd.ckpt"
_PART = ".part"  # beside the target: on the same file system a file is renamed in one step


class _WriteAndRename:
    """Writes a checkpoint as a strategy's ``checkpoint_io`` does, beside its target, and renames it when it is whole.

    Lightning's own writer makes its temporary file in ``/tmp``, where a killed process leaves it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:  # noqa: ARG002
        part = f"{path}{_PART}"
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)


def save_snapshot(trainer: Any) -> None:
    """Write ``async_sgd.ckpt`` into the Trainer's ``default_root_dir``, in the place of the one before."""
    root = str(trainer.default_root_dir)
    if "://" in root:  # no file system of this machine: whoever writes there sees to it
        trainer.save_checkpoint(f"{root}/{NAME}")
        return
    Path(root).mkdir(parents=True, exist_ok=True)
    strategy = trainer.strategy
    before = strategy.checkpoint_io
    strategy.checkpoint_io = _WriteAndRename()
    try:
        trainer.save_checkpoint(os.path.join(root, NAME))
    finally:
        strategy.checkpoint_io = before


def remove_part(root: Any) -> None:
    """Remove what a killed process has left beside a snapshot."""
    with contextlib.suppress(OSError):
        os.remove(os.path.join(str(root), NAME + _PART))
