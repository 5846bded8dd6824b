"""Deferred cells: a Python loop over a cell, in code that knows nothing of it, runs with the scheduled kernels.

A call of the cell returns `DeferredTensor`s and only records its input; a call whose states are the previous call's
results extends the chain. The first operation that needs a value computes the whole chain.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_accel.recurrent.deferred.input_stacking import stack_inputs

Slot = int
TensorLike = tuple[torch.Size, torch.dtype, torch.device]

_KNOWN = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_sparse", "is_quantized", "is_nested")
} | {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.__len__,
}
_GRADIENT_LISTENERS = {torch.Tensor.register_hook, torch.Tensor.retain_grad}


class DeferredTensor(torch.Tensor):
    """A result of a recorded call; every operation on it computes its chain and works on the value.

    Attributes:
        chain: The chain it belongs to.
        step: Index of the call in the chain.
        slot: Index of the result among the call's results.
        changed: Its own value after an operation in place, from then on independent of the chain's.
    """

    chain: "Chain"
    step: int
    slot: Slot
    changed: Tensor | None

    @staticmethod
    def make(chain: "Chain", step: int, slot: Slot) -> "DeferredTensor":
        """Make the result ``slot`` of call ``step``."""
        shape, dtype, device = chain.like[slot]
        made: DeferredTensor = torch.Tensor._make_wrapper_subclass(DeferredTensor, shape, dtype=dtype, device=device)
        made.chain, made.step, made.slot, made.changed = chain, step, slot, None
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what is known without a value; otherwise compute."""
        kwargs = kwargs or {}
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else None
        if isinstance(first, DeferredTensor):
            if func is torch.Tensor.requires_grad.__get__ and first.changed is None:  # type: ignore[attr-defined]
                return first.chain.requires_grad and first.dtype.is_floating_point
            if func in _GRADIENT_LISTENERS:
                first.chain.cut(first)
            elif _is_in_place(func):
                return _change(first, func, args, kwargs)
        elif func is torch.stack and isinstance(first, (list, tuple)):
            whole = _stacked(first)
            if whole is not None:
                dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
                return whole.movedim(0, dim)
        return func(*_values(args), **{k: _values(v) for k, v in kwargs.items()})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # declared as an instance's method there
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse: whoever comes here went past ``__torch_function__`` and would lose the gradients silently."""
        raise RuntimeError(
            f"{func} reached a recurrent cell's deferred output below torch's function interface; "
            "leave the cell's loop as it is with `IntraStreamScheduling(deferred_cells=False)`."
        )


class Chain:
    """Consecutive calls of one cell.

    Args:
        run: ``run(xs, states) -> (outputs by slot, final states)``; an output may be ``None`` where only the last
            step's is known.
        initial: States before the first call, in the order of ``state_slots``.
        state_slots: Slot of the result that is the next call's state, for each state.
        parameters: Tensors the cell reads; changing one before the chain is computed is an error.
        like: Shape, type and device of each result.
        run_inner: Like ``run``, but gives every output; used when an inner result is asked for that ``run`` leaves out.
        ended: Called with the number of steps when the chain is computed.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        initial: Sequence[Tensor],
        state_slots: Sequence[Slot],
        parameters: Sequence[Tensor],
        *,
        like: Sequence[TensorLike],
        run_inner: Callable[..., Any],
        ended: Callable[[int], None],
    ) -> None:
        self.like, self.parameters = like, parameters
        self.x_specs: list[Any] = []
        self._run, self._run_inner, self._ended = run, run_inner, ended
        self.initial, self.state_slots = list(initial), tuple(state_slots)
        self.modes = current_modes()
        self._parameters = [(p, p._version) for p in parameters]
        self.requires_grad = self.modes[0] and any(p.requires_grad for p in parameters)
        self.inputs: list[tuple[Tensor, ...]] = []
        self._versions: list[int] = []
        self._cuts: set[int] = set()
        self._segments: list[_Segment] = []
        self.depends: set[Chain] = set()
        for state in self.initial:
            self._note(state)

    @property
    def evaluated(self) -> bool:
        """Whether it has been computed; it can not grow any more then."""
        return bool(self._segments)

    def __len__(self) -> int:
        return len(self.inputs)

    def would_wait_for_itself(self, leaves: Sequence[Tensor]) -> bool:
        """Tell whether computing these inputs needs this chain's own results."""
        return any(
            type(leaf) is DeferredTensor and leaf.chain not in self.depends and _reaches(leaf.chain, self)
            for leaf in leaves
        )

    def append(self, leaves: tuple[Tensor, ...]) -> int:
        """Record a call; return its index."""
        for leaf in leaves:
            self._note(leaf)
            self._versions.append(_version(leaf))
        self.inputs.append(leaves)
        return len(self.inputs) - 1

    def cut(self, at: DeferredTensor) -> None:
        """Make the value of ``at`` what later calls take as their state, so that a hook on it sees all its gradient.

        Raises:
            RuntimeError: If the chain has been computed as a whole already.
        """
        if self.evaluated and not any(s.stop == at.step + 1 for s in self._segments):
            raise RuntimeError(
                "a hook was put on a recurrent cell's output after values behind it were computed; put it there right "
                "after the cell's call, or use `IntraStreamScheduling(deferred_cells=False)`."
            )
        self._cuts.add(at.step + 1)

    def value(self, step: int, slot: Slot) -> Tensor:
        """Return a result, computing the chain if need be."""
        self._evaluate()
        segment = next(s for s in self._segments if step < s.stop)
        return segment.value(step - segment.start, slot)

    def output(self, slot: Slot) -> Tensor | None:
        """Return a result of all steps, shape (T, B, ...), if it was computed in one piece."""
        self._evaluate()
        return self._segments[0].outputs.get(slot) if len(self._segments) == 1 else None

    def _note(self, leaf: Tensor) -> None:
        if type(leaf) is DeferredTensor:
            self.depends.add(leaf.chain)
            self.requires_grad = self.requires_grad or leaf.chain.requires_grad
        elif not self.requires_grad:
            self.requires_grad = self.modes[0] and leaf.requires_grad

    def _evaluate(self) -> None:
        if self._segments:
            return
        for parameter, version in self._parameters:
            if parameter._version != version:
                raise RuntimeError(
                    "a parameter of a recurrent cell was changed after the cell's call and before its result was used; "
                    "use the result first, or `IntraStreamScheduling(deferred_cells=False)`."
                )
        if [_version(leaf) for leaves in self.inputs for leaf in leaves] != self._versions:
            raise RuntimeError(
                "an input of a recurrent cell was changed in place after the cell's call and before its result was "
                "used; use a new tensor for every step, or `IntraStreamScheduling(deferred_cells=False)`."
            )
        steps = len(self.inputs)
        stops = sorted({c for c in self._cuts if c < steps} | {steps})
        with recorded_modes(self.modes):
            states = [value_of(s) for s in self.initial]
            start = 0
            made = []
            for stop in stops:
                xs = [stack_inputs(column, whole_output) for column in zip(*self.inputs[start:stop], strict=True)]
                segment = _Segment(self, start, stop, xs, states)
                states = [segment.value(stop - start - 1, slot) for slot in self.state_slots]
                made.append(segment)
                start = stop
        self._segments = made
        self._ended(steps)


class _Segment:
    """Steps that were computed together."""

    def __init__(self, chain: Chain, start: int, stop: int, xs: list[Tensor], states: list[Tensor]) -> None:
        self.start, self.stop = start, stop
        self._chain = weakref.ref(chain)
        self._xs, self._states, self._run_inner, self._modes = xs, states, chain._run_inner, chain.modes
        outputs, last = chain._run(xs, states)
        self.outputs: dict[Slot, Tensor] = {k: o for k, o in enumerate(outputs) if o is not None}
        self._last = dict(zip(chain.state_slots, last, strict=True))
        self._rows: dict[Slot, Sequence[Tensor]] = {}

    def value(self, step: int, slot: Slot) -> Tensor:
        if step == self.stop - self.start - 1 and slot in self._last:
            return self._last[slot]
        if slot not in self._rows:
            if slot not in self.outputs:
                with recorded_modes(self._modes):
                    self.outputs[slot] = self._run_inner(self._xs, self._states)[0][slot]
            self._rows[slot] = self.outputs[slot].unbind(0)
        return self._rows[slot][step]


def value_of(tensor: Any) -> Any:
    """Return the value of a deferred tensor; anything else as it is."""
    if not isinstance(tensor, DeferredTensor):
        return tensor
    return tensor.chain.value(tensor.step, tensor.slot) if tensor.changed is None else tensor.changed


def whole_output(tensors: Sequence[Any]) -> Tensor | None:
    """Return the (T, B, ...) tensor whose rows these are, if they are consecutive results of one chain."""
    first = tensors[0] if tensors else None
    if not isinstance(first, DeferredTensor):
        return None
    chain, slot, start = first.chain, first.slot, first.step
    for k, tensor in enumerate(tensors):
        if not isinstance(tensor, DeferredTensor) or tensor.changed is not None:
            return None
        if tensor.chain is not chain or tensor.slot != slot or tensor.step != start + k:
            return None
    whole = chain.output(slot)
    if whole is None or (start == 0 and len(tensors) == len(whole)):
        return whole
    return whole[start : start + len(tensors)]


def _stacked(tensors: Sequence[Any]) -> Tensor | None:
    """Stack results of one chain without taking them apart first; plain tensors may stand before them."""
    head = next(k for k, t in enumerate(tensors) if isinstance(t, DeferredTensor))
    whole = whole_output(tensors[head:])
    if whole is None or head == 0:
        return whole
    return torch.cat([torch.stack(list(tensors[:head])), whole])


def current_modes() -> tuple[Any, ...]:
    """Return what decides how operations run: gradients, autocast on CPU and CUDA."""
    casts = ((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
    return (torch.is_grad_enabled(), *casts)


@contextmanager
def recorded_modes(modes: tuple[Any, ...]) -> Iterator[None]:
    """Run with the modes of the time of recording."""
    if modes == current_modes():
        yield
        return
    grad, (_, on_cpu, cpu_type), (_, on_cuda, cuda_type) = modes
    with (
        torch.set_grad_enabled(grad),
        torch.autocast("cpu", enabled=on_cpu, dtype=cpu_type),
        torch.autocast("cuda", enabled=on_cuda and torch.cuda.is_available(), dtype=cuda_type),
    ):
        yield


@contextmanager
def custom_functions_get_values() -> Iterator[None]:
    """Let ``torch.autograd.Function.apply``, which asks no ``__torch_function__``, take values for deferred tensors.

    It would take the wrapper itself, and the gradients that flow into it would be lost without a word.
    """
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return original.__func__(cls, *map(value_of, args), **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


def spec_of(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    """Return shape and type, for a deferred tensor without going through torch."""
    if type(tensor) is DeferredTensor:
        return tensor.chain.like[tensor.slot][:2]
    return tensor.shape, tensor.dtype


def _version(leaf: Tensor) -> int:
    if type(leaf) is not DeferredTensor:
        return leaf._version
    return 0 if leaf.changed is None else leaf.changed._version + 1


def _values(value: Any) -> Any:
    if isinstance(value, DeferredTensor):
        return value_of(value)
    if isinstance(value, (list, tuple)):
        parts = [_values(v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {k: _values(v) for k, v in value.items()}
    return value


def _is_in_place(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name in ("__setitem__", "__set__") or (name.startswith("__i") and name.endswith("__") and name != "__invert__"):
        return name not in ("__index__", "__int__")
    return name.endswith("_") and not name.endswith("__")


def _change(tensor: DeferredTensor, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Change a value in place: in a copy, which the deferred tensor stands for from then on."""
    own = value_of(tensor)
    if tensor.changed is None:
        own = own.clone() if func.__name__ != "requires_grad_" else own
    result = func(own, *_values(args[1:]), **{k: _values(v) for k, v in kwargs.items()})
    tensor.changed = own
    return tensor if result is own else result


def _reaches(source: Chain, target: Chain) -> bool:
    seen, stack = set(), [source]
    while stack:
        chain = stack.pop()
        if chain is target:
            return True
        if chain not in seen and not chain.evaluated:
            seen.add(chain)
            stack += chain.depends
    return False
