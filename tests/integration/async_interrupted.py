"""A program that trains asynchronously until it is interrupted: ``python async_interrupted.py FIFO LIVE``."""

import os
import sys

import lightning.pytorch as pl
from async_modules import Classifier, loader

from lightning_accel import AsyncSGDStrategy


class SaysThatItTrains(pl.Callback):
    """Writes the number of each worker's process into a named pipe, once it has trained."""

    def __init__(self, pipe):
        self.pipe, self.said = pipe, False

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not self.said:
            self.said = True
            with open(self.pipe, "w", encoding="utf-8") as file:
                file.write(f"{os.getpid()}\n")


if __name__ == "__main__":
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=AsyncSGDStrategy(live=sys.argv[2] == "live"),
        max_epochs=-1,
        callbacks=[SaysThatItTrains(sys.argv[1])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), loader())
