"""Modules with recurrent layers as people write them, and how the tests train them."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.recurrent import PeepholeLSTMCell, Recurrent

STEPS, FEATURES, HIDDEN = 9, 3, 4


class Body(LightningModule):
    """Train on sequences (batch, time, features); subclasses say what happens to them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.build()
        self.double()
        self.losses, self.gradients = [], []

    def training_step(self, batch, batch_idx):
        loss = self(batch[0].transpose(0, 1)).square().mean()
        self.losses.append(loss.item())
        return loss

    def on_after_backward(self):
        self.gradients.append({n: p.grad.clone() for n, p in self.named_parameters()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LSTMLoop(Body):
    def build(self):
        self.cell, self.out = nn.LSTMCell(FEATURES, HIDDEN), nn.Linear(HIDDEN, 1)

    def forward(self, x):
        state, hidden = None, []
        for t in range(len(x)):
            state = self.cell(x[t], state)
            hidden.append(state[0])
        return self.out(torch.stack(hidden))


class GRULoop(Body):
    def build(self):
        self.cell, self.out = nn.GRUCell(FEATURES, HIDDEN), nn.Linear(HIDDEN, 1)

    def forward(self, x):
        h = x.new_zeros(x.shape[1], HIDDEN)
        for step in x:
            h = self.cell(step, h)
        return self.out(h)


class StackedLoop(Body):
    def build(self):
        self.embed = nn.Linear(FEATURES, FEATURES)
        self.lower, self.upper = nn.LSTMCell(FEATURES, HIDDEN), nn.LSTMCell(HIDDEN, HIDDEN)

    def forward(self, x):
        x = self.embed(x)
        lower = upper = (x.new_zeros(x.shape[1], HIDDEN),) * 2
        hidden = []
        for t in range(len(x)):
            lower = self.lower(x[t], lower)
            upper = self.upper(lower[0], upper)
            hidden.append(upper[0])
        return torch.cat(hidden, -1) * hidden[2].mean() + upper[1].sum()


class PeepholeLoop(Body):
    def build(self):
        self.cell = PeepholeLSTMCell(FEATURES, HIDDEN)

    def forward(self, x):
        state = self.cell.initial_state(x[0])
        hidden = []
        for step in x:
            y, state = self.cell(step, state)
            hidden.append(y)
        return torch.stack(hidden, 1) + state[1].mean()


class HandWrittenCell(nn.Module):
    """A peephole cell that nobody but its author knows: other names, other order, keyword arguments."""

    def __init__(self):
        super().__init__()
        self.inwards, self.around = nn.Linear(FEATURES, 4 * HIDDEN), nn.Linear(HIDDEN, 4 * HIDDEN, bias=False)
        self.peep = nn.Parameter(torch.randn(3, HIDDEN) * 0.3)

    def forward(self, memory, hidden, *, token):
        a, b, c, d = (self.inwards(token) + self.around(hidden)).split(HIDDEN, dim=1)
        keep, write = torch.sigmoid(a + self.peep[0] * memory), torch.sigmoid(b + self.peep[1] * memory)
        memory = memory * keep + write * c.tanh()
        return {"memory": memory, "hidden": memory.tanh() * torch.sigmoid(d + self.peep[2] * memory)}


class HandWrittenLoop(Body):
    def build(self):
        self.cell, self.out = HandWrittenCell(), nn.Linear(HIDDEN, 1)

    def forward(self, x):
        found = {"memory": x.new_zeros(x.shape[1], HIDDEN), "hidden": x.new_zeros(x.shape[1], HIDDEN)}
        hidden = []
        for step in x:
            found = self.cell(found["memory"], found["hidden"], token=step)
            hidden.append(found["hidden"])
        return self.out(torch.stack(hidden))


class EncoderDecoder(Body):
    """With teacher forcing."""

    def build(self):
        self.encoder, self.decoder = nn.LSTMCell(FEATURES, HIDDEN), nn.LSTMCell(FEATURES, HIDDEN)
        self.out = nn.Linear(HIDDEN, FEATURES)

    def forward(self, x):
        state = None
        for step in x:
            state = self.encoder(step, state)
        hidden = []
        for step in x[:-1]:
            state = self.decoder(step, state)
            hidden.append(state[0])
        return self.out(torch.stack(hidden)) - x[1:]


class OwnOutput(Body):
    """A decoder that feeds its own output back."""

    def build(self):
        self.cell, self.out = nn.LSTMCell(FEATURES, HIDDEN), nn.Linear(HIDDEN, FEATURES)

    def forward(self, x):
        state, y, outputs = None, x[0], []
        for _ in x:
            state = self.cell(y, state)
            y = self.out(state[0])
            outputs.append(y)
        return torch.stack(outputs)


class PackedLSTM(Body):
    def build(self):
        self.rnn = nn.LSTM(FEATURES, HIDDEN, num_layers=2, dropout=0.3, bidirectional=True)

    def forward(self, x):
        lengths = torch.tensor([9, 2, 5, 7])[: x.shape[1]]
        packed, (h, c) = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(packed)[0].sum() + h.sum() + c.sin().sum()


class RecurrentLayer(Body):
    def build(self):
        self.rnn = Recurrent(PeepholeLSTMCell(FEATURES, HIDDEN))

    def forward(self, x):
        return self.rnn(x)[0]


class MLP(Body):
    def build(self):
        self.layer = nn.Linear(FEATURES, 1)

    def forward(self, x):
        return self.layer(x)


def data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, STEPS, FEATURES, generator=generator, dtype=torch.double)
    return DataLoader(TensorDataset(x), batch_size=4)


def trainer(*callbacks, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings = quiet | {"max_epochs": 2, "enable_checkpointing": False} | settings
    return Trainer(callbacks=list(callbacks), **settings)


def fit(kind, *callbacks, **settings):
    module = kind()
    torch.manual_seed(5)
    runner = trainer(*callbacks, **settings)
    runner.fit(module, data())
    return module
