"""Optimizer steps over a few long tensors instead of many small ones, to the same bits.

Parameters lie in one piece of memory, laid out as gradients are in a mailbox. Neighbours in one parameter group are
then one long tensor to an elementwise optimizer, and so are their states.
"""

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.async_sgd.policy.stepping import ELEMENTWISE, EXACT, bare_step, step_optimizer
from lightning_accel.async_sgd.shared_memory.memory import aligned


class Arena:
    """Parameters in one piece of memory; they stay the objects that they are.

    Args:
        parameters: Moved here if all are dense, on one device, and all of single or all of double precision.

    Attributes:
        spans: First element and end of each parameter; empty if they were not moved.
        memory: What holds them, with zeros between.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.spans: list[tuple[int, int]] = []
        self.memory = torch.empty(0)
        kinds = {(p.dtype, p.device, p.layout) for p in parameters}
        if len(kinds) != 1:
            return
        dtype, device, layout = kinds.pop()
        if dtype not in EXACT or layout != torch.strided:
            return
        end = 0
        for parameter in parameters:
            self.spans.append((end, end + parameter.numel()))
            end += aligned(parameter.numel() * dtype.itemsize) // dtype.itemsize
        self.memory = torch.zeros(end, dtype=dtype, device=device)
        for parameter, place in zip(parameters, self.views(self.memory, parameters), strict=True):
            place.copy_(parameter.detach())
            parameter.data = place

    def views(self, memory: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the parts of ``memory``, laid out as the arena is, in the shapes of ``parameters``."""
        pairs = zip(self.spans, parameters, strict=True)
        return [memory[begin:end].view(parameter.shape) for (begin, end), parameter in pairs]


class FlatOptimizer:
    """A real optimizer whose steps a twin takes on long tensors, where that makes the same bits.

    The real one keeps its groups and its state: after its first step, the tensors of that state are views of the
    twin's. A step that has no gradient for one of its parameters is the real one's own, and so are all that follow,
    because the parameters then differ in their number of steps.

    Args:
        optimizer: Over some of ``parameters``.
        parameters: All of the arena.
        arena: Where they lie.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], arena: Arena) -> None:
        self.optimizer = optimizer
        self._parameters = parameters
        self._arena = arena
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._places = [i for i, parameter in enumerate(parameters) if id(parameter) in held]
        self._runs = [_runs(group["params"], parameters) for group in optimizer.param_groups]
        self._able = type(optimizer) in ELEMENTWISE and bool(arena.spans)
        self._twin: Optimizer | None = None
        self._gradients: Tensor | None = None  # for gradients that lie elsewhere

    def step(self, gradients: Sequence[Tensor | None], *, weight: float, flat: Tensor | None = None) -> None:
        """Take one step with a learning rate times ``weight``; see `step_optimizer`.

        Args:
            gradients: One entry a parameter of the arena, or None.
            weight: Factor on the learning rate.
            flat: The memory that ``gradients`` are views of, if it is laid out as the arena is.
        """
        complete = all(gradients[place] is not None for place in self._places)
        plain = complete and all(_is_plain(group) for group in self.optimizer.param_groups)
        if self._twin is not None and plain:
            self._step_twin(self._twin, self._collected(gradients) if flat is None else flat, weight)
            return
        if self._twin is not None:
            self.scatter()
            self._able = False
        step_optimizer(self.optimizer, self._parameters, gradients, weight=weight)
        if self._able and plain:
            self._gather()

    @property
    def pieces(self) -> list[Tensor]:
        """Tensors that cover the optimizer's parameters and share their memory, as few as there can be."""
        if not self._arena.spans:
            return [self._parameters[place] for place in self._places]
        spans = self._arena.spans
        return [self._arena.memory[spans[a][0] : spans[b][1]] for runs in self._runs for a, b in runs]

    def forget(self) -> None:
        """Take note that the optimizer was given another state."""
        self._twin = None

    def scatter(self) -> None:
        """Give each parameter a state of its own again, which shares no memory."""
        if self._twin is None:
            return
        self._twin = None
        for state in self.optimizer.state.values():
            state.update({key: value.clone() for key, value in state.items() if isinstance(value, Tensor)})

    def _step_twin(self, twin: Optimizer, flat: Tensor, weight: float) -> None:
        for mine, theirs, runs in zip(twin.param_groups, self.optimizer.param_groups, self._runs, strict=True):
            long = mine["params"]
            mine.update(theirs)
            mine.update(params=long, lr=theirs["lr"] * weight if weight != 1.0 else theirs["lr"])
            for parameter, (first, last) in zip(long, runs, strict=True):
                parameter.grad = flat[self._arena.spans[first][0] : self._arena.spans[last][1]]
        known = [len(state) for state in twin.state.values()]
        bare_step(twin)
        if known != [len(state) for state in twin.state.values()]:
            self._link(twin)  # momentum was switched on, say
        for parameter in twin.state:
            parameter.grad = None

    def _collected(self, gradients: Sequence[Tensor | None]) -> Tensor:
        if self._gradients is None:
            self._gradients = torch.zeros_like(self._arena.memory)
        for target, gradient in zip(self._arena.views(self._gradients, self._parameters), gradients, strict=True):
            if gradient is not None:
                target.copy_(gradient)
        return self._gradients

    def _gather(self) -> None:
        """Copy the state into long tensors, if it is the same for all parameters of a run but for its elements."""
        twin = copy.copy(self.optimizer)
        twin.param_groups, twin.state = [], defaultdict(dict)
        for group, runs in zip(self.optimizer.param_groups, self._runs, strict=True):
            long = []
            for first, last in runs:
                begin, end = self._arena.spans[first][0], self._arena.spans[last][1]
                long.append(nn.Parameter(self._arena.memory[begin:end]))
                state = self._long_state(first, last, long[-1])
                if state is None:
                    self._able = False
                    return
                twin.state[long[-1]] = state
            twin.param_groups.append({**group, "params": long})
        self._link(twin)
        self._twin = twin

    def _long_state(self, first: int, last: int, long: Tensor) -> dict[str, Any] | None:
        parameters = self._parameters[first : last + 1]
        states = [self.optimizer.state.get(parameter, {}) for parameter in parameters]
        found: dict[str, Any] = {}
        for key in set().union(*states):
            values = [state.get(key) for state in states]
            if all(value is None for value in values):
                found[key] = None
            elif any(not isinstance(value, Tensor) for value in values):
                return None
            elif key == "step":
                if any(value != values[0] for value in values):
                    return None
                found[key] = values[0].clone()
            else:
                found[key] = torch.zeros_like(long, requires_grad=False)
                pairs = zip(self._cut(found[key], first, last), values, strict=True)
                for target, value in pairs:
                    if value.shape != target.shape or value.dtype != target.dtype:
                        return None
                    target.copy_(value)
        return found

    def _link(self, twin: Optimizer) -> None:
        """Make the tensors of the optimizer's state views of the twin's."""
        for group, runs in zip(twin.param_groups, self._runs, strict=True):
            for long, (first, last) in zip(group["params"], runs, strict=True):
                for key, value in twin.state[long].items():
                    count = last + 1 - first
                    elementwise = isinstance(value, Tensor) and key != "step"
                    parts = self._cut(value, first, last) if elementwise else [value] * count
                    for parameter, part in zip(self._parameters[first : last + 1], parts, strict=True):
                        self.optimizer.state[parameter][key] = part

    def _cut(self, long: Tensor, first: int, last: int) -> list[Tensor]:
        start = self._arena.spans[first][0]
        shapes = [parameter.shape for parameter in self._parameters[first : last + 1]]
        spans = self._arena.spans[first : last + 1]
        return [long[b - start : e - start].view(shape) for (b, e), shape in zip(spans, shapes, strict=True)]


def _runs(held: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return the first and the last number of each row of neighbours among ``parameters`` that ``held`` holds."""
    numbers = {id(parameter): i for i, parameter in enumerate(parameters)}
    runs: list[tuple[int, int]] = []
    for place in sorted(numbers[id(parameter)] for parameter in held):
        if runs and runs[-1][1] == place - 1:
            runs[-1] = runs[-1][0], place
        else:
            runs.append((place, place))
    return runs


def _is_plain(group: dict[str, Any]) -> bool:
    """Whether a group's step is made of torch's elementwise operations, with numbers for hyper-parameters."""
    special = group.get("fused") or group.get("differentiable") or group.get("capturable")
    return not special and not any(isinstance(value, Tensor) for value in group.values())
