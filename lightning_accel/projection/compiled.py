"""Passes over rows that a compiler merges into one loop, where there is a compiler: an option, never a need.

Maxima and clamps are those of the eager passes bit for bit. Sums are added in another order, so they agree to about
1e-6 of their size in float32 and 1e-14 in float64.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_wanted: ContextVar[bool] = ContextVar("compiled passes wanted", default=False)
_broken: list[str] = []  # why compiling failed on this machine; it is tried once


@contextlib.contextmanager
def compiling(wanted: bool) -> Iterator[None]:
    """Ask for compiled passes within the block."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def wanted(x: Tensor) -> bool:
    """Say whether passes over ``x`` should be compiled; 16-bit floats have quick eager ones."""
    return _wanted.get() and not _broken and x.dtype in (torch.float32, torch.float64)


def largest_of_rows(rows: Tensor) -> Tensor:
    """Return the largest magnitude of each row."""
    return rows.abs().amax(1)


def norms_of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest magnitude and the l1 norm of each row."""
    magnitude = rows.abs()
    return magnitude.amax(1), magnitude.sum(1)


def excess_of_rows(rows: Tensor, chosen: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of what is above its level in each chosen row, and how many entries are."""
    above = (rows.index_select(0, chosen).abs() - level.unsqueeze(1)).clamp_min(0.0)
    return above.sum(1), (above > 0.0).to(rows.dtype).sum(1)


def clamp_rows(rows: Tensor, bound: Tensor, target: Tensor) -> None:
    """Write rows clamped to bounds ``(rows, 1)`` to ``target``."""
    target.copy_(torch.minimum(torch.maximum(rows, -bound), bound))


def run(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """Call a function of this module compiled; as it is, with one warning, where that fails."""
    if not _broken:
        try:
            return _compiled(function)(*tensors)
        except Exception as error:  # whatever a compiler may raise
            _broken.append(str(error))
            warnings.warn(
                f"Compiling projections failed, so they go on without: {str(error).strip().splitlines()[0]}. Install a "
                "C++ compiler (on GPU: Triton), or do not ask for `compile`.",
                RuntimeWarning,
                stacklevel=2,
            )
    return function(*tensors)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)
