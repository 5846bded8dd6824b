"""How long it takes from `fit` to the first training step, by the way in which workers are started.

Run in a process of its own (``python -c "from lightning_accel.bench.async_start import main; main()" METHOD FITS``),
so that nothing is imported or started before that a user's script would not have. The time that this process takes to
import Lightning is not counted, for nobody.
"""

import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_accel.strategies.for_lightning import AsyncSGDStrategy

PLAIN = "plain"
_BATCH = 8


class FirstStep(LightningModule):
    """Tells a file when it makes its first training step."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.file = file
        self.told = False

    @override
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        if not self.told:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(f"{time.monotonic()}\n")
            self.told = True
        return functional.mse_loss(self.net(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def seconds_to_first_step(method: str, fits: int = 1) -> list[float]:
    """Fit so many times in a new process; returns the seconds from each `fit` to the first step of any worker.

    Args:
        method: ``plain`` for a Trainer without this package, or a ``start_method`` for two workers.
        fits: One after another in that process, >= 1.
    """
    code = "from lightning_accel.bench.async_start import main; main()"
    done = subprocess.run([sys.executable, "-c", code, method, str(fits)], capture_output=True, text=True, check=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print what `seconds_to_first_step` returns."""
    method, fits = sys.argv[1], int(sys.argv[2])
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)  # one for each of two workers
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps([_fit(method, str(Path(folder, str(number)))) for number in range(fits)]))


def _fit(method: str, file: str) -> float:
    alone = method == PLAIN
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1 if alone else 2,
        strategy="auto" if alone else AsyncSGDStrategy(start_method=method),  # type: ignore[arg-type]  # checked there
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(torch.randn(8 * _BATCH, 4), torch.randn(8 * _BATCH, 1)), _BATCH)
    began = time.monotonic()
    trainer.fit(FirstStep(file), loader)
    return min(map(float, Path(file).read_text(encoding="utf-8").split())) - began
