"""Stacked recurrent layers with a cell of choice, as a reader would write them."""

from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from lightning_accel.zoo.arguments import check_choice, check_integers
from lightning_accel.zoo.models.cells import LayerNormLSTMCell, MinGRUCell, PeepholeLSTMCell

CellName = Literal["lstm", "lstm_cell", "peephole", "layer_norm", "min_gru"]

_CELLS: dict[str, type[nn.Module]] = {
    "lstm_cell": nn.LSTMCell,
    "peephole": PeepholeLSTMCell,
    "layer_norm": LayerNormLSTMCell,
    "min_gru": MinGRUCell,
}


def unroll(cell: nn.Module, x: Tensor) -> Tensor:
    """Return the outputs (time, batch, hidden) of ``cell`` over ``x`` (time, batch, features), from a zero state."""
    outputs, state = [], None
    for x_t in x.unbind(0):
        if isinstance(cell, nn.LSTMCell):
            state = cell(x_t, state)
            y_t = state[0]
        else:
            y_t, state = cell(x_t, state)
        outputs.append(y_t)
    return torch.stack(outputs)


class RecurrentLayers(nn.Module):
    """Run ``layers`` recurrent layers over a sequence, each over the whole output of the one below.

    Args:
        cell: ``"lstm"`` is ``nn.LSTM``; the others are Python loops over ``nn.LSTMCell`` or a cell of
            `lightning_accel.zoo.models.cells`.
        input_size: Features of the input.
        hidden_size: Features of every layer's output.
        layers: Number of layers.

    Raises:
        ValueError: If ``cell`` is unknown or a size is below 1.
    """

    def __init__(self, cell: CellName, input_size: int, hidden_size: int, layers: int) -> None:
        super().__init__()
        check_choice("cell", cell, get_args(CellName))
        check_integers(1, input_size=input_size, hidden_size=hidden_size, layers=layers)
        if cell == "lstm":
            self.stack: nn.Module = nn.LSTM(input_size, hidden_size, layers)
        else:
            sizes = [input_size] + [hidden_size] * (layers - 1)
            self.stack = nn.ModuleList(_CELLS[cell](size, hidden_size) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (time, batch, input_size) to (time, batch, hidden_size)."""
        if isinstance(self.stack, nn.LSTM):
            return cast(Tensor, self.stack(x)[0])
        for cell in cast(nn.ModuleList, self.stack):
            x = unroll(cell, x)
        return x
