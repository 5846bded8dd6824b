"""Which parameters a projection callback acts on, and why it leaves the others alone."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_accel.projection.kernels.rounding import FLOAT_TYPES
from lightning_accel.projection.training.ball_specification import Ball
from lightning_accel.projection.training.targets import NAMED_GROUPS, Target, find_lazy, find_targets

_WEIGHTS = ("*weight",)


@dataclass(frozen=True)
class Selection:
    """Which parameters; the arguments of `lightning_accel.projection.training.targets.find_targets`.

    Attributes:
        parameters: Shell patterns of names; ``None`` for the weights of hidden layers.
        module_types: Class names of the owners; ``None`` for any.
        groups: Named, or dimensions.
        num_heads: For groups of heads.

    Raises:
        ValueError: If the groups have another name, or there are fewer heads than one.
    """

    parameters: tuple[str, ...] | None
    module_types: tuple[str, ...] | None
    groups: str | tuple[int, ...]
    num_heads: int | None

    def __post_init__(self) -> None:
        if isinstance(self.groups, str) and self.groups not in NAMED_GROUPS:
            raise ValueError(f"`groups` must be of {NAMED_GROUPS} or dimensions, got {self.groups!r}.")
        if self.num_heads is not None and self.num_heads < 1:
            raise ValueError(f"`num_heads` must be >= 1, got {self.num_heads}.")

    @property
    def patterns(self) -> tuple[str, ...]:
        """What names have to fit."""
        return _WEIGHTS if self.parameters is None else self.parameters

    @property
    def hidden_only(self) -> bool:
        """Whether layers that write the model's output are left alone: unless names were asked for."""
        return self.parameters is None

    def find(self, model: nn.Module) -> list[Target]:
        """Find the targets in ``model``, those of output layers among them."""
        return find_targets(
            model, self.patterns, module_types=self.module_types, groups=self.groups, num_heads=self.num_heads
        )

    def find_lazy(self, model: nn.Module) -> list[str]:
        """Find the names of those whose shapes are still to come."""
        return find_lazy(model, self.patterns, self.module_types)

    def without_match(self, targets: Sequence[Target]) -> list[str]:
        """Return the patterns that no target's name fits."""
        asked = self.parameters or ()
        return [p for p in asked if not any(fnmatch.fnmatchcase(target.name, p) for target in targets)]


def without_projection(target: Target, ball: Ball) -> str | None:
    """Say which numbers or dimensions of a target have no projection onto a ball; ``None`` where it has one."""
    parameter = target.parameter
    if parameter is not None and parameter.dtype not in FLOAT_TYPES:
        return f"holds {str(parameter.dtype).removeprefix('torch.')} numbers"
    if ball.dims is not None and (named := sum(map(len, ball.dims))) != len(target.shape):
        return f"is {len(target.shape)}-dimensional, and `dims` name {named}"
    return None


def too_few_groups(target: Target, ball: Ball, *, hidden_only: bool) -> str | None:
    """Say why a target has too few groups to choose from; ``None`` where it has enough, or a radius holds it alone."""
    if target.num_groups > ball.min_groups:
        return None
    if ball.target_sparsity is None and not (hidden_only and target.num_groups < 2):
        return None
    count = "only 1 group" if target.num_groups == 1 else f"only {target.num_groups} groups"
    return count if ball.min_groups < 2 else f"{count}, and min_groups={ball.min_groups}"
