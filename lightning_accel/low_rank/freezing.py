"""Sequential freezing: which factor group rests in which phase, and making it rest."""

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lightning_accel.arguments import check_integer, check_number
from lightning_accel.low_rank.eligibility import low_rank_layers

NUM_GROUPS = 2
"""Every factored layer has two groups: {U} / {V}, or {both 1x1} / {core}."""


def frozen_factor_index(
    epoch: int, *, period_epochs: int, num_groups: int = NUM_GROUPS, weights: Sequence[float] | None = None
) -> int:
    """Return the index of the factor group that is frozen during ``epoch`` (both zero-based).

    Groups take turns. A pure function of the epoch, so a resumed run needs no saved state to agree with an
    uninterrupted one. (Counts steps as well, if both arguments do.)

    Args:
        epoch: Epochs since freezing began, >= 0.
        period_epochs: Mean length of a phase in epochs, >= 1.
        num_groups: Groups that take turns, >= 2.
        weights: Relative length of the phase in which each group is frozen, > 0; equal if None. A cycle lasts
            ``period_epochs * num_groups`` on average. Phases are whole epochs, so lengths that are none alternate
            between the two next to them, 0 included: at any time each group has rested for its share of the epochs so
            far, to within the cycle under way.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If ``epoch < 0``, ``period_epochs < 1``, ``num_groups < 2``, or the weights are not ``num_groups``
            positive numbers.
    """
    check_integer("epoch", epoch, at_least=0)
    check_integer("period_epochs", period_epochs, at_least=1)
    if num_groups < 2:
        raise ValueError(f"`num_groups` must be >= 2 to take turns, got {num_groups}.")
    if weights is None:
        return (epoch // period_epochs) % num_groups
    check_weights(weights, num_groups)
    mean_lengths = [period_epochs * num_groups * weight / sum(weights) for weight in weights]

    def rested(cycles: int) -> list[int]:
        """Epochs that each group has rested for in the first ``cycles`` cycles."""
        return [math.floor(cycles * length + 0.5) for length in mean_lengths]

    cycle = epoch // (period_epochs * num_groups)
    while sum(rested(cycle)) > epoch:
        cycle -= 1
    while sum(rested(cycle + 1)) <= epoch:
        cycle += 1
    before, after = rested(cycle), rested(cycle + 1)
    ends = itertools.accumulate((end - begin for begin, end in zip(before, after, strict=True)), initial=sum(before))
    return next(index for index, end in enumerate(itertools.islice(ends, 1, None)) if epoch < end)


def check_weights(weights: object, num_groups: int = NUM_GROUPS) -> None:
    """Check that there is one positive number a group.

    Raises:
        TypeError: If ``weights`` are no list of numbers.
        ValueError: If there are more or fewer, or one is not > 0.
    """
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise TypeError(f"`weights` must be {num_groups} numbers > 0, got {weights!r}.")
    if len(weights) != num_groups:
        raise ValueError(f"`weights` must be {num_groups} numbers > 0, got {tuple(weights)}.")
    for index, weight in enumerate(weights):
        check_number(f"weights[{index}]", weight, above=0.0)


@dataclass(frozen=True)
class FreezingSchedule:
    """When which factor group is frozen: at most three patterns (group 0, group 1, none).

    Group 0 is the one whose weight gradients cost more, see ``groups()`` of the layers.

    Args:
        mode: ``"sequential"``: groups take turns. ``"fixed"``: group ``fixed_group`` is frozen throughout.
            ``"none"``: nothing is. ``"adaptive"``: this schedule freezes nothing, `AdaptiveFreezing` does.
        period_epochs: Mean length of a phase in epochs, >= 1. Give this or ``period_steps``; 1 epoch if neither.
        period_steps: Mean length of a phase in optimizer steps, >= 1.
        weights: Relative lengths of the phases in which group 0 and group 1 are frozen, > 0. A larger first one saves
            more time and trains the costlier factor less. The shares come out however short the period is, see
            `frozen_factor_index`.
        start: First epoch (or step, the unit of the period) in which anything is frozen, >= 0.
        end: First epoch (or step) from which nothing is frozen any more; None for never.
        final_trainable: Epochs (or steps) at the end of training in which nothing is frozen, >= 0; needs ``total``.
        fixed_group: Group that ``mode="fixed"`` freezes, 0 or 1.

    Raises:
        TypeError: If a value is of another kind, such as text for a number.
        ValueError: If a value is out of range, both periods are given, or ``end <= start``.

    References:
        Hajimolahoseini, Ahmed, Liu, arXiv:2309.03824. *Deviations*: unequal phases, ``start``, ``end`` and the last
        all-trainable phase; which group comes first is decided by cost, layer by layer.

    Example:
        >>> from lightning_accel.low_rank import FreezingSchedule
        >>> schedule = FreezingSchedule(period_epochs=2)
        >>> [schedule.frozen_group(epoch=epoch) for epoch in range(4)]
        [0, 0, 1, 1]
    """

    mode: Literal["none", "fixed", "sequential", "adaptive"] = "sequential"
    period_epochs: int | None = None
    period_steps: int | None = None
    weights: tuple[float, float] = (1.0, 1.0)
    start: int = 0
    end: int | None = None
    final_trainable: int = 0
    fixed_group: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("none", "fixed", "sequential", "adaptive"):
            raise ValueError(f"`mode` must be none, fixed, sequential or adaptive, got {self.mode!r}.")
        if self.period_epochs is not None and self.period_steps is not None:
            raise ValueError("give one of `period_epochs` and `period_steps`, not both.")
        for name in ("period_epochs", "period_steps"):
            check_integer(name, getattr(self, name), at_least=1, optional=True)
        check_weights(self.weights)
        for name in ("start", "final_trainable"):
            check_integer(name, getattr(self, name), at_least=0)
        check_integer("end", self.end, optional=True)
        if self.end is not None and self.end <= self.start:
            raise ValueError(
                f"`end` must be > `start`, got {self.end} and {self.start}; use mode='none' to freeze never."
            )
        check_integer("fixed_group", self.fixed_group)
        if self.fixed_group not in range(NUM_GROUPS):
            raise ValueError(f"`fixed_group` must be 0 or 1, got {self.fixed_group}.")

    @property
    def counts_steps(self) -> bool:
        """Whether phases are counted in optimizer steps rather than epochs."""
        return self.period_steps is not None

    def frozen_group(self, *, epoch: int, step: int = 0, total: int | None = None) -> int | None:
        """Return the group that is frozen at this moment, or None.

        A pure function: nothing to save, nothing to restore.

        Args:
            epoch: Current epoch, zero-based.
            step: Optimizer steps done so far; used with ``period_steps`` only.
            total: Epochs (or steps) the training lasts; needed with ``final_trainable``.

        Raises:
            ValueError: If ``final_trainable`` is set and ``total`` is not given.
        """
        now = step if self.counts_steps else epoch
        if self.mode in ("none", "adaptive") or now < self.start:
            return None
        if self.end is not None and now >= self.end:
            return None
        if self.final_trainable:
            if total is None or total < 0:
                raise ValueError("`final_trainable` needs a known length of training; set max_epochs or max_steps.")
            if now >= total - self.final_trainable:
                return None
        if self.mode == "fixed":
            return self.fixed_group
        period = self.period_steps if self.period_steps is not None else self.period_epochs or 1
        return frozen_factor_index(now - self.start, period_epochs=period, weights=self.weights)


def freeze(model: nn.Module, group: int | None, *, user_frozen: Collection[str] = ()) -> list[str]:
    """Freeze one factor group of every low-rank layer and thaw the other; None thaws all.

    A frozen parameter loses its gradient (``grad = None``), so that optimizers skip it, momentum and weight decay
    included. Biases and all other layers are never touched.

    Args:
        model: With low-rank layers, whoever made them; changed in place.
        group: Index into the layers' ``groups()``, 0 or 1, or None.
        user_frozen: Full names of parameters that stay frozen, see `frozen_parameters`.

    Returns:
        Full names of the factors that are frozen now, those of the user included.

    Raises:
        ValueError: If the model has no low-rank layer, or there is no such group.

    Example:
        >>> from torch import nn
        >>> from lightning_accel.low_rank import LowRankLinear, freeze
        >>> model = nn.Sequential(LowRankLinear(64, 32, 8))
        >>> frozen = freeze(model, 0, user_frozen=frozenset())
        >>> [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == sorted(frozen)
        True
    """
    layers = low_rank_layers(model)
    if not layers:
        raise ValueError("the model has no low-rank layer to freeze; decompose it first (`RankQuantization`).")
    if group is not None and group not in range(NUM_GROUPS):
        raise ValueError(f"`group` must be 0, 1 or None, got {group}.")
    frozen: list[str] = []
    for name, layer in layers.items():
        resting = () if group is None else layer.groups()[group]
        for part in layer.factor_names:
            full_name = f"{name}.{part}" if name else part
            trainable = part not in resting and full_name not in user_frozen
            set_trainable(getattr(layer, part), trainable)
            if not trainable:
                frozen.append(full_name)
    return frozen


def mean_of_phases(phases: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """Return times averaged over the phases of sequential freezing, pair by pair.

    Args:
        phases: For each group, the times with that group at rest; equal indices belong together.
        weights: Relative length of each phase, >= 0, not all 0.
    """
    total = sum(weights)
    return [sum(w * t for w, t in zip(weights, times, strict=True)) / total for times in zip(*phases, strict=True)]


def set_trainable(parameter: nn.Parameter, trainable: bool) -> None:
    """Freeze (and drop the gradient of) or thaw one parameter."""
    parameter.requires_grad_(trainable)
    if not trainable:
        parameter.grad = None


def frozen_parameters(model: nn.Module) -> set[str]:
    """Return the full names of all parameters with ``requires_grad=False``; call it before the first `freeze`.

    Example:
        >>> from torch import nn
        >>> from lightning_accel.low_rank import frozen_parameters
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.bias.requires_grad_(False)
        >>> sorted(frozen_parameters(layer))
        ['bias']
    """
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def factor_parameter_names(model: nn.Module) -> set[str]:
    """Return the full names of the factors of all low-rank layers, without biases."""
    return {
        f"{name}.{part}" if name else part
        for name, layer in low_rank_layers(model).items()
        for part in layer.factor_names
    }
