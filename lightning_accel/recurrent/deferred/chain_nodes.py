"""The nodes that a loop computed at once leaves in the model's graph: one for each step, and one below all of them."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_accel.torch_private import apply_outside_of_transforms, node_class, running_backward


class BackwardOfLoop(Protocol):
    """What the nodes hand their gradients to.

    Attributes:
        listened_to: Whether a hook was registered on a step's node.
        no_gradients: What a step's node returns where it has only collected.
    """

    listened_to: bool
    no_gradients: tuple[None, ...]

    def receiving(self, backward: int) -> dict[int, tuple[Tensor | None, ...]] | None:
        """Return what collects the steps' gradients; ``None`` if each step makes its own part of the backward."""

    def step_back(
        self, step: int, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Make the backward of one step."""

    def collect(self) -> list[Tensor | None]:
        """Return the gradients of what the loop got at its first call."""


class Step(torch.autograd.Function):
    """One call: results that depend on its inputs and states and on the whole loop."""

    @staticmethod
    def forward(
        ctx: Any,
        chain: BackwardOfLoop,
        step: int,
        results: tuple[Tensor, ...],
        token: Tensor | None,  # noqa: ARG004
        *tensors: Tensor,
    ) -> Any:
        """Take the results, which are computed already.

        Args:
            ctx: The node.
            chain: Of the loop.
            step: Which call it is.
            results: Of the call.
            token: Of the whole loop, for the first call; all others depend on it through their states.
            tensors: Inputs that want a gradient, and states.
        """
        ctx.chain, ctx.step = chain, step
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """Hand the gradients to the chain, or make the backward of this step where somebody wants to know."""
        chain: BackwardOfLoop = ctx.chain
        received = chain.receiving(running_backward())
        if received is not None:
            received[ctx.step] = gradients
            return chain.no_gradients
        tensors = ctx.saved_tensors
        if all(g is None for g in gradients):
            return chain.no_gradients
        return (None, None, None, None, *chain.step_back(ctx.step, tensors, gradients))


class Whole(torch.autograd.Function):
    """The whole loop: what it got at its first call, and the token that its steps depend on."""

    @staticmethod
    def forward(ctx: Any, chain: BackwardOfLoop, mark: Tensor, *edges: Tensor) -> Tensor:  # noqa: ARG004
        """Return the token."""
        ctx.chain = chain
        ctx.set_materialize_grads(False)
        return mark.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:  # noqa: ARG004
        """Bring the gradients of all steps to where they belong."""
        return (None, None, *ctx.chain.collect())


def _hear(node: Any, hook: Any) -> Any:
    """Register a hook on a step's node, and let its loop's backward go step by step for it."""
    node.chain.listened_to = True
    return super(STEP_NODE, node).register_prehook(hook)


def _hear_after(node: Any, hook: Any) -> Any:
    node.chain.listened_to = True
    return super(STEP_NODE, node).register_hook(hook)


STEP_NODE = node_class(Step)
STEP_NODE.register_prehook, STEP_NODE.register_hook = _hear, _hear_after
apply_step = apply_outside_of_transforms(Step)
