"""Which ranks are worth trying for a weight of a given shape."""

import math
from collections.abc import Iterable

from lightning_accel.low_rank.plan import factor_parameters

_GRANULARITIES = (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
_ENOUGH = 6  # plateaus that describe how time depends on the rank
_DEEPEST = 8.0  # compression ratio down to which plateaus are tried, if the target asks for no more


def theoretical_ranks(shape: tuple[int, ...], ratio: float) -> tuple[int, ...]:
    r"""Return the largest ranks at which the factors have at most ``1 / ratio`` of the weight's entries.

    For a matrix ``r = O I / (a (O + I))``. For a k x k convolution both channel numbers shrink by one factor beta,
    ``beta^2 O I k^2 + beta (O^2 + I^2) = O I k^2 / a``; ``r1 = beta I``, ``r2 = beta O``.

    Args:
        shape: (out, in, *kernel) of the dense weight.
        ratio: Compression ratio a, > 0.

    Returns:
        ``(r,)`` or ``(r1, r2)``, rounded down, at least 1.

    Raises:
        ValueError: If ``ratio <= 0``.

    References:
        Hajimolahoseini, Ahmed, Liu, arXiv:2309.03824.

    Example:
        >>> from lightning_accel.low_rank import theoretical_ranks
        >>> theoretical_ranks((64, 64), 2.0)
        (16,)
    """
    if ratio <= 0.0:
        raise ValueError(f"`ratio` must be > 0, got {ratio}.")
    out, fan_in, *kernel = shape
    positions = math.prod(kernel)
    if positions == 1:
        return (max(1, min(int(out * fan_in / (ratio * (out + fan_in))), out, fan_in)),)
    quadratic, linear = out * fan_in * positions, out * out + fan_in * fan_in
    beta = (-linear + math.sqrt(linear * linear + 4.0 * quadratic * quadratic / ratio)) / (2.0 * quadratic)
    return (max(1, min(int(beta * fan_in), fan_in)), max(1, min(int(beta * out), out)))


def plateau_candidates(shape: tuple[int, ...], ratio: float | None = None, *, unit: int = 1) -> list[tuple[int, ...]]:
    """Return ranks on multiples of the coarsest power of two that leaves enough of them, smallest first.

    They reach from the rank of ratio 8 (twice ``ratio``, if that is deeper) up to where the factors would have as many
    entries as the dense weight. Near the theoretical rank of ``ratio`` the neighbouring multiples of 32 (or of the
    granularity, if finer) join, below and above. Convolutions larger than 1x1 get both forms: Tucker-2 with two ranks,
    and two factors with one rank.

    Args:
        shape: (out, in, *kernel) of the dense weight.
        ratio: Compression ratio the caller aims at, or None.
        unit: Power of two of which ranks are multiples wherever the weight has room for it: `rank_unit` of a device.
    """
    deepest = max(_DEEPEST, 2.0 * ratio if ratio is not None else 0.0)
    low, high = min(theoretical_ranks(shape, deepest)), min(theoretical_ranks(shape, 1.0))
    granularity = next((g for g in _GRANULARITIES if high // g - (low - 1) // g >= _ENOUGH), 1)
    granularity = max(granularity, unit if high >= unit else 1)
    small = set(range(granularity, high + 1, granularity)) - set(range(low))
    if ratio is not None:
        step = min(granularity, 32)
        around = min(theoretical_ranks(shape, ratio)) // step * step
        small |= {around, around + step}
    candidates = [_scaled(shape, rank, granularity) for rank in sorted(small) if rank >= 1]
    out, fan_in, *kernel = shape
    if math.prod(kernel) != 1:  # the same plateaus for the two-factor form
        candidates += plateau_candidates((out, fan_in * math.prod(kernel)), ratio, unit=unit)
    return _smaller_than_dense(shape, candidates)


def rank_unit(device_type: str) -> int:
    """Return what ranks are to be multiples of: 8 on CUDA, 1 elsewhere.

    Tensor cores take 8 numbers of half precision (4 of float32) at a time; a rank in between runs as the next one, or
    beside them. Coarser plateaus, multiples of 64, are found by time, as on any machine.
    """
    return 8 if device_type == "cuda" else 1


def plateau_below(ranks: tuple[int, ...]) -> tuple[int, ...]:
    """Return ``ranks``, each rounded down to a multiple of the largest power of two that is at most its half and 32.

    Kernels work in blocks: a convolution of rank 77 takes longer than its share over one of rank 64. For ranks that are
    not measured; what the plateaus of a machine really are, only its times tell.
    """
    steps = [next((step for step in (32, 16, 8, 4, 2) if 2 * step <= rank), 1) for rank in ranks]
    return tuple(rank // step * step for rank, step in zip(ranks, steps, strict=True))


def snapped_ranks(
    shape: tuple[int, ...], ratio: float, candidates: Iterable[tuple[int, ...]]
) -> tuple[int, ...] | None:
    """Return the largest candidate of the theoretical form that compresses at least by ``ratio``; None if none does."""
    limit, form = math.prod(shape) / ratio, len(theoretical_ranks(shape, ratio))
    fitting = [ranks for ranks in candidates if len(ranks) == form and factor_parameters(shape, ranks) <= limit]
    return max(fitting, key=lambda ranks: factor_parameters(shape, ranks), default=None)


def every_rank(shape: tuple[int, ...], ratio: float) -> list[tuple[int, ...]]:
    """Return all ranks from the theoretical rank of ``ratio`` down to that of ``ratio + 1``, largest first.

    References:
        Hajimolahoseini, Ahmed, Liu, arXiv:2309.03824, rank search. *Deviations*: for Tucker-2 both ranks go down
        together, in proportion.
    """
    high, low = theoretical_ranks(shape, ratio), theoretical_ranks(shape, ratio + 1.0)
    return [_scaled(shape, rank, 1) for rank in range(min(high), min(low) - 1, -1)]


def _scaled(shape: tuple[int, ...], small: int, granularity: int) -> tuple[int, ...]:
    """Give the narrower channel side the rank ``small`` and the other one its share, on the same granularity."""
    out, fan_in, *kernel = shape
    if math.prod(kernel) == 1:
        return (small,)
    wide, narrow = max(out, fan_in), min(out, fan_in)
    unit = min(granularity, small)
    large = min(wide, max(unit, round(small * wide / narrow / unit) * unit))
    return (small, large) if fan_in == narrow else (large, small)


def _smaller_than_dense(shape: tuple[int, ...], ranks: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    unique = dict.fromkeys(ranks)
    return [candidate for candidate in unique if factor_parameters(shape, candidate) < math.prod(shape)]
