"""Models that replicas of several processes share, and a callback that kills one of them."""

import os
import signal

import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset


def data(batches=24, batch=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batches * batch, 12, generator=generator)
    return DataLoader(TensorDataset(x, torch.tanh(x[:, :4].sum(1, keepdim=True))), batch_size=batch)


class Spread(LightningModule):
    """A model whose layers are spread over the mesh, where there is one."""

    def __init__(self, optimizer="sgd"):
        super().__init__()
        self.optimizer = optimizer
        torch.manual_seed(0)
        self.build()

    def configure_model(self):
        if self.device_mesh is not None:
            parallelize_module(self, self.device_mesh["tensor_parallel"], self.plan())

    def training_step(self, batch):
        loss = functional.mse_loss(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch):
        self.log("val", functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.003)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class SpreadMLP(Spread):
    def build(self):
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 1)

    def plan(self):
        return {"up": ColwiseParallel(), "down": RowwiseParallel()}

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class SpreadBlock(Spread):
    """A transformer block over tokens of four numbers: heads and hidden units are spread, the norms are not."""

    def build(self):
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        # a bias of the keys has no gradient but rounding, of which Adam makes whole steps
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8, bias=bias) for bias in (True, False, True, True))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.before, self.between = nn.LayerNorm(8), nn.LayerNorm(8)

    def plan(self):
        columns, rows = ("query", "key", "value", "up"), ("out", "down")
        return {name: ColwiseParallel() for name in columns} | {name: RowwiseParallel() for name in rows}

    def forward(self, x):
        tokens = self.embed(x.view(len(x), 3, 4))
        normed = self.before(tokens)
        # the number of heads is what this process has of them
        q, k, v = (p(normed).unflatten(-1, (-1, 2)).transpose(1, 2) for p in (self.query, self.key, self.value))
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(attended)
        tokens = tokens + self.down(functional.gelu(self.up(self.between(tokens))))
        return self.head(tokens.mean(1))


class KillOneRank(Callback):
    """Kill this process, if it is the given rank of the given worker in its first life, before its n-th batch."""

    def __init__(self, worker, rank, batch):
        self.worker, self.rank, self.batch = worker, rank, batch
        self.seen = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        store = trainer.strategy._store
        self.seen += 1
        me = (store.worker, store.ranks.rank, store.incarnation)
        if self.seen == self.batch and me == (self.worker, self.rank, 0):
            os.kill(os.getpid(), signal.SIGKILL)
