"""The rows of packed sequences as dense grids of steps and streams, which the kernels for padded sequences take.

As long as no sequence ends, packed rows are a dense grid as they lie: `Stretches` runs the kernel once for each such
stretch, and nothing is padded. `PaddedGrid` runs it once, on all steps, made exact by one more input feature, 1 in the
padding and 0 elsewhere, whose weights hold the state: the forget gate (LSTM) or the update gate (GRU) is forced to 1
and the input gate to 0, so the state at the end is the state at each sequence's own last step. Outputs past the end are
dropped. The reverse direction flips every sequence in itself.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# sigmoid(+-1e4) is exactly 1 and 0 in every floating-point type, and 1e4 is finite in all of them.
_HOLD = 1e4
# Rows of gates (in units of the hidden size) that an LSTM and a GRU hold in the padding: (input, forget, cell, output)
# and (reset, update, new). A plain RNN has no gate to hold; its last state is read from its outputs.
_HOLDING_ROWS = {"lstm": (-_HOLD, _HOLD, 0.0, 0.0), "gru": (0.0, _HOLD, 0.0)}
KERNELS: dict[str, Callable[..., Any]] = {
    "lstm": torch.lstm,
    "gru": torch.gru,
    "rnn_tanh": torch.rnn_tanh,
    "rnn_relu": torch.rnn_relu,
}
_PADDED_FILL = 0.2
# What one more call of a kernel costs, as measured on CPU: its set-up, in multiplications of the forward pass, and its
# own gradients of the weights, in rows.
_CALL_PRODUCTS, _CALL_ROWS = 8e6, 20
_PACKED_STEPS = 8  # steps of the packed kernel that take longer than such a call


class _PlaceRows(torch.autograd.Function):
    """Write rows to their places in a zero tensor; its gradient is `_TakeRows`, which is far faster than indexing's."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, count: int) -> Tensor:
        ctx.places = places
        return rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, places, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _TakeRows.apply(gradients[0], ctx.places), None, None


class _TakeRows(torch.autograd.Function):
    """Take the rows at distinct places."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, places: Tensor) -> Tensor:
        ctx.places, ctx.count = places, table.shape[0]
        return table.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _PlaceRows.apply(gradients[0], ctx.places, ctx.count), None


class _Reorder(torch.autograd.Function):
    """Permute the rows; its gradient is the inverse permutation instead of a sum into zeros."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, inverse: Tensor) -> Tensor:
        ctx.places, ctx.inverse = places, inverse
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Reorder.apply(gradients[0], ctx.inverse, ctx.places), None, None


class PaddedGrid:
    """Packed data as one padded (T, B) grid."""

    def __init__(self, batch_sizes: Tensor, device: torch.device) -> None:
        self._steps, self._streams = len(batch_sizes), int(batch_sizes[0])
        inside = torch.arange(self._streams)[None, :] < batch_sizes[:, None]
        lengths = inside.sum(0)
        step, stream = inside.nonzero(as_tuple=True)
        self._forward = (step * self._streams + stream).to(device)
        self._reverse = ((lengths[stream] - 1 - step) * self._streams + stream).to(device)
        self._ends = ((lengths - 1) * self._streams + torch.arange(self._streams)).to(device)
        self._padding = (~inside).to(device)

    def run(
        self, kind: str, data: Tensor, states: list[Tensor], weights: Sequence[Tensor], *, bias: bool, reverse: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Run one layer in one direction; returns packed outputs and final states."""
        places = self._reverse if reverse else self._forward
        padded: Tensor = _PlaceRows.apply(data, places, self._steps * self._streams)
        padded = padded.view(self._steps, self._streams, -1)
        rows = _HOLDING_ROWS.get(kind)
        w_ih = weights[0]
        if rows is not None:
            column = w_ih.new_tensor(rows).repeat_interleave(w_ih.shape[0] // len(rows))[:, None]
            w_ih = torch.cat([w_ih, column], 1)
            padded = torch.cat([padded, self._padding[..., None].to(padded.dtype)], 2)
        outputs, last = _run_kernel(kind, padded, states, [w_ih, *weights[1:]], bias=bias)
        flat = outputs.flatten(0, 1)
        if kind != "gru":  # an LSTM's output gate and a plain RNN's state run on in the padding
            last[0] = _TakeRows.apply(flat, self._ends)[None]
        return _TakeRows.apply(flat, places), last


class Stretches:
    """Packed data as dense grids: one for each stretch of steps in which no sequence ends."""

    def __init__(self, batch_sizes: Tensor, device: torch.device) -> None:
        streams, steps = batch_sizes.unique_consecutive(return_counts=True)
        self._streams: list[int] = streams.tolist()
        self._rows: list[int] = (streams * steps).tolist()
        self._batch_sizes, self._device = batch_sizes, device

    @functools.cached_property
    def _flip(self) -> Tensor:
        """Where the row lies that takes a row's place when every sequence is turned around in itself."""
        inside = torch.arange(self._streams[0])[None, :] < self._batch_sizes[:, None]
        step, stream = inside.nonzero(as_tuple=True)
        begins = self._batch_sizes.cumsum(0) - self._batch_sizes
        return (begins[inside.sum(0)[stream] - 1 - step] + stream).to(self._device)

    def run(
        self, kind: str, data: Tensor, states: list[Tensor], weights: Sequence[Tensor], *, bias: bool, reverse: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Run one layer in one direction; returns packed outputs and final states."""
        if reverse:
            data = _Reorder.apply(data, self._flip, self._flip)
        outputs: list[Tensor] = []
        ended: list[list[Tensor]] = [[] for _ in states]
        for part, streams, going_on in zip(data.split(self._rows), self._streams, [*self._streams[1:], 0], strict=True):
            running = [state[:, :streams] for state in states]
            output, states = _run_kernel(kind, part.view(-1, streams, part.shape[1]), running, weights, bias=bias)
            outputs.append(output.flatten(0, 1))
            for ends, state in zip(ended, states, strict=True):
                ends.insert(0, state[:, going_on:])  # who ends later stands before
        packed = torch.cat(outputs)
        if reverse:
            packed = _Reorder.apply(packed, self._flip, self._flip)
        return packed, [torch.cat(ends, 1) for ends in ended]


def _run_kernel(
    kind: str, x: Tensor, states: list[Tensor], weights: Sequence[Tensor], *, bias: bool
) -> tuple[Tensor, list[Tensor]]:
    hx = states if kind == "lstm" else states[0]
    outputs, *last = KERNELS[kind](x, hx, weights, bias, 1, 0.0, False, False, False)
    return outputs, last


def best_layout(batch_sizes: Tensor, weights: int) -> type[PaddedGrid] | type[Stretches] | None:
    """Choose how packed data runs fastest.

    Args:
        batch_sizes: Streams still running at each step, shape (T,), on CPU, not increasing.
        weights: Multiplications that a row takes in one layer and direction.

    Returns:
        A layout; ``None`` for torch's packed kernel.
    """
    grid, rows = len(batch_sizes) * int(batch_sizes[0]), int(batch_sizes.sum())
    calls = 1 + int((batch_sizes[1:] != batch_sizes[:-1]).sum())
    if rows < _PADDED_FILL * grid:
        return Stretches if len(batch_sizes) >= _PACKED_STEPS * calls else None
    return Stretches if grid - rows >= (calls - 1) * (_CALL_PRODUCTS / weights + _CALL_ROWS) else PaddedGrid
