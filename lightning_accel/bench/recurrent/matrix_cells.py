"""Cells whose states are matrices, as papers describe them: for the recurrent rows."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize, softplus


class DiagonalStateSpace(nn.Module):
    """A state of shape (B, D, N) that decays by input-dependent rates and is written and read along N, as in Mamba."""

    def __init__(self, size: int, state_size: int = 16) -> None:
        super().__init__()
        self.rate, self.write = nn.Linear(size, size), nn.Linear(size, state_size)
        self.read, self.decay = nn.Linear(size, state_size), nn.Parameter(torch.rand(size, state_size))

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Make one step of x, (B, D)."""
        rate = softplus(self.rate(x))
        keep = torch.exp(-rate[:, :, None] * self.decay)
        state = keep * state + (rate * x)[:, :, None] * self.write(x)[:, None, :]
        return (state * self.read(x)[:, None, :]).sum(-1) + x, state


class DeltaRule(nn.Module):
    """A matrix (B, K, V) whose value for a key is moved towards a new one, as in DeltaNet."""

    def __init__(self, size: int, heads: int = 32) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(size, heads) for _ in range(3))
        self.rate = nn.Linear(size, 1)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Make one step of x, (B, D)."""
        key = normalize(self.key(x), dim=-1)
        known = torch.einsum("bkv,bk->bv", state, key)
        state = state + torch.einsum("bk,bv->bkv", key, torch.sigmoid(self.rate(x)) * (self.value(x) - known))
        return torch.einsum("bkv,bk->bv", state, self.query(x)), state


class MatrixLSTM(nn.Module):
    """An LSTM whose memory is a matrix (B, V, K), with a normalizer (B, K) and a stabilizer (B, 1), as in xLSTM."""

    def __init__(self, size: int, heads: int = 32) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(size, heads) for _ in range(4))
        self.gates = nn.Linear(size, 2)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Make one step of x, (B, D)."""
        memory, norm, top = state
        query, key = self.query(x), self.key(x) * self.key.out_features**-0.5
        enter, keep = self.gates(x).chunk(2, -1)
        keep = logsigmoid(keep) + top
        top = torch.maximum(keep, enter)
        enter, keep = torch.exp(enter - top), torch.exp(keep - top)
        memory = keep[:, :, None] * memory + (enter * self.value(x))[:, :, None] * key[:, None, :]
        norm = keep * norm + enter * key
        read = torch.bmm(memory, query[:, :, None])[:, :, 0]
        scale = (norm * query).sum(-1, keepdim=True).abs().clamp_min(1.0)
        return torch.sigmoid(self.out(x)) * read / scale, (memory, norm, top)


class AttentionMemory(nn.Module):
    """Slots (B, S, K) that are read by attention and written by gates, and a hidden state (B, K)."""

    def __init__(self, size: int, slots: int = 8, width: int = 32) -> None:
        super().__init__()
        self.query, self.new, self.out = (nn.Linear(size + width, width) for _ in range(3))
        self.gate = nn.Linear(size + width, slots)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Make one step of x, (B, D)."""
        slots, hidden = state
        seen = torch.cat([x, hidden], -1)
        scores = (slots @ self.query(seen)[:, :, None])[:, :, 0] * self.query.out_features**-0.5
        read = (torch.softmax(scores, -1)[:, None, :] @ slots)[:, 0]
        hidden = torch.tanh(self.out(torch.cat([x, read], -1)))
        gate = torch.sigmoid(self.gate(seen))[:, :, None]
        return hidden, ((1 - gate) * slots + gate * torch.tanh(self.new(seen))[:, None, :], hidden)


def matrix_states(cell: nn.Module, size: int, batch: int, device: str = "cpu") -> Any:
    """Return the states that a cell with matrix-valued ones begins with."""
    made = {
        DiagonalStateSpace: lambda: torch.zeros(batch, size, 16, device=device),
        DeltaRule: lambda: torch.zeros(batch, 32, 32, device=device),
        MatrixLSTM: lambda: tuple(torch.zeros(batch, *s, device=device) for s in ((32, 32), (32,), (1,))),
        AttentionMemory: lambda: (torch.randn(batch, 8, 32, device=device), torch.zeros(batch, 32, device=device)),
    }
    return made[type(cell)]()
