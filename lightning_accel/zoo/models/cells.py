"""Recurrent cells, one step each: ``cell(x_t, state) -> (y_t, state)``; ``state=None`` starts from zeros."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_accel.zoo.arguments import check_integers

LSTMState = tuple[Tensor, Tensor]


def uniform_parameter(bound: float, *shape: int) -> nn.Parameter:
    """Return a parameter of ``shape`` drawn uniformly from ``[-bound, bound)``."""
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


class PeepholeLSTMCell(nn.Module):
    """Advance an LSTM whose gates also see the memory, by one step.

    With ``i, f`` from ``W x + U h + b`` and ``p_i * c``, ``p_f * c``: ``c' = f * c + i * tanh(g)``, and the output gate
    sees the new memory: ``h' = sigmoid(o + p_o * c') * tanh(c')``.

    Args:
        input_size: Features of ``x_t``.
        hidden_size: Features of ``h`` and ``c``.

    References:
        Gers, Schraudolph, Schmidhuber, JMLR 3 (2002): Learning Precise Timing with LSTM Recurrent Networks.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        check_integers(1, input_size=input_size, hidden_size=hidden_size)
        self.input_size = input_size
        self.hidden_size = hidden_size
        bound = 1 / math.sqrt(hidden_size)
        self.weight_ih = uniform_parameter(bound, 4 * hidden_size, input_size)
        self.weight_hh = uniform_parameter(bound, 4 * hidden_size, hidden_size)
        self.bias = uniform_parameter(bound, 4 * hidden_size)
        self.peephole_i = uniform_parameter(bound, hidden_size)
        self.peephole_f = uniform_parameter(bound, hidden_size)
        self.peephole_o = uniform_parameter(bound, hidden_size)

    def forward(self, x: Tensor, state: LSTMState | None = None) -> tuple[Tensor, LSTMState]:
        """Map ``x`` (batch, input_size) and ``(h, c)``, each (batch, hidden_size), to ``h'`` and ``(h', c')``."""
        if state is None:
            zeros = x.new_zeros(len(x), self.hidden_size)
            state = (zeros, zeros)
        h, c = state
        gates = functional.linear(x, self.weight_ih, self.bias) + functional.linear(h, self.weight_hh)
        i, f, g, o = gates.chunk(4, dim=-1)
        i = torch.sigmoid(i + self.peephole_i * c)
        f = torch.sigmoid(f + self.peephole_f * c)
        c = f * c + i * torch.tanh(g)
        h = torch.sigmoid(o + self.peephole_o * c) * torch.tanh(c)
        return h, (h, c)


class LayerNormLSTMCell(nn.Module):
    """Advance an LSTM with LayerNorm on both products and on the memory's way out, by one step.

    Args:
        input_size: Features of ``x_t``.
        hidden_size: Features of ``h`` and ``c``.

    References:
        Ba, Kiros, Hinton, arXiv:1607.06450, supplementary material, equations 20-22.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        check_integers(1, input_size=input_size, hidden_size=hidden_size)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.input_map = nn.Linear(input_size, 4 * hidden_size, bias=False)
        self.hidden_map = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.norm_input = nn.LayerNorm(4 * hidden_size)
        self.norm_hidden = nn.LayerNorm(4 * hidden_size)
        self.norm_memory = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor, state: LSTMState | None = None) -> tuple[Tensor, LSTMState]:
        """Map ``x`` (batch, input_size) and ``(h, c)``, each (batch, hidden_size), to ``h'`` and ``(h', c')``."""
        if state is None:
            zeros = x.new_zeros(len(x), self.hidden_size)
            state = (zeros, zeros)
        h, c = state
        gates = self.norm_input(self.input_map(x)) + self.norm_hidden(self.hidden_map(h))
        i, f, g, o = gates.chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(self.norm_memory(c))
        return h, (h, c)


class MinGRUCell(nn.Module):
    """Advance a minimal GRU by one step: ``z = sigmoid(W_z x + b_z)``, ``h' = (1 - z) * h + z * (W_h x + b_h)``.

    Affine and elementwise in the state, so a parallel scan can run it.

    Args:
        input_size: Features of ``x_t``.
        hidden_size: Features of ``h``.

    References:
        Feng, Tung, Ahmed, Bengio, Hajimirsadeghi, arXiv:2410.01201, section 3.1.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        check_integers(1, input_size=input_size, hidden_size=hidden_size)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.gate = nn.Linear(input_size, hidden_size)
        self.candidate = nn.Linear(input_size, hidden_size)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``x`` (batch, input_size) and ``h`` (batch, hidden_size) to ``h'`` twice: as output and as state."""
        h = x.new_zeros(len(x), self.hidden_size) if state is None else state
        z = torch.sigmoid(self.gate(x))
        h = (1 - z) * h + z * self.candidate(x)
        return h, h
