"""One parameter's projection again, step after step: one compiled call and next to nothing around it.

Between the operations of a training step, what Python needs has left the caches as well; every object that is looked
at costs a fraction of a microsecond, and the general way looks at a hundred.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_accel.projection.memory import Memory
from lightning_accel.projection.one_call import OneCall, Run
from lightning_accel.projection.targets import Target

Place = tuple[int, torch.Size, tuple[int, ...]]


class Again(NamedTuple):
    """What a projector did last, if that was one compiled call for one parameter.

    Attributes:
        targets: What the projector was asked to project: a list of one.
        since: The number of that step; from there on the projection is a full one.
        parameters: Of the parameter's module.
        leaf: The parameter's name in them.
        parameter: Found there; another one in its place is not this one's business.
        address: Where that was.
        shape: As it was.
        stride: As it was.
        call: Projects what is in that place.
        run: Its graph.
        tensors: What that takes.
        numbers: Those of them that it leaves for the next time, the threshold at 3.
        memory: Of the parameter.
    """

    targets: Sequence[Target]
    since: int
    parameters: Mapping[str, nn.Parameter | None]
    leaf: str
    parameter: nn.Parameter
    address: int
    shape: torch.Size
    stride: tuple[int, ...]
    call: OneCall
    run: Run
    tensors: list[Tensor]
    numbers: Any
    memory: Memory


def project_again(again: Again, targets: Sequence[Target], step: int) -> bool:
    """Project what was asked for if it is the same as last time; say whether it was, and was done."""
    known, since, parameters, leaf, parameter, address, shape, stride, call, run, tensors, numbers, memory = again
    if targets is not known or len(targets) != 1 or step < since or parameters.get(leaf) is not parameter:
        return False
    if parameter.data_ptr() != address or parameter.shape != shape or parameter.stride() != stride:
        return False
    (call.tops,) = run(tensors)
    call.tau = memory.tau = tau = numbers[3]
    if tau >= 0.0:
        return True
    done = call.go_on()
    memory.tau = call.tau if done else 0.0
    return done


def place_of(x: Tensor) -> Place:
    """Return what stays the same as long as a tensor's layout is good."""
    return x.data_ptr(), x.shape, x.stride()
