"""Stand before one cell's ``forward``: answer the calls of a loop from what its first call has computed."""

import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.recurrent.cell_step import is_torch_cell
from lightning_accel.recurrent.deferred.call_layout import CallLayout, flatten
from lightning_accel.recurrent.deferred.cell_key import cell_key, changed_part
from lightning_accel.recurrent.deferred.chain import GOES_ON, WRITTEN, Chain
from lightning_accel.recurrent.deferred.feeds import Feed, FeedForm, feed_of, is_listened_to, is_ordinary
from lightning_accel.recurrent.deferred.kernel import SHORTEST, Kernel
from lightning_accel.recurrent.instance_forward import InstanceForward
from lightning_accel.torch_private import (
    active_mode,
    active_transform,
    is_jit_tracing,
    running_backward,
    saved_tensor_hooks_are_active,
)

_SIDE_BY_SIDE = 4  # loops over one cell at a time
_PATIENCE = 3  # batches in a row in which more steps were computed in vain than used
_DOUBTS = 3  # changes of the cell, or backwards step by step, until it is plain for good
_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-9}  # of one step to the plain one, relative to its largest value
_TO_THE_END = 2  # slices of an input that a loop which runs to its end may leave out: a target, a token

Found = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


@dataclass(eq=False)
class _Loop:
    """A loop that is being answered.

    Attributes:
        chain: Its steps.
        token: Of the graph.
        versions: Of the cell's tensors.
        left: How many steps its inputs would have allowed.
        order: Which loop of the batch it is.
    """

    chain: Chain
    token: Tensor
    versions: tuple[int, ...]
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
        self.active = self.is_fault = False
        self.reason = self.doubt = self.idle = ""
        self.chains = self.steps = 0
        self.lengths: list[tuple[int, float]] = []
        self._key = cell_key(cell)
        self._parameters = list(cell.parameters())
        self._tensors = [*self._parameters, *cell.buffers()]
        self._running: deque[_Loop] = deque(maxlen=_SIDE_BY_SIDE)
        self._plain: deque[list[weakref.ref[Tensor]]] = deque(maxlen=_SIDE_BY_SIDE)
        self._seen: dict[int, tuple[int, float]] = {}
        self._begun = self._vain = self._used = self._vain_batches = self._changes = self._asked = 0
        self._traced = False
        self._thread = threading.get_ident()
        self._forward = InstanceForward(cell, self._call)

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
        key, tensors = cell_key(self.cell), [*self.cell.parameters(), *self.cell.buffers()]
        part = changed_part(self._key, key)
        if part is None and [id(t) for t in tensors] != [id(t) for t in self._tensors]:
            part = "a parameter"
        if part is not None:
            self._changes += 1
            self.doubt = f"`{part}` of it changed"
            if self._changes >= _DOUBTS:
                self.remove(f"{self.doubt} {self._changes} times")
                return
            self._key, self._tensors, self._parameters = key, tensors, list(self.cell.parameters())
        self.active = not self.doubt
        self._begun = self._vain = self._used = 0
        self._seen = {}
        self._thread = threading.get_ident()

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
        if found is not None and steps >= SHORTEST and self._cannot(*found) is None:
            xs, states = ([t.detach() for t in group] for group in found)
            self.kernel.run([x.expand(steps, *x.shape).contiguous() for x in xs], states)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active or threading.get_ident() != self._thread:
            return self._forward.original(*args, **kwargs)
        outputs, is_rest = None, False
        try:
            outputs, is_rest = self._answer(args, kwargs)
        except Exception as error:  # the plain loop needs none of this
            self.remove(f"{type(error).__name__} while its steps were computed: {_first_line(error)}", is_fault=True)
        if outputs is not None:
            return self.layout.result(outputs)
        result = self._forward.original(*args, **kwargs)
        if is_rest:
            leaves: list[Any] = []
            flatten(result, leaves)
            self._plain.appendleft([weakref.ref(leaf) for leaf in leaves if isinstance(leaf, Tensor)])
        return result

    def _answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sequence[Tensor] | None, bool]:
        """Return a call's results, ``None`` if it is to be computed plainly; and whether the next ones are, too."""
        unusual = _unusual()
        if unusual is not None:
            self.idle = unusual
            return None, False
        found = self._read(args, kwargs)
        if found is None:
            self.idle = "it is called in another form"
            return None, False
        xs, states = found
        loop = next((r for r in self._running if r.chain.follows(states)), None)
        if loop is None:
            if any(ref() is state for known in self._plain for ref in known for state in states):
                return None, True  # the rest of a loop that left the foretold way
            loop = self._start(xs, states)
            if loop is None:
                return None, True
        else:
            problem = loop.chain.accepts(xs, states)
            if problem is None and loop.versions != self._versions():
                problem = "its weights change between the steps"
            if problem is not None:
                if problem == WRITTEN:
                    self.remove(problem, is_fault=True)
                    return None, False
                self._running.remove(loop)
                self._close(loop, problem)
                return None, True
        outputs = loop.chain.next(loop.token, xs, states)
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
        loop = _Loop(chain, chain.begin(), self._versions(), left, order)
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
        return int(left - over) if over <= _TO_THE_END else int(min(left, used))

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
            first, close = values[0], _CLOSE[values.dtype]
            if plain.shape == first.shape and plain.dtype == first.dtype:
                both_nan = plain.isnan() & first.isnan()
                if torch.allclose(plain.masked_fill(both_nan, 0), first.masked_fill(both_nan, 0), close, close):
                    continue
            self.remove("a step of it computes something else than the one that was traced", is_fault=True)
            return False
        return True

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found | None:
        if self.native:
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
        leaves: list[Any] = []
        if flatten((args, kwargs), leaves) != self.layout.arguments:
            return None
        return self.layout.split(leaves)

    def _cannot(self, xs: tuple[Tensor, ...], states: tuple[Tensor, ...]) -> str | None:
        """Say why a loop can not begin with this call."""
        streams, dtype = xs[0].shape[0] if xs[0].dim() else 0, states[0].dtype
        if not streams or dtype not in _CLOSE:
            return "its states are of another type than float32 and float64, or there is no stream"
        if not all(is_ordinary(t) and t.dim() > 1 and t.shape[0] == streams for t in (*xs, *states)):
            return "an input or state is no ordinary tensor (B, ...)"
        if any(s.dtype != dtype for s in states) or any(is_listened_to(x) for x in xs):
            return "its states differ in type, or an input has a hook"
        if any(x.requires_grad and not x.dtype.is_floating_point for x in xs):
            return "an input of whole numbers has a gradient"
        if any(p.dtype != dtype or not is_ordinary(p) for p in self._parameters):
            return "its weights are of another type than its states"
        if any(is_listened_to(p) for p in self._parameters):
            return "a weight of it has a gradient hook"
        if torch.is_autocast_enabled(xs[0].device.type):
            return "autocast is on"
        if [id(t) for t in (*self.cell.parameters(), *self.cell.buffers())] != [id(t) for t in self._tensors]:
            return "its weights are other tensors for the time of a call"
        return None

    def _versions(self) -> tuple[int, ...]:
        return tuple(t._version for t in self._tensors)


def _unusual() -> str | None:
    """Say what is going on in which a call must be just what it says; ``None`` in usual training."""
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return "it is called without gradients"
    if torch.compiler.is_compiling() or is_jit_tracing():
        return "it is being compiled"
    if running_backward() != -1:
        return "it is called in a backward (checkpointing)"
    if saved_tensor_hooks_are_active():
        return "what its steps save for the backward is packed (checkpointing, offloading)"
    return active_transform() or active_mode()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else "without a message"
