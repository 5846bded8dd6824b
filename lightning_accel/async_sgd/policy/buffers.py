"""What becomes of a module's buffers when several workers train copies of it.

One rule: a buffer is the coordinator's, and the others read it (masks, pointers, queues, counters, schedules). The one
exception is what is itself a running average over batches, the statistics of normalization layers: these are averaged
over the workers, and their count of batches only rises.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Role = Literal["own", "average", "count"]


def buffer_roles(module: nn.Module | None, names: Sequence[str]) -> list[Role]:
    """Return the role of each named buffer of a module, by the type of the layer that holds it; all own without one."""
    roles: dict[str, Role] = {}
    for prefix, layer in module.named_modules() if module is not None else ():
        if isinstance(layer, _NormBase):
            dot = f"{prefix}." if prefix else ""
            roles |= {f"{dot}running_mean": "average", f"{dot}running_var": "average"}
            roles[f"{dot}num_batches_tracked"] = "count"
    return [roles.get(name, "own") for name in names]


@torch.no_grad()
def take_buffers(
    mine: Sequence[Tensor],
    theirs: Sequence[Tensor],
    roles: Sequence[Role],
    *,
    workers: int,
    from_coordinator: bool,
    averages: bool,
) -> None:
    """Take the buffers that come with a push into those of the server, in place.

    A worker that is alone is copied to the bit. Of several, an average moves by 1 / workers towards the pusher's, where
    that is finite; no buffer that has no NaN gets one.

    Args:
        mine: Of the server.
        theirs: Of the pusher, in the same shapes and dtypes.
        roles: Of each; "own" where there are fewer.
        workers: Live ones, >= 1.
        from_coordinator: Whether the coordinator pushed.
        averages: Whether averages are made at all; without, all buffers are the coordinator's.
    """
    own: list[Role] = ["own"] * (len(mine) - len(roles))
    for target, value, role in zip(mine, theirs, [*roles, *own], strict=True):
        if workers == 1:
            target.copy_(value)
        elif averages and role == "average":
            moved = torch.lerp(target, value, 1.0 / workers)
            moved = torch.where(target.isfinite(), moved, value)  # a bad batch of before is forgotten
            target.copy_(torch.where(value.isfinite(), moved, target))
        elif averages and role == "count":
            target.copy_(torch.maximum(target, value))
        elif from_coordinator and not (value.isnan().any() and not target.isnan().any()):
            target.copy_(value)
