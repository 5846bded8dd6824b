"""What the server does with ways that workers have gone on their own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_accel.async_sgd.settings import Outer


class OuterStep:
    """Move the parameters by ways that workers have gone on their own (base minus reached).

    One by one (`apply`): ``mean`` moves them by ``rate * way / N`` for ``N`` live workers; ``delayed_nesterov`` does
    the same and, with every N-th push, adds ``momentum`` times a running mean of ways.

    By rounds (`gather`, and `close` at the end of each): with ``d`` the sum of a round's ways, each times its share,
    ``mean`` moves them by ``rate * d``; ``nesterov`` by ``rate * (d + momentum * v)``, where ``v = momentum * v + d``.

    Args:
        outer: Which of these.
        momentum: Of the two with momentum, in [0, 1).
        rate: Factor on all of it, > 0.

    References:
        ``delayed_nesterov``: Liu et al., arXiv:2401.09135, algorithm 2 with c = 0. *Deviation*: N follows the live
        workers. ``nesterov``: Douillard et al., arXiv:2311.08105, algorithm 1. *Deviation*: shares by samples.
    """

    def __init__(self, outer: Outer = "mean", *, momentum: float = 0.9, rate: float = 1.0) -> None:
        self._outer, self._momentum, self._rate = outer, momentum, rate
        self._velocity: dict[int, Tensor] = {}
        self._sum: dict[int, Tensor] = {}
        self._count = 0

    @torch.no_grad()
    def apply(
        self, parameters: Sequence[Tensor], ways: Sequence[Tensor | None], *, workers: int, weight: float
    ) -> None:
        """Move ``parameters`` by the ways of one worker, one entry a parameter, None for unmoved."""
        self._count += 1
        delayed = self._outer == "delayed_nesterov"
        adds_momentum = delayed and self._count >= workers
        for i, (parameter, way) in enumerate(zip(parameters, ways, strict=True)):
            if way is None:
                continue
            parameter.sub_(way, alpha=self._rate * weight / workers)
            if not delayed:
                continue
            total = self._sum.setdefault(i, torch.zeros_like(parameter)).add_(way)
            if adds_momentum:
                velocity = self._velocity.setdefault(i, torch.zeros_like(parameter))
                velocity.mul_(self._momentum).add_(total, alpha=1.0 / self._count)
                parameter.sub_(velocity, alpha=self._rate * weight * self._momentum)
                total.zero_()
        if adds_momentum:
            self._count = 0

    @torch.no_grad()
    def gather(self, parameters: Sequence[Tensor], ways: Sequence[Tensor | None], *, share: float) -> None:
        """Add the ways of one worker, times its ``share`` in [0, 1], to those of the round. Moves nothing yet."""
        for i, (parameter, way) in enumerate(zip(parameters, ways, strict=True)):
            if way is not None:
                self._sum.setdefault(i, torch.zeros_like(parameter)).add_(way, alpha=share)

    @torch.no_grad()
    def close(self, parameters: Sequence[Tensor]) -> None:
        """Move ``parameters`` by what the round has gathered, and begin another."""
        for i, total in self._sum.items():
            parameter = parameters[i]
            parameter.sub_(total, alpha=self._rate)
            if self._outer == "nesterov":
                velocity = self._velocity.setdefault(i, torch.zeros_like(parameter))
                velocity.mul_(self._momentum).add_(total)
                parameter.sub_(velocity, alpha=self._rate * self._momentum)
            total.zero_()
