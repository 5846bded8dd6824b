"""How a worker takes the place of an optimizer's ``step``, with its hooks, and which optimizers it cannot serve."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

Closure = Callable[[], Any]


def pushing_step(push_and_pull: Callable[[Closure | None], Any]) -> Callable[..., Any]:
    """Return what stands for ``step`` of an optimizer: it lets a worker push and pull."""

    def step(optimizer: Optimizer, closure: Closure | None = None) -> Any:
        optimizer._opt_called = True  # type: ignore[attr-defined]  # learning-rate schedulers ask this to warn
        return push_and_pull(closure)

    return step


def with_hooks(step: Callable[..., Any], settle: Callable[[Optimizer], None]) -> Callable[..., Any]:
    """Return a step that calls the hooks registered on its optimizer, then ``settle`` for what they changed."""
    # `profile_hook_step` is what makes torch call the step hooks that are registered on an optimizer
    hooked = Optimizer.profile_hook_step(step)

    def step_and_settle(optimizer: Optimizer, closure: Closure | None = None) -> Any:
        result = hooked(optimizer, closure)
        settle(optimizer)
        return result

    return step_and_settle


def post_hooks(optimizer: Optimizer) -> list[Callable[..., Any]]:
    """Return the hooks that run after each step of an optimizer."""
    # what `register_step_post_hook` fills; torch has no way to ask
    return list(optimizer._optimizer_step_post_hooks.values())


def places_in(optimizer: Optimizer, places: dict[int, int]) -> list[int]:
    """Return the places of an optimizer's parameters, given the place of each parameter of the module by identity.

    Raises:
        ValueError: If the module does not have one of them.
    """
    owned = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in places:
                raise ValueError(
                    f"{type(optimizer).__name__} holds a parameter of shape {tuple(parameter.shape)} that the module "
                    "does not have; register it in the module, or drop it from the optimizer."
                )
            owned.append(places[id(parameter)])
    return owned


def refuse_unsupported(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers that evaluate the loss several times a step: the server has no loss.

    Raises:
        ValueError: For `torch.optim.LBFGS` and its subclasses.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS evaluates the loss several times in one step, which a parameter server cannot; "
                "use SGD, AdamW or another first-order optimizer, or another strategy."
            )
