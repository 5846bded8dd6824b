"""What a projection callback tells the loggers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_accel.callbacks.projection.group_sparsity import count_zeros, zero_fractions
from lightning_accel.projection.sharded import gather
from lightning_accel.projection.training.projector import Projector


def log_sparsity(projector: Projector, log_dict: Callable[..., None], prefix: str) -> None:
    """Log the fractions of zero groups and zero entries, of all targets and of each, with what a projection found.

    Args:
        projector: Knows the targets, and what the last projection found.
        log_dict: Of the module.
        prefix: Of the names.
    """
    counts, values = list[Tensor](), dict[str, Any]()
    for target in projector.targets:
        counts.append(count_zeros(gather(target.view()), target.group_dims))
        values |= {f"{prefix}/{target.name}/{k}": v.float() for k, v in zero_fractions(counts[-1]).items()}
    overall = torch.stack([found.to(counts[-1].device) for found in counts]).sum(0)
    values |= {f"{prefix}/{k}": v.float() for k, v in zero_fractions(overall).items()}
    for name, found in projector.last.items():
        values |= {f"{prefix}/{name}/norm": found.norm.float(), f"{prefix}/{name}/tau": found.tau.float()}
    # every process has the same values: the maximum is theirs, to the bit
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    log_dict(values, sync_dist=several, reduce_fx="max")
