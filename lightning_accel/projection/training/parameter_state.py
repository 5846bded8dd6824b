"""What is known of a parameter from one projection to the next."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_accel.projection.sharded import gather
from lightning_accel.projection.training.targets import Target


@dataclass
class Memory:
    """What a projector knows of one parameter; all of it is in the projector's state.

    Attributes:
        first_norm: Norm before the first projection, where the size of the ball depends on it.
        dead: Boolean ``(groups,)``: cleared, and kept so if groups are frozen.
        kept: Boolean in the shape of the parameter: entries that a mask lets live.
        mu: Where the exact method ended.
        tau: Where the bi-level method ended, if it was the parameter's own ball.
    """

    first_norm: float | None = None
    dead: Tensor | None = None
    kept: Tensor | None = None
    mu: Tensor | None = None
    tau: float = 0.0

    def fits(self, target: Target) -> bool:
        """Say whether this can be known of a target: of as many groups, and of its shape."""
        parameter = target.parameter
        same = self.kept is None or parameter is None or self.kept.shape == parameter.shape
        return same and (self.dead is None or len(self.dead) == target.num_groups)

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, whole and on CPU."""
        return {
            name: gather(value.detach()).cpu().clone() if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }

    @classmethod
    def of(cls, state: dict[str, Any], device: torch.device | None) -> "Memory":
        """Restore `state_dict` to ``device``."""
        restored = cls(**state)
        for name, value in state.items():
            if isinstance(value, Tensor) and device is not None:
                setattr(restored, name, value.to(device))
        return restored
