"""The radius that clears a given fraction of the groups: an order statistic, no search."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_accel.projection.balls.floor import Floor
from lightning_accel.projection.balls.newton import Newton
from lightning_accel.projection.balls.norm_pyramid import check_levels, pyramid
from lightning_accel.projection.kernels.eager import group_norms
from lightning_accel.projection.kernels.layout import Blocks, is_sharded, normalize_dims
from lightning_accel.projection.kernels.rounding import check_input, require_finite


@torch.no_grad()
def radius_for_sparsity(
    x: Tensor,
    sparsity: float,
    group_dims: Sequence[int] = (0,),
    method: str = "bilevel",
    *,
    norms: Sequence[str] | None = None,
    dims: Sequence[Sequence[int]] | None = None,
) -> float:
    r"""Return the radius whose projection clears ``round(sparsity * groups)`` groups of ``x``.

    Bi-level, the threshold is any :math:`\tau` between the last group norm to go and the first to stay, and
    :math:`\eta = \sum_j (v_j - \tau)_+`. Exact, :math:`\theta` is chosen so among the groups' l1 norms, and
    :math:`\eta = \sum_j \mu_j(\theta)`. The middle of the gap is taken, so that rounding moves no group across.
    Groups of one norm go together; groups that are zero already count.

    Args:
        x: As in `project_multilevel`.
        sparsity: Fraction of groups to clear, in [0, 1].
        group_dims: As in `project_l1inf`.
        method: As in `project_l1inf`.
        norms: With ``dims``: levels as in `project_multilevel`, the outermost an ``"l1"``, in place of ``group_dims``
            and ``method``.
        dims: See ``norms``.

    Returns:
        The radius, for a projection with the same arguments.

    Raises:
        TypeError: If ``x`` is no floating-point tensor.
        ValueError: If ``sparsity`` is not in [0, 1], the groups are not valid, or ``x`` holds NaN or infinity.

    Complexity: One pass over ``x`` and a sort of the group norms; exact: a few passes over the groups that stay.

    Example:
        >>> import torch
        >>> from lightning_accel.projection import project_l1inf, radius_for_sparsity
        >>> weight = torch.randn(10, 5, generator=torch.Generator().manual_seed(0))
        >>> projected = project_l1inf(weight, radius_for_sparsity(weight, 0.5, group_dims=(0,)), group_dims=(0,))
        >>> int((projected == 0).all(1).sum())
        5
    """
    check_input(x)
    check_sparsity(sparsity)
    if norms is not None or dims is not None:
        levels = check_levels(norms or (), dims or (), x.ndim)
        if levels[0][0] != "l1":
            raise ValueError(f"the outermost of `norms` must be 'l1' to clear groups, got {levels[0][0]!r}.")
    else:
        group = normalize_dims(group_dims, x.ndim)
        levels = (("l1", group), ("linf", tuple(d for d in range(x.ndim) if d not in group)))
        if method not in ("bilevel", "exact"):
            raise ValueError(f"`method` must be 'bilevel' or 'exact', got {method!r}.")
    if x.numel() == 0:
        return 0.0
    exact = method == "exact" and norms is None
    if is_sharded(x):
        from lightning_accel.projection.sharded import gather, sharded_pyramid

        if exact:
            return exact_radius(gather(x), levels[0][1], sparsity)
        tops = sharded_pyramid(x, levels).tops()  # type: ignore[arg-type]
    elif exact:
        return exact_radius(x, levels[0][1], sparsity)
    else:
        tops = pyramid(x, levels, x).tops()
    require_finite(tops.sum())
    return float(bilevel_radius(tops, sparsity))


def bilevel_radius(norms: Tensor, sparsity: float) -> Tensor:
    """Return the radius, float64 scalar, for group norms float64 ``(groups,)``; without a host synchronization."""
    return (norms - gap_middle(norms, sparsity)).clamp_min_(0.0).sum()


def exact_radius(x: Tensor, group_dims: tuple[int, ...], sparsity: float) -> float:
    """Return the radius for the exact projection.

    Raises:
        ValueError: If ``x`` holds NaN or infinity.
    """
    source = Blocks.of(x, group_dims, x).source
    largest, totals = group_norms(source)
    require_finite(totals.sum())
    theta = gap_middle(totals, sparsity)
    if not bool(theta > 0.0):
        return float(largest.sum())
    return float(Newton([source], largest, totals).levels(theta, precise=True).sum())


def gap_middle(values: Tensor, sparsity: float) -> Tensor:
    """Return the middle between the largest of the ``round(sparsity * n)`` smallest values and the next one."""
    return Floor([len(values)], 0, sparsity).tau(values)


def check_sparsity(sparsity: float, name: str = "sparsity") -> None:
    """Refuse a fraction outside [0, 1].

    Raises:
        ValueError: If so.
    """
    if not 0.0 <= sparsity <= 1.0:
        hint = f" {sparsity:g} % are {sparsity / 100:g}." if 1.0 < sparsity <= 100.0 else ""
        raise ValueError(f"`{name}` must be a fraction of groups in [0, 1], got {sparsity}.{hint}")
