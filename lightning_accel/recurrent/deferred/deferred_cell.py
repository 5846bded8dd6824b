"""Stand before one cell's ``forward``: answer the calls of a loop from what its first call has computed."""

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from operator import attrgetter
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.recurrent.cell_step import is_torch_cell
from lightning_accel.recurrent.deferred.call_layout import CallLayout, flatten
from lightning_accel.recurrent.deferred.call_reader import Found, call_reader, is_batched, result_writer
from lightning_accel.recurrent.deferred.chain import GOES_ON, WRITTEN, Chain
from lightning_accel.recurrent.deferred.circumstances import CLOSE, refusal, unusual
from lightning_accel.recurrent.deferred.feeds import Feed, FeedForm, feed_of
from lightning_accel.recurrent.deferred.kernel import SHORTEST, Kernel
from lightning_accel.recurrent.exactness.assumptions import assumptions_of, change_between
from lightning_accel.recurrent.instance_forward import InstanceForward
from lightning_accel.torch_private import nothing_is_around

_SIDE_BY_SIDE = 4  # loops over one cell at a time
_PATIENCE = 3  # batches in a row in which more steps were computed in vain than used
_DOUBTS = 3  # changes of the cell, or backwards step by step, until it is plain for good
_ANOTHER_FORM = "it is called in another form"
_TO_THE_END = 2  # slices of an input that a loop which runs to its end may leave out: a target, a token
_version_of: Any = attrgetter("_version")


@dataclass(eq=False)
class _Loop:
    """A loop that is being answered.

    Attributes:
        chain: Its steps.
        token: Of the graph, until the first call has taken it.
        versions: Of the cell's tensors.
        left: How many steps its inputs would have allowed.
        order: Which loop of the batch it is.
    """

    chain: Chain
    token: Tensor | None
    versions: list[int]
    left: float
    order: int


class DeferredCell:
    """Answer a cell's calls while ``active``; everything that is not foretold goes to its own ``forward``.

    Args:
        cell: The module.
        kernel: Computes its loops; of the same cell or of one that it is a copy of.
        forms: For each loop of a batch, how each of its inputs goes from step to step; the last one for all later.

    Attributes:
        active: Whether calls are answered now.
        reason: Why they are not any more; empty while they are.
        is_fault: Whether that reason is an error or a wrong result.
        doubt: What changed of the cell since it was last compared; empty if nothing did.
        idle: Why the last call that was not answered was not.
        chains, steps: Loops and steps that were answered.
        lengths: For each loop of a batch, in order, its steps and how many more there could have been.
    """

    def __init__(self, cell: nn.Module, kernel: Kernel, forms: Sequence[tuple[FeedForm, ...]]) -> None:
        self.cell, self.kernel, self.forms = cell, kernel, tuple(forms)
        self.layout: CallLayout = kernel.layout
        self.native = is_torch_cell(cell)
        self._split, self._result = call_reader(self.layout), result_writer(self.layout)
        self.active = self.is_fault = False
        self.reason = self.doubt = self.idle = ""
        self.chains = self.steps = 0
        self.lengths: list[tuple[int, float]] = []
        self._parameters = list(cell.parameters())
        self._tensors = [*self._parameters, *cell.buffers()]
        self._running: deque[_Loop] = deque(maxlen=_SIDE_BY_SIDE)
        self._plain: deque[list[weakref.ref[Tensor]]] = deque(maxlen=_SIDE_BY_SIDE)
        self._seen: dict[int, tuple[int, float]] = {}
        self._begun = self._vain = self._used = self._vain_batches = self._changes = self._asked = 0
        self._traced = False
        self._thread = get_ident()
        self._forward = InstanceForward(cell, self._call)
        try:
            self._key = assumptions_of(cell)
        except Exception as error:  # a property that fails, more values than can be watched
            self.remove(f"looking at it failed: {type(error).__name__}: {_first_line(error)}")

    @property
    def choice(self) -> Any:
        """Return what chose the schedule."""
        return self.kernel.choice

    def remove(self, reason: str = "", *, is_fault: bool = False) -> None:
        """Give the cell its own forward back."""
        self.active, self.reason = False, self.reason or reason
        self.is_fault = self.is_fault or is_fault
        self._running.clear()
        self._plain.clear()
        self._forward.remove()

    def begin(self) -> None:
        """Begin a training step: see whether the cell is what it was."""
        if self.reason:
            return
        try:
            key, tensors = assumptions_of(self.cell), _tensors(self.cell)
            change = change_between(self.cell, self._key, key)
        except Exception as error:  # a property that fails, more values than can be watched
            self.remove(f"looking at it failed: {type(error).__name__}: {_first_line(error)}")
            return
        if change is None and [id(t) for t in tensors] != [id(t) for t in self._tensors]:
            change = "a parameter of it changed"
        if change is not None:
            self._changes += 1
            self.doubt = change
            if self._changes >= _DOUBTS:
                self.remove(f"{self.doubt}, {self._changes} times")
                return
            self._key, self._tensors, self._parameters = key, tensors, list(self.cell.parameters())
        self.active = not self.doubt
        self._begun = self._vain = self._used = 0
        self._seen = {}
        self._thread = get_ident()

    def end(self) -> None:
        """End a training step; give up what does not pay."""
        self.active = False
        if self.reason:
            return
        while self._running:
            self._close(self._running.popleft(), "it ends earlier")
        self._plain.clear()
        if self._seen:
            known = dict(enumerate(self.lengths))
            self.lengths = [value for _, value in sorted({**known, **self._seen}.items())]
        self._vain_batches = self._vain_batches + 1 if self._vain > self._used else 0
        if self._vain_batches >= _PATIENCE:
            self.remove(
                f"{self.idle}: in each of {_PATIENCE} batches, more steps were computed in vain than used "
                f"({self._vain} over {self._used} in the last one)"
            )
        elif self._asked >= _DOUBTS:
            self.remove("gradients of hidden states or of gradients are asked for, which need every step by itself")
        elif self.kernel.is_loop:
            refusal = self.choice.refusals.get("intra_stream")
            speed = max(self.choice.speed.values(), default=1.0)
            self.remove(refusal or f"no schedule was faster than the loop (measured {speed:.2f} times)")

    def choose(self, args: tuple[Any, ...], kwargs: dict[str, Any], steps: int) -> None:
        """Choose now how loops of ``steps`` calls like this one run, which else the first one does."""
        found = self._read(args, kwargs)
        if found is not None and is_batched(found[1]) and steps >= SHORTEST and self._cannot(*found) is None:
            xs, states = ([t.detach() for t in group] for group in found)
            self.kernel.run([x.expand(steps, *x.shape).contiguous() for x in xs], states)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active or get_ident() != self._thread or not self._forward.stands_first():
            return self._forward.original(*args, **kwargs)
        outputs, is_rest = None, False
        try:
            outputs, is_rest = self._answer(args, kwargs)
        except Exception as error:  # the plain loop needs none of this
            self.remove(f"{type(error).__name__} while its steps were computed: {_first_line(error)}", is_fault=True)
        if outputs is not None:
            return self._result(outputs)
        result = self._forward.original(*args, **kwargs)
        if is_rest:
            leaves: list[Any] = []
            flatten(result, leaves)
            self._plain.appendleft([weakref.ref(leaf) for leaf in leaves if isinstance(leaf, Tensor)])
        return result

    def _answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sequence[Tensor] | None, bool]:
        """Return a call's results, ``None`` if it is to be computed plainly; and whether the next ones are, too."""
        if not nothing_is_around() and (reason := unusual()):
            self.idle = reason
            return None, False
        found = self._read(args, kwargs)
        if found is None:
            self.idle = _ANOTHER_FORM
            return None, False
        xs, states = found
        for loop in self._running:
            if loop.chain.follows(states):
                break
        else:
            if not is_batched(states):
                self.idle = _ANOTHER_FORM
                return None, False
            if any(ref() is state for known in self._plain for ref in known for state in states):
                return None, True  # the rest of a loop that left the foretold way
            begun = self._start(xs, states)
            if begun is None:
                return None, True
            loop = begun
        if loop.chain.given:
            problem = loop.chain.problem(xs, states)
            if problem is None and loop.versions != list(map(_version_of, self._tensors)):
                problem = "its weights change between the steps"
            if problem is not None:
                if problem == WRITTEN:
                    self.remove(problem, is_fault=True)
                    return None, False
                self._running.remove(loop)
                self._close(loop, problem)
                return None, True
        token, loop.token = loop.token, None
        outputs = loop.chain.next(token, xs, states)
        self.steps += 1
        return outputs, False

    def _start(self, xs: tuple[Tensor, ...], states: tuple[Tensor, ...]) -> _Loop | None:
        problem = self._cannot(xs, states)
        feeds: list[Feed] = []
        if problem is None:
            try:
                forms = self.forms[min(self._begun, len(self.forms) - 1)]
                feeds = [feed_of(form, x) for form, x in zip(forms, xs, strict=True)]
            except ValueError as error:
                problem = f"an input can not be foretold: {error}"
        if problem is not None:
            self.idle = problem
            return None
        order, self._begun = self._begun, self._begun + 1
        left = min(feed.left for feed in feeds)
        steps = self._foretold(order, left)
        if steps < SHORTEST:
            self.idle = "its loops are shorter than foretold pays"
            return None
        if len(self._running) == _SIDE_BY_SIDE:
            self._close(self._running.pop(), "its state is changed between the steps")
        if self._vain > self._used + steps:  # for this batch
            return None
        if not self._has_schedule(xs, states):
            return None
        known, random_state = len(self.choice.choices), torch.get_rng_state()
        chain = Chain(self.kernel, feeds, xs, states, parameters=self._parameters, steps=steps, asked=self._note_asked)
        if len(self.choice.choices) != known:  # what was measured must not be seen in the run
            torch.set_rng_state(random_state)
        if not self.native and not self._is_what_it_was(chain, xs, states):
            return None
        loop = _Loop(chain, chain.begin(), list(map(_version_of, self._tensors)), left, order)
        self._running.appendleft(loop)
        self.chains += 1
        return loop

    def _has_schedule(self, xs: Sequence[Tensor], states: Sequence[Tensor]) -> bool:
        """See whether a step can be traced; computed as a loop, it could draw random numbers before its time."""
        if self.native or self._traced:
            return True
        refusal = self.choice.refusal(self.layout, [x.detach() for x in xs], [s.detach() for s in states])
        self._traced = refusal is None
        if refusal is not None:
            self.remove(refusal)
        return self._traced

    def _foretold(self, order: int, left: float) -> int:
        """Return how many steps the loop that begins will have, if it is like that of the batch before."""
        if not self.lengths:
            return int(left) if left < float("inf") else 0
        used, over = self.lengths[min(order, len(self.lengths) - 1)]
        return int(left - max(over, 0)) if over <= _TO_THE_END else int(min(left, used))

    def _close(self, loop: _Loop, problem: str) -> None:
        given, steps = loop.chain.given, loop.chain.steps
        self._used += given
        self._vain += steps - given
        if given < steps:
            self.idle = problem
            self._seen[loop.order] = (given, loop.left - given)
        elif problem == GOES_ON:
            self._seen[loop.order] = (2 * steps, 0.0 if loop.left < float("inf") else float("inf"))
        else:
            self._seen[loop.order] = (given, loop.left - given)

    def _note_asked(self) -> None:
        self._asked += 1

    def _is_what_it_was(self, chain: Chain, xs: Sequence[Tensor], states: Sequence[Tensor]) -> bool:
        """Compare the first step with the plain one: the cell's code may look at what no key holds."""
        with torch.no_grad():
            outputs, _ = self.layout(self.cell, xs, states)
        for plain, values in zip(outputs, chain.values, strict=True):
            first, close = values[0], CLOSE[values.dtype]
            if plain.shape == first.shape and plain.dtype == first.dtype:
                both_nan = plain.isnan() & first.isnan()
                if torch.allclose(plain.masked_fill(both_nan, 0), first.masked_fill(both_nan, 0), close, close):
                    continue
            self.remove("a step of it computes something else than the one that was traced", is_fault=True)
            return False
        return True

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found | None:
        return self._split(args, kwargs) or (self._read_torchs(args, kwargs) if self.native else None)

    def _read_torchs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found | None:
        """Read a call of a torch cell in another form than the usual one: by keywords, without a state."""
        named = dict(zip(("input", "hx"), args, strict=False)) | kwargs
        if len(named) != len(args) + len(kwargs) or not {"input"} <= set(named) <= {"input", "hx"}:
            return None
        x, hx = named["input"], named.get("hx")
        if not isinstance(x, Tensor) or x.dim() != 2:
            return None
        if hx is None:
            size: Any = self.cell.hidden_size
            hx = x.new_zeros(x.shape[0], size)
            return (x,), (hx,) * len(self.layout.state_places)
        states = tuple(hx) if isinstance(self.cell, nn.LSTMCell) else (hx,)
        if len(states) != len(self.layout.state_places) or not all(isinstance(s, Tensor) for s in states):
            return None
        return (x,), states

    def _cannot(self, xs: tuple[Tensor, ...], states: tuple[Tensor, ...]) -> str | None:
        """Say why a loop can not begin with this call."""
        found = refusal(xs, states, self._parameters)
        if found is None and any(a is not b for a, b in zip_longest(_tensors(self.cell), self._tensors)):
            found = "its weights are other tensors for the time of a call"
        return found


def _tensors(cell: nn.Module) -> list[Tensor]:
    return [*cell.parameters(), *cell.buffers()]


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else "without a message"
