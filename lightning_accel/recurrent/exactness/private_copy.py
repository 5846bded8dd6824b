"""A copy of a cell that nobody else uses: for tracing, comparing and measuring."""

import copy
from typing import Any

from torch import nn

from lightning_accel import torch_private
from lightning_accel.recurrent.compiler.trace import CannotScheduleError
from lightning_accel.recurrent.instance_forward import InstanceForward


def private_copy(module: nn.Module) -> nn.Module:
    """Copy a module, so that no thread sees its weights exchanged and no hook on a tensor is called.

    Under `torch.func.functional_call` its weights may be results of other operations, which can not be copied; the copy
    gets leaves of the same values.

    Raises:
        CannotScheduleError: If it can not be copied.
    """
    memo: dict[int, Any] = {}
    for weight in (*module.parameters(), *module.buffers()):
        leaf = weight.detach().clone()
        if isinstance(weight, nn.Parameter):
            memo[id(weight)] = nn.Parameter(leaf, requires_grad=weight.requires_grad)
        else:
            memo[id(weight)] = leaf.requires_grad_(weight.requires_grad)
    try:
        twin = copy.deepcopy(module, memo)
    except Exception as error:
        raise CannotScheduleError(f"it can not be copied: {type(error).__name__}: {error}") from error
    if isinstance(module.__dict__.get("forward"), InstanceForward):  # then hooks are not part of a step
        torch_private.drop_forward_hooks(twin)
    return twin
