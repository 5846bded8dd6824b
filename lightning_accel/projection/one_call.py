"""A whole bi-level projection in one compiled call, for tensors so small that single operations count.

Between the operations of a training step even a small operation takes 3 us and more; the dozen of a projection then
take longer than its two passes over memory. One graph, compiled for one shape, does all of it: the largest magnitudes,
Newton's method for the threshold in a fixed number of evaluations, and the clamp. If the method has not ended by then,
or a rule of `thresholds` asks for more care, nothing is changed, and the caller goes the longer way.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_accel.projection import compiled
from lightning_accel.projection.rounding import inner_radius, round_bound
from lightning_accel.projection.thresholds import slack_of

_SMALL = 1 << 23  # bytes; single operations do not count beside passes over more
_EVALUATIONS = 8  # from a good start three are enough, from none six
_WHOLE = 200  # rows up to which a column is reduced in one block
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int32}


class Shape(NamedTuple):
    """What a graph is compiled for: ``(before, groups, after)`` of ``dtype``, in place or not."""

    before: int
    groups: int
    after: int
    dtype: torch.dtype
    in_place: bool
    threads: int


class Found(NamedTuple):
    """What a call found.

    Attributes:
        tops: float64 ``(groups,)``, the largest magnitudes before.
        bounds: float64 ``(groups,)``, what is left of each.
        tau: What was taken off each; 0 where nothing was written.
    """

    tops: Tensor
    bounds: Tensor
    tau: float


class OneCall:
    """The projection of one tensor, or of many in the same place.

    Args:
        source: ``(before, groups, after)``, contiguous.
        target: As ``source``, or ``source`` itself.
    """

    def __init__(self, source: Tensor, target: Tensor) -> None:
        before, groups, after = source.shape
        in_place = source.data_ptr() == target.data_ptr()
        self._shape = Shape(before, groups, after, source.dtype, in_place, 0)
        bits = _INTEGERS[source.dtype]
        views = (source,) if in_place else (source, target)
        self._tensors = [t.view(-1).view(bits).view(*_matrix(self._shape)) for t in views]

    @classmethod
    def of(cls, source: Tensor, target: Tensor) -> "OneCall | None":
        """Return the call where there can be one."""
        size = source.numel() * source.element_size()
        if source.device.type != "cpu" or source.dtype not in _INTEGERS or not 0 < size <= _SMALL:
            return None
        before, groups, after = source.shape
        uneven = (after if before == 1 else groups * after) % 2 or source.storage_offset() % 2
        if source.dtype == torch.bfloat16 and (uneven or target.storage_offset() % 2):
            return None
        return cls(source, target)

    def __call__(self, radius: float, start: float) -> Found | None:
        """Project.

        Args:
            radius: >= 0.
            start: The tau of a similar tensor, or 0.

        Returns:
            None where compiling fails.
        """
        groups = self._shape.groups
        target = inner_radius(radius, groups)
        numbers = torch.tensor((target, slack_of(target, groups), start, radius), dtype=torch.float64)
        try:
            graph = _graph(self._shape._replace(threads=torch.get_num_threads()))
            tops, bounds, state = graph(*self._tensors, numbers)
        except Exception as error:  # whatever a compiler may raise
            compiled.give_up(error)
            return None
        fine, tau = state.tolist()
        return Found(tops, bounds, tau if fine else 0.0)


def _matrix(shape: Shape) -> tuple[int, int]:
    """Return rows and columns of the integers: a group is a row, or ``after`` columns (halves of them, of pairs)."""
    width = 2 if shape.dtype == torch.bfloat16 else 1
    if shape.before == 1:
        return shape.groups, shape.after // width
    return shape.before, shape.groups * shape.after // width


@functools.cache
def _graph(shape: Shape) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Compile the projection of one shape, without guards: who calls sees to it that the tensors fit.

    The clamp is a graph of its own, or its loop would compute every level anew for every entry.
    """
    bits = torch.zeros(_matrix(shape), dtype=_INTEGERS[shape.dtype])
    numbers = torch.zeros(4, dtype=torch.float64)
    write = compiled.clamp_passes(pairs=shape.dtype == torch.bfloat16, in_place=shape.in_place)

    def find(source: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
        tops = _tops(source, shape)
        bounds, state = _threshold(tops, numbers)
        return tops, bounds, state, *_level_and_sign(bounds, state[0] > 0.0, shape)

    found = _compile(find, bits, numbers)
    targets = () if shape.in_place else (torch.zeros_like(bits),)
    written = _compile(write, bits, *found(bits, numbers)[3:], *targets)

    def project(source: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tops, bounds, state, level, sign = found(source, rest[-1])
        written(source, level, sign, *rest[:-1])
        return tops, bounds, state

    return project


def _compile(function: Callable[..., Any], *examples: Tensor) -> Callable[..., Any]:
    with torch.no_grad():
        traced = make_fx(function)(*examples)
        compiled_graph: Callable[..., Any] = torch._inductor.compile(traced, [*examples])
        compiled_graph(*examples)
    return compiled_graph


def _tops(bits: Tensor, shape: Shape) -> Tensor:
    """Return the largest magnitudes, float64 ``(groups,)``."""
    if shape.dtype == torch.bfloat16:
        high, low = (_largest(bits & mask, shape) for mask in (0x7FFF0000, 0x7FFF))
        if shape.before == 1:
            found = torch.maximum(high >> 16, low)
        else:
            found = torch.stack((low, high >> 16), 1).view(shape.groups, shape.after).amax(1)
        return (found << 16).view(torch.float32).double()
    found = _largest(bits & torch.iinfo(bits.dtype).max, shape)
    if shape.before > 1:
        found = found.view(shape.groups, shape.after).amax(1)
    return found.view(shape.dtype).double()


def _largest(magnitudes: Tensor, shape: Shape) -> Tensor:
    """Reduce rows, or columns in blocks."""
    if shape.before == 1:
        return magnitudes.amax(1)
    if len(magnitudes) <= _WHOLE:
        return magnitudes.amax(0)
    blocks, rest = compiled.row_blocks(magnitudes)
    found = blocks.amax(1).amax(0)
    return found if rest == 0 else torch.maximum(found, magnitudes[-rest:].amax(0))


def _threshold(tops: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is left of each norm, and whether that is right beside the threshold."""
    target, slack, start, radius = numbers.unbind()
    size = tops.sum()
    tau = torch.where(start > 0.0, start, (size - target) / len(tops))
    done = torch.zeros((), dtype=torch.bool)
    for _ in range(_EVALUATIONS):
        kept = (tops - tau).clamp_min(0.0)
        rest = kept.sum()
        done = done | ((rest <= target) & (rest >= target - 2.0 * slack))
        tau = torch.where(done, tau, tau + (rest - target + slack) / (kept > 0.0).sum())
    fine = done & (size > radius) & (tau > 0.0) & (tau <= target)
    return (tops - tau).clamp_min(0.0), torch.stack((fine.double(), tau))


def _level_and_sign(bounds: Tensor, fine: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Return for each row or column what `compiled.clamp_passes` takes; all stays as it is unless ``fine``."""
    level = round_bound(bounds, shape.dtype)
    if shape.dtype == torch.bfloat16:
        level, sign_bit, most = level.float().view(torch.int32) >> 16, 0x8000, 0x7FFF
    else:
        level = level.view(_INTEGERS[shape.dtype])
        sign_bit, most = torch.iinfo(level.dtype).min, torch.iinfo(level.dtype).max
    sign = torch.where(level > 0, sign_bit, 0).to(level.dtype)  # a cleared entry has none
    both = [torch.where(fine, level, most), torch.where(fine, sign, sign_bit)]
    if shape.before > 1:
        both = [t.unsqueeze(1).expand(-1, shape.after).reshape(-1) for t in both]
    if shape.dtype == torch.bfloat16:
        both = [t | t << 16 if shape.before == 1 else t[0::2] | t[1::2] << 16 for t in both]
    level, sign = (t.unsqueeze(1 if shape.before == 1 else 0) for t in both)
    return level, sign
