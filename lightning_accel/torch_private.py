"""The one place that touches private attributes of torch, each with its reason and a canary in the tests.

Where an attribute is missing in some version of torch, the answer is the careful one: what asks then runs plainly.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_file

_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


def active_transform() -> str | None:
    """Name the transform that is running (`torch.func`, forward-mode differentiation); ``None`` if there is none.

    Inside one, tensors are wrappers whose memory must not be written. torch has no public way to ask.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func"
    return "forward-mode differentiation" if forward_ad._current_level >= 0 else None


def active_mode() -> str | None:
    """Name a mode that sees every operation (FLOP counters, fake tensors, a default device); ``None`` if there is none.

    Machine code would pass by it unseen. The stacks of modes are private.
    """
    if torch._C._len_torch_dispatch_stack():
        return type(torch._C._get_dispatch_stack_at(torch._C._len_torch_dispatch_stack() - 1)).__name__
    if torch._C._len_torch_function_stack():
        return type(torch._C._get_function_stack_at(torch._C._len_torch_function_stack() - 1)).__name__
    return None


def saved_tensor_hooks_are_active() -> bool:
    """Tell whether what autograd saves is packed by somebody (checkpointing, offloading), who counts what is saved."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def backward_keeps_graph() -> bool:
    """Tell whether the running backward was called with ``retain_graph``; if torch can not say, it may have been.

    Memory of a graph that is kept may not be used again; there is no public way to ask.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def hooks_of(module: nn.Module) -> str | None:
    """Name the kind of hooks that a call of the module would run; ``None`` if it would run none."""
    for kind in (*_FORWARD_HOOKS, *_BACKWARD_HOOKS):
        if module.__dict__.get(kind):
            return kind.strip("_").replace("_", " ")
    return None


def global_hooks() -> str | None:
    """Name the kind of hooks that the call of any module would run (``register_module_forward_hook`` and so on)."""
    for kind in (*_FORWARD_HOOKS, *_BACKWARD_HOOKS):
        if getattr(module_file, f"_global{kind}", None):
            return "global " + kind.strip("_").replace("_", " ")
    return None


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that a user gave a module: its dictionary without what every `nn.Module` holds there."""
    return {name: value for name, value in module.__dict__.items() if name not in _EVERY_MODULES}


_EVERY_MODULES = frozenset(nn.Module().__dict__)
