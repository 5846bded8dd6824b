"""What workers that do not wait for each other cannot do, refused before training starts."""

from importlib import import_module
from typing import Any

import torch
from torch import nn

from lightning_accel.lightning_private import sync_batch_norm_requested


def refuse_lock_step(strategy: Any, module: nn.Module) -> None:
    """Refuse whatever makes workers wait for each other in every batch.

    Raises:
        MisconfigurationException: For synchronized batch norm, and where a default process group exists.
    """
    error = import_module(f"{strategy.distribution}.utilities.exceptions").MisconfigurationException
    synchronized = [n for n, m in module.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    if synchronized or sync_batch_norm_requested(strategy):
        raise error(
            "synchronized batch norm waits for all workers in every forward pass, and asynchronous workers do not "
            f"wait ({', '.join(synchronized) or 'sync_batchnorm=True'}); use plain batch norm: `buffers='mean'` "
            "averages its statistics."
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise error(
            "a default process group exists: Lightning would synchronize all workers in every batch; do not call "
            "`torch.distributed.init_process_group` with this strategy."
        )
