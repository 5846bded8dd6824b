"""Where a loop's inputs come from, known at its first call: slices of a tensor, results of another loop, one tensor.

A feed foretells the inputs of all steps, says of each call's input whether it is the foretold one, and brings the
gradient of all inputs to where the gradients of the single ones would have gone.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lightning_accel.recurrent.deferred.step_values import StepValues, same_values
from lightning_accel.torch_private import part_of, running_backward


@dataclass(frozen=True)
class FeedForm:
    """How one input goes from step to step.

    Attributes:
        kind: ``"slices"`` of one tensor, ``"rows"``: results of another loop, or ``"same"`` tensor at every step.
        stride: From one slice or row to the next: 1, or -1 for backwards.
    """

    kind: Literal["slices", "rows", "same"]
    stride: int = 1


def is_ordinary(tensor: Any) -> bool:
    """Tell whether a tensor is no subclass's, no inference's, dense, and on a device that schedules know."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and not tensor.is_inference()
    )


def is_listened_to(tensor: Tensor) -> bool:
    """Tell whether somebody wants to know a tensor's gradient: a hook or ``retain_grad``."""
    return bool(tensor._backward_hooks) or tensor.retains_grad


@dataclass(frozen=True)
class _Place:
    """Where a slice stands among its like.

    Attributes:
        spacing: Entries of memory from one slice to the next.
        index: Of this slice.
        count: Of all slices.
    """

    spacing: int
    index: int
    count: int


def slices_between(before: Tensor, after: Tensor) -> FeedForm | None:
    """Return the form of two consecutive inputs that are slices of one tensor, if they are."""
    if before._base is None or before._base is not after._base or before.shape != after.shape:
        return None
    found = {place.spacing: place for place in _places(after)}
    for place in _places(before):
        stride = found[place.spacing].index - place.index if place.spacing in found else 0
        if stride in (1, -1):
            return FeedForm("slices", stride)
    return None


def _places(part: Tensor) -> list[_Place]:
    """Return every place at which a view may be a slice of what it is a view of, the likely ones first.

    A base that has the slices as a dimension tells them; one of other dimensions (the result of a linear layer is a
    view of a matrix) may hold them one after another, or in turns for each stream.
    """
    base = part._base
    assert base is not None
    shape, strides, found = part.shape, part.stride(), []
    offset = part.storage_offset() - base.storage_offset()
    for dim, spacing in enumerate(base.stride()):
        others = zip(base.stride()[:dim] + base.stride()[dim + 1 :], strides, strict=False)
        if base.shape[:dim] + base.shape[dim + 1 :] != shape or spacing <= 0:
            continue
        index = offset // spacing
        if (
            offset % spacing == 0
            and 0 <= index < base.shape[dim]
            and all(a == b or n < 2 for (a, b), n in zip(others, shape, strict=True))
        ):
            found.append(_Place(spacing, index, base.shape[dim]))
    if not found and base.is_contiguous() and part.numel():
        row = math.prod(shape[1:])
        if part[0].is_contiguous() and shape[0] > 1 and strides[0] > row and strides[0] % row == 0:
            found.append(_Place(row, offset // row % (strides[0] // row), strides[0] // row))
        elif part.is_contiguous() and offset % part.numel() == 0:
            found.append(_Place(part.numel(), offset // part.numel(), base.numel() // part.numel()))
    return found


class Slices:
    """Inputs that are slices of one tensor.

    Args:
        first: The first of them.
        stride: Index of the next slice less that of this one.

    Attributes:
        left: How many slices there are from the first one on.
        wants_gradient: Whether gradients flow to the inputs.

    Raises:
        ValueError: If ``first`` is no slice of a tensor, or gradients could not be brought to that one.
    """

    def __init__(self, first: Tensor, stride: int) -> None:
        places = [] if first._base is None else _places(first)
        if not places:
            raise ValueError("it is no slice of a tensor")
        self._place, self._stride = places[0], stride
        self._base: Tensor | None = first._base
        self._shape, self._strides, self._offset = first.shape, first.stride(), first.storage_offset()
        self.left = self._place.count - self._place.index if stride > 0 else self._place.index + 1
        self.wants_gradient = first.requires_grad
        self._values: StepValues | None = None
        self._waiting: dict[int, Tensor] = {}
        if self.wants_gradient:
            part = part_of(first)
            if part is None:
                raise ValueError("its gradient takes another way than a slice's")
            self._source, self._source_dim, self._source_start, size = part
            self.left = min(self.left, size - self._source_start if stride > 0 else self._source_start + 1)

    def values(self, steps: int) -> Tensor:
        """Return the inputs of all steps, of shape (T, ...), in memory of their own."""
        spacing, offset = self._place.spacing, self._offset
        if self._stride < 0:
            offset -= spacing * (steps - 1)
        assert self._base is not None
        with torch.no_grad():
            part = self._base.detach().as_strided((steps, *self._shape), (spacing, *self._strides), offset)
            copy = (part if self._stride > 0 else part.flip(0)).clone(memory_format=torch.contiguous_format)
        self._values = StepValues(copy)
        return copy

    def begin(self, first: Tensor) -> None:
        """Let the gradients of all inputs go the way of the first one's."""
        if self.wants_gradient:
            first.grad_fn.register_hook(self._add_rows)  # type: ignore[union-attr]
        if first.device.type == "cpu":
            self._base = None  # values tell; do not keep the batch alive

    def accepts(self, step: int, x: Tensor) -> bool:
        """Tell whether ``x`` is the input that was foretold for a step."""
        assert self._values is not None
        if type(x) is not Tensor or x.requires_grad is not self.wants_gradient or not self._values.are_in(x, step):
            return False
        if self._base is not None and (x._base is not self._base or x._version):
            return False
        if not self.wants_gradient:
            return True
        part = None if is_listened_to(x) else part_of(x)
        return part is not None and part[:3] == (
            self._source,
            self._source_dim,
            self._source_start + self._stride * step,
        )

    def is_written(self, x: Tensor) -> bool:  # noqa: ARG002
        """Tell nothing: another input may be meant as well."""
        return False

    def bring(self, gradient: Tensor) -> Tensor:
        """Bring the inputs' gradient, of shape (T, ...), to its place; return the part of the first input."""
        self._waiting[running_backward()] = gradient
        return gradient[0]

    def _add_rows(self, inwards: Any, outwards: Any) -> Any:  # noqa: ARG002
        gradient = self._waiting.pop(running_backward(), None)
        if gradient is None or inwards[0] is None or len(gradient) < 2:
            return None
        whole = inwards[0].clone()
        rows = whole.movedim(self._source_dim, 0)
        steps = torch.arange(1, len(gradient), device=whole.device) * self._stride + self._source_start
        rows.index_add_(0, steps, gradient[1:].to(whole.dtype))
        return (whole, *inwards[1:])


class FeedingLoop(Protocol):
    """A loop whose results are the inputs of another.

    Attributes:
        steps: How many calls are foretold.
        values: The distinct results of all steps, each of shape (T, B, ...).
    """

    steps: int
    values: list[Tensor]

    def gave(self, tensor: Tensor, step: int, slot: int) -> bool:
        """Tell whether a tensor is a result of a step, as it was given."""

    def receiving(self, backward: int) -> dict[int, tuple[Tensor | None, ...]] | None:
        """Return what collects the steps' gradients in a backward; ``None`` if each step makes its own part of it."""

    def receive_rows(self, slot: int, steps: Tensor, gradients: Tensor, last: int) -> None:
        """Keep gradients of one result at several steps, the latest of them ``last``."""


class Rows:
    """Inputs that are results of another loop.

    Args:
        first: The first of them.
        source: The loop.
        start: Step of the other loop whose result ``first`` is.
        slot: Which of the results.
        stride: As for `Slices`.
    """

    wants_gradient = True

    def __init__(self, source: FeedingLoop, start: int, slot: int, stride: int) -> None:
        self.source, self._start, self._slot, self._stride = source, start, slot, stride
        self.left = source.steps - start if stride > 0 else start + 1

    def values(self, steps: int) -> Tensor:
        """Return the inputs of all steps."""
        rows = self.source.values[self._slot]
        stop = self._start + self._stride * steps
        return rows[self._start : stop] if self._stride > 0 else rows[stop + 1 : self._start + 1].flip(0)

    def begin(self, first: Tensor) -> None:
        """Do nothing: the other loop takes the gradients."""

    def accepts(self, step: int, x: Tensor) -> bool:
        """Tell whether ``x`` is the input that was foretold for a step."""
        row = self._start + self._stride * step
        return self.source.gave(x, row, self._slot) and not (x._backward_hooks or x.retains_grad)

    def is_written(self, x: Tensor) -> bool:  # noqa: ARG002
        """Tell nothing: another input may be meant as well."""
        return False

    def bring(self, gradient: Tensor) -> Tensor:
        """Bring the inputs' gradient to its place; return the part of the first input."""
        steps = torch.arange(1, len(gradient), device=gradient.device) * self._stride + self._start
        latest = len(gradient) - 1 if self._stride > 0 else min(len(gradient) - 1, 1)
        last = self._start + self._stride * latest if latest else -1
        self.source.receive_rows(self._slot, steps, gradient[1:], last)
        return gradient[0]


class Same:
    """One tensor that is the input of every step.

    Args:
        first: The tensor.
    """

    left = math.inf

    def __init__(self, first: Tensor) -> None:
        self._first, self._value, self._version = first, first.detach().clone(), first._version
        self.wants_gradient = first.requires_grad

    def values(self, steps: int) -> Tensor:
        """Return the inputs of all steps."""
        return self._value.expand(steps, *self._value.shape).contiguous()

    def begin(self, first: Tensor) -> None:
        """Do nothing: the gradient's place is the tensor's own."""

    def accepts(self, step: int, x: Tensor) -> bool:  # noqa: ARG002
        """Tell whether ``x`` is the input that was foretold for a step."""
        known = x is self._first and x._version == self._version
        if self.wants_gradient or x.device.type != "cpu":
            return known and same_values(x, self._value)
        return not x.requires_grad and same_values(x, self._value)

    def is_written(self, x: Tensor) -> bool:
        """Tell whether ``x`` is the tensor, with other values that autograd was not told of."""
        known = x is self._first and x._version == self._version
        return known and not same_values(x, self._value)

    def bring(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the tensor."""
        return gradient.sum(0)


Feed = Slices | Rows | Same


def feed_of(form: FeedForm, first: Tensor) -> Feed:
    """Return what foretells the inputs of a loop by its first one.

    Raises:
        ValueError: If it can not be foretold.
    """
    if form.kind == "same":
        return Same(first)
    if form.kind == "slices":
        return Slices(first, form.stride)
    node: Any = first.grad_fn
    chain = getattr(node, "chain", None)
    if chain is None or not chain.gave(first, node.step, first.output_nr):
        raise ValueError("the loop that makes it is not computed at once, or its results are changed")
    return Rows(chain, node.step, first.output_nr, form.stride)
