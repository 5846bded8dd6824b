"""What the tests of other people's models share: a callback that watches a training, and how to name what it saw."""

import math

import lightning.pytorch as pl
from torch import nn

from lightning_accel.callbacks import RankQuantization, SequentialFreezing
from lightning_accel.low_rank import low_rank_layers


class Watch(pl.Callback):
    """Keep each step's loss, and which parameters rested in it."""

    def __init__(self):
        self.losses = []
        self.resting = []
        self.module = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.module = pl_module
        self.losses.append(float(outputs["loss"]))
        self.resting.append({name for name, p in pl_module.named_parameters() if not p.requires_grad})

    def check_losses(self, steps, *, per_epoch):
        """All finite, none missing, and the last epoch's mean under the first one's."""
        assert len(self.losses) == steps
        assert all(map(math.isfinite, self.losses))
        assert sum(self.losses[-per_epoch:]) < sum(self.losses[:per_epoch])

    def check_turns(self, names):
        """Every named layer's factors rested in turns, never both at once."""
        for name in names:
            seen = {frozenset(p for p in resting if p.startswith(f"{name}.")) for resting in self.resting}
            assert {f"{name}.factor_in"} in seen
            assert {f"{name}.factor_out"} in seen
            assert not any(len(factors) > 1 for factors in seen)


def low_rank_callbacks(**settings):
    """Rank quantization from the second epoch, whatever the clock says, and turns of three steps."""
    quantization = RankQuantization(2.0, method="fixed", when=1, on_loss="keep", **settings)
    return quantization, SequentialFreezing(period_steps=3)


def parameters_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def factored(module: nn.Module) -> list[str]:
    return list(low_rank_layers(module))
