"""Which ball parameters are projected onto: its norms, its size, and what it may not clear."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_accel.projection.balls.floor import Floor, count_to_clear
from lightning_accel.projection.balls.norm_pyramid import Norm, check_levels
from lightning_accel.projection.kernels.rounding import check_nonfinite, check_radius
from lightning_accel.projection.multilevel import Method, Nonfinite
from lightning_accel.projection.sparsity import check_sparsity

Scope = Literal["parameter", "global"]
DEFAULT_TARGET_SPARSITY = 0.5
"""Fraction of the groups that is cleared where nobody says how much."""


@dataclass(frozen=True)
class Ball:
    """A ball of nested norms, of exactly one of the three sizes.

    Attributes:
        radius: See `project_multilevel`; of every parameter, or of all together.
        radius_fraction: Radius over the norm that the parameters had at first, in [0, 1].
        target_sparsity: Fraction of groups to clear, in [0, 1].
        norms: Levels from the outermost in, see `project_multilevel`.
        dims: Their dimensions; by default groups outside and the rest inside, for two levels.
        method: ``"exact"`` for the nearest point, with norms ``("l1", "linf")``.
        scope: ``"parameter"``: one radius (or sparsity) a parameter; ``"global"``: one budget over all.
        nonfinite: ``"raise"`` or ``"skip"``.
        min_groups: Groups of each parameter that stay whatever the size, >= 0; 0 lets a layer be cleared whole.

    Raises:
        ValueError: If a value is out of range, or values exclude each other.
    """

    radius: float | None = None
    radius_fraction: float | None = None
    target_sparsity: float | None = None
    norms: tuple[Norm, ...] = ("l1", "linf")
    dims: tuple[tuple[int, ...], ...] | None = None
    method: Method = "bilevel"
    scope: Scope = "parameter"
    nonfinite: Nonfinite = "raise"
    min_groups: int = 1

    def __post_init__(self) -> None:
        sizes = {
            "radius": self.radius,
            "radius_fraction": self.radius_fraction,
            "target_sparsity": self.target_sparsity,
        }
        chosen = [name for name, value in sizes.items() if value is not None]
        if len(chosen) != 1:
            given = " and ".join(f"`{name}`" for name in chosen) or "none"
            raise ValueError(
                f"give exactly one of `radius`, `radius_fraction` and `target_sparsity`, got {given}. Set the others "
                "to None (null in configurations)."
            )
        if self.radius is not None:
            check_radius(self.radius)
        if self.radius_fraction is not None and not 0.0 <= self.radius_fraction <= 1.0:
            raise ValueError(f"`radius_fraction` must be in [0, 1], got {self.radius_fraction}.")
        if self.target_sparsity is not None:
            check_sparsity(self.target_sparsity, "target_sparsity")
        if self.dims is None and len(self.norms) != 2:
            raise ValueError(f"`dims` must be given for {len(self.norms)} levels; only two have a default.")
        check_levels(self.norms, self.dims or ((0,), (1,)), sum(map(len, self.dims)) if self.dims is not None else 2)
        if self.norms[0] != "l1" and (self.target_sparsity is not None or self.scope == "global"):
            raise ValueError(f"`target_sparsity` and a global `scope` need 'l1' outermost, got {self.norms[0]!r}.")
        if self.method not in get_args(Method):
            raise ValueError(f"`method` must be 'bilevel' or 'exact', got {self.method!r}.")
        if self.method == "exact" and (self.norms != ("l1", "linf") or self.dims is not None):
            raise ValueError("`method` 'exact' solves the l1,inf ball only; leave `norms` and `dims` alone.")
        if self.scope not in get_args(Scope):
            raise ValueError(f"`scope` must be 'parameter' or 'global', got {self.scope!r}.")
        check_nonfinite(self.nonfinite)
        if self.min_groups < 0:
            raise ValueError(f"`min_groups` must be >= 0, got {self.min_groups}.")

    def size(self, first: float, part: float) -> float:
        """Return the radius ``part`` of the way to the full projection, in [0, 1], from a norm of ``first``."""
        if self.radius is not None and part == 1.0:
            return self.radius
        goal = self.radius if self.radius is not None else first * (self.radius_fraction or 0.0)
        return goal if part == 1.0 else first + (goal - first) * part

    def cleared(self, groups: int, part: float) -> int:
        """Return how many of a parameter's groups a target sparsity clears ``part`` of the way, in [0, 1]."""
        return count_to_clear([groups], self.min_groups, (self.target_sparsity or 0.0) * part)

    def floor(self, sizes: Sequence[int], first: float, part: float, *, zeros_only: bool) -> Floor:
        """Return which groups may be cleared ``part`` of the way.

        Args:
            sizes: Groups of each parameter that shares the budget.
            first: Norm that all of them had at first.
            part: In [0, 1].
            zeros_only: See `Floor`.
        """
        least = self.min_groups if self.norms[0] == "l1" else 0  # no other outermost norm clears groups
        if self.target_sparsity is not None:
            return Floor(sizes, least, sparsity=self.target_sparsity * part, zeros_only=zeros_only)
        return Floor(sizes, least, radius=self.size(first, part))
