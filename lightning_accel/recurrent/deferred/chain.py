"""A loop over a cell whose steps were all computed at its first call, and whose graph is that of the loop.

Every call gets its results as ordinary tensors of their own memory. In the graph they depend on that call's inputs and
states and, through a token, on what the whole loop got at its first call: one node a step, `Step`, and below all of
them `Whole`. In a usual backward the nodes of the steps only collect the gradients of their results; `Whole` comes
last and makes one backward of all steps, whose gradients it brings to the inputs, the first states and the parameters.
Where somebody wants to know more (hooks on hidden states, gradients with respect to one, second derivatives), every
node makes the backward of its own step instead, as the loop's nodes would.
"""

import weakref
from collections.abc import Callable, Sequence
from itertools import chain as chain_together
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_accel.recurrent.deferred.chain_nodes import STEP_NODE, Whole, apply_step
from lightning_accel.recurrent.deferred.feeds import Feed, Rows, is_listened_to
from lightning_accel.recurrent.deferred.inner_graph import gradients_of, twin, without_autocast
from lightning_accel.recurrent.deferred.kernel import SHORTEST, Kernel
from lightning_accel.recurrent.deferred.step_values import StepValues
from lightning_accel.torch_private import backward_keeps_graph, backward_reaches, running_backward

GOES_ON = "it goes on longer than foretold"
CHANGED = "its state is changed or listened to between the steps"
NOT_FORETOLD = "an input is not the one that was foretold"
WRITTEN = "its state or input is written to past autograd (NumPy, `.data`), which gradients then do not know of"
_Gradients = dict[int, tuple[Tensor | None, ...]]  # of the results, by step
_REMEMBERED = 16  # backwards of one loop
_FREED = (
    "Trying to backward through the graph a second time, but a recurrent loop has freed what it kept; call the first "
    "backward with `retain_graph=True`."
)

unbind_copy: Any = torch.unbind_copy  # declared to return nothing


class Chain:
    """All steps of a loop.

    Args:
        kernel: Computes them.
        feeds: Of the inputs.
        firsts: Inputs of the first call.
        states: States before the first call.
        parameters: The cell's parameters, in the kernel's order.
        steps: How many calls are foretold.
        asked: Called for each backward that goes step by step.

    Attributes:
        values: The distinct results of all steps, each of shape (T, B, ...).
        given: How many calls have got their results.
    """

    def __init__(
        self,
        kernel: Kernel,
        feeds: Sequence[Feed],
        firsts: Sequence[Tensor],
        states: Sequence[Tensor],
        *,
        parameters: Sequence[Tensor],
        steps: int,
        asked: Callable[[], None],
    ) -> None:
        self.kernel, self.feeds, self.steps, self._asked = kernel, list(feeds), steps, asked
        self.given = 0
        self.parameters = list(parameters)
        self._xs = [feed.values(steps) for feed in feeds]
        self._states = [s.detach().clone() for s in states]
        self._wanted = (
            [feed.wants_gradient for feed in feeds],
            [s.requires_grad for s in states],
            [p.requires_grad for p in parameters],
        )
        self._made: _Made | None = _Made(self, steps)
        known = [StepValues(v.detach()) for v in self._made.outputs]
        self.values = [v.values for v in known]
        self._known, self._states_known = known, [known[slot] for slot in kernel.layout.state_slots]
        copies = zip(*(unbind_copy(v) for v in self.values), strict=True)  # in memory of their own, at once
        self._ready: list[tuple[Tensor, ...] | None] = list(copies)
        self._slots = kernel.layout.state_slots
        self._heard = [k for k, feed in enumerate(feeds) if feed.wants_gradient]
        self._hears_all = len(self._heard) == len(feeds)
        self.no_gradients = (None,) * (4 + len(self._heard) + len(states))
        self._last: tuple[weakref.ref[Tensor], ...] = ()
        self._given: list[tuple[weakref.ref[Tensor], ...]] = []
        self._taken: list[weakref.ref[Tensor]] = []
        self.listened_to = False
        self._received: dict[int, _Gradients | None] = {}
        self._rows_received: dict[int, list[tuple[int, Tensor, Tensor, int]]] = {}
        self._weight_gradients: dict[int, list[Tensor | None]] = {}
        mark = torch.zeros((), requires_grad=True)
        self._mark = get_gradient_edge(mark).node
        self._edges = mark, (*firsts, *states, *parameters)

    def begin(self) -> Tensor:
        """Join the graph of the model, once; return the token for the calls, which the chain itself must not hold."""
        (mark, tensors), self._edges = self._edges, None  # type: ignore[assignment]  # they may hold the chain itself
        wanted = [flag for group in self._wanted for flag in group]
        edges = [t for t, flag in zip(tensors, wanted, strict=True) if flag]
        for feed, first in zip(self.feeds, tensors, strict=False):
            feed.begin(first)
        token: Tensor = Whole.apply(self, mark, *edges) if edges else mark.detach()
        return token

    def problem(self, xs: Sequence[Tensor], states: Sequence[Tensor]) -> str | None:
        """Say why a call is not the next foretold one; ``None`` if it is. Its states are the last call's results."""
        step = self.given
        for state, known in zip(states, self._states_known, strict=True):
            if state._version or state._backward_hooks or state.retains_grad:
                return CHANGED
            if not known.are_in(state, step - 1):
                return WRITTEN
        if step >= self.steps:
            return GOES_ON
        for feed, x in zip(self.feeds, xs, strict=True):
            if not feed.accepts(step, x):
                return WRITTEN if feed.is_written(x) else NOT_FORETOLD
        return None

    def follows(self, states: Sequence[Tensor]) -> bool:
        """Tell whether these are the very results of the last call."""
        last = self._last
        if not last:
            return False
        for state, slot in zip(states, self._slots, strict=True):  # noqa: SIM110  # a third of what `all` takes
            if state is not last[slot]():
                return False
        return True

    def gave(self, tensor: Tensor, step: int, slot: int) -> bool:
        """Tell whether a tensor is a result of a step, as it was given."""
        if step != self.given - 1 or self._last[slot]() is not tensor:
            node: Any = tensor.grad_fn
            if type(node) is not STEP_NODE or node.chain is not self:
                return False
            if (node.step, tensor.output_nr) != (step, slot):
                return False
        return not tensor._version and self._known[slot].are_in(tensor, step)

    def next(self, token: Tensor | None, xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the next call's results; the first call takes the token."""
        step = self.given
        self.given = step + 1
        results, self._ready[step] = self._ready[step], None
        if not self._hears_all:
            xs = [xs[k] for k in self._heard]
        outputs: tuple[Tensor, ...] = apply_step(self, step, results, token, *xs, *states)
        self._last = last = tuple(map(weakref.ref, outputs))
        self._given.append(last)
        if xs:
            self._taken.extend(map(weakref.ref, xs))
        return outputs

    def _is_listened_to(self) -> bool:
        """Tell whether somebody wants to know the gradient of a state or of an input."""
        states = (last[slot]() for last in self._given for slot in self._slots)
        inputs = (ref() for ref in self._taken)
        return any(t is not None and is_listened_to(t) for t in chain_together(states, inputs))

    def receiving(self, backward: int) -> _Gradients | None:
        """Return what collects the steps' gradients in a backward; ``None`` if each step makes its own part of it."""
        if backward in self._received:
            return self._received[backward]
        if len(self._received) > _REMEMBERED:
            self._received.clear()
        by_step = (
            torch.is_grad_enabled()
            or self.listened_to
            or not backward_reaches(self._mark)
            or self._is_listened_to()
            or any(isinstance(feed, Rows) and feed.source.receiving(backward) is None for feed in self.feeds)
        )
        self._received[backward] = None if by_step else {}
        if by_step:
            self._asked()
        return self._received[backward]

    def receive_rows(self, slot: int, steps: Tensor, gradients: Tensor, last: int) -> None:
        """Keep gradients of one result at several steps, the latest of them ``last``, from a loop that it feeds."""
        self._rows_received.setdefault(running_backward(), []).append((slot, steps, gradients, last))

    def step_back(
        self, step: int, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Make the backward of one step.

        Args:
            step: Which one.
            tensors: Its inputs that want a gradient, and its states.
            gradients: Of its results.

        Returns:
            Gradients of ``tensors``; those of the parameters wait for `collect`.
        """
        twice = torch.is_grad_enabled()
        count = len(self._heard)
        with torch.enable_grad(), without_autocast(self._xs[0]):
            leaves = [twin(t, twice) for t in (*tensors, *self.parameters)]
            heard, states, weights = leaves[:count], leaves[count : len(tensors)], leaves[len(tensors) :]
            xs = [x[step] for x in self._xs]
            for k, x in zip(self._heard, heard, strict=True):
                xs[k] = x
            outputs = [o[0] for o in self.kernel.run_one_by_one([x[None] for x in xs], states, weights)]
        found = gradients_of(outputs, gradients, leaves, create_graph=twice)
        known = self._weight_gradients.setdefault(running_backward(), [None] * len(weights))
        for k, new in enumerate(found[len(tensors) :]):
            known[k] = new if known[k] is None or new is None else known[k] + new  # type: ignore[operator]
        return found[: len(tensors)]

    def collect(self) -> list[Tensor | None]:
        """Return the gradients of what the loop got at its first call, once all steps have theirs."""
        backward, (for_xs, for_states, for_weights) = running_backward(), self._wanted
        received = self.receiving(backward)
        if received is None:
            found = self._weight_gradients.pop(backward, [None] * len(for_weights))
            weights = [g for g, flag in zip(found, for_weights, strict=True) if flag]
            return [*[None] * (sum(for_xs) + sum(for_states)), *weights]
        del self._received[backward]
        rows = self._rows_received.pop(backward, [])
        used = 1 + max(
            max((t for t, gradients in received.items() if any(g is not None for g in gradients)), default=-1),
            max((last for *_, last in rows), default=-1),
        )
        if not used:
            return [None] * (sum(for_xs) + sum(for_states) + sum(for_weights))
        gradients = [self._joined(slot, used, received, rows) for slot in range(len(self.values))]
        keep = backward_keeps_graph()
        made = self._made
        if made is None:
            raise RuntimeError(_FREED)
        heard = any(is_listened_to(p) for p in (*self.parameters, *self.kernel.parameters))
        one_by_one = heard or used < SHORTEST or not made.serves(gradients)
        if one_by_one or used < self.steps:  # what lies behind the last step that counts may be NaN
            found = _Made(self, used, one_by_one=one_by_one).gradients(gradients, keep=False)
        else:
            found = made.gradients(gradients, keep=keep)
        if not keep:
            self._made = None
        given: list[Tensor | None] = []
        flags = [*for_xs, *for_states, *for_weights]
        for k, (gradient, flag) in enumerate(zip(found, flags, strict=True)):
            if flag:
                given.append(self.feeds[k].bring(gradient) if gradient is not None and k < len(for_xs) else gradient)
        return given

    def _joined(
        self,
        slot: int,
        steps: int,
        received: _Gradients,
        rows: list[tuple[int, Tensor, Tensor, int]],
    ) -> Tensor | None:
        single = [received[t][slot] if t in received else None for t in range(steps)]
        rows = [part for part in rows if part[0] == slot]
        if not rows and all(g is None for g in single):
            return None
        zero = torch.zeros_like(self.values[slot][0])
        joined = torch.stack([zero if g is None else g for g in single])
        for _, places, gradient, _ in rows:
            joined.index_add_(0, places, gradient)
        return joined

    def made_from(self, steps: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return new leaves for inputs and states."""
        for_xs, for_states, _ = self._wanted
        xs = [x[:steps].detach().requires_grad_(flag) for x, flag in zip(self._xs, for_xs, strict=True)]
        return xs, [s.detach().requires_grad_(flag) for s, flag in zip(self._states, for_states, strict=True)]


class _Made:
    """The graph of all steps, apart from the model's."""

    def __init__(self, chain: Chain, steps: int, *, one_by_one: bool = False) -> None:
        xs, states = chain.made_from(steps)
        weights: list[Any] = chain.kernel.parameters
        self._last: dict[int, Tensor] = {}
        with torch.enable_grad(), without_autocast(xs[0]):
            if one_by_one:
                weights = [twin(w, twice=False) for w in weights]
                self.outputs = chain.kernel.run_one_by_one(xs, states, weights)
            else:
                self.outputs, self._last = chain.kernel.run(xs, states)
        self._leaves = [*xs, *states, *weights]

    def serves(self, gradients: Sequence[Tensor | None]) -> bool:
        """Tell whether gradients of these results can be had: a kernel may know some of the last step's only."""
        inner = [slot for slot in self._last if (g := gradients[slot]) is not None and bool(g[:-1].any())]
        return not inner

    def gradients(self, gradients: Sequence[Tensor | None], *, keep: bool) -> list[Tensor | None]:
        """Make the backward; return the gradients of inputs, states and parameters."""
        outputs, given = list(self.outputs), list(gradients)
        for slot, last in self._last.items():
            gradient = given[slot]
            outputs[slot], given[slot] = last, None if gradient is None else gradient[-1]
        return gradients_of(outputs, given, self._leaves, keep=keep)
