"""Fits of a sharded model on two processes, and of the same model on one.

Both processes get the same batches, so that their mean gradients are those of one process, bit for bit, and the result
must be that of training without shards.
"""

import os
import warnings

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.callbacks import L1InfProjection, MultilevelProjection

CASES = {
    "bi-level": lambda: L1InfProjection(radius_fraction=0.1),
    "sparsity": lambda: L1InfProjection(target_sparsity=0.5, freeze_zero_groups=True, every_n_steps=2),
    "columns": lambda: L1InfProjection(target_sparsity=0.5, groups="columns", schedule="cubic", end_step=8),
    "global exact": lambda: L1InfProjection(target_sparsity=0.5, scope="global", method="exact"),
    "l1,2": lambda: MultilevelProjection(1.0, norms=("l1", "l2"), scope="global"),
    "retrain": lambda: L1InfProjection(
        target_sparsity=0.5, mode="project_then_retrain", retrain_epoch=1, rewind="init"
    ),
    "retrain later": lambda: L1InfProjection(
        target_sparsity=0.5, mode="project_then_retrain", retrain_epoch=2, rewind="init"
    ),
}


class Net(LightningModule):
    def __init__(self, *, shards):
        super().__init__()
        torch.manual_seed(0)
        self.shards = shards
        self.net = nn.Sequential(nn.Linear(12, 15), nn.Tanh(), nn.Linear(15, 7), nn.Tanh(), nn.Linear(7, 3))

    def configure_model(self):
        if self.shards and not any("DTensor" in type(p).__name__ for p in self.parameters()):
            mesh = self.device_mesh["data_parallel"]
            for layer in self.net:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self, mesh=mesh)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class SaveInTheMiddle(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


def train(*callbacks, shards, **settings):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 12, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    sharding = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    strategy = sharding if shards else "auto"
    trainer = Trainer(
        accelerator="cpu",
        devices=2 if shards else 1,
        strategy=strategy,
        max_epochs=3,
        callbacks=list(callbacks),
        logger=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    net = Net(shards=shards)
    trainer.fit(net, DataLoader(TensorDataset(x, y), batch_size=8), **settings)
    return trainer, net


def whole(net):
    return {n: p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for n, p in net.named_parameters()}


def train_shards(rank, case, folder, port):
    """Train, train the second half again from a checkpoint, and write both results to ``rankN.pt``."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    os.environ |= {"WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    callback = CASES[case]()
    trainer, net = train(callback, SaveInTheMiddle(folder / "half.ckpt"), shards=True)
    result = {"state": whole(net), "logged": {k: float(v) for k, v in trainer.callback_metrics.items()}}
    result |= {"projections": callback.projections, "steps": trainer.global_step}
    _, resumed = train(CASES[case](), shards=True, ckpt_path=folder / "half.ckpt")
    torch.save(result | {"resumed": whole(resumed)}, folder / f"rank{rank}.pt")
    leave()


def leave():
    """End this process at once, as one that has succeeded.

    Gloo's threads may outlive the process group with tensors in their hands; one that drops its tensor while the
    interpreter winds down makes the process abort, now and then.
    """
    torch.distributed.barrier()  # the first to leave would take the other's connections along
    torch.distributed.destroy_process_group()
    os._exit(0)
