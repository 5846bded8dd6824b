"""A whole bi-level projection in one compiled call, for tensors so small that more than the passes over them counts.

Between the operations of a training step even a small operation takes 3 us and more, for its code has left the caches;
the dozen of a projection then take longer than its two passes over memory. And with several threads, operations on the
norms are the serial part. One graph, compiled ahead of time for one shape, does all of it: largest magnitudes, a few
evaluations of Newton's method for the threshold, and the clamp. If the method has not ended by then, nothing is
changed, and another call goes on; if a rule of `thresholds` asks for more care, the caller goes the longer way. What a
call needs besides the tensor it leaves for the next one.
"""

import functools
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_accel.projection import compiled
from lightning_accel.projection.cuts import Cut, LoneCut
from lightning_accel.projection.rounding import inner_radius, round_bound
from lightning_accel.projection.thresholds import slack_of

_FROM_NOWHERE, _FROM_NEARBY = 8, 3  # evaluations a call; six and three are enough nearly always
_MORE = 2  # calls where one does not suffice
_WHOLE = 200  # rows up to which a column is reduced in one block
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int32}


class Shape(NamedTuple):
    """What a graph is compiled for: ``(before, groups, after)`` of ``dtype``, in place or not, evaluations a call."""

    before: int
    groups: int
    after: int
    dtype: torch.dtype
    in_place: bool
    threads: int
    evaluations: int


Run = Callable[[list[Tensor]], list[Tensor]]


class OneCall:
    """The projection of one tensor, or of many in the same place.

    Args:
        source: ``(before, groups, after)``, contiguous.
        target: As ``source``, or ``source`` itself.

    Attributes:
        tops: float64 ``(groups,)``, the largest magnitudes before the last call.
        tau: What it took off each; 0 where the tensor was in the ball; NaN where nothing was done.
    """

    def __init__(self, source: Tensor, target: Tensor) -> None:
        before, groups, after = source.shape
        in_place = source.data_ptr() == target.data_ptr()
        self._shape = Shape(before, groups, after, source.dtype, in_place, torch.get_num_threads(), 0)
        self._made_of = source, target
        bits = _INTEGERS[source.dtype]
        views = (source,) if in_place else (source, target)
        numbers = torch.zeros(4, dtype=torch.float64)
        self._tensors = [*(t.view(-1).view(bits).view(*_matrix(self._shape)) for t in views), numbers]
        self._numbers = _view(numbers)
        self._radius = math.nan
        self._run: Run = list
        self.tops = numbers
        self.tau = math.nan

    def __reduce__(self) -> tuple[Any, ...]:
        """Make a copy for the copied tensors."""
        return OneCall, self._made_of

    @classmethod
    def of(cls, source: Tensor, target: Tensor) -> "OneCall | None":
        """Return the call where there can be one."""
        size = source.numel() * source.element_size()
        if source.device.type != "cpu" or source.dtype not in _INTEGERS or not 0 < size <= compiled.LARGEST:
            return None
        before, groups, after = source.shape
        uneven = (after if before == 1 else groups * after) % 2 or source.storage_offset() % 2
        if source.dtype == torch.bfloat16 and (uneven or target.storage_offset() % 2):
            return None
        return cls(source, target)

    def __call__(self, radius: float, start: float) -> bool:
        """Project; say whether that was done. If not, the target holds what the source does, or what it did.

        Args:
            radius: >= 0.
            start: The tau of a similar tensor, or 0.
        """
        try:
            if start != self.tau or radius != self._radius:
                self._aim(radius, start)
            (self.tops,) = self._run(self._tensors)
            self.tau = self._numbers[3]
            return self.tau >= 0.0 or self.go_on()
        except Exception as error:  # whatever a compiler may raise
            compiled.give_up(error)
            self.tau = math.nan
            return False

    def _aim(self, radius: float, start: float) -> None:
        """Write what the graph is to look for; later calls with its last threshold for a start need not."""
        evaluations = _FROM_NEARBY if start > 0.0 else _FROM_NOWHERE
        self._run = _graph(self._shape._replace(evaluations=evaluations))
        target = inner_radius(radius, self._shape.groups)
        for i, number in enumerate((target, slack_of(target, self._shape.groups), radius, start)):
            self._numbers[i] = number
        self._radius = radius

    def go_on(self) -> bool:
        """Call again as long as that gets nearer; say whether it got there."""
        for _ in range(_MORE):
            if not self.tau < 0.0:
                break
            (self.tops,) = self._run(self._tensors)
            self.tau = self._numbers[3]
        return self.tau >= 0.0

    def parts(self) -> tuple[Run, list[Tensor], Any]:
        """Return what does the last call again: the graph, what it takes, and the numbers of that, to look at."""
        return self._run, self._tensors, self._numbers

    def cut(self) -> Cut:
        """Return what the last call found."""
        return LoneCut(self.tops, self.tau).cut()


def _view(numbers: Tensor) -> Any:
    """Return what numbers are looked at and written by, which is quicker than an operation."""
    return memoryview(numbers.numpy())  # type: ignore[arg-type]  # numpy's types say so from Python 3.12 on


def _matrix(shape: Shape) -> tuple[int, int]:
    """Return rows and columns of the integers: a group is a row, or ``after`` columns (halves of them, of pairs)."""
    width = 2 if shape.dtype == torch.bfloat16 else 1
    if shape.before == 1:
        return shape.groups, shape.after // width
    return shape.before, shape.groups * shape.after // width


class _Projection(nn.Module):
    """What is compiled: integers ``(rows, columns)``, if not in place those of the target, what `_threshold` takes.

    The last are written over for the next call.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.write = compiled.clamp_passes(pairs=shape.dtype == torch.bfloat16, in_place=shape.in_place)

    def forward(self, source: Tensor, *rest: Tensor) -> Tensor:
        """Return largest magnitudes."""
        tops = _tops(source, self.shape)
        bounds, numbers = _threshold(tops, rest[-1], self.shape.evaluations)
        level = _stored(_level(bounds, numbers[3] > 0.0, self.shape))
        self.write(source, level, _sign(level, self.shape), *rest[:-1])
        rest[-1].copy_(numbers)
        return tops


def _stored(x: Tensor) -> Tensor:
    """Return the same from memory: otherwise the clamp's loop would compute a group's level for every entry."""
    return torch.as_strided(x, x.shape, x.stride())


@functools.cache
def _graph(shape: Shape) -> Run:
    """Compile the projection of one shape, without guards: who calls sees to it that the tensors fit."""
    begin = time.perf_counter()
    bits = torch.zeros(_matrix(shape), dtype=_INTEGERS[shape.dtype])
    targets = () if shape.in_place else (torch.zeros_like(bits),)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of torch's own code
        numbers = torch.zeros(4, dtype=torch.float64)
        program = torch.export.export(_Projection(shape), (bits, *targets, numbers))
        package = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(Path(folder) / "projection.pt2"),
            inductor_configs={"memory_planning": True},  # one allocation for all that lies between
        )
        run: Run = torch._inductor.aoti_load_package(package, run_single_threaded=True).loader.run
    compiled.log_seconds(f"projections of {shape.before} x {shape.groups} x {shape.after} ({shape.dtype})", begin)
    return run


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


def _threshold(tops: Tensor, numbers: Tensor, evaluations: int) -> tuple[Tensor, Tensor]:
    """Find a threshold by Newton's method.

    Args:
        tops: float64 ``(groups,)``.
        numbers: The sum to reach, how far it may stay below, the radius, and where to start (0 for nowhere), whatever
            the sign.
        evaluations: Of the sum of what is left.

    Returns:
        What is left of each norm; and ``numbers``, at last the threshold, or less than 0 if it is no more than a better
        start, 0 if the norms are of the ball, NaN if they need more care.
    """
    target, slack, radius, start = numbers.unbind()
    start, size = start.abs(), tops.sum()
    tau = torch.where(start > 0.0, start, (size - target) / len(tops))
    for _ in range(evaluations):
        kept = (tops - tau).clamp_min(0.0)
        tau = tau + (kept.sum() - target + slack) / (kept > 0.0).to(kept.dtype).sum()
    bounds = (tops - tau).clamp_min(0.0)
    rest = bounds.sum()
    done = (rest <= target) & (rest >= target - 2.0 * slack)
    outside = (size > radius + slack) & (tau > 0.0) & (tau <= target)
    inside = size < radius - slack  # as near as rounding the norm itself decides
    found = torch.where(outside, torch.where(done, tau, -tau), torch.where(inside, 0.0, torch.nan))
    return bounds, torch.where(torch.arange(4) == 3, found, numbers)


def _level(bounds: Tensor, fine: Tensor, shape: Shape) -> Tensor:
    """Return for each row or column what `compiled.clamp_passes` takes; all stays as it is unless ``fine``."""
    level = round_bound(bounds, shape.dtype)
    if shape.dtype == torch.bfloat16:
        level, most = level.float().view(torch.int32) >> 16, 0x7FFF
    else:
        level = level.view(_INTEGERS[shape.dtype])
        most = torch.iinfo(level.dtype).max
    level = torch.where(fine, level, most)
    if shape.before > 1:
        level = level.unsqueeze(1).expand(-1, shape.after).reshape(-1)
    if shape.dtype == torch.bfloat16:
        level = level | level << 16 if shape.before == 1 else level[0::2] | level[1::2] << 16
    return level.unsqueeze(1 if shape.before == 1 else 0)


def _sign(level: Tensor, shape: Shape) -> Tensor:
    """Return where entries keep their signs: not where they are cleared."""
    if shape.dtype == torch.bfloat16:
        high, low = ((-(level & mask) >> 31) & sign for mask, sign in ((0x7FFF0000, -0x80000000), (0x7FFF, 0x8000)))
        return high | low
    info = torch.iinfo(level.dtype)
    return (-level >> (info.bits - 1)) & info.min
