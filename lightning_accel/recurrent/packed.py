"""``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` on packed sequences, run padded.

The packed CPU kernels narrow the batch at every step and are several times slower than the padded ones. A padded run is
made exact by one more input feature, 1 in the padding and 0 elsewhere, whose weights hold the state: the forget gate
(LSTM) or the update gate (GRU) is forced to 1 and the input gate to 0, so the state at the end is the state at each
sequence's own last step. Outputs past the end are dropped. The reverse direction flips every sequence in itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# sigmoid(+-1e4) is exactly 1 and 0 in every floating-point type, and 1e4 is finite in all of them.
_HOLD = 1e4
# Rows of gates (in units of the hidden size) that an LSTM and a GRU hold in the padding: (input, forget, cell, output)
# and (reset, update, new). A plain RNN has no gate to hold; its last state is read from its outputs.
_HOLDING_ROWS = {"lstm": (-_HOLD, _HOLD, 0.0, 0.0), "gru": (0.0, _HOLD, 0.0)}
_KERNELS: dict[str, Callable[..., Any]] = {
    "lstm": torch.lstm,
    "gru": torch.gru,
    "rnn_tanh": torch.rnn_tanh,
    "rnn_relu": torch.rnn_relu,
}
_PACKED_ARGUMENTS = 9
_PADDED_FILL = 0.2


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


class _Layout:
    """Where the rows of packed data lie in a padded (T, B) grid."""

    def __init__(self, batch_sizes: Tensor, device: torch.device) -> None:
        self.steps, self.streams = len(batch_sizes), int(batch_sizes[0])
        inside = torch.arange(self.streams)[None, :] < batch_sizes[:, None]
        lengths = inside.sum(0)
        step, stream = inside.nonzero(as_tuple=True)
        self.forward = (step * self.streams + stream).to(device)
        self.reverse = ((lengths[stream] - 1 - step) * self.streams + stream).to(device)
        self.ends = ((lengths - 1) * self.streams + torch.arange(self.streams)).to(device)
        self.padding = (~inside).to(device)

    def pad(self, data: Tensor, places: Tensor) -> Tensor:
        padded: Tensor = _PlaceRows.apply(data, places, self.steps * self.streams)
        return padded.view(self.steps, self.streams, -1)

    def pack(self, padded: Tensor, places: Tensor) -> Tensor:
        return _TakeRows.apply(padded.flatten(0, 1), places)


def run_padded(
    kind: str,
    data: Tensor,
    batch_sizes: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    """Compute what the packed kernel ``torch.<kind>`` computes, with the padded kernel.

    Args:
        kind: ``"lstm"``, ``"gru"``, ``"rnn_tanh"`` or ``"rnn_relu"``.
        data: Packed data, shape (sum of lengths, I).
        batch_sizes: Streams still running at each step, shape (T,), on CPU, not increasing.
        states: ``(h0, c0)`` for an LSTM, otherwise ``(h0,)``, each of shape (layers * directions, B, H).
        weights: Of all layers and directions, in the kernel's order.
        bias: Whether ``weights`` hold biases.
        num_layers: Layers, >= 1.
        dropout: Probability between layers. Drawn on the packed data, so the random numbers are the packed kernel's.
        training: Whether dropout acts.
        bidirectional: Whether each layer has a reverse direction as well.

    Returns:
        Packed outputs, shape (sum of lengths, directions * H), and the final states, shaped as ``states``.
    """
    layout = _Layout(batch_sizes, data.device)
    directions = 2 if bidirectional else 1
    per_run = len(weights) // (num_layers * directions)
    finals: list[list[Tensor]] = [[] for _ in states]
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            run = layer * directions + direction
            places = layout.reverse if direction else layout.forward
            padded, last = _run_direction(
                kind,
                layout.pad(data, places),
                [state[run : run + 1] for state in states],
                weights[run * per_run : (run + 1) * per_run],
                layout,
                bias=bias,
            )
            outputs.append(layout.pack(padded, places))
            for final, state in zip(finals, last, strict=True):
                final.append(state)
        data = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and training and layer < num_layers - 1:
            data = nn.functional.dropout(data, dropout)
    return data, *(torch.cat(final) for final in finals)


def _run_direction(
    kind: str, padded: Tensor, states: list[Tensor], weights: Sequence[Tensor], layout: _Layout, *, bias: bool
) -> tuple[Tensor, list[Tensor]]:
    rows = _HOLDING_ROWS.get(kind)
    w_ih = weights[0]
    if rows is not None:
        column = w_ih.new_tensor(rows).repeat_interleave(w_ih.shape[0] // len(rows))[:, None]
        w_ih = torch.cat([w_ih, column], 1)
        padded = torch.cat([padded, layout.padding[..., None].to(padded.dtype)], 2)
    hx = states if kind == "lstm" else states[0]
    outputs, *last = _KERNELS[kind](padded, hx, [w_ih, *weights[1:]], bias, 1, 0.0, False, False, False)
    if kind != "gru":  # an LSTM's output gate and a plain RNN's state run on in the padding
        last[0] = layout.pack(outputs, layout.ends)[None]
    return outputs, last


class RunPackedPadded(TorchFunctionMode):
    """While active, packed CPU calls of ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` run padded.

    Acts on the call that reaches the kernel, so that subclasses that pack inside gain as well. A batch whose lengths
    fill less than a fifth of the padded grid, a half-precision or a CUDA one goes to the packed kernel as it is.

    Attributes:
        replaced: Number of calls that ran padded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.replaced = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace a packed kernel call, pass everything else on."""
        kind = getattr(func, "__name__", "")
        if kind not in _KERNELS or func is not _KERNELS[kind] or not _pays(args):
            return func(*args, **(kwargs or {}))
        data, batch_sizes, hx, weights, bias, num_layers, dropout, training, bidirectional = args
        self.replaced += 1
        return run_padded(
            kind,
            data,
            batch_sizes,
            hx if kind == "lstm" else (hx,),
            weights,
            bias=bias,
            num_layers=num_layers,
            dropout=dropout,
            training=training,
            bidirectional=bidirectional,
        )


def _pays(args: tuple[Any, ...]) -> bool:
    """Tell a packed call worth padding: the unpacked overload has other arguments."""
    if len(args) != _PACKED_ARGUMENTS or not isinstance(args[1], Tensor) or not isinstance(args[3], (list, tuple)):
        return False
    data, batch_sizes = args[0], args[1]
    if (
        data.device.type != "cpu"
        or data.dtype not in (torch.float32, torch.float64)
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    return len(data) >= _PADDED_FILL * len(batch_sizes) * int(batch_sizes[0])
