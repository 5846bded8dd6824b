"""``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` on packed sequences, run by the kernels for padded ones.

The packed CPU kernels narrow the batch at every step and are several times slower than those for padded sequences.
Those run here instead, on one of the layouts of `lightning_accel.recurrent.packed.layouts`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_accel.recurrent.packed.layouts import KERNELS, PaddedGrid, Stretches, best_layout

_PACKED_ARGUMENTS = 9


def run_padded(
    kind: str,
    data: Tensor,
    layout: PaddedGrid | Stretches,
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
        layout: Of the packed data.
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
    directions = 2 if bidirectional else 1
    per_run = len(weights) // (num_layers * directions)
    finals: list[list[Tensor]] = [[] for _ in states]
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            run = layer * directions + direction
            output, last = layout.run(
                kind,
                data,
                [state[run : run + 1] for state in states],
                weights[run * per_run : (run + 1) * per_run],
                bias=bias,
                reverse=direction == 1,
            )
            outputs.append(output)
            for final, state in zip(finals, last, strict=True):
                final.append(state)
        data = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and training and layer < num_layers - 1:
            data = nn.functional.dropout(data, dropout)
    return data, *(torch.cat(final) for final in finals)


class RunPackedPadded(TorchFunctionMode):
    """While active, packed CPU calls of ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` run padded.

    Acts on the call that reaches the kernel, so that subclasses that pack inside gain as well. A batch of many lengths
    that fill less than a fifth of the padded grid, a half-precision or a CUDA one goes to the packed kernel as it is.

    Attributes:
        replaced: Number of calls that ran padded.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> from lightning_accel.recurrent import RunPackedPadded
        >>> lstm = nn.LSTM(4, 8)
        >>> with RunPackedPadded():
        ...     packed, _ = lstm(pack_sequence([torch.randn(5, 4), torch.randn(3, 4)]))
        >>> packed.data.shape
        torch.Size([8, 8])
    """

    def __init__(self) -> None:
        super().__init__()
        self.replaced = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace a packed kernel call, pass everything else on."""
        kind = getattr(func, "__name__", "")
        layout = _layout(args) if kind in KERNELS and func is KERNELS[kind] else None
        if layout is None:
            return func(*args, **(kwargs or {}))
        data, _, hx, weights, bias, num_layers, dropout, training, bidirectional = args
        self.replaced += 1
        return run_padded(
            kind,
            data,
            layout,
            hx if kind == "lstm" else (hx,),
            weights,
            bias=bias,
            num_layers=num_layers,
            dropout=dropout,
            training=training,
            bidirectional=bidirectional,
        )


def packed_refusal(device: str, dtype: torch.dtype, *, autocast: bool) -> str | None:
    """Return why packed calls on a type of device go to torch's packed kernel; ``None`` if they may run padded."""
    if device != "cpu":
        return f"the packed kernel of {device} takes one call for all steps, and reads no padding"
    if dtype not in (torch.float32, torch.float64):
        return f"padded forms are for float32 and float64, not {dtype}"
    return "autocast is on" if autocast else None


def _layout(args: tuple[Any, ...]) -> PaddedGrid | Stretches | None:
    """Return how a packed call runs best, ``None`` as it is: the unpacked overload has other arguments."""
    if len(args) != _PACKED_ARGUMENTS or not isinstance(args[1], Tensor) or not isinstance(args[3], (list, tuple)):
        return None
    data, batch_sizes, weights = args[0], args[1], args[3]
    if packed_refusal(data.device.type, data.dtype, autocast=torch.is_autocast_enabled("cpu")) is not None:
        return None
    layout = best_layout(batch_sizes, weights[0].numel() + weights[1].numel())
    return None if layout is None else layout(batch_sizes, data.device)
