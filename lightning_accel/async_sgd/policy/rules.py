"""Staleness rules: what a gradient is worth that was computed on parameters which have moved on since.

Pure functions of counters and tensors; the server, the replay and the tests share them.
"""

from collections.abc import Iterable
from typing import Literal, get_args

from torch import Tensor

StalenessRule = Literal["look_ahead", "inverse", "none", "delay_compensation", "drop"]
STALENESS_RULES: tuple[str, ...] = get_args(StalenessRule)


def staleness_of(version: int, base_version: int) -> int:
    """Return how many optimizer steps were applied since the parameters of a gradient were read.

    Raises:
        ValueError: If the gradient claims to come from the future.
    """
    if base_version > version:
        raise ValueError(f"`base_version` must be <= `version` {version}, got {base_version}.")
    return version - base_version


def learning_rate_weight(staleness: int, *, rule: StalenessRule, threshold: int) -> float | None:
    """Return the factor on the learning rate of one push, or None where the push is to be dropped.

    ``none`` and ``delay_compensation``: 1. ``inverse``: ``1 / max(1, staleness)``; so does ``look_ahead`` for pushes of
    local steps, for those of gradients see `LookAhead`. ``drop``: 1 up to ``threshold``, None beyond. The factor acts
    on the learning rate, not on the gradient, which Adam would normalise away.

    Args:
        staleness: Optimizer steps between the reading and the pushing, >= 0.
        rule: One of `STALENESS_RULES`.
        threshold: Largest staleness that ``drop`` still applies, in optimizer steps, >= 0.

    Raises:
        ValueError: If ``rule`` is unknown.

    References:
        ``inverse``: Zhang, Gupta, Lian, Liu, arXiv:1511.05950. ``drop``: Maranjyan, Tyurin, Richtarik,
        arXiv:2501.16168, without their stopping of computations already under way (*Deviation*).

    Example:
        >>> from lightning_accel.async_sgd import learning_rate_weight
        >>> learning_rate_weight(4, rule="inverse", threshold=16)
        0.25
    """
    if rule in ("none", "delay_compensation"):
        return 1.0
    if rule in ("look_ahead", "inverse"):
        return 1.0 / max(1, staleness)
    if rule == "drop":
        return 1.0 if staleness <= threshold else None
    raise ValueError(f"`rule` must be one of {', '.join(STALENESS_RULES)}, got {rule!r}.")


def compensate_delay(gradient: Tensor, current: Tensor, base: Tensor, *, strength: float) -> Tensor:
    """Return ``g + strength * g * g * (current - base)``, a first-order guess of the gradient at ``current``.

    The squared gradient stands for the diagonal of the Hessian. With ``current == base`` the gradient itself comes
    back, bit for bit. All tensors share one shape; nothing is changed in place.

    References:
        Zheng et al., arXiv:1609.08326, equation 10.

    Example:
        >>> import torch
        >>> from lightning_accel.async_sgd import compensate_delay
        >>> gradient, current, base = torch.tensor([2.0]), torch.tensor([1.5]), torch.tensor([1.0])
        >>> compensate_delay(gradient, current, base, strength=0.5)
        tensor([3.])
    """
    return gradient + strength * gradient * gradient * (current - base)


def has_slack(clock: int, clocks: Iterable[int], *, max_staleness: int | None) -> bool:
    """Return whether a worker at ``clock`` pushes may go on under stale-synchronous parallelism.

    Args:
        clock: Pushes of this worker.
        clocks: Pushes of every worker that counts: the live ones that are not themselves waiting.
        max_staleness: How many pushes the fastest may be ahead of the slowest; None for no bound.

    References:
        Ho et al., "More effective distributed ML via a stale synchronous parallel parameter server", NeurIPS 2013.
    """
    return max_staleness is None or clock - min(clocks, default=clock) <= max_staleness


def expected_gain(workers: int, slowdown: float) -> float:
    """Return how many times more samples a second asynchrony makes than lock-step, with one slow worker.

    ``(N - 1 + 1/s) / (N / s)`` for ``N`` workers of which one is ``s`` times slower. A model of throughput alone.

    Raises:
        ValueError: If ``workers < 1`` or ``slowdown < 1``.
    """
    if workers < 1:
        raise ValueError(f"`workers` must be >= 1, got {workers}.")
    if slowdown < 1.0:
        raise ValueError(f"`slowdown` must be >= 1, got {slowdown}.")
    return (workers - 1 + 1.0 / slowdown) / (workers / slowdown)
