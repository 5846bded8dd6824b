"""Sums of magnitudes whose order is laid down, so that eager operations and machine code find the same bit for bit.

Sixteen numbers are added up by halves in the type of numbers that was asked for, the first to the ninth and so on;
what comes of them is added up in float64, from the first to the last. Neither the number of threads nor the pieces in
which memory is worked on change that.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_accel.projection.kernels import compiled, placement

UNIT = 16  # numbers that are added up by halves
_SIDE = 64  # neighbours in a run that are added up apart
_PIECE = UNIT * _SIDE
LONG_RUN = _PIECE // 2  # entries; shorter runs are not worth it
_SLAB = 1 << 14  # columns at once: a unit of them fits into the second-level cache
_CHUNK = 1 << 18  # entries at once, of runs


def column_sums(x: Tensor, levels: Tensor | None, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Add up the columns of magnitudes, or of what of them is above a level.

    Args:
        x: ``(rows, columns)``, contiguous.
        levels: In ``wide``, ``(columns,)``; or ``None`` for none.
        wide: Type of numbers in which units are added up.

    Returns:
        Sums, float64 ``(columns,)``, and beside them in ``wide`` how many magnitudes are above their levels; without
        levels, the largest magnitudes.
    """
    found = compiled.column_sums(x, levels, wide)
    if found is not None:
        return found
    rows, columns = x.shape
    totals, others = (torch.zeros(columns, dtype=kind, device=x.device) for kind in (torch.float64, wide))
    scratch, signs = torch.empty(2, min(rows, UNIT), min(columns, _SLAB), dtype=wide, device=x.device).unbind()
    for slab in _slices(columns, _SLAB):
        total, other = totals[slab], others[slab]
        for unit in _slices(rows, UNIT):
            part = x[unit, slab]
            values = scratch[: part.shape[0], : part.shape[1]]
            _magnitudes(part, values)
            if levels is None:
                torch.maximum(other, values.amax(0), out=other)
            else:
                values.sub_(levels[slab]).clamp_min_(0.0)
                other += torch.sign(values, out=signs[: part.shape[0], : part.shape[1]]).sum(0)
            total += _by_halves(values, 0).squeeze(0)
    return totals, others


def run_sums(x: Tensor, chosen: Tensor | None, levels: Tensor | None, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Do what `column_sums` does for long runs: rows of a matrix, of which some may be chosen.

    Args:
        x: ``(runs, columns)``, contiguous.
        chosen: int64 ``(chosen,)``, or ``None`` for all.
        levels: In ``wide``, ``(chosen,)``; or ``None`` for none.
        wide: As in `column_sums`.

    Returns:
        As `column_sums`, ``(chosen,)``.
    """
    found = compiled.run_sums(x, chosen, levels, wide)
    return _eager_run_sums(x, chosen, levels, wide) if found is None else found


def running_sums(x: Tensor) -> Tensor:
    """Return the sums of the first 1, 2, ... entries along the last dimension.

    On a GPU, torch's own raises where deterministic algorithms were asked for, for it has no order that is laid down.
    """
    if not (placement.is_far(x) and torch.are_deterministic_algorithms_enabled()):
        return x.cumsum(-1)
    reach = 1
    while reach < x.shape[-1]:
        x = torch.cat((x[..., :reach], x[..., reach:] + x[..., :-reach]), -1)
        reach *= 2
    return x


def _eager_run_sums(
    x: Tensor, chosen: Tensor | None, levels: Tensor | None, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Do what `run_sums` does: sides of a run are added up apart, then from the first to the last."""
    runs, columns = len(x) if chosen is None else len(chosen), x.shape[1]
    pieces, height = -(-columns // _PIECE), min(runs, max(1, _CHUNK // columns))
    unit = UNIT if pieces > 1 else -(-columns // _SIDE)  # zeros that a short run lacks need not be added up
    sides = torch.empty(runs, _SIDE, dtype=torch.float64, device=x.device)
    others = torch.empty(runs, dtype=wide, device=x.device)
    scratch = torch.zeros(
        height, pieces * unit * _SIDE, dtype=wide, device=x.device
    )  # what a last piece lacks is zeros
    signs = None if levels is None else torch.empty_like(scratch)
    for rows in _slices(runs, height):
        part = x[rows] if chosen is None else x.index_select(0, chosen[rows])
        values = scratch[: len(part)]
        values[:, columns:].zero_()
        _magnitudes(part, values[:, :columns])
        if levels is None or signs is None:
            others[rows] = values.amax(1)
        else:
            values.sub_(levels[rows].unsqueeze(1)).clamp_min_(0.0)
            others[rows] = torch.sign(values, out=signs[: len(part)]).sum(1)
        units = _by_halves(values.view(-1, pieces, unit, _SIDE), 2).squeeze(2)
        sides[rows] = units.double().cumsum(1)[:, -1]
    return sides.cumsum(1)[:, -1], others


def _magnitudes(part: Tensor, values: Tensor) -> None:
    if part.dtype == values.dtype:
        torch.abs(part, out=values)
    else:
        values.copy_(part).abs_()


def _by_halves(values: Tensor, dim: int) -> Tensor:
    """Add up at most 16 numbers along a dimension, which keeps size 1, over what ``values`` held."""
    half = UNIT // 2
    while half:
        count = values.shape[dim]
        if count > half:
            values.narrow(dim, 0, count - half).add_(values.narrow(dim, half, count - half))
            values = values.narrow(dim, 0, half)
        half //= 2
    return values


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
