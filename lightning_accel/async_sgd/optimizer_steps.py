"""How a worker takes the place of an optimizer's ``step``, with its hooks, and which optimizers it cannot serve."""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_accel.async_sgd.optimizer_side import refuse_elsewhere
from lightning_accel.async_sgd.policy.optimizer_copy import refuse_what_needs_a_loss
from lightning_accel.async_sgd.policy.stepping import ELEMENTWISE, get_groups
from lightning_accel.async_sgd.store import ParameterStore

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


def changed_since(
    parameters: Sequence[Tensor], base: Sequence[Tensor], *, but: Collection[int] = ()
) -> list[Tensor | None]:
    """Return the parameters that are not what they were, and None for all others and those at the places ``but``."""
    pairs = enumerate(zip(parameters, base, strict=True))
    return [None if i in but or torch.equal(p, before) else p.detach() for i, (p, before) in pairs]


def refuse_compressed(what: str, compression: str) -> None:
    """Refuse parameters that go to the server as they are where nothing goes as it is.

    Raises:
        ValueError: With a ``compression`` other than "none".
    """
    if compression != "none":
        raise ValueError(
            f"{what}, which go to the server as they are: use `compression='none'`, or leave that change out."
        )


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


def refuse_unsupported(optimizers: Sequence[Optimizer], optimizer_device: str = "cpu") -> None:
    """Refuse optimizers that cannot step on a server, which has gradients and no loss, on its device.

    Raises:
        ValueError: For `torch.optim.LBFGS`, `torch.optim.SparseAdam`, optimizers of two steps (SAM) or of two sets of
            parameters (schedule-free), those whose step needs or uses the loss, and what cannot be pickled; see
            `refuse_elsewhere` too.
    """
    refuse_elsewhere(optimizers, optimizer_device)
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS evaluates the loss several times in one step, which a parameter server cannot; "
                "use SGD, AdamW or another first-order optimizer, or another strategy."
            )
        if isinstance(optimizer, torch.optim.SparseAdam):
            raise ValueError(
                "SparseAdam needs sparse gradients, and pushes are dense; use Adam with `sparse=False` embeddings, or "
                "another strategy."
            )
        if hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
            raise ValueError(
                f"`{name}` makes a step of two (`first_step`, `second_step`) around a second backward pass, and a "
                "parameter server sees `step()` alone; use its base optimizer, or another strategy."
            )
        if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
            raise ValueError(
                f"`{name}` has one set of parameters to train and one to evaluate (`train()`, `eval()`), and what "
                "turns one into the other lies on the server; use an optimizer with a schedule, or another strategy."
            )
        if type(optimizer) not in ELEMENTWISE:
            refuse_what_needs_a_loss(optimizer)


class StateElsewhere(defaultdict[Any, Any]):
    """Stands in a worker for the state of an optimizer, which the server has: empty, and it knows who empties it."""

    emptied = False

    def clear(self) -> None:
        """Take note that the server's state is to be forgotten."""
        self.emptied = True

    def __missing__(self, key: Any) -> Any:
        """Refuse what a plain optimizer would answer."""
        raise RuntimeError(
            "the state of an optimizer lies with the server while asynchronous workers train, and steps are made "
            "there: `optimizer.state` can be cleared or loaded in a worker, not read or written; use another strategy "
            "for an optimizer that is told more than `step`, and for what reads its moments."
        )

    def __setitem__(self, key: Any, value: Any) -> None:
        """Refuse what would not reach the server."""
        self.__missing__(key)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Be an ordinary state in copies, which step on their own."""
        return defaultdict, (dict,)


def leave_states(optimizers: Sequence[Optimizer]) -> None:
    """Leave the states of a worker's optimizers to the server."""
    for optimizer in optimizers:
        optimizer.state = StateElsewhere()


def take_state(optimizer: Optimizer) -> None:
    """Let an optimizer that had left it have a state of its own again, empty as yet."""
    if isinstance(optimizer.state, StateElsewhere):
        optimizer.state = defaultdict(dict)


def pass_on_state(optimizer: Optimizer, store: ParameterStore, index: int) -> bool:
    """Give the server the state that somebody has emptied, or put in place, in the coordinator; returns whether.

    What others have under way is refused then, and their batches are given out again.
    """
    found: dict[Any, dict[str, Any]] = {}
    if not isinstance(optimizer.state, StateElsewhere):
        found = optimizer.state_dict()["state"]
    elif not optimizer.state.emptied:
        return False
    leave_states([optimizer])
    if not store.is_coordinator:
        return False
    cut = store.snapshot()
    on_cpu = {k: {n: v.cpu() if isinstance(v, Tensor) else v for n, v in values.items()} for k, values in found.items()}
    cut.optimizer_states[index]["state"] = on_cpu
    store.restore(cut)
    return True


class SentGroups:
    """What the server knows of an optimizer's hyper-parameters.

    Only what is changed in a worker (by a schedule, say) goes to the server: the rest is what the server's optimizer
    makes of it, which may keep counters and estimates in its groups.

    Args:
        optimizer: A worker's.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._sent = self._kept()

    def changed(self) -> list[dict[str, Any]]:
        """Return the hyper-parameters that were changed since they were sent, group by group."""
        pairs = zip(get_groups(self._optimizer), self._sent, strict=False)
        return [{k: v for k, v in now.items() if k not in sent or not _same(v, sent[k])} for now, sent in pairs]

    def take(self) -> list[dict[str, Any]] | None:
        """Return the same, on CPU, as something that is sent now; None if there is nothing."""
        groups = self.changed()
        if len(groups) != len(self._optimizer.param_groups):
            groups = get_groups(self._optimizer)  # which the server refuses, and says why
        elif not any(groups):
            return None
        self._sent = self._kept()
        return [{k: v.cpu() if isinstance(v, Tensor) else v for k, v in group.items()} for group in groups]

    def _kept(self) -> list[dict[str, Any]]:
        # a rate may be a tensor that a schedule writes into
        groups = get_groups(self._optimizer)
        return [{k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in g.items()} for g in groups]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
