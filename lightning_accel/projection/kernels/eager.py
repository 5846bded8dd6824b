"""Passes over memory: reduce groups and clamp them, on contiguous ``(before, groups, after)`` blocks.

On CPU each pass walks over chunks of rows that fit into the second-level cache, so that several elementwise operations
cost one trip to memory; 16-bit floats are handled as integers there, whose order is that of the magnitudes once the
sign bit is gone. On other devices an expression over the whole tensor does the same. `compiled` does a pass instead
where it may.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_accel.projection.kernels import compiled, placement
from lightning_accel.projection.kernels.ordered_sums import LONG_RUN, UNIT, column_sums, run_sums

_CHUNK = 1 << 17  # entries a thread works on at once with a copy beside them: 512 KiB of float32
_BARE = 1 << 18  # the same without a copy
_FLAT = 1 << 21  # one operation is enough; blocks of this size still take half the time that a whole tensor does
_SUMMED = 1 << 16  # the same for sums over rows, which put what they add up beside them
_SUMMED_WIDE = 1 << 13  # entries of a row of which columns are summed
_FEW = 4  # one group of so many is worth moving
_MAGNITUDE = 0x7FFF
_SIGN = -0x8000
_HALVES = (torch.float16, torch.bfloat16)
_LONG = 4096  # entries; from here on an operation a row costs less than the memory it spares
_RUN = 64  # entries of a group in a row; from here on groups are worked on run by run
_WIDE = 512  # entries a row; as long as operations need to be quick
_SHORT = 32  # entries; reducing shorter rows one by one is slow


def small_matrices(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, int] | None:
    """View blocks as matrices where few operations count more than few passes over memory, else return ``None``.

    Returns:
        Source, target and the dimension to reduce.
    """
    before, groups, after = source.shape
    if placement.is_far(source) or source.numel() > _CHUNK or source.dtype in _HALVES:
        return None
    if before == 1 and after >= _SHORT:
        return source[0], target[0], 1
    return (source.view(before, groups), target.view(before, groups), 0) if after == 1 else None


def group_max(x: Tensor) -> Tensor:
    """Return the largest magnitude of each group, ``(groups,)``, in the type of ``x``; NaN where a group has one."""
    before, groups, after = x.shape
    if placement.is_far(x):
        return torch.linalg.vector_norm(x, math.inf, (0, 2))  # one pass, where magnitudes would be written first
    found = compiled.largest(x)
    if found is not None:
        return found
    if before == 1:
        return _max_of_rows(x[0])
    if after >= _RUN:
        return _max_of_rows(x.view(before * groups, after)).view(before, groups).amax(0)
    beside, rows = _side_by_side(before, groups * after)
    columns = x.view(before, groups * after)
    found = _max_of_columns(columns[: rows * beside].view(rows, beside * groups * after))
    if beside > 1:
        found = found.view(beside, groups * after).amax(0)
    if rows * beside < before:
        found = torch.maximum(found, columns[rows * beside :].abs().amax(0))
    return _max_of_rows(found.view(groups, after))


def group_norms(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest magnitude and the l1 norm of each group, float64 ``(groups,)`` both.

    The l1 norm is summed in the type of ``x`` (float32 for 16 bits) within a chunk and in float64 across chunks; all in
    float64 where float32 overflows.
    """
    largest, total = quick_group_norms(x)
    if not placement.is_far(x) and bool(torch.isinf(total).any()) and bool(torch.isfinite(largest).all()):
        return quick_group_norms(x, precise=True)
    return largest, total


def quick_group_norms(x: Tensor, *, precise: bool = False) -> tuple[Tensor, Tensor]:
    """Do what `group_norms` does, but where float32 overflows, so does the l1 norm; all in float64 if ``precise``."""
    before, groups, after = x.shape
    if placement.is_far(x):
        magnitude = x.abs()
        return magnitude.amax((0, 2)).double(), magnitude.sum((0, 2), dtype=torch.float64)
    wide = torch.float64 if precise or x.dtype == torch.float64 else torch.float32
    if after >= LONG_RUN:
        total, largest = run_sums(x.view(-1, after), None, None, wide)
        return largest.view(before, groups).amax(0).double(), total.view(before, groups).sum(0)
    if before == 1:
        magnitudes = (x[0, rows].to(wide).abs() for rows in _slices(groups, after, _SUMMED))
        pairs = [(m.amax(1), m.sum(1)) for m in magnitudes]
        return torch.cat([p[0] for p in pairs]).double(), torch.cat([p[1] for p in pairs]).double()
    columns = x.view(before, groups * after)
    if x.numel() <= _CHUNK:
        few = columns.to(wide).abs()
        total = few.sum(0).double().view(groups, after).sum(1)
        return few.amax(0).view(groups, after).amax(1).double(), total
    beside, height = _wide_rows(before, groups * after)
    total, largest = column_sums(columns[: height * beside].view(height, -1), None, wide)
    total, largest = total.view(beside, groups, after).sum((0, 2)), largest.view(beside, groups, after).amax((0, 2))
    if height * beside < before:
        left = x[height * beside :].to(wide).abs()
        total += left.sum((0, 2), dtype=torch.float64)
        largest = torch.maximum(largest, left.amax((0, 2)))
    return largest.double(), total


def excess(x: Tensor, groups: Tensor, mu: Tensor, *, precise: bool = False) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\sum_i (|y_i| - \mu)_+` and how many magnitudes are above :math:`\mu`, for some of the groups.

    Args:
        x: ``(before, groups, after)``.
        groups: Indices of the groups, ``(chosen,)``.
        mu: float64 ``(chosen,)``; numbers that float32 holds, unless ``precise``.
        precise: Subtract and sum in float64; otherwise in the type of ``x`` (float32 for 16 bits) within a chunk.

    Returns:
        Two float64 tensors ``(chosen,)``.
    """
    before, total_groups, after = x.shape
    wide = torch.float64 if precise or x.dtype == torch.float64 else torch.float32
    level = mu.to(wide)
    if len(groups) == 0:
        return mu.clone(), mu.clone()
    if placement.is_far(x):
        above = (x.index_select(1, groups).to(wide).abs_() - level.view(1, -1, 1)).clamp_min_(0.0)
        return above.sum((0, 2), dtype=torch.float64), (above > 0).sum((0, 2)).double()
    if after >= LONG_RUN:
        if before == 1:
            total, count = run_sums(x[0], groups, level, wide)
            return total, count.double()
        chosen = (torch.arange(before, device=x.device).unsqueeze(1) * total_groups + groups).flatten()
        total, count = run_sums(x.view(-1, after), chosen, level.repeat(before), wide)
        return total.view(before, -1).sum(0), count.view(before, -1).sum(0, dtype=torch.float64)
    if len(groups) * before * after <= _CHUNK:
        if after == 1 < before:  # columns add up as they lie
            few = x if len(groups) == total_groups else x.index_select(1, groups)
            above = few.squeeze(2).to(wide).abs().sub_(level).clamp_min_(0.0)
            return above.sum(0).double(), above.sign_().sum(0).double()
        chosen = x if len(groups) == total_groups else x.index_select(1, groups)
        few = chosen.transpose(0, 1).reshape(len(groups), before * after)
        above = few.to(wide).abs().sub_(level.unsqueeze(1)).clamp_min_(0.0)  # not abs_: it may be x itself
        return above.sum(1, dtype=torch.float64), above.sign_().sum(1).double()
    if before == 1:
        sums, counts = [], []
        for rows in _slices(len(groups), after, _SUMMED):
            above = x[0].index_select(0, groups[rows]).to(wide).abs_().sub_(level[rows].unsqueeze(1)).clamp_min_(0.0)
            sums.append(above.sum(1))
            counts.append(above.sign_().sum(1))
        return torch.cat(sums).double(), torch.cat(counts).double()
    if _FEW * len(groups) <= total_groups:  # then moving them together costs less than reading all of them
        return excess(x.index_select(1, groups), torch.arange(len(groups), device=x.device), mu, precise=precise)
    every = level.new_full((total_groups,), torch.inf).index_copy_(0, groups, level).repeat_interleave(after)
    beside, height = _wide_rows(before, total_groups * after)
    columns = x.view(before, total_groups * after)
    total, count = column_sums(columns[: height * beside].view(height, -1), every.repeat(beside), wide)
    total = total.view(beside, total_groups, after).sum((0, 2))
    count = count.view(beside, total_groups, after).sum((0, 2), dtype=torch.float64)
    if height * beside < before:
        left = (columns[height * beside :].to(wide).abs() - every).clamp_min_(0.0).view(-1, total_groups, after)
        total += left.sum((0, 2), dtype=torch.float64)
        count += left.sign_().sum((0, 2), dtype=torch.float64)
    return total[groups], count[groups]


def clamp(source: Tensor, bounds: Tensor, target: Tensor) -> None:
    """Write ``source`` clamped to plus and minus ``bounds`` to ``target``; entries within stay bit for bit.

    Args:
        source: ``(before, groups, after)``.
        bounds: ``(groups,)`` in the type of ``source``, >= 0; infinite leaves a group alone.
        target: As ``source``, or ``source`` itself.
    """
    before, groups, after = source.shape
    if compiled.clamp(source, bounds, target):
        return
    few = after == 1 and before > 1 and source.numel() <= _FLAT and source.dtype not in _HALVES
    if few or placement.is_far(source):
        high = bounds.view(groups, 1)
        torch.clamp(source, 0.0 - high, high, out=target)
    elif before == 1:
        _clamp_rows(source[0], bounds.unsqueeze(1), target[0])
    elif after >= _RUN:
        runs = before * groups, after
        _clamp_rows(source.view(runs), bounds.repeat(before).unsqueeze(1), target.view(runs))
    else:
        bound = (bounds if after == 1 else bounds.repeat_interleave(after)).unsqueeze(0)
        beside, rows = _side_by_side(before, groups * after)
        columns, out = source.view(before, groups * after), target.view(before, groups * after)
        wide = rows, beside * groups * after
        _clamp_rows(columns[: rows * beside].view(wide), bound.repeat(1, beside), out[: rows * beside].view(wide))
        if rows * beside < before:
            _clamp_rows(columns[rows * beside :], bound, out[rows * beside :])


def _side_by_side(rows: int, width: int) -> tuple[int, int]:
    """Return how many narrow rows to lay side by side, so that operations find long rows, and how many there are then.

    Some rows may be left over.
    """
    beside = max(1, min(rows // _SHORT, _WIDE // width)) if width < _SHORT else 1
    return beside, rows // beside


def _wide_rows(rows: int, width: int) -> tuple[int, int]:
    """Return how many narrow rows to lay side by side for sums, which take few rows of thousands of entries best."""
    beside = max(1, min(rows // UNIT, _SUMMED_WIDE // width))
    return beside, rows // beside


def _clamp_rows(source: Tensor, bound: Tensor, target: Tensor) -> None:
    """Clamp ``(rows, columns)`` to a bound for every row ``(rows, 1)`` or for every column ``(1, columns)``."""
    by_row = bound.shape[0] > 1
    if source.dtype in _HALVES:
        # NaN is above infinity here; the largest integer leaves both alone
        level = bound.view(torch.int16).masked_fill(torch.isinf(bound), _MAGNITUDE)
        signs = (level > 0).to(torch.int16) * _SIGN
        source, target = source.view(torch.int16), target.view(torch.int16)
        for rows in _row_slices(source):
            piece, out = source[rows], target[rows]
            sign = torch.bitwise_and(piece, signs[rows] if by_row else signs)
            torch.bitwise_and(piece, _MAGNITUDE, out=out)
            torch.minimum(out, level[rows] if by_row else level, out=out)
            torch.bitwise_or(out, sign, out=out)
        return
    floor = 0.0 - bound  # and not -bound, whose -0.0 would give cleared entries signs
    if not by_row:
        for rows in _row_slices(source, _FLAT):
            torch.clamp(source[rows], floor, bound, out=target[rows])
        return
    if source.shape[1] >= _LONG and torch.get_num_threads() == 1 and 4 * int((bound == 0).sum()) > 3 * len(bound):
        _clamp_few_rows(source, bound, target)
        return
    for rows in _row_slices(source, _BARE):  # `clamp` with a broadcast column is three times slower than its two halves
        torch.minimum(source[rows], bound[rows], out=target[rows])
        torch.maximum(target[rows], floor[rows], out=target[rows])


def _clamp_few_rows(source: Tensor, bound: Tensor, target: Tensor) -> None:
    """Clamp row by row where most rows are cleared, which need not be read for that."""
    in_place = source.data_ptr() == target.data_ptr()
    for row, out, high in zip(source.unbind(0), target.unbind(0), bound[:, 0].tolist(), strict=True):
        if high == 0.0:
            out.zero_()
        elif high < math.inf:
            torch.clamp(row, -high, high, out=out)
        elif not in_place:
            out.copy_(row)


def _max_of_rows(rows: Tensor) -> Tensor:
    if rows.shape[1] < _SHORT and rows.shape[0] > rows.shape[1]:
        first, *others = rows.unbind(1)
        largest = first.abs()
        for other in others:
            torch.maximum(largest, other.abs(), out=largest)
        return largest
    if rows.dtype in _HALVES:
        bits = rows.view(torch.int16)
        parts = [torch.bitwise_and(bits[s], _MAGNITUDE).amax(1) for s in _row_slices(bits)]
        return torch.cat(parts).view(rows.dtype)
    slices = _row_slices(rows)
    scratch = rows[next(slices)].abs()
    parts = [scratch.amax(1)]
    for s in slices:
        part = rows[s]
        parts.append(torch.abs(part, out=scratch[: part.shape[0]]).amax(1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _max_of_columns(rows: Tensor) -> Tensor:
    if rows.dtype in _HALVES:
        bits = rows.view(torch.int16)
        slices = _row_slices(bits)
        largest = torch.bitwise_and(bits[next(slices)], _MAGNITUDE)
        scratch = torch.empty_like(largest)
        for s in slices:
            magnitude = torch.bitwise_and(bits[s], _MAGNITUDE, out=scratch[: bits[s].shape[0]])
            part = largest[: magnitude.shape[0]]
            torch.maximum(part, magnitude, out=part)
        return largest.amax(0).view(rows.dtype)
    # each thread reduces a block of rows of its own
    blocks = max(1, min(torch.get_num_threads(), rows.shape[0] // _SHORT))
    height, width = rows.shape[0] // blocks, rows.shape[1]
    found = [_extremes(rows[: blocks * height].view(blocks, height, width))]
    if blocks * height < rows.shape[0]:
        found.append(_extremes(rows[blocks * height :].unsqueeze(0)))
    high, low = (torch.cat([pair[i] for pair in found]) if len(found) > 1 else found[0][i] for i in (0, 1))
    return torch.maximum(high.amax(0), low.amin(0).neg_())


def _extremes(slabs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest and the smallest entry of each column of ``(blocks, height, width)``, in cached pieces."""
    blocks, height, width = slabs.shape
    first, *others = _slices(height, width, _BARE * blocks // torch.get_num_threads())
    high, low = slabs[:, first].amax(1), slabs[:, first].amin(1)
    for s in others:
        torch.maximum(high, slabs[:, s].amax(1), out=high)
        torch.minimum(low, slabs[:, s].amin(1), out=low)
    return high, low


def _row_slices(rows: Tensor, entries: int = _CHUNK) -> Iterator[slice]:
    height, width = rows.shape
    return _slices(height, width, entries)


def _slices(rows: int, columns: int, entries: int = _CHUNK) -> Iterator[slice]:
    """Cut ``(rows, columns)`` into slices of rows that fit into the caches of the threads."""
    step = max(1, entries * torch.get_num_threads() // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))
