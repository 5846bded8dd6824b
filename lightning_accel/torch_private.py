"""The one place that touches private attributes of torch, each with its reason and a canary in the tests.

Where an attribute is missing in some version of torch, the answer is the careful one: what asks then runs plainly.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_file
from torch.nn.utils import parametrize

_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
HOOK_DICTIONARIES = (*_FORWARD_HOOKS, *_BACKWARD_HOOKS)
"""Where a module keeps its hooks; torch has no public way to see whether there are any."""


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


def hooks_of(module: nn.Module, *, but_forward: bool = False) -> str | None:
    """Name the kind of hooks that a call of the module would run; ``None`` if it would run none.

    Args:
        module: The module.
        but_forward: Whether its forward hooks do not count.
    """
    for kind in _BACKWARD_HOOKS if but_forward else (*_FORWARD_HOOKS, *_BACKWARD_HOOKS):
        if module.__dict__.get(kind):
            return kind.strip("_").replace("_", " ")
    return None


def drop_forward_hooks(module: nn.Module) -> None:
    """Take the forward hooks off a module, for a copy that computes what its forward alone does."""
    for kind in _FORWARD_HOOKS:
        module.__dict__[kind].clear()


def global_hooks() -> str | None:
    """Name the kind of hooks that the call of any module would run (``register_module_forward_hook`` and so on)."""
    for kind in (*_FORWARD_HOOKS, *_BACKWARD_HOOKS):
        if getattr(module_file, f"_global{kind}", None):
            return "global " + kind.strip("_").replace("_", " ")
    return None


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that a user gave a module: its dictionary without what every `nn.Module` holds there."""
    return {name: value for name, value in module.__dict__.items() if name not in _EVERY_MODULES}


def running_backward() -> int:
    """Return a number that tells the backward that is running from others; -1 outside of one.

    What one backward collects must not be mixed with another's; there is no public way to tell them apart.
    """
    return int(torch._C._current_graph_task_id())


def is_jit_tracing() -> bool:
    """Tell whether ``torch.jit.trace`` is running; ``torch.jit.is_tracing`` is not among its public names."""
    return torch._C._get_tracing_state() is not None


@contextlib.contextmanager
def not_traced() -> Iterator[None]:
    """Keep what is done inside out of a trace of ``torch.jit.trace``, which can not be paused in a public way."""
    state = torch._C._get_tracing_state()
    set_state: Any = vars(torch._C)["_set_tracing_state"]  # which its stubs lack
    set_state(None)
    try:
        yield
    finally:
        set_state(state)


def backward_reaches(node: Any) -> bool:
    """Tell whether the backward that is running will execute a node of the graph.

    ``torch.autograd.grad`` and ``backward(inputs=...)`` execute only what leads to their inputs. torch's own
    checkpointing asks in this way.
    """
    return bool(torch._C._will_engine_execute_node(node))


def node_class(function: type[torch.autograd.Function]) -> Any:
    """Return the class of the nodes that a function of our own leaves in the graph."""
    return function._backward_cls


def apply_outside_of_transforms(function: type[torch.autograd.Function]) -> Any:
    """Return a function's ``apply`` for calls of which it is known that no transform of `torch.func` is active.

    The public one looks for transforms and unwraps every argument, a fifth of what a node of the graph costs.
    """
    above: Any = super(torch.autograd.Function, function)
    return above.apply


def nothing_is_around() -> bool:
    """Tell at once, for what is asked at every time step, that training is usual where this is called.

    Gradients are recorded, no backward runs, and no transform, mode, tracer or packing of saved tensors is active.
    """
    return (
        _grad_is_enabled()
        and _running_backward() == -1
        and _transforms() is None
        and forward_ad._current_level < 0
        and not _dispatch_modes()
        and not _function_modes()
        and _tracing_state() is None
        and _packs_saved_tensors(True) is None
        and not _inference_mode()
        and not torch.compiler.is_compiling()
    )


_grad_is_enabled, _inference_mode = torch.is_grad_enabled, torch.is_inference_mode_enabled
_running_backward, _tracing_state = torch._C._current_graph_task_id, torch._C._get_tracing_state
_transforms = torch._C._functorch.peek_interpreter_stack
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_packs_saved_tensors = torch._C._autograd._top_saved_tensors_default_hooks


def part_of(tensor: torch.Tensor) -> tuple[Any, int, int, int] | None:
    """Return from which place in the graph a slice was taken, its dimension, its index and how many slices there are.

    ``None`` if ``tensor`` is no result of ``select`` or ``unbind``, whose nodes alone make a gradient as large as what
    the slice was taken from. What a node was called with, it tells by private attributes only.
    """
    node: Any = tensor.grad_fn
    kind = type(node).__name__
    if kind == "UnbindBackward0":
        dim = _signed(node._saved_dim)
        return node.next_functions[0], dim % (tensor.dim() + 1), tensor.output_nr, len(node._input_metadata)
    if kind == "SelectBackward0":
        sizes = node._saved_self_sym_sizes
        dim = _signed(node._saved_dim) % len(sizes)
        return node.next_functions[0], dim, _signed(node._saved_index) % int(sizes[dim]), int(sizes[dim])
    return None


def _signed(number: int) -> int:
    """Undo that nodes show negative numbers as unsigned ones."""
    return number - 2**64 if number >= 2**63 else number


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return a module's own parameters by name, absent ones as ``None``, several times the faster of all ways."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Return a module's own buffers by name, absent ones as ``None``."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return a module's own submodules by name, absent ones as ``None``; one under two names is there twice."""
    return module._modules


def is_compiled(module: nn.Module) -> bool:
    """Tell whether ``module.compile()`` was called or `torch.compile` wraps it: its calls are not Python's to trace."""
    return module.__dict__.get("_compiled_call_impl") is not None or "_orig_mod" in module._modules


def parametrizations_are_cached() -> bool:
    """Tell whether `torch.nn.utils.parametrize.cached` is active: what a trace computes would stay in its cache."""
    return bool(getattr(parametrize, "_cache_enabled", 0))


_EVERY_MODULES = frozenset(nn.Module().__dict__)


def storage_users(tensor: torch.Tensor) -> int:
    """Return how many tensors (and arrays, views of NumPy included) use the memory of ``tensor``, itself included.

    Only the storage counts its users, for no public eye.
    """
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) - 1  # without the wrapper that was made to ask


def gradient_hooks_of(parameter: torch.Tensor) -> str | None:
    """Name the kind of hooks that see or change the gradient of a parameter; ``None`` if there is none.

    Neither ``register_hook`` nor ``register_post_accumulate_grad_hook`` leaves a public trace.
    """
    for kind, name in (
        ("_backward_hooks", "a gradient hook"),
        ("_post_accumulate_grad_hooks", "a hook after gradient accumulation"),
    ):
        if getattr(parameter, kind, None):
            return name
    return None


no_torch_function: Any = torch._C._disabled_torch_function_impl
"""What makes operations on a subclass of `torch.Tensor` plain ones; `torch.nn.Parameter` uses it, for no public eye."""


def move_gradient_hooks(source: torch.Tensor, target: nn.Parameter, after: dict[int, Any]) -> None:
    """Let the hooks of ``source``, and ``after`` accumulation, act on ``target``; their handles remove them there.

    A handle refers to the dictionary in which its hook lies, so it is that which has to move.
    """
    if source._backward_hooks:
        target._backward_hooks = source._backward_hooks
    if after:
        target._post_accumulate_grad_hooks = after


def set_gradient(tensor: torch.Tensor, value: torch.Tensor | None) -> None:
    """Set the gradient of a tensor whose class has another meaning for ``grad``."""
    torch._C.TensorBase.grad.__set__(tensor, value)  # type: ignore[union-attr]


USED_IN_PLACE = {
    "_apply": "what `Module.to` and others call; layers that keep more than their parameters override it",
    "_backward_hooks": "whether a tensor has hooks, asked once a step of a loop, where a call would cost",
    "_base": "of which tensor another is a view",
    "_BatchNorm": "the class that all batch norms share",
    "_buffers": "as `buffers_of`, written to",
    "_ConvNd": "the class that all convolutions share",
    "_foreach_add_": "one call for many tensors; the optimizers of torch are made of these",
    "_foreach_copy_": "likewise",
    "_foreach_mul_": "likewise",
    "_foreach_norm": "likewise",
    "_foreach_sub_": "likewise",
    "_is_replica": "whether `DataParallel` made a module: a copy for one forward",
    "_load_from_state_dict": "what `load_state_dict` calls for each module; layers that take other keys override it",
    "_log_softmax": "the operation that a traced `log_softmax` becomes",
    "_log_softmax_backward_data": "the operation that its gradient becomes",
    "_modules": "as `children_of`, written to",
    "_NormBase": "the class that all norms with running statistics share",
    "_ops": "where the classes of operations are found; `torch.ops` is public, its classes are not",
    "_opt_called": "what schedulers ask an optimizer, to warn where it has not stepped",
    "_optimizer_step_post_hooks": "what `register_step_post_hook` fills; there is no way to ask",
    "_orig_mod": "the module that `torch.compile` wraps",
    "_overloadname": "which form of an operation was traced",
    "_parameters": "as `parameters_of`, written to",
    "_pytree": "nests of tensors, as torch itself takes them apart",
    "_save_to_state_dict": "what `state_dict` calls for each module; layers with other keys override it",
    "_schema": "which arguments an operation has, and which of them it writes",
    "_softmax": "the operation that a traced `softmax` becomes",
    "_softmax_backward_data": "the operation that its gradient becomes",
    "_to_copy": "the operation that a traced `to` becomes",
    "_unsafe_view": "the operation that a traced product of matrices ends with",
    "_version": "how often a tensor was written to; several times a step of a loop",
    "_wrapped_by_lr_sched": "whether a scheduler has put its counter around `step`",
}
"""Private names of torch outside of this file, and why they are used where they stand; each has a canary as well."""
