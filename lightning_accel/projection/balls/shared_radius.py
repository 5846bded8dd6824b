"""One budget over the groups of one tensor or of many, found for many budgets at once."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_accel.projection.balls.floor import Floor
from lightning_accel.projection.balls.l1_thresholds import Thresholds, l1_thresholds, single_threshold, threshold_near
from lightning_accel.projection.balls.norm_pyramid import Norm, Pyramid, fibre_norms, project_fibres
from lightning_accel.projection.balls.outcome import Cut, LoneCut
from lightning_accel.projection.kernels import placement
from lightning_accel.projection.kernels.rounding import inner_radius, require_finite

_LARGE = 1e-20


@dataclass
class Team:
    """Tensors that share one budget.

    Attributes:
        pyramids: One a tensor, all of one device.
        radius: Gives the radius, float64 ``(1,)``, for the norms of all groups, float64 ``(groups,)``.
        dead: For each tensor a boolean ``(groups,)`` of groups to clear whatever their norm, or ``None``; none by
            default.
        name: For errors.
        floor: Groups that stay; none by default.
        start: The tau of similar tensors, or 0; looked at on CPU.
    """

    pyramids: Sequence[Pyramid]
    radius: Callable[[Tensor], Tensor]
    dead: Sequence[Tensor | None] = ()
    name: str = "x"
    start: float = 0.0
    floor: Floor | None = None


def cut(teams: Sequence[Team], *, outer: Norm = "l1", nonfinite: str = "raise") -> list[Cut]:
    """Project each team's tensors together onto one ball of the outermost norm, and write the results.

    On an accelerator, thresholds of teams with equally many groups are found together, for a handful of small
    operations a team costs more than its passes over memory.

    Raises:
        ValueError: If there is NaN or infinity and ``nonfinite`` is ``"raise"``; nothing was written then.
    """
    tops = [_living_tops(team) for team in teams]
    together = [torch.cat(t) if len(t) > 1 else t[0] for t in tops]
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, (norms, team) in enumerate(zip(together, teams, strict=True)):
        roundings = max(p.roundings for p in team.pyramids)
        shared = norms.device if placement.is_far(norms) else i  # each CPU tensor by itself, as in one call for all
        alike.setdefault((len(norms), roundings, shared), []).append(i)
    found: dict[int, Thresholds] = {}
    for members in alike.values():
        alone = len(members) == 1
        rows = together[members[0]].unsqueeze(0) if alone else torch.stack([together[i] for i in members])
        radii = [teams[i].radius(together[i]) for i in members]
        terms = rows.shape[1] + max(p.roundings for p in teams[members[0]].pyramids)
        near = None
        if alone and teams[members[0]].start > 0.0 and outer == "l1" and not placement.is_far(rows):
            near = threshold_near(rows[0], float(radii[0]), terms, teams[members[0]].start)
        if near is not None:
            found[members[0]] = Thresholds(near[0], rows.new_full((), near[1]), rows.sum())
            continue
        thresholds = outer_bounds(rows, radii[0] if alone else torch.cat(radii), outer, terms)
        if nonfinite == "raise":
            require_finite(thresholds.norm, ", ".join(teams[i].name for i in members))
        found |= {i: Thresholds(*(part[row] for part in thresholds)) for row, i in enumerate(members)}
    for i, team in enumerate(teams):
        if team.floor is not None:
            found[i] = found[i]._replace(bounds=team.floor.keep(together[i], found[i].bounds))
    return [_write(team, tops[i], found[i]) for i, team in enumerate(teams)]


def cut_alone(
    part: Pyramid,
    radius: float | Callable[[Tensor], float],
    *,
    start: float = 0.0,
    nonfinite: str = "raise",
    name: str = "x",
    floor: Floor | None = None,
) -> LoneCut:
    """Do what `cut` does for a single tensor on CPU and the outermost norm l1, in as few small operations as possible.

    ``radius`` may be what gives it for the norms of the groups. ``start`` is the tau of a similar tensor, or 0;
    ``floor`` says which groups stay.
    """
    tops = part.tops()
    if callable(radius):
        radius = radius(tops)
    terms = len(tops) + part.roundings
    near = threshold_near(tops, radius, terms, start) if start > 0.0 else None
    if near is not None:
        bounds, tau = near
        if floor is not None:
            bounds = floor.keep(tops, bounds)
        part.cut(bounds, normal=tau > _LARGE)  # differences of float64 numbers that large are 0 or normal anywhere
        return LoneCut(tops, tau, bounds)
    bounds, tau, size = single_threshold(tops, radius, terms)
    if nonfinite == "raise" and not math.isfinite(size):
        require_finite(tops.new_full((), size), name)
    if radius < size < math.inf:
        if floor is not None:
            bounds = floor.keep(tops, bounds)
        part.cut(bounds)
    else:
        part.leave()
    return LoneCut(tops, tau, bounds)


def clear_alone(
    part: Pyramid, floor: Floor, *, dead: Tensor | None = None, nonfinite: str = "raise", name: str = "x"
) -> LoneCut:
    """Clear of a single tensor on CPU the groups that the projection for a floor's sparsity clears, and no more.

    These are the smallest, as many as the sparsity asks for; ``dead`` ones, boolean ``(groups,)``, count as zero and
    are cleared in any case.

    Raises:
        ValueError: As `cut`.
    """
    cleared = floor.cleared
    tops = part.tops()
    if dead is not None:
        tops = tops.masked_fill(dead & torch.isfinite(tops), 0.0)
    size = float(tops.sum())
    if nonfinite == "raise" and not math.isfinite(size):
        require_finite(tops.new_full((), size), name)
    left, tau = torch.full_like(tops, math.inf), 0.0
    if math.isfinite(size):
        if cleared:
            left, tau = floor.smallest(tops)
        if dead is not None:
            left = left.masked_fill(dead, 0.0)
        if tau > 0.0 or dead is not None:
            part.cut(left)
            return LoneCut(tops, tau, left)
    part.leave()
    return LoneCut(tops, tau, left)


def outer_bounds(norms: Tensor, radius: Tensor, outer: Norm, terms: int) -> Thresholds:
    """Project vectors of norms ``(batch, n)`` onto balls of the outermost norm."""
    if outer == "l1":
        return l1_thresholds(norms, radius, terms=terms)
    norm = fibre_norms(norms, outer, (1,))[:, 0]
    unchanged = ~((norm > radius) & torch.isfinite(norm))
    target = inner_radius(radius, terms).unsqueeze(1)
    bounds = torch.minimum(project_fibres(norms, target, outer, (1,)), norms)
    return Thresholds(bounds.masked_fill(unchanged.unsqueeze(1), torch.inf), torch.zeros_like(norm), norm)


def _living_tops(team: Team) -> list[Tensor]:
    tops = [p.tops() for p in team.pyramids]
    if not team.dead:
        return tops
    return [t if m is None else t.masked_fill(m & torch.isfinite(t), 0.0) for t, m in zip(tops, team.dead, strict=True)]


def _write(team: Team, tops: Sequence[Tensor], found: Thresholds) -> Cut:
    bounds = [found.bounds] if len(tops) == 1 else list(found.bounds.split([len(t) for t in tops]))
    masked = [m for m in team.dead if m is not None]
    if masked:
        finite = torch.isfinite(found.norm)
        bounds = [b if m is None else b.masked_fill(m & finite, 0.0) for b, m in zip(bounds, team.dead, strict=True)]
    # on GPU, looking would wait for the device; there infinite bounds do the same
    unchanged = not masked and not placement.is_far(found.bounds) and float(found.bounds[0]) == math.inf
    for part, bound in zip(team.pyramids, bounds, strict=True):
        if unchanged:
            part.leave()
        else:
            part.cut(bound)
    return Cut(found.norm, found.tau, bounds, list(tops))
