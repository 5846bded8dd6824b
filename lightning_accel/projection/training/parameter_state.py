"""What is known of a parameter from one projection to the next."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_accel.projection.sharded import gather


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
