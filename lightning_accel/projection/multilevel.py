"""Multi-level projections of one tensor: the l1, l1,inf, l1,2 and l1,1 balls, and any nesting of them."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_accel.projection.balls.exact import ExactState, project_exact
from lightning_accel.projection.balls.norm_pyramid import Level, Norm, Pyramid, check_levels, pyramid
from lightning_accel.projection.balls.shared_radius import Team, cut, cut_alone
from lightning_accel.projection.kernels import placement
from lightning_accel.projection.kernels.compiled import Compile, check_compile, compiling
from lightning_accel.projection.kernels.huge_pages import empty_like_dense
from lightning_accel.projection.kernels.layout import is_sharded, normalize_dims, overlap
from lightning_accel.projection.kernels.one_call import project_in_one_call
from lightning_accel.projection.kernels.rounding import check_input, check_nonfinite, check_out, check_radius

Nonfinite = Literal["raise", "skip"]
Method = Literal["bilevel", "exact"]


@torch.no_grad()
def project_multilevel(
    x: Tensor,
    radius: float,
    norms: Sequence[str] = ("l1", "linf"),
    dims: Sequence[Sequence[int]] = ((0,), (1, 2, 3)),
    *,
    out: Tensor | None = None,
    nonfinite: Nonfinite = "raise",
) -> Tensor:
    r"""Project onto a ball of nested norms, level by level.

    For levels :math:`q_1, \dots, q_k` from the outermost in, let :math:`v` hold the :math:`q_k` norms of the innermost
    fibres. :math:`T` is the projection of :math:`v` for the levels :math:`q_1, \dots, q_{k-1}`, and every fibre is
    projected onto the :math:`q_k` ball of its radius in :math:`T`.

    The result lies in the ball, keeps signs, never grows an entry, and projecting it again changes no bit. It is the
    nearest point of the ball for one level and for ``("l1", "l2")``; otherwise it is a relaxation, whose reward is
    that each level is a reduction: the span is the sum of the dimensions, not their product.

    Args:
        x: Any shape and strides, float16, bfloat16, float32 or float64, any device. A DTensor is projected as the
            whole that its processes hold, all of which must call; the result is sharded as it is.
        radius: Of the ball, >= 0, in the unit of ``x``; infinity leaves ``x`` alone, 0 clears it.
        norms: ``"l1"``, ``"l2"`` or ``"linf"`` a level, from the outermost in.
        dims: Dimensions of ``x`` a level, from the outermost in; each dimension once.
        out: Tensor for the result; ``x`` itself projects in place; what shares some of its memory gets what a tensor
            of its own would. A new tensor by default.
        nonfinite: ``"raise"``, or ``"skip"`` to return NaN- or infinity-holding data unchanged.

    Returns:
        The projection; ``out`` if given. It carries no gradient: `MultilevelBall` does.

    Raises:
        TypeError: If ``x`` is no floating-point tensor.
        ValueError: If ``radius`` is negative or NaN, ``norms`` and ``dims`` do not fit ``x``, ``out`` cannot hold the
            result, (unless skipped) ``x`` holds NaN or infinity, or it is a DTensor that is neither sharded nor
            replicated but partial.

    References:
        Perez, Barlaud, arXiv:2405.02086 (multi-level), arXiv:2407.16293 (bi-level). *Deviations*: thresholds are
        computed in float64 and rounded toward zero, so that the result is feasible without slack.

    Complexity: O(numel); two passes over ``x`` for ``("l1", "linf")``. On GPU no host synchronization with
        ``nonfinite="skip"``, one otherwise.

    Example:
        >>> import torch
        >>> from lightning_accel.projection import project_multilevel
        >>> weight = torch.randn(8, 4, 3, 3)  # output channels, input channels, kernel
        >>> projected = project_multilevel(weight, 1.0, norms=("l1", "linf"), dims=((0,), (1, 2, 3)))
        >>> projected.shape
        torch.Size([8, 4, 3, 3])
    """
    check_input(x)
    return _project(x, radius, check_levels(norms, dims, x.ndim), out, nonfinite)


def project_l1inf(
    x: Tensor,
    radius: float,
    group_dims: Sequence[int] = (0,),
    method: Method = "bilevel",
    *,
    out: Tensor | None = None,
    nonfinite: Nonfinite = "raise",
    state: ExactState | None = None,
    compile: Compile = "auto",
) -> Tensor:
    r"""Project onto the l1,inf ball: the sum over groups of the largest magnitude in each is at most the radius.

    ``method="exact"`` solves :math:`\min_X \|X - Y\|_F` subject to :math:`\sum_j \max_i |x_{ij}| \le \eta`. With
    :math:`\theta \ge 0` and, for groups with :math:`\|y_j\|_1 > \theta`, :math:`\sum_i (|y_{ij}| - \mu_j)_+ = \theta`,
    other groups zero and :math:`\sum_j \mu_j = \eta`, it is :math:`X = \mathrm{clamp}(Y, -\mu, \mu)`.

    ``method="bilevel"`` projects the vector of largest magnitudes onto the l1 ball and clamps each group to what is
    left of its own: feasible and quicker, but not the nearest point. Which of the two clears more groups at one radius
    depends on the data, so compare them at equal sparsity (`radius_for_sparsity`), never at equal radius.

    Args:
        x: As in `project_multilevel`.
        radius: As in `project_multilevel`.
        group_dims: Dimensions that number the groups; the others lie within a group. ``(0,)``: rows, i.e. output
            neurons or channels; ``(1,)``: columns, i.e. input features or channels.
        method: ``"bilevel"`` or ``"exact"``.
        out: As in `project_multilevel`.
        nonfinite: As in `project_multilevel`.
        state: Of the exact method: where the last call for this tensor ended, to start from; it is updated.
        compile: Let the machine's C compiler make the passes over memory, which changes no bit and takes about a second
            once a type of numbers: ``True`` from now on, ``"auto"`` once so much has passed that it pays (1 GiB, or
            some 8,000 calls for small tensors), ``False`` never. Where there is no compiler, warn once and go on
            without.

    Returns:
        As `project_multilevel`.

    Raises:
        TypeError: If ``x`` is no floating-point tensor.
        ValueError: As in `project_multilevel`, or if ``group_dims`` or ``method`` are not valid.

    References:
        Perez, Barlaud, arXiv:2407.16293 (bi-level), arXiv:2307.09836 (exact). *Deviations*: the exact method is a
        joint Newton iteration on :math:`(\theta, \mu)` in float64 over the groups that can still survive.

    Complexity: Bi-level as `project_multilevel`. Exact: three passes, and two to eight more over the groups that
        survive. On GPU the exact method sorts instead (four times a float32 tensor's memory) and takes a number of
        small steps that depends on the shape alone; no host synchronization with ``nonfinite="skip"``, one otherwise.

    Example:
        >>> import torch
        >>> from lightning_accel.projection import project_l1inf
        >>> project_l1inf(torch.tensor([[3.0, 1.0], [0.5, -0.5]]), 2.0, group_dims=(0,))
        tensor([[2.0000, 1.0000],
                [0.0000, 0.0000]])
    """
    if method == "bilevel" and compile in (True, "auto") and nonfinite in ("raise", "skip"):
        found = project_in_one_call(x, radius, group_dims, out)
        if found is not None:
            return found
    check_compile(compile)
    check_input(x)
    group = normalize_dims(group_dims, x.ndim)
    if method == "bilevel":
        rest = tuple(d for d in range(x.ndim) if d not in group)
        with compiling(compile), torch.no_grad():
            return _project(x, radius, (("l1", group), ("linf", rest)), out, nonfinite)
    if method != "exact":
        raise ValueError(f"`method` must be 'bilevel' or 'exact', got {method!r}.")
    with compiling(compile), torch.no_grad():
        return _project_exactly(x, radius, group, out, nonfinite=nonfinite, state=state)


def project_l1(x: Tensor, radius: float, *, out: Tensor | None = None, nonfinite: Nonfinite = "raise") -> Tensor:
    r"""Project onto the l1 ball, :math:`\min_X \|X - Y\|_F` subject to :math:`\sum_i |x_i| \le \eta`.

    Arguments, result and errors are those of `project_multilevel` with the single level ``"l1"``.

    Example:
        >>> import torch
        >>> from lightning_accel.projection import project_l1
        >>> project_l1(torch.tensor([3.0, 1.0]), 2.0)
        tensor([2.0000, 0.0000])
    """
    return project_multilevel(x, radius, ("l1",), (_all_dims(x),), out=out, nonfinite=nonfinite)


def project_l12(
    x: Tensor,
    radius: float,
    group_dims: Sequence[int] = (0,),
    *,
    out: Tensor | None = None,
    nonfinite: Nonfinite = "raise",
) -> Tensor:
    r"""Project onto the l1,2 ball, :math:`\min_X \|X - Y\|_F` subject to :math:`\sum_j \|x_j\|_2 \le \eta`.

    Two levels solve it exactly. Arguments, result and errors are those of `project_l1inf`.

    Example:
        >>> import torch
        >>> from lightning_accel.projection import project_l12
        >>> project_l12(torch.tensor([[3.0, 0.0], [0.5, 0.0]]), 2.0, group_dims=(0,))
        tensor([[2.0000, 0.0000],
                [0.0000, 0.0000]])
    """
    return _two_levels(x, radius, "l2", group_dims, out=out, nonfinite=nonfinite)


def project_l11(
    x: Tensor,
    radius: float,
    group_dims: Sequence[int] = (0,),
    *,
    out: Tensor | None = None,
    nonfinite: Nonfinite = "raise",
) -> Tensor:
    r"""Project onto the l1 ball in two levels: first the l1 norms of the groups, then each group onto its share.

    Clears whole groups, which the nearest point of the same ball (`project_l1`) does not. Arguments, result and errors
    are those of `project_l1inf`.

    Example:
        >>> import torch
        >>> from lightning_accel.projection import project_l11
        >>> project_l11(torch.tensor([[3.0, 0.0], [0.5, 0.0]]), 2.0, group_dims=(0,))
        tensor([[2.0000, 0.0000],
                [0.0000, 0.0000]])
    """
    return _two_levels(x, radius, "l1", group_dims, out=out, nonfinite=nonfinite)


def _checked(x: Tensor, radius: float, out: Tensor | None, nonfinite: Nonfinite) -> tuple[Tensor, float, Tensor]:
    """Return what to read, the radius as a number, and where the result goes."""
    check_out(x, out)
    check_nonfinite(nonfinite)
    limit = check_radius(radius)
    if out is None:
        return x, limit, empty_like_dense(x)
    return x.clone() if overlap(x, out) else x, limit, out


def _project(x: Tensor, radius: float, levels: tuple[Level, ...], out: Tensor | None, nonfinite: Nonfinite) -> Tensor:
    if is_sharded(x):
        return _project_shards(x, radius, levels, out, nonfinite)
    x, limit, result = _checked(x, radius, out, nonfinite)
    if x.numel():
        _cut(pyramid(x, levels, result), x, limit, levels[0][0], nonfinite)
    return result


def _project_shards(
    x: Tensor, radius: float, levels: tuple[Level, ...], out: Tensor | None, nonfinite: Nonfinite
) -> Tensor:
    from lightning_accel.projection.sharded import deliver, in_place_copy, sharded_pyramid

    check_nonfinite(nonfinite)
    limit = check_radius(radius)
    mine = in_place_copy(x, out)
    if x.numel():
        _cut(sharded_pyramid(mine, levels), x, limit, levels[0][0], nonfinite)
    return deliver(mine, out)


def _project_exactly(x: Tensor, radius: float, group: tuple[int, ...], out: Tensor | None, **how: Any) -> Tensor:
    if is_sharded(x):
        from lightning_accel.projection.sharded import deliver, gather, in_place_copy, scatter

        mine = in_place_copy(x, out)
        whole = gather(mine)
        _project_exactly(whole, radius, group, whole, **how)
        scatter(whole, mine)
        return deliver(mine, out)
    x, limit, result = _checked(x, radius, out, how["nonfinite"])
    if x.numel():
        project_exact([(x, group, result)], _scalar(limit, x), **how)
    return result


def _cut(whole: Pyramid, x: Tensor, limit: float, outer: Norm, nonfinite: Nonfinite) -> None:
    if not placement.is_far(x) and outer == "l1":
        cut_alone(whole, limit, nonfinite=nonfinite)
    else:
        cut([Team([whole], lambda norms: _scalar(limit, norms))], outer=outer, nonfinite=nonfinite)


def _two_levels(
    x: Tensor, radius: float, inner: str, group_dims: Sequence[int], *, out: Tensor | None, nonfinite: Nonfinite
) -> Tensor:
    check_input(x)
    group = normalize_dims(group_dims, x.ndim)
    rest = [d for d in range(x.ndim) if d not in group]
    return project_multilevel(x, radius, ("l1", inner), (group, rest), out=out, nonfinite=nonfinite)


def _all_dims(x: Tensor) -> tuple[int, ...]:
    check_input(x)
    return tuple(range(x.ndim))


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.full((1,), value, dtype=torch.float64, device=like.device)
