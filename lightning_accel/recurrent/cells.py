"""Recurrent cells beyond torch's: one step each, ``cell(x_t, state) -> (y_t, state)``, written plainly.

None of them knows about schedules; `Recurrent` makes them fast. Shapes: x_t (B, I), states (B, H).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

States = tuple[Tensor, ...]


class _Cell(nn.Module):
    """What the cells share: sizes, a uniform start and zero states."""

    num_states = 2

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        if input_size < 1 or hidden_size < 1:
            raise ValueError(f"`input_size` and `hidden_size` must be >= 1, got {input_size} and {hidden_size}.")
        self.input_size, self.hidden_size = input_size, hidden_size

    def initial_state(self, x: Tensor) -> States:
        """Return zero states for one step's input ``x`` of shape (B, I)."""
        return tuple(x.new_zeros(x.shape[0], self.hidden_size) for _ in range(self.num_states))

    def _uniform(self, *shape: int) -> nn.Parameter:
        bound = 1.0 / math.sqrt(self.hidden_size)
        return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}"


class PeepholeLSTMCell(_Cell):
    """LSTM whose gates see the cell state through one weight a unit.

    References:
        Gers, Schraudolph, Schmidhuber, "Learning precise timing with LSTM recurrent networks", 2002.

    Example:
        >>> import torch
        >>> from lightning_accel.recurrent import PeepholeLSTMCell, Recurrent
        >>> y, _ = Recurrent(PeepholeLSTMCell(4, 8))(torch.randn(10, 2, 4))
        >>> y.shape[:2]
        torch.Size([10, 2])
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.weight_ih = self._uniform(4 * hidden_size, input_size)
        self.weight_hh = self._uniform(4 * hidden_size, hidden_size)
        self.bias = self._uniform(4 * hidden_size)
        self.peephole_input = self._uniform(hidden_size)
        self.peephole_forget = self._uniform(hidden_size)
        self.peephole_output = self._uniform(hidden_size)

    def forward(self, x: Tensor, state: States) -> tuple[Tensor, States]:
        """Make one step."""
        h, c = state
        gates = linear(x, self.weight_ih, self.bias) + linear(h, self.weight_hh)
        i, f, g, o = gates.chunk(4, -1)
        i = torch.sigmoid(i + self.peephole_input * c)
        f = torch.sigmoid(f + self.peephole_forget * c)
        c = f * c + i * torch.tanh(g)
        h = torch.sigmoid(o + self.peephole_output * c) * torch.tanh(c)
        return h, (h, c)


class LayerNormLSTMCell(_Cell):
    """LSTM with layer normalization of the input's part, the recurrent part and the cell state.

    References:
        Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.

    Example:
        >>> import torch
        >>> from lightning_accel.recurrent import LayerNormLSTMCell, Recurrent
        >>> y, _ = Recurrent(LayerNormLSTMCell(4, 8))(torch.randn(10, 2, 4))
        >>> y.shape[:2]
        torch.Size([10, 2])
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.weight_ih = self._uniform(4 * hidden_size, input_size)
        self.weight_hh = self._uniform(4 * hidden_size, hidden_size)
        self.norm_ih = nn.LayerNorm(4 * hidden_size)
        self.norm_hh = nn.LayerNorm(4 * hidden_size)
        self.norm_c = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor, state: States) -> tuple[Tensor, States]:
        """Make one step."""
        h, c = state
        gates = self.norm_ih(linear(x, self.weight_ih)) + self.norm_hh(linear(h, self.weight_hh))
        i, f, g, o = gates.chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(self.norm_c(c))
        return h, (h, c)


class CoupledGateLSTMCell(_Cell):
    """LSTM whose forget gate is one minus its input gate.

    References:
        Greff et al., "LSTM: A Search Space Odyssey", arXiv:1503.04069 (variant CIFG).

    Example:
        >>> import torch
        >>> from lightning_accel.recurrent import CoupledGateLSTMCell, Recurrent
        >>> y, _ = Recurrent(CoupledGateLSTMCell(4, 8))(torch.randn(10, 2, 4))
        >>> y.shape[:2]
        torch.Size([10, 2])
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.input = nn.Linear(input_size, 3 * hidden_size)
        self.recurrent = nn.Linear(hidden_size, 3 * hidden_size, bias=False)

    def forward(self, x: Tensor, state: States) -> tuple[Tensor, States]:
        """Make one step."""
        h, c = state
        i, g, o = (self.input(x) + self.recurrent(h)).chunk(3, -1)
        i = torch.sigmoid(i)
        c = (1 - i) * c + i * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, (h, c)


class ZoneoutLSTMCell(_Cell):
    """LSTM that keeps single units of its states, by masks given with the input.

    The input is a pair ``(x_t, keep_t)``: ``keep_t`` of shape (B, 2 H) holds ones where a unit of (h, c) stays.

    References:
        Krueger et al., "Zoneout", arXiv:1606.01305. *Deviations*: the masks are drawn outside the cell.

    Example:
        >>> import torch
        >>> from lightning_accel.recurrent import Recurrent, ZoneoutLSTMCell
        >>> keep = torch.bernoulli(torch.full((10, 2, 16), 0.1))
        >>> y, _ = Recurrent(ZoneoutLSTMCell(4, 8))((torch.randn(10, 2, 4), keep))
        >>> y.shape
        torch.Size([10, 2, 8])
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.cell = nn.LSTMCell(input_size, hidden_size)

    def initial_state(self, x: Tensor | tuple[Tensor, Tensor]) -> States:
        """Return zero states for one step's input, with its masks or without."""
        return super().initial_state(x[0] if isinstance(x, tuple) else x)

    def forward(self, inputs: tuple[Tensor, Tensor], state: States) -> tuple[Tensor, States]:
        """Make one step."""
        x, keep = inputs
        h, c = state
        new_h, new_c = self.cell(x, (h, c))
        keep_h, keep_c = keep.chunk(2, -1)
        h = keep_h * h + (1 - keep_h) * new_h
        c = keep_c * c + (1 - keep_c) * new_c
        return h, (h, c)


class FeedbackLSTMCell(_Cell):
    """Two LSTM layers; the lower one also sees the upper one's previous output.

    Example:
        >>> import torch
        >>> from lightning_accel.recurrent import FeedbackLSTMCell, Recurrent
        >>> y, _ = Recurrent(FeedbackLSTMCell(4, 8))(torch.randn(10, 2, 4))
        >>> y.shape[:2]
        torch.Size([10, 2])
    """

    num_states = 4

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.lower = nn.LSTMCell(input_size + hidden_size, hidden_size)
        self.upper = nn.LSTMCell(hidden_size, hidden_size)

    def forward(self, x: Tensor, state: States) -> tuple[Tensor, States]:
        """Make one step."""
        h1, c1, h2, c2 = state
        h1, c1 = self.lower(torch.cat([x, h2], -1), (h1, c1))
        h2, c2 = self.upper(h1, (h2, c2))
        return h2, (h1, c1, h2, c2)


class OutputGRUCell(_Cell):
    """GRU followed by an output layer, which lies outside the loop although it is written inside the step.

    Example:
        >>> import torch
        >>> from lightning_accel.recurrent import OutputGRUCell, Recurrent
        >>> y, _ = Recurrent(OutputGRUCell(4, 8))(torch.randn(10, 2, 4))
        >>> y.shape[:2]
        torch.Size([10, 2])
    """

    num_states = 1

    def __init__(self, input_size: int, hidden_size: int, output_size: int | None = None) -> None:
        super().__init__(input_size, hidden_size)
        self.cell = nn.GRUCell(input_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size if output_size is None else output_size)

    def forward(self, x: Tensor, state: States) -> tuple[Tensor, States]:
        """Make one step."""
        h = self.cell(x, state[0])
        return torch.relu(self.output(h)), (h,)


class MinGRUCell(_Cell):
    """GRU whose gates do not see the state: elementwise and affine in it, so that a scan computes it.

    References:
        Feng et al., "Were RNNs All We Needed?", arXiv:2410.01201.

    Example:
        >>> import torch
        >>> from lightning_accel.recurrent import MinGRUCell, Recurrent
        >>> y, _ = Recurrent(MinGRUCell(4, 8))(torch.randn(10, 2, 4))
        >>> y.shape[:2]
        torch.Size([10, 2])
    """

    num_states = 1

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.gate = nn.Linear(input_size, hidden_size)
        self.candidate = nn.Linear(input_size, hidden_size)

    def forward(self, x: Tensor, state: States) -> tuple[Tensor, States]:
        """Make one step."""
        z = torch.sigmoid(self.gate(x))
        h = (1 - z) * state[0] + z * self.candidate(x)
        return h, (h,)
