"""Watch how a model calls one module: whether in a loop with its own results, and where its inputs are from."""

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.recurrent.cell_step import is_torch_cell
from lightning_accel.recurrent.deferred.call_layout import (
    CallLayout,
    distinct_tensors,
    flatten,
    learn_layout,
    torch_layout,
)
from lightning_accel.recurrent.deferred.feeds import FeedForm, Slices, slices_between
from lightning_accel.recurrent.exactness.assumptions import Assumptions, assumptions_of, first_change
from lightning_accel.torch_private import running_backward

LOOP = 3  # chained calls in one batch that make a loop
_SIDE_BY_SIDE = 4  # loops over one module at a time
_LOOKED_AT = 8  # calls of a batch whose arguments' history and whose attributes are looked at
_NEAR = 64  # nodes of the graph

Origin = tuple[str, int, int, int]  # module, which of its loops in this batch, step, which result


class Origins:
    """Which tensors of this batch are results of watched modules; forgets what the model forgets."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Origin]] = {}

    def note(self, tensor: Tensor, origin: Origin) -> None:
        """Note where a tensor comes from."""
        self._known[id(tensor)] = weakref.ref(tensor), origin

    def of(self, tensor: Tensor) -> Origin | None:
        """Return where a tensor comes from."""
        ref, origin = self._known.get(id(tensor), (None, None))
        return origin if ref is not None and ref() is tensor else None


class _Loop:
    """Calls of which each got a result of the one before."""

    def __init__(self, order: int, results: list[Any], leaves: list[Any]) -> None:
        self.order, self.results, self.leaves = order, results, leaves
        self.first = leaves
        self.calls = 1
        self.left: float | None = None
        self.forms: tuple[FeedForm, ...] | None = None


class Watch:
    """What is seen of one module in one batch.

    Args:
        name: Of the module.
        module: Watched.
        origins: Shared by all watches of the batch.

    Attributes:
        calls: How many there were.
        problem: Why they are no loop that can be foretold; empty if nothing speaks against it.
        is_changed: Whether arguments were made of results of the call before.
    """

    def __init__(self, name: str, module: nn.Module, origins: Origins) -> None:
        self.name, self.module, self._origins = name, module, origins
        self.native = is_torch_cell(module)
        self.layout: CallLayout | None = torch_layout(module) if self.native else None
        self.calls = 0
        self.problem = ""
        self.is_changed = False
        self._recent: deque[_Loop] = deque(maxlen=_SIDE_BY_SIDE)
        self._loops: list[_Loop] = []
        self._key: Assumptions | None = None
        self._tensors: list[Tensor] = []
        self._same: dict[int, Tensor] = {}
        self._versions: list[int] = []
        self.specs: list[Any] = []

    def before(self, *_: Any) -> None:
        """Look at the module before a call."""
        if self.calls < _LOOKED_AT:
            self._key = assumptions_of(self.module)
            self._tensors = [*self.module.parameters(), *self.module.buffers()]
            self._versions = [t._version for t in self._tensors]
        else:
            self._key = None

    def see(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Look at a call."""
        self.calls += 1
        if self._key is not None and self._key.key != assumptions_of(self.module).key:
            self._object(f"a call of it changes {first_change(self.module, self._key)}")
        elif self._key is not None and [t._version for t in self._tensors] != self._versions:
            self._object("a call of it changes a buffer or a weight in place")
        leaves: list[Any] = []
        results: list[Any] = []
        flatten((args, kwargs), leaves)
        flatten(result, results)
        loop = next((r for r in self._recent if any(x is y for x in leaves for y in r.results if _is_tensor(y))), None)
        if loop is None:
            if self.calls <= _LOOKED_AT and any(_is_made_of(leaf, r.results) for leaf in leaves for r in self._recent):
                self.is_changed = True
            loop = _Loop(len(self._loops), results, leaves)
            self._loops.append(loop)
            self._recent.appendleft(loop)
        else:
            self._learn(loop, args, kwargs, result, leaves)
            loop.calls += 1
            loop.results, loop.leaves = results, leaves
        for slot, tensor in zip(distinct_tensors(results), results, strict=True):
            if slot >= 0:
                self._origins.note(tensor, (self.name, loop.order, loop.calls, slot))

    @property
    def chained(self) -> int:
        """Return how many calls of the longest loop got a result of the one before."""
        return max((loop.calls for loop in self._loops), default=1) - 1

    def lengths(self) -> list[tuple[int, float]]:
        """Return for each loop its steps and how many more its inputs would have allowed."""
        found = []
        for loop in self._loops:
            if loop.left is not None and self.layout is not None:
                whole = self.native or self.layout.split(loop.first) is not None
                found.append((loop.calls if whole else loop.calls - 1, loop.left - (0 if whole else 1)))
        return [(used, left - used) for used, left in found]

    def forms(self) -> list[tuple[FeedForm, ...]]:
        """Return for each loop how its inputs go from step to step; for those of one step, as the others."""
        known = [loop.forms for loop in self._loops if loop.forms is not None]
        return [loop.forms or known[0] for loop in self._loops] if known else []

    def forget(self) -> None:
        """Let go of the batch's tensors."""
        self._recent.clear()
        self._same.clear()
        for loop in self._loops:
            loop.results = loop.leaves = loop.first = []

    def _object(self, problem: str) -> None:
        self.problem = self.problem or problem

    def _learn(
        self, loop: _Loop, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, leaves: list[Any]
    ) -> None:
        if not self.native:
            try:
                layout = learn_layout(args, kwargs, result, loop.results)
            except TypeError as problem:
                self._object(str(problem))
                return
            if self.layout is None:
                self.layout = layout
                distinct: list[Any] = []
                flatten(result, distinct)
                self.specs = layout.outputs(result)
                self.specs = [(t.dim(), t.shape[:1], t.dtype) for t in self.specs]
            elif layout != self.layout:
                self._object("its calls differ in form")
                return
        if loop.calls <= LOOP:
            self._learn_forms(loop, leaves)

    def _learn_forms(self, loop: _Loop, leaves: list[Any]) -> None:
        assert self.layout is not None
        places = self.layout.x_places if not self.native else (0,)
        try:
            found = [self._form(loop.leaves[k], leaves[k]) for k in places]
        except (IndexError, AttributeError):
            self._object("its calls differ in form")
            return
        except ValueError as problem:
            self._object(str(problem))
            return
        forms = tuple(form for form in found if form is not None)
        if len(forms) < len(found):
            self._object("its inputs are made between the steps, and may use every step's result before the next step")
            return
        if loop.forms is None:
            loop.forms = forms
        elif forms != loop.forms:
            self._object("its inputs come from changing places")
        if loop.left is None:
            try:
                loop.left = min(self._left(form, loop.first[k]) for form, k in zip(forms, places, strict=True))
            except ValueError as problem:
                self._object(f"an input can not be foretold: {problem}")

    def _form(self, before: Any, after: Any) -> FeedForm | None:
        if before is after:
            if self._same.setdefault(id(after), after.detach().clone()).ne(after).any():
                raise ValueError("its input is written to past autograd (NumPy, `.data`) between the steps")
            return FeedForm("same")
        old, new = self._origins.of(before), self._origins.of(after)
        if old is not None and new is not None:
            stride = new[2] - old[2]
            same_loop = (old[0], old[1], old[3]) == (new[0], new[1], new[3])
            return FeedForm("rows", stride) if same_loop and stride in (1, -1) else None
        return slices_between(before, after)

    def _left(self, form: FeedForm, first: Any) -> float:
        if form.kind != "slices":
            return float("inf")
        return Slices(first, form.stride).left


def seeing(watch: Watch) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return hooks for before and after a call, which never raise: a watch must not end what it watches."""

    def before(*_: Any) -> None:
        try:
            if is_recorded():
                watch.before()
        except Exception as error:
            watch.problem = watch.problem or f"looking at it failed: {type(error).__name__}: {error}"

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        try:
            if is_recorded():
                watch.see(args, kwargs, result)
        except Exception as error:
            watch.problem = watch.problem or f"looking at its calls failed: {type(error).__name__}: {error}"

    return before, after


def is_recorded() -> bool:
    """Tell whether calls leave a graph, and none is being computed anew for a backward."""
    return torch.is_grad_enabled() and running_backward() == -1


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_made_of(leaf: Any, results: list[Any]) -> bool:
    """Tell whether a tensor was computed from one of these by few operations."""
    if not isinstance(leaf, Tensor) or leaf.grad_fn is None:
        return False
    wanted = {r.grad_fn for r in results if isinstance(r, Tensor) and r.grad_fn is not None}
    seen: set[Any] = set()
    waiting = deque([leaf.grad_fn])
    while waiting and len(seen) < _NEAR:
        node = waiting.popleft()
        if node in wanted:
            return True
        if node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions if following is not None]
    return False
