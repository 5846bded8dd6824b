"""Real gradients for simulated workers, one after another on one module."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.async_sgd.policy.optimizer_copy import copy_optimizers
from lightning_accel.async_sgd.store import Opening

LossOf = Callable[[nn.Module, Any], Tensor]


class Training:
    """What is trained: gradients of any worker's parameters, and what the server begins with.

    Args:
        module: On CPU; its buffers are shared by all workers.
        loss_of: Returns the loss of a batch.
        batches: Each is trained on once.
        optimizer: Over the module's parameters, without state.
    """

    def __init__(self, module: nn.Module, loss_of: LossOf, batches: Sequence[Any], optimizer: Optimizer) -> None:
        self._module, self._loss_of, self.batches, self._optimizer = module, loss_of, batches, optimizer
        self._names = [name for name, _ in module.named_parameters()]
        self._parameters = list(module.parameters())

    def opening(self) -> Opening:
        """Return copies of parameters and optimizer, for the server."""
        values, optimizer = self.own_copy()
        return Opening(self._names, values, [], [], [optimizer])

    def own_copy(self) -> tuple[list[nn.Parameter], Optimizer]:
        """Return copies of the parameters with an optimizer over them, for whoever steps alone."""
        values = [nn.Parameter(p.detach().clone()) for p in self._parameters]
        pairs = zip(self._parameters, values, strict=True)
        (optimizer,) = copy_optimizers([self._optimizer], {id(p): value for p, value in pairs})
        return values, optimizer

    @torch.no_grad()
    def load(self, values: Sequence[Tensor]) -> None:
        """Put values into the module."""
        torch._foreach_copy_([p.detach() for p in self._parameters], [value.detach() for value in values])

    def gradients(self, values: Sequence[Tensor], batch: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of a batch's loss where the parameters are ``values``."""
        self.load(values)
        loss = self._loss_of(self._module, batch)
        return torch.autograd.grad(loss, self._parameters, allow_unused=True)


class Nothing:
    """Stands for a training of which only the times are asked for: one parameter, whose gradient is zero."""

    def __init__(self, batches: int) -> None:
        self.batches = range(batches)
        self._gradient = (torch.zeros(1),)

    def opening(self) -> Opening:
        """Return the one parameter."""
        values, optimizer = self.own_copy()
        return Opening(["nothing"], values, [], [], [optimizer])

    def own_copy(self) -> tuple[list[nn.Parameter], Optimizer]:
        """Return the one parameter, and a plain optimizer."""
        values = [nn.Parameter(torch.zeros(1))]
        return values, torch.optim.SGD(values, lr=0.0)

    def load(self, values: Sequence[Tensor]) -> None:
        """Do nothing."""

    def gradients(self, values: Sequence[Tensor], batch: Any) -> tuple[Tensor, ...]:  # noqa: ARG002
        """Return a zero."""
        return self._gradient
