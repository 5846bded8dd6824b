"""One parameter's projection again, step after step: one compiled call and next to nothing around it.

Between the operations of a training step, what Python needs has left the caches as well; every object that is looked
at costs a fraction of a microsecond, and the general way looks at a hundred.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_accel.projection.memory import Memory
from lightning_accel.projection.one_call import OneCall
from lightning_accel.projection.targets import Target


@dataclass(frozen=True, slots=True)
class Again:
    """What a projector did last, if that was one compiled call for one parameter.

    Attributes:
        targets: What the projector was asked to project: a list of one.
        since: The number of that step; from there on the projection is a full one.
        parameters: Of the parameter's module.
        leaf: The parameter's name in them.
        parameter: Found there; another one in its place is not this one's business.
        place: Where that was.
        call: Projects what is in that place.
        radius: Of the ball.
        memory: Of the parameter.
    """

    targets: Sequence[Target]
    since: int
    parameters: Mapping[str, nn.Parameter | None]
    leaf: str
    parameter: nn.Parameter
    place: tuple[Any, ...]
    call: OneCall
    radius: float
    memory: Memory

    def __call__(self) -> bool:
        """Project; say whether that was done. If not, the general way is to be taken."""
        parameter, (address, shape, stride) = self.parameter, self.place
        if self.parameters.get(self.leaf) is not parameter or parameter.data_ptr() != address:
            return False
        if parameter.shape != shape or parameter.stride() != stride:
            return False
        memory, call = self.memory, self.call
        if call(self.radius, memory.tau):
            memory.tau = call.tau
            return True
        return False


def place_of(x: Tensor) -> tuple[Any, ...]:
    """Return what stays the same as long as a tensor's layout is good."""
    return x.data_ptr(), x.shape, x.stride()
