"""One step of a real torch optimizer with given gradients, and its hyper-parameters as plain values."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

ELEMENTWISE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad)
"""Optimizers that treat each element on its own, with the same bits one tensor at a time, many, or as a long one."""

EXACT = (torch.float32, torch.float64)
"""Types in which that holds: half precision is rounded otherwise in many at once, and at the end of a tensor."""


def step_optimizer(
    optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], *, weight: float
) -> None:
    """Let a real optimizer take one step with given gradients and a learning rate times ``weight``.

    A parameter whose gradient is None is skipped by the optimizer, momentum and decay included.
    """
    with _foreach(optimizer), _weighted(optimizer, weight):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        bare_step(optimizer)
    for parameter in parameters:
        parameter.grad = None


def bare_step(optimizer: Optimizer) -> None:
    """Step without the hooks and the profiler's mark that torch wraps around every ``step``.

    They cost a small model as much as the step itself; the hooks of a user run in the workers.
    """
    step = type(optimizer).step
    bare = getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step
    bare(optimizer)


@contextlib.contextmanager
def _weighted(optimizer: Optimizer, weight: float) -> Iterator[None]:
    rates = [(group, group["lr"]) for group in optimizer.param_groups if "lr" in group] if weight != 1.0 else []
    for group, rate in rates:
        group["lr"] = rate * weight
    yield
    for group, rate in rates:
        group["lr"] = rate


@contextlib.contextmanager
def _foreach(optimizer: Optimizer) -> Iterator[None]:
    """Step many tensors at once where that gives the same bits; torch's own choice on CPU is one after another."""
    groups = optimizer.param_groups if type(optimizer) in ELEMENTWISE else []
    free = [
        group
        for group in groups
        if group["foreach"] is None
        and all(parameter.dtype in EXACT for parameter in group["params"])
        and not (group.get("fused") or group["differentiable"] or isinstance(group["lr"], Tensor))
    ]
    for group in free:
        group["foreach"] = True
    yield
    for group in free:
        group["foreach"] = None


def get_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the hyper-parameters of each parameter group, without the parameters."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def set_groups(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Set the hyper-parameters of each parameter group.

    Raises:
        ValueError: If the number of groups differs.
    """
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the optimizer was opened with {len(optimizer.param_groups)} parameter groups, a push has {len(groups)}; "
            "add every group in `configure_optimizers`."
        )
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        group.update(values)
