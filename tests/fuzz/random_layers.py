"""Random tiny layers, for `random_modules`: ``(batch, WIDTH)`` in and out, by every way to hold and call one."""

import copy

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

WIDTH = 8


class OwnLinear(nn.Linear):
    """A subclass that scales."""

    def forward(self, x):
        return 0.9 * super().forward(x)


class Residual(nn.Module):
    """A branch whose last layer starts at zero, or not."""

    def __init__(self, draw, hidden):
        super().__init__()
        self.norm = draw.choice((nn.Identity(), nn.LayerNorm(WIDTH)))
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        if draw.random() < 0.5:
            nn.init.zeros_(self.down.weight)
            nn.init.zeros_(self.down.bias)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Convolution(nn.Module):
    """Sees the features as a signal or an image, with or without a norm, zero at the end or not."""

    def __init__(self, draw, hidden):
        super().__init__()
        self.flat = draw.random() < 0.5
        kind = nn.Conv1d if self.flat else nn.Conv2d
        size = draw.choice((1, 3))
        self.first = kind(1 if self.flat else 2, hidden, size, padding=size // 2)
        norms = (
            nn.Identity(),
            nn.BatchNorm1d(hidden) if self.flat else nn.BatchNorm2d(hidden),
            nn.GroupNorm(1, hidden),
        )
        self.norm = draw.choice(norms)
        self.last = kind(hidden, 1 if self.flat else 2, 3, padding=1, padding_mode=draw.choice(("zeros", "circular")))
        if draw.random() < 0.3:
            nn.init.zeros_(self.last.weight)

    def forward(self, x):
        shape = (-1, 1, WIDTH) if self.flat else (-1, 2, 2, WIDTH // 4)
        return x + self.last(F.gelu(self.norm(self.first(x.view(shape))))).reshape(x.shape)


class Attention(nn.Module):
    """Layers that torch's fast paths read."""

    def __init__(self, draw):
        super().__init__()
        if draw.random() < 0.5:
            self.inner = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        else:
            self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        tokens = x.view(-1, 2, 4)
        if isinstance(self.inner, nn.MultiheadAttention):
            return x + self.inner(tokens, tokens, tokens)[0].reshape(x.shape)
        return self.inner(tokens).reshape(x.shape)


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, draw, hidden):
        super().__init__()
        self.cell = draw.choice((nn.GRU, nn.LSTM, nn.RNN))(2, hidden, batch_first=True)
        self.out = nn.Linear(hidden, WIDTH)

    def forward(self, x):
        return self.out(self.cell(x.view(-1, 4, 2))[0][:, -1])


class Adapted(nn.Module):
    """A frozen layer with an adapter beside it."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, WIDTH)), nn.Parameter(torch.zeros(WIDTH, 2))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


class Tied(nn.Module):
    """A weight under two names, a module under two names, or a weight used forth and back."""

    def __init__(self, draw):
        super().__init__()
        self.kind = draw.choice(("weight", "module", "transposed"))
        self.one = nn.Linear(WIDTH, WIDTH)
        self.two = self.one if self.kind == "module" else nn.Linear(WIDTH, WIDTH)
        if self.kind == "weight":
            self.two.weight = self.one.weight

    def forward(self, x):
        x = torch.tanh(self.one(x))
        return F.linear(x, self.one.weight.T) + self.two(x) if self.kind == "transposed" else self.two(x)


class Often(nn.Module):
    """One layer several times, sometimes skipped, or through a checkpoint."""

    def __init__(self, draw):
        super().__init__()
        self.layer, self.kind = nn.Linear(WIDTH, WIDTH), draw.choice(("twice", "skipped", "checkpoint"))

    def forward(self, x):
        if self.kind == "twice":
            return self.layer(torch.relu(self.layer(x)))
        if self.kind == "checkpoint":
            return checkpoint(self.layer, x, use_reentrant=False)
        return x if self.training and float(torch.rand(())) < 0.3 else x + self.layer(x)


class OtherWay(nn.Module):
    """Two layers that are reached past their names."""

    def __init__(self, draw):
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.kind = draw.choice(("list", "dict", "closure", "method", "weight", "weights", "functional", "forward"))
        layers, two = [self.one, self.two], self.two
        if self.kind in ("list", "dict"):
            self.held = layers if self.kind == "list" else dict(enumerate(layers))
        elif self.kind == "closure":
            self.held = lambda x: two(x)
        elif self.kind == "method":
            self.held = self.two.forward
        elif self.kind == "weights":
            self.held = [layer.weight for layer in layers]
        elif self.kind == "forward":
            plain = self.two.forward
            self.two.forward = lambda x: 0.5 * plain(x)

    def __deepcopy__(self, memo):
        if self.kind in ("closure", "method", "forward"):
            raise TypeError("this module can not be copied: it would run the original's layers")
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return new

    def forward(self, x):
        if self.kind in ("list", "dict"):
            return self.held[1](torch.relu(self.held[0](x)))
        h = torch.relu(self.one(x))
        if self.kind in ("closure", "method"):
            return self.held(h)
        if self.kind == "weights":
            return F.linear(torch.relu(F.linear(x, self.held[0])), self.held[1])
        if self.kind == "functional":
            return F.linear(h, self.two.weight, self.two.bias)
        return self.two(h) if self.kind == "forward" else self.two(h) + 0.1 * self.two.weight.mean()


def reparametrized(draw):
    """A layer whose weight is computed, or pruned."""
    layer, kind = nn.Linear(WIDTH, WIDTH), draw.randrange(4)
    if kind == 0:
        return parametrizations.weight_norm(layer)
    if kind == 1:
        return parametrizations.spectral_norm(layer)
    if kind == 2:
        return prune.random_unstructured(layer, "weight", amount=0.3)
    return nn.Sequential(layer, nn.Linear(WIDTH, WIDTH).requires_grad_(False))


def hooked(draw):
    """A layer with a hook: on gradients, on itself, forth or back."""
    layer = nn.Linear(WIDTH, WIDTH)
    kind = draw.randrange(5)
    if kind == 0:
        layer.weight.register_hook(lambda grad: 0.5 * grad)
    elif kind == 1:
        layer.weight.register_post_accumulate_grad_hook(_halve)
    elif kind == 2:
        layer.register_forward_hook(_scale_output)
    elif kind == 3:
        layer.register_forward_pre_hook(_scale_input)
    else:
        layer.register_full_backward_hook(_scale_gradient)
    return layer


def _halve(parameter):
    parameter.grad.mul_(0.5)


def _scale_output(_, __, output):
    return 0.9 * output


def _scale_input(_, args):
    return (0.9 * args[0],)


def _scale_gradient(_, grad_input, __):
    return tuple(None if grad is None else 0.9 * grad for grad in grad_input)


def random_block(draw):
    """Return a random module of ``(batch, WIDTH)``."""
    hidden = draw.choice((6, 8, 12))
    makers = (
        lambda: nn.Linear(WIDTH, WIDTH, bias=draw.random() < 0.7),
        lambda: nn.Sequential(nn.Linear(WIDTH, hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, WIDTH)),
        lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ELU()),
        lambda: Residual(draw, hidden),
        lambda: Convolution(draw, draw.choice((4, 6))),
        lambda: Attention(draw),
        lambda: Recurrent(draw, hidden),
        Adapted,
        lambda: Tied(draw),
        lambda: Often(draw),
        lambda: OtherWay(draw),
        lambda: reparametrized(draw),
        lambda: hooked(draw),
        lambda: OwnLinear(WIDTH, WIDTH),
    )
    return draw.choice(makers)()
