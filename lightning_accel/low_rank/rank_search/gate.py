"""The decisions behind "never slower": what to revert, and whether the whole pays before training ends."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lightning_accel.low_rank.plan import RankPlan
from lightning_accel.measure import PairedRatio, compare_paired

TimeVariants = Callable[[Mapping[str, frozenset[str]]], Mapping[str, Sequence[float]]]
"""Gets variants by name, each the set of layers that shall be low rank, and returns the seconds of whole training steps
with the real optimizer, interleaved, so that entries of one index make a pair."""


@dataclass(frozen=True)
class GateDecision:
    """What the gate decided about a plan.

    Attributes:
        keep: Layers that stay low rank; empty if the model stays dense.
        reverted: Layer to the reason why it goes back to dense.
        ratio: Dense over low-rank time of the whole step with ``keep``, as measured last; None if nothing was timed.
        pays: Whether anything is kept.
        reason: In words, with the numbers.
    """

    keep: frozenset[str]
    reverted: dict[str, str]
    ratio: PairedRatio | None
    pays: bool
    reason: str


def verify_plan(
    plan: RankPlan,
    time_variants: TimeVariants,
    *,
    min_speedup: float = 1.0,
    setup_seconds: float = 0.0,
    remaining_steps: int | None = None,
) -> GateDecision:
    """Check a plan against whole training steps; revert what does not pay.

    Layers of one shape, input and ranks stand or fall together. A group whose return to dense makes the step no slower
    is reverted, the largest gain first; each revert is measured with those before it. At the end the rest is timed
    against the dense model.

    Args:
        plan: Whose low-rank layers are checked.
        time_variants: Times the real step, see `TimeVariants`.
        min_speedup: Dense over low-rank time that the median must exceed, >= 1; the lower end of the interval must
            exceed 1.
        setup_seconds: Spent on planning, checking and swapping so far, to be paid back.
        remaining_steps: Optimizer steps left in training; None if unknown, then pay-back is not asked for.

    Raises:
        ValueError: If ``min_speedup < 1``, ``setup_seconds < 0`` or ``remaining_steps < 0``.
    """
    if min_speedup < 1.0:
        raise ValueError(f"`min_speedup` must be >= 1, got {min_speedup}.")
    if setup_seconds < 0.0:
        raise ValueError(f"`setup_seconds` must be >= 0, got {setup_seconds}.")
    if remaining_steps is not None and remaining_steps < 0:
        raise ValueError(f"`remaining_steps` must be >= 0, got {remaining_steps}.")
    groups = layer_groups(plan)
    keep = frozenset(name for group in groups for name in group)
    reverted: dict[str, str] = {}
    if not keep:
        return GateDecision(keep, reverted, None, False, "the plan keeps every layer dense")
    # One round tells each group's marginal contribution; a second one confirms the reverts together.
    variants = {"dense": frozenset[str](), "all": keep}
    if len(groups) > 1:
        variants |= {f"without {index}": keep - group for index, group in enumerate(groups)}
    seconds = time_variants(variants)
    contributions = {
        group: compare_paired(seconds[f"without {index}"], seconds["all"])
        for index, group in enumerate(groups)
        if len(groups) > 1
    }
    for group in marginal_reverts(contributions):
        for name in sorted(group):
            reverted[name] = f"costs time in the whole step: x{contributions[group].median:.3f} with it"
    if reverted:
        keep -= set(reverted)
        if not keep:
            return GateDecision(keep, reverted, None, False, "no layer pays in the whole step")
        seconds = time_variants({"dense": frozenset(), "all": keep})
    ratio = compare_paired(seconds["dense"], seconds["all"])
    reason = _verdict(ratio, min_speedup)
    if reason is None and remaining_steps is not None:
        gain = statistics.median(d - low for d, low in zip(seconds["dense"], seconds["all"], strict=True))
        reason = _payback_problem(payback_steps(setup_seconds, gain), remaining_steps, setup_seconds)
    if reason is not None:
        return GateDecision(frozenset(), reverted | dict.fromkeys(sorted(keep), reason), ratio, False, reason)
    words = f"the step is x{ratio.median:.2f} as fast (interval {ratio.low:.2f} to {ratio.high:.2f})"
    return GateDecision(keep, reverted, ratio, True, words)


def marginal_reverts(contributions: Mapping[frozenset[str], PairedRatio]) -> list[frozenset[str]]:
    """Return the groups that do not pay, the worst first.

    Args:
        contributions: Group to step time without it over step time with it; over 1 the group saves time.

    A group must save time by the median of its pairs: what does not even do that gives up energy for nothing.
    """
    losing = [group for group, ratio in contributions.items() if ratio.median <= 1.0]
    return sorted(losing, key=lambda group: contributions[group].median)


def payback_steps(setup_seconds: float, seconds_saved_per_step: float) -> float:
    """Return after how many steps the set-up is paid back; infinite if a step saves nothing."""
    return setup_seconds / seconds_saved_per_step if seconds_saved_per_step > 0.0 else math.inf


def layer_groups(plan: RankPlan) -> list[frozenset[str]]:
    """Return the low-rank layers of a plan, those of equal shape, input, calls and ranks together."""
    groups: dict[object, set[str]] = {}
    for layer in plan.layers:
        if layer.ranks is not None:
            groups.setdefault((layer.kind, layer.shape, layer.input_shape, layer.ranks), set()).add(layer.name)
    return [frozenset(group) for group in groups.values()]


def apply_decision(plan: RankPlan, decision: GateDecision) -> RankPlan:
    """Return the plan with the reverted layers dense, each with the gate's reason."""
    for name, reason in decision.reverted.items():
        plan = plan.dense({name}, reason)
    return plan


def _verdict(ratio: PairedRatio, min_speedup: float) -> str | None:
    """Say why the whole does not pay; None if it does."""
    numbers = f"x{ratio.median:.3f} as fast as dense (interval {ratio.low:.3f} to {ratio.high:.3f})"
    if ratio.median <= min_speedup:
        return f"the whole step is {numbers}, more than x{min_speedup:.2f} is asked for"
    if ratio.low <= 1.0:
        return f"the whole step is {numbers}, within the noise"
    return None


def _payback_problem(needed: float, remaining_steps: int, setup_seconds: float) -> str | None:
    if needed <= remaining_steps:
        return None
    return f"the set-up took {setup_seconds:.1f} s, paid back after {needed:.0f} steps, but {remaining_steps} remain"
