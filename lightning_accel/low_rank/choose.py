"""Decide the ranks once energies and times are known; pure functions of the draft plan."""

import dataclasses
import itertools
from collections.abc import Sequence

from lightning_accel.low_rank.plan import Candidate, LayerPlan
from lightning_accel.low_rank.rank_search.candidates import snapped_ranks
from lightning_accel.low_rank.rank_search.knapsack import least_cost, most_value
from lightning_accel.low_rank.rank_search.two_budgets import most_value_within

MARGIN = 0.03
"""Share of the dense time that a low-rank layer must save to be considered at all."""

SMALL_SHARE = 0.01
"""Share of the entries of all layers below which a layer that is not measured stays dense: heads, stems, shortcuts."""


def choose_fixed(drafts: Sequence[LayerPlan]) -> list[LayerPlan]:
    """Take the only candidate of each layer, by theory alone; nobody has seen that small layers gain by it."""
    entries = sum(draft.dense_parameters for draft in drafts)
    small = f"has less than {SMALL_SHARE:.0%} of the entries, and was not measured"
    return [
        draft
        if not draft.candidates
        else dataclasses.replace(draft, reason=small)
        if draft.dense_parameters < SMALL_SHARE * entries
        else _decide(draft, draft.candidates[0], "chosen by theory, not measured")
        for draft in drafts
    ]


def choose_by_paper(draft: LayerPlan) -> LayerPlan:
    """Take the rank below the largest drop in time, or dense if that is not faster.

    ``draft.candidates`` go down rank by rank.

    References:
        Hajimolahoseini, Ahmed, Liu, arXiv:2309.03824, rank search.
    """
    timed = [(candidate, candidate.ms) for candidate in draft.candidates if candidate.ms is not None]
    if not timed or draft.dense_ms is None:
        return draft
    drops = [(above[1] - below[1], below) for above, below in itertools.pairwise(timed)]
    best, ms = max(drops, key=lambda drop: drop[0])[1] if drops else timed[0]
    if ms >= draft.dense_ms:
        return dataclasses.replace(draft, reason=f"dense is not beaten: {ms:.3f} ms against {draft.dense_ms:.3f} ms")
    return _decide(draft, best, "below the largest drop in time")


def choose_in_knapsack(drafts: Sequence[LayerPlan], target: str, value: float, *, min_energy: float) -> list[LayerPlan]:
    """Choose for all layers together by a multiple-choice knapsack.

    With t, e, p the time, retained energy and parameters of the options, summed over the layers, and n the number of
    layers: ``speedup`` maximizes e with ``t <= t(dense) / value``; ``energy`` minimizes t with ``e >= value n``;
    ``ratio`` maximizes e with t and p at most those of the theoretical ranks snapped down to measured plateaus (dense
    where that is faster), and never keeps less than those. A target out of reach gives the nearest plan.

    Args:
        drafts: With candidates and times; layers without stay dense.
        target: ``"ratio"``, ``"energy"`` or ``"speedup"``.
        value: Of the target.
        min_energy: Floor of each layer's energy, in [0, 1].
    """
    options = [_options(draft, min_energy) for draft in drafts]
    active = [index for index, choices in enumerate(options) if len(choices) > 1]
    decided = [
        dataclasses.replace(draft, reason=_why_dense(draft, min_energy)) if draft.candidates else draft
        for draft in drafts
    ]
    if not active:
        return decided
    # Layers that can only stay dense take part in the target, though not in the choice.
    timed = [draft for draft in drafts if draft.dense_ms is not None]
    dense_ms = sum(draft.dense_ms or 0.0 for draft in timed)
    fixed_ms = dense_ms - sum(drafts[index].dense_ms or 0.0 for index in active)
    table = [[_Option.of(drafts[index], choice) for choice in options[index]] for index in active]
    if target == "speedup":
        chosen = _within(table, dense_ms / value - fixed_ms)
    elif target == "energy":
        wanted = value * len(drafts) - (len(drafts) - len(active))
        chosen = least_cost([[(o.ms, o.energy) for o in row] for row in table], wanted)
    else:
        uniform = [_uniform(drafts[index], options[index], value) for index in active]
        chosen = _no_worse_than(table, uniform)
    if chosen is None:  # out of reach: as near as the options allow
        chosen = [max(range(len(row)), key=lambda k: row[k].energy) for row in table]
        if target == "speedup":
            chosen = [min(range(len(row)), key=lambda k: row[k].ms) for row in table]
    for index, k in zip(active, chosen, strict=True):
        choice = options[index][k]
        if choice is None:
            decided[index] = dataclasses.replace(drafts[index], reason="its time is better spent on other layers")
        else:
            decided[index] = _decide(drafts[index], choice, "knapsack over measured times")
    return decided


@dataclasses.dataclass(frozen=True)
class _Option:
    ms: float
    energy: float
    parameters: int

    @classmethod
    def of(cls, draft: LayerPlan, choice: Candidate | None) -> "_Option":
        if choice is None:
            return cls(draft.dense_ms or 0.0, 1.0, draft.dense_parameters)
        return cls(choice.ms or 0.0, choice.energy, choice.parameters)


def _options(draft: LayerPlan, min_energy: float) -> list[Candidate | None]:
    """Return dense (None) and the candidates that are faster than it, keep enough, and are not dominated."""
    if draft.dense_ms is None:
        return [None]
    limit = (1.0 - MARGIN) * draft.dense_ms
    sound = [c for c in draft.candidates if c.ms is not None and c.ms < limit and c.energy >= min_energy]
    return [None, *sound]


def _uniform(draft: LayerPlan, options: Sequence[Candidate | None], ratio: float) -> int:
    """Return the index of the theoretical rank, snapped down to a plateau; 0 (dense) if that is no option."""
    snapped = snapped_ranks(draft.shape, ratio, [c.ranks for c in options if c is not None])
    return next((k for k, c in enumerate(options) if c is not None and c.ranks == snapped), 0)


def _within(table: Sequence[Sequence[_Option]], time: float) -> list[int] | None:
    """Return the choices of most energy within ``time``."""
    return most_value([[(o.ms, o.energy) for o in row] for row in table], time)


def _no_worse_than(table: Sequence[Sequence[_Option]], uniform: Sequence[int]) -> list[int]:
    """Return the choices of most energy in the time and with the entries of the choices ``uniform``."""
    chosen = [row[k] for row, k in zip(table, uniform, strict=True)]
    budgets = sum(o.ms for o in chosen), float(sum(o.parameters for o in chosen))
    return most_value_within([[(o.ms, float(o.parameters), o.energy) for o in row] for row in table], budgets, uniform)


def _why_dense(draft: LayerPlan, min_energy: float) -> str:
    if draft.dense_ms is None:
        return draft.reason
    enough = [c for c in draft.candidates if c.energy >= min_energy]
    if not enough:
        most = max(c.energy for c in draft.candidates)
        return f"no candidate keeps an energy of {min_energy:.2f} (best {most:.2f})"
    fastest = min(c.ms for c in enough if c.ms is not None)
    return f"dense is not beaten by {MARGIN:.0%}: {fastest:.3f} ms against {draft.dense_ms:.3f} ms"


def _decide(draft: LayerPlan, choice: Candidate, reason: str) -> LayerPlan:
    return dataclasses.replace(
        draft,
        ranks=choice.ranks,
        decision="low rank",
        reason=reason,
        energy=choice.energy,
        low_rank_ms=choice.ms,
    )
