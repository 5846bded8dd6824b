"""Blocks of straight-line steps as CUDA graphs: launched at once, where a loop has no kernel of its own.

A graph reads and writes fixed memory, so a block's values are copied there before a replay and from there after it.
That is a pass over memory for some tens of launches.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_accel.recurrent.compiler.workspace import Workspace

CAPTURED_STEPS = 32
"""Steps of a block: enough to hide the launch of a graph, few enough to be recorded quickly."""

_PLAIN_CALLS = 2  # of a kind: libraries that set themselves up at first are not to be recorded
_MOST_GRAPHS = 8  # batch sizes and rests of lengths; all others run plainly

Record = Callable[[Callable[[], None]], Callable[[], object]]
"""Takes a function that always works on the same memory, returns what does the same work again."""


def record_on_device(function: Callable[[], None]) -> Callable[[], object]:
    """Record the launches of a function as one CUDA graph."""
    current = torch.cuda.current_stream()
    aside = torch.cuda.Stream()
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        function()
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay


class CapturedBlocks:
    """A generated ``forward`` or ``backward`` that is recorded once a kind of block, and called like it.

    Args:
        function: The generated function.
        device: Of its tensors.
        record: Records what works on fixed memory.

    Attributes:
        failure: Why nothing is recorded any more; ``None`` as long as all is well.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device, record: Record = record_on_device) -> None:
        self._function, self._device, self._record = function, device, record
        self._calls: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, _Graph] = {}
        self.failure: str | None = None

    def __call__(self, steps: int, streams: int, *arguments: Any) -> list[Tensor | None]:
        """Run a block; the arguments are those of the generated function."""
        kind = (steps, streams, _shapes_of(arguments), torch.is_inference_mode_enabled())
        graph = self._graphs.get(kind)
        if graph is None:
            self._calls[kind] = self._calls.get(kind, 0) + 1
            many = len(self._graphs) >= _MOST_GRAPHS
            if self.failure is not None or many or self._calls[kind] <= _PLAIN_CALLS:
                return self._function(steps, streams, *arguments)
            try:
                graph = _Graph(self._function, (steps, streams), arguments, device=self._device, record=self._record)
            except Exception as error:
                self.failure = f"{type(error).__name__}: {error}"
                return self._function(steps, streams, *arguments)
            self._graphs[kind] = graph
        return graph.replay(arguments)


class _Graph:
    """One recorded block."""

    def __init__(
        self,
        function: Callable[..., Any],
        lengths: tuple[int, int],
        arguments: Sequence[Any],
        *,
        device: torch.device,
        record: Record,
    ) -> None:
        self._inputs, self._slabs, sums = _sides(arguments)
        self._inputs = _copy(self._inputs)
        self._slabs = {name: torch.zeros_like(slab) for name, slab in self._slabs.items()}
        workspace = Workspace(device)
        self._sums: list[Tensor | None] | None = None
        self._ends: list[Tensor | None] = []

        def run() -> None:
            fresh: list[Tensor | None] | None = None if sums is None else [None] * len(sums)
            parts = [*self._inputs, self._slabs, workspace, *([] if fresh is None else [fresh])]
            self._ends, self._sums = function(*lengths, *parts), fresh

        self._replay = record(run)

    def replay(self, arguments: Sequence[Any]) -> list[Tensor | None]:
        """Run the block on other numbers."""
        inputs, slabs, sums = _sides(arguments)
        for held, given in zip(self._inputs, inputs, strict=True):
            _fill(held, given)
        self._replay()
        for name, slab in slabs.items():
            slab.copy_(self._slabs[name])
        if sums is not None:
            assert self._sums is not None
            for k, part in enumerate(self._sums):
                total = sums[k]
                if part is not None:
                    sums[k] = part.clone() if total is None else total.add_(part)
        return [None if end is None else end.clone() for end in self._ends]


def _sides(arguments: Sequence[Any]) -> tuple[list[Any], dict[str, Tensor], list[Tensor | None] | None]:
    """Split the arguments of a generated function: what it reads, what it fills, sums that it adds to (backwards).

    The last ones of a forward are slabs and a workspace, those of a backward slabs, a workspace and sums.
    """
    if isinstance(arguments[-1], Workspace):
        *inputs, slabs, _ = arguments
        return inputs, slabs, None
    *inputs, slabs, _, sums = arguments
    return inputs, slabs, sums


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: _copy(part) for name, part in value.items()}
    return [_copy(part) for part in value] if isinstance(value, (list, tuple)) else value


def _fill(held: Any, given: Any) -> None:
    if isinstance(held, Tensor):
        held.copy_(given)
    elif isinstance(held, dict):
        for name, part in held.items():
            _fill(part, given[name])
    elif isinstance(held, list):
        for part, new in zip(held, given, strict=True):
            _fill(part, new)


def _shapes_of(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return tuple((name, _shapes_of(part)) for name, part in value.items())
    return tuple(map(_shapes_of, value)) if isinstance(value, (list, tuple)) else value is None
