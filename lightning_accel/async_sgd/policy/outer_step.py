"""What the server does with ways that workers have gone on their own."""

from collections.abc import Sequence

import torch
from torch import Tensor


class OuterStep:
    """Apply ways that workers have gone on their own, each weighted 1 / live workers.

    With ``momentum`` a delayed Nesterov step: each way moves the parameters at once, and every N-th push, N being the
    live workers, adds ``momentum`` times a running mean of ways.

    References:
        Liu et al., arXiv:2401.09135, algorithm 2 with c = 0. *Deviation*: N follows the live workers.
    """

    def __init__(self, momentum: float | None) -> None:
        self._momentum = momentum
        self._velocity: dict[int, Tensor] = {}
        self._sum: dict[int, Tensor] = {}
        self._count = 0

    @torch.no_grad()
    def apply(
        self, parameters: Sequence[Tensor], ways: Sequence[Tensor | None], *, workers: int, weight: float
    ) -> None:
        """Move ``parameters`` against ``ways`` (base minus reached), one entry a parameter, None for unmoved."""
        self._count += 1
        adds_momentum = self._momentum is not None and self._count >= workers
        for i, (parameter, way) in enumerate(zip(parameters, ways, strict=True)):
            if way is None:
                continue
            parameter.sub_(way, alpha=weight / workers)
            if self._momentum is None:
                continue
            total = self._sum.setdefault(i, torch.zeros_like(parameter)).add_(way)
            if adds_momentum:
                velocity = self._velocity.setdefault(i, torch.zeros_like(parameter))
                velocity.mul_(self._momentum).add_(total, alpha=1.0 / self._count)
                parameter.sub_(velocity, alpha=weight * self._momentum)
                total.zero_()
        if adds_momentum:
            self._count = 0
