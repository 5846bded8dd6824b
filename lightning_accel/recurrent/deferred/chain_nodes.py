"""The nodes that a loop computed at once leaves in the model's graph: one for each step, and one below all of them."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_accel.torch_private import apply_outside_of_transforms, node_class, running_backward

if TYPE_CHECKING:
    from lightning_accel.recurrent.deferred.chain import Chain


class Step(torch.autograd.Function):
    """One call: results that depend on its inputs and states and on the whole loop."""

    @staticmethod
    def forward(
        ctx: Any,
        chain: "Chain",
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
        chain: Chain = ctx.chain
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
    def forward(ctx: Any, chain: "Chain", mark: Tensor, *edges: Tensor) -> Tensor:  # noqa: ARG004
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
