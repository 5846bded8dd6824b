"""Random models with groups of zeros, for `shrink`: it must make them smaller or leave them, and never wrong.

``python tests/fuzz/shrink_models.py 500`` draws 500 of them and prints what it found.
"""

import math
import random
import sys
import traceback

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_accel.projection.shrink import shrink

ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.ReLU6, nn.Softplus, nn.Identity, nn.LeakyReLU)


class Block(nn.Module):
    """A block of tokens ``(batch, time, width)``; ``out`` is its width."""

    def __init__(self, draw, width):
        super().__init__()
        self.width, self.out = width, width
        self.act = draw.choice(ACTIVATIONS)()
        self.build(draw, width)

    def linear(self, draw, a, b):
        return nn.Linear(a, b, bias=draw.random() < 0.7)


class Plain(Block):
    def build(self, draw, width):
        self.out = draw.choice((4, 6, 8, 12))
        self.layer = self.linear(draw, width, self.out)

    def forward(self, x, given):
        return self.act(self.layer(x))


class Residual(Block):
    def build(self, draw, width):
        hidden = draw.choice((6, 8, width))
        self.norm = draw.choice((nn.Identity, nn.LayerNorm))(width)
        self.up, self.down = self.linear(draw, width, hidden), self.linear(draw, hidden, width)

    def forward(self, x, given):
        return x + self.down(self.act(self.up(self.norm(x))))


class Gate(Block):
    """GLU in its many ways of writing."""

    def build(self, draw, width):
        self.hidden = draw.choice((4, 6, 8))
        self.up, self.down = self.linear(draw, width, 2 * self.hidden), self.linear(draw, self.hidden, width)
        self.gate = self.linear(draw, width, self.hidden)
        self.kind = draw.randrange(6)

    def forward(self, x, given):
        h = self.up(x)
        if self.kind == 0:
            h = F.glu(h, -1)
        elif self.kind == 1:
            a, b = h.chunk(2, -1)
            h = a * self.act(b)
        elif self.kind == 2:
            h = h[..., : self.hidden] * h[..., self.hidden :].sigmoid()
        elif self.kind == 3:
            h = F.silu(self.gate(x)) * h[..., ::2]
        elif self.kind == 4:
            a, b = h.unflatten(-1, (2, self.hidden)).unbind(-2)
            h = a * b
        else:
            a, b = h.split((self.hidden, self.hidden), -1)
            h = a + self.act(b)
        return self.down(h)


class SwiGLU(Block):
    def build(self, draw, width):
        hidden = draw.choice((6, 10))
        self.gate, self.up = self.linear(draw, width, hidden), self.linear(draw, width, hidden)
        self.down = self.linear(draw, hidden, width)

    def forward(self, x, given):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Masked(Block):
    def build(self, draw, width):
        self.kind = draw.randrange(5)
        self.up, self.down = self.linear(draw, width, 8), self.linear(draw, 8, width)

    def forward(self, x, given):
        h, mask = self.act(self.up(x)), given["mask"].unsqueeze(-1)
        if self.kind == 0:
            h = h * mask.to(h.dtype)
        elif self.kind == 1:
            h = h.masked_fill(~mask, 0.5)
        elif self.kind == 2:
            h = torch.where(mask, h, -h)
        elif self.kind == 3:
            h = h + given["bias"].unsqueeze(-1)
        else:
            h = h * (torch.arange(h.shape[1]) < given["lengths"].unsqueeze(1)).unsqueeze(-1)
        return self.down(h)


class Attention(Block):
    def build(self, draw, width):
        self.qkv, self.proj = self.linear(draw, width, 3 * 8), self.linear(draw, 8, width)
        self.kind = draw.randrange(3)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x, given):
        if self.kind == 0:
            return x + self.attention(x, x, x, key_padding_mask=~given["mask"])[0]
        batch, time, _ = x.shape
        h = self.qkv(x)
        if self.kind == 1:
            q, k, v = h.view(batch, time, 3, 2, 4).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (part.view(batch, -1, 2, 4).transpose(1, 2) for part in h.chunk(3, -1))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, time, 8)
        return x + self.proj(h)


class Recurrent(Block):
    def build(self, draw, width):
        self.up = self.linear(draw, width, 6)
        self.cell = draw.choice((nn.LSTM, nn.GRU, nn.RNN))(6, 8, batch_first=True)
        self.down = self.linear(draw, 8, width)

    def forward(self, x, given):
        return self.down(self.cell(self.act(self.up(x)))[0])


class Mixing(Block):
    """Operations that mix or move channels, or count them."""

    def build(self, draw, width):
        self.kind = draw.randrange(14)
        self.up, self.down = self.linear(draw, width, 8), self.linear(draw, 8, width)
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x, given):
        h = self.act(self.up(x))
        ways = (
            lambda: h.softmax(-1),
            lambda: F.layer_norm(h, (8,)),
            lambda: h.flip(-1),
            lambda: h.roll(1, -1),
            lambda: F.normalize(h, dim=-1),
            lambda: h / math.sqrt(h.shape[-1]),
            lambda: h - h.mean(-1, keepdim=True),
            lambda: h.cumsum(1),
            lambda: h.sum(1, keepdim=True).expand(-1, h.shape[1], -1),
            lambda: h.view(*h.shape[:2], 4, 2).transpose(-1, -2).reshape(*h.shape[:2], 8),
            lambda: h * self.scale,
            lambda: h.view(h.shape[0], -1, 2, 4).amax(2, keepdim=True).expand(-1, -1, 2, -1).reshape(*h.shape[:2], 8),
            lambda: h * F.normalize(h.detach(), dim=-1),
            lambda: h if float(x.detach().mean()) > 0 else h.flip(-1),
        )
        return self.down(ways[self.kind]())


class Twice(Block):
    def build(self, draw, width):
        self.kind = draw.randrange(5)
        self.a, self.b = self.linear(draw, width, width), self.linear(draw, width, width)
        if self.kind == 1:
            self.b.weight = self.a.weight
        elif self.kind == 2:
            self.again = self.a
        elif self.kind == 4:
            self.b = weight_norm(self.b)
        self.layers = [self.a, self.b]

    def forward(self, x, given):
        if self.kind == 0:
            return self.a(self.act(self.a(x)))
        if self.kind == 2:
            return self.again(self.act(self.b(x)))
        if self.kind == 3:
            return F.linear(self.act(self.a(x)), self.b.weight)
        return self.layers[1](self.act(self.layers[0](x)))


class Concat(Block):
    def build(self, draw, width):
        self.a, self.b, self.c = (self.linear(draw, i, o) for i, o in ((width, 4), (width, 6), (10, width)))
        self.kind, self.twice = draw.randrange(3), self.linear(draw, 8, width)

    def forward(self, x, given):
        a, b = self.act(self.a(x)), self.b(x)
        if self.kind == 0:
            return self.c(torch.cat([a, b], -1))
        if self.kind == 1:
            return self.twice(torch.cat([a, a.tanh()], -1))
        return self.twice(a.repeat_interleave(2, -1)) + self.c(torch.cat([b, a], -1))


class Ids(Block):
    def build(self, draw, width):
        self.table, self.kind = nn.Embedding(7, width), draw.randrange(3)
        self.up, self.down = self.linear(draw, width, 8), self.linear(draw, 8, width)
        self.small = nn.Embedding(7, 8)

    def forward(self, x, given):
        if self.kind == 0:
            return self.down(self.act(self.up(x + self.table(given["ids"]))))
        if self.kind == 1:
            return self.down(self.act(self.up(x)) + self.small(given["ids"]))
        return self.down(self.act(self.up(x)) * (given["ids"] > 0).unsqueeze(-1))


class Images(Block):
    """Tokens as an image, ``(batch, channels, time, 6)``, convolved."""

    def build(self, draw, width):
        self.kind, c = draw.randrange(9), 8
        padding = draw.choice((0, 1))
        self.rise = nn.Conv2d(1, c, 3, padding=1, bias=draw.random() < 0.7)
        self.norm = draw.choice(
            (nn.Identity(), nn.BatchNorm2d(c), nn.GroupNorm(2, c), nn.InstanceNorm2d(c, affine=True), nn.PReLU(c))
        )
        kinds = (
            lambda: nn.Conv2d(c, 4, 3, padding=padding),
            lambda: nn.Sequential(nn.Conv2d(c, c, 3, padding=padding, groups=c), nn.Conv2d(c, 4, 1)),
            lambda: nn.Sequential(nn.Conv2d(c, c, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(c, 4, 1)),
            lambda: nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(2, 4, 1)),
            lambda: nn.Sequential(nn.ConvTranspose2d(c, 6, 2), nn.ReLU(), nn.Conv2d(6, 4, 1)),
            lambda: nn.Sequential(nn.Conv2d(c, 6, 1), nn.AvgPool2d(2, 1), nn.Conv2d(6, 4, 1)),
            lambda: nn.Sequential(nn.MaxPool2d(2, 1, padding=1), nn.Dropout2d(), nn.Conv2d(c, 4, 1)),
            lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, 4, 2, stride=2)),
            lambda: nn.Sequential(nn.ChannelShuffle(2), nn.Conv2d(c, 4, 1)),
        )
        self.body = kinds[self.kind]()
        self.pool, self.flat = nn.AdaptiveAvgPool2d((2, 1)), nn.Linear(8, width)

    def forward(self, x, given):
        h = self.pool(self.body(self.act(self.norm(self.rise(x.unsqueeze(1))))))
        return x + self.flat(h.flatten(1)).unsqueeze(1)


class Sequences(Block):
    """Convolutions along time, with norms over the batch, squeezed attention, strides and dilations."""

    def build(self, draw, width):
        self.kind = draw.randrange(6)
        norm = draw.choice((nn.Identity(), nn.BatchNorm1d(8), nn.BatchNorm1d(8, affine=False), nn.GroupNorm(4, 8)))
        self.up = nn.Sequential(nn.Conv1d(width, 8, 1, bias=draw.random() < 0.7), norm)
        self.same = nn.Conv1d(8, 8, 3, padding=1, dilation=1, groups=draw.choice((1, 8, 2)))
        self.squeeze, self.rise = self.linear(draw, 8, 3), self.linear(draw, 3, 8)
        self.down, self.wide = nn.Conv1d(8, width, 1), nn.Conv1d(16, width, 1)

    def forward(self, x, given):
        h = self.act(self.up(x.mT))
        if self.kind == 0:
            h = h * self.rise(self.act(self.squeeze(h.mean(-1)))).sigmoid().unsqueeze(-1)
        elif self.kind == 1:
            h = self.act(self.same(h))
        elif self.kind == 2:
            h = h + self.same(h)
        elif self.kind == 3:
            return x + self.wide(torch.cat([h.amax(-1), h.mean(-1)], 1).unsqueeze(-1)).mT
        elif self.kind == 4:
            h = F.pad(h, (1, 0))[..., :-1]
        else:
            h = h.masked_fill(~given["mask"].unsqueeze(1), float("-inf")).amax(-1, keepdim=True)
        return x + self.down(h).mT


class Experts(Block):
    """Tokens go to one of several layers, or to all with weights; some layers may not be called at all."""

    def build(self, draw, width):
        self.gate, self.kind = self.linear(draw, width, 3), draw.randrange(4)
        self.experts = nn.ModuleList(
            nn.Sequential(self.linear(draw, width, 6), nn.GELU(), self.linear(draw, 6, width)) for _ in range(3)
        )
        self.spare = self.linear(draw, 6, width)

    def forward(self, x, given):
        scores = self.gate(x).softmax(-1)
        if self.kind == 0:
            return sum(scores[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        if self.kind == 1:
            chosen, y = scores.argmax(-1), torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                y[chosen == i] = expert(x[chosen == i])
            return y
        if self.kind == 2:
            return self.experts[int(given["ids"].sum()) % 3](x)
        h = self.experts[0][:2](x)
        return self.spare(h) if bool(given["mask"].all()) else self.experts[0][2](h)


class Steps(Block):
    """One layer step after step, its result kept in a list; and channels contracted by letters."""

    def build(self, draw, width):
        self.cell, self.up, self.kind = self.linear(draw, width + 6, 6), self.linear(draw, width, 6), draw.randrange(4)
        self.down, self.table = self.linear(draw, 6, width), nn.Parameter(torch.randn(6, 6))

    def forward(self, x, given):
        h = self.act(self.up(x))
        if self.kind == 0:
            state, states = h[:, 0], []
            for t in range(x.shape[1]):
                state = torch.tanh(self.cell(torch.cat([x[:, t], state], -1)))
                states.append(state)
            h = torch.stack(states, 1)
        elif self.kind == 1:
            h = torch.einsum("btc,cd->btd", h, self.table)
        elif self.kind == 2:
            h = torch.einsum("btc,bsc->bts", h, h).softmax(-1) @ h
        else:
            h = h.sort(1).values - h.flip(1)
        return self.down(h)


BLOCKS = (
    Sequences,
    Experts,
    Steps,
    Plain,
    Residual,
    Gate,
    SwiGLU,
    Masked,
    Attention,
    Recurrent,
    Mixing,
    Twice,
    Concat,
    Ids,
    Images,
)


class Net(nn.Module):
    """Random blocks, a random output, inputs in a random container."""

    def __init__(self, draw):
        super().__init__()
        self.features = draw.choice((5, 8))
        width = draw.choice((4, 8))
        self.stem = nn.Linear(self.features, width)
        blocks = []
        for _ in range(draw.randint(1, 4)):
            blocks.append(draw.choice(BLOCKS)(draw, width))
            width = blocks[-1].out
        self.layer = nn.ModuleList(blocks)  # a name that is an attribute of other classes
        self.dropout, self.head, self.kind = nn.Dropout(0.3), nn.Linear(width, 3), draw.randrange(6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, given):
        self.calls += 1
        x = self.stem(x)
        for block in self.layer:
            x = block(x, given)
        y = self.head(self.dropout(x))
        mask = given["mask"]
        outputs = (
            lambda: y,
            lambda: {"logits": y, "pooled": (y * mask.unsqueeze(-1)).sum(1)},
            lambda: y.masked_fill(~mask.unsqueeze(-1), -math.inf),
            lambda: (y, y.argmax(-1), mask),
            lambda: (y, x),
            lambda: y[torch.arange(len(y)), given["lengths"] - 1],
        )
        return outputs[self.kind]()


def inputs_for(net, generator, *, full=False, scale=1.0, batch=3, time=5):
    """Draw inputs: full masks, as in an example that someone takes, or any."""
    x = scale * torch.randn(batch, time, net.features, generator=generator)
    mask = torch.ones(batch, time, dtype=torch.bool)
    lengths = torch.full((batch,), time)
    if not full:
        mask = torch.rand(batch, time, generator=generator) < 0.6
        mask[:, 0] = True
        lengths = torch.randint(1, time + 1, (batch,), generator=generator)
    ids = torch.randint(0, 7, (batch, time), generator=generator)
    bias = torch.zeros(batch, time) if full else torch.rand(batch, time, generator=generator).round()
    return x, {"mask": mask, "lengths": lengths, "ids": ids, "bias": bias}


def make(seed):
    """Return a random model with zero groups, and an example of its inputs."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = Net(draw)
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d) and "weight" in m._parameters]
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
        for layer in layers:
            if draw.random() < 0.7:
                rows = torch.rand(len(layer.weight), generator=generator) < draw.choice((0.3, 0.6, 1.0))
                layer.weight[rows] = 0.0
                if layer.bias is not None and draw.random() < 0.5:
                    layer.bias[rows] = 0.0
            if draw.random() < 0.3:
                layer.weight[:, torch.rand(layer.weight.shape[1], generator=generator) < 0.4] = 0.0
    for parameter in net.parameters():
        parameter.requires_grad_(draw.random() < 0.7)
    for module in net.modules():
        module.training = draw.random() < 0.5
    return net, inputs_for(net, generator, full=draw.random() < 0.7)


def problems(seed):
    """Shrink one model and return what is wrong with the result, and by how much it got smaller."""
    net, example = make(seed)
    names = {name: p.requires_grad for name, p in net.named_parameters()}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = {name: m.training for name, m in net.named_modules()}
    result = shrink(net, example)
    found = [name for name, value in net.state_dict().items() if not torch.equal(value, before[name])]
    found = [f"the original's `{name}` changed" for name in found]
    for name, parameter in result.model.named_parameters():
        leaf = name.rpartition(".")[2]
        if name not in names and leaf != "bias":
            found.append(f"new parameter `{name}`")
        if names.get(name, parameter.requires_grad) != parameter.requires_grad:
            found.append(f"`{name}` changed its flag")
    found += [f"mode of `{n}`" for n, m in result.model.named_modules() if modes.get(n) != m.training]
    for name, layer in result.model.named_modules():
        known = name in result.left or not isinstance(layer, nn.Linear | nn.Conv2d) or "weight" not in layer._parameters
        if not known and bool((layer.weight == 0).flatten(1).all(1).any()):
            found.append(f"`{name}` keeps zero rows without a reason")
    found += [f"buffer `{n}`" for n, b in result.model.named_buffers() if n == "calls" and float(b)]
    net.eval()
    result.model.eval()
    generator = torch.Generator().manual_seed(seed + 10**6)
    settings = [{}, {"full": True}, {"scale": 5.0}, {"batch": 2}, {"time": 4}, {"scale": 0.1, "batch": 4, "time": 7}]
    with torch.no_grad():
        for setting in settings:
            inputs = inputs_for(net, generator, **setting)
            want, got = (torch.utils._pytree.tree_leaves(m(*inputs)) for m in (net, result.model))
            for a, b in zip(want, got, strict=True):
                if a.shape != b.shape or not torch.allclose(a.double(), b.double(), 1e-4, 1e-4, equal_nan=True):
                    found.append(f"outputs differ with {setting}")
    return found, 1.0 - result.parameters_after / result.parameters_before


def main(count):
    """Draw models, print every problem and a total."""
    torch.set_num_threads(1)
    wrong, smaller = 0, 0
    for seed in range(count):
        try:
            found, share = problems(seed)
        except Exception:
            found, share = [traceback.format_exc(limit=-3)], 0.0
        smaller += share > 0.0
        wrong += bool(found)
        if found:
            print(seed, [type(b).__name__ for b in make(seed)[0].layer], *found, sep="\n  ", flush=True)
    print(f"{count} models: {wrong} wrong, {smaller} smaller")
    return wrong


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]))))
