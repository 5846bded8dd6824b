"""Norms that were found on a GPU, looked at when they have come to the host: no step waits for them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_accel.machine.transfers import Mark, send_to_host
from lightning_accel.projection.balls.outcome import Cut
from lightning_accel.projection.kernels.rounding import require_finite


@dataclass
class LateNorms:
    """Norms that nobody has looked at yet.

    Attributes:
        there: On the device.
        under_way: On their way to the host, the oldest first.
    """

    there: list[Tensor] = field(default_factory=list)
    under_way: list[tuple[Tensor, Mark]] = field(default_factory=list)

    def add(self, cuts: Sequence[Cut]) -> None:
        """Take the norms of what was projected."""
        self.there += [c.norm for c in cuts]

    def check(self, *, wait: bool) -> None:
        """Send what there is to the host; look at all of it, or without waiting at what has come.

        Raises:
            ValueError: If a norm was NaN or infinite.
        """
        norms, self.there = self.there, []
        if norms:
            self.under_way.append(send_to_host(torch.stack(norms)))
        while self.under_way and (wait or self.under_way[0][1].is_passed()):
            found, mark = self.under_way.pop(0)
            mark.wait()
            require_finite(found, "a projected parameter")
