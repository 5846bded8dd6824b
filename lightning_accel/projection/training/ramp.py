"""How hard to project at a given step."""

from dataclasses import dataclass
from typing import Literal, get_args

Curve = Literal["constant", "linear", "cubic"]


@dataclass(frozen=True)
class Ramp:
    r"""Rise from 0 (no projection) to 1 (the full one) between two steps; a pure function of the step.

    ``"cubic"`` is :math:`1 - (1 - p)^3`: most is cleared early, while there is much to spare, and the end is gentle.

    Attributes:
        curve: ``"constant"``, ``"linear"`` or ``"cubic"``.
        start_step: Optimizer steps before the first projection, >= 0.
        end_step: Optimizer step from which on the projection is full, > ``start_step``; not for ``"constant"``.

    Raises:
        ValueError: If the curve is unknown or the steps are not in order.

    References:
        Zhu, Gupta, arXiv:1710.01878 (the cubic curve).
    """

    curve: Curve = "constant"
    start_step: int = 0
    end_step: int | None = None

    def __post_init__(self) -> None:
        if self.curve not in get_args(Curve):
            raise ValueError(f"`schedule` must be of {get_args(Curve)}, got {self.curve!r}.")
        if self.start_step < 0:
            raise ValueError(f"`start_step` must be >= 0 optimizer steps, got {self.start_step}.")
        if (self.curve == "constant") != (self.end_step is None):
            raise ValueError("`end_step` must be given for a 'linear' or 'cubic' `schedule`, and only for those.")
        if self.end_step is not None and self.end_step <= self.start_step:
            raise ValueError(f"`end_step` must be > `start_step`, got {self.end_step} and {self.start_step}.")

    def at(self, step: int) -> float:
        """Return the part of the way, in [0, 1], after ``step`` optimizer steps; 0 up to ``start_step``."""
        if step <= self.start_step:
            return 0.0
        if self.end_step is None:
            return 1.0
        part = min(1.0, (step - self.start_step) / (self.end_step - self.start_step))
        return part if self.curve == "linear" else 1.0 - (1.0 - part) ** 3
