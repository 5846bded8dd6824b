"""What was decided: a plan and the reason."""

import dataclasses
from dataclasses import dataclass

from lightning_accel.callbacks.layer_exchange.layer_trial import Ranks
from lightning_accel.callbacks.rank_quantization.reasons import Comparison, Reason
from lightning_accel.low_rank import RankPlan


@dataclass(frozen=True)
class Verdict:
    """A plan, its low-rank layers maybe none, and why.

    Attributes:
        plan: To be applied.
        reason: Why, with the numbers.
        measured: The steps that were timed last; None if none were.
    """

    plan: RankPlan
    reason: Reason
    measured: Comparison | None = None

    @property
    def ranks(self) -> Ranks:
        """Layers that become low rank, with their ranks."""
        return ranks_of(self.plan)

    def explained(self) -> RankPlan:
        """Return the plan with the reason; a plan that was given keeps its own."""
        return self.plan if self.plan.reason else dataclasses.replace(self.plan, reason=str(self.reason))

    def metrics(self) -> dict[str, float]:
        """Return the decision in numbers, for loggers."""
        numbers = {"low_rank": float(len(self.ranks))}
        if self.ranks:
            numbers |= {
                "parameters_dense": float(self.plan.parameters_before),
                "parameters_low_rank": float(self.plan.parameters_after),
                "energy": self.plan.energy,
            }
        if self.measured is not None:
            numbers |= {
                "step_ms_dense": 1e3 * self.measured.dense,
                "step_ms_low_rank": 1e3 * self.measured.low_rank,
                "speedup": self.measured.ratio.median,
            }
        return {f"rank_quantization/{name}": value for name, value in numbers.items()}


def ranks_of(plan: RankPlan) -> Ranks:
    """Return the layers that a plan makes low rank, with their ranks."""
    return {layer.name: layer.ranks for layer in plan.layers if layer.ranks is not None}


def dense(reason: Reason, measured: Comparison | None = None) -> Verdict:
    """Leave the model as it is, without a plan."""
    return Verdict(RankPlan(layers=(), method="fixed", target="ratio", value=1.0), reason, measured)
