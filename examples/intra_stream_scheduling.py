"""Train a character model whose `forward` loops over a hand-written cell, with and without intra-stream scheduling.

Run: python examples/intra_stream_scheduling.py
"""

import logging
import time

from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_accel.callbacks import IntraStreamScheduling
from lightning_accel.zoo import CharLM, CopyTask


class StepTimes(Callback):
    """Keep the processor seconds of every training step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: object, **__: object) -> None:
        """Begin."""
        self._begin = time.process_time()

    def on_train_batch_end(self, *_: object, **__: object) -> None:
        """End."""
        self.seconds.append(time.process_time() - self._begin)


def fit(*callbacks: Callback) -> tuple[float, float]:
    """Return the last loss and the median seconds of the later steps."""
    seed_everything(0, verbose=False)
    times = StepTimes()
    trainer = Trainer(
        max_steps=16,
        accelerator="cpu",
        callbacks=[times, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(CharLM(cell="peephole", embedding_dim=64, hidden_size=128), CopyTask(delay=100, batch_size=4))
    later = sorted(times.seconds[4:])  # the first steps watch, plan and measure
    return float(trainer.callback_metrics["train/loss"]), later[len(later) // 2]


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scheduling = IntraStreamScheduling()
    loss, seconds = fit()
    scheduled_loss, scheduled_seconds = fit(scheduling)
    print(*scheduling.report, sep="\n")
    print(f"loss {loss:.4f} without, {scheduled_loss:.4f} with")
    ratio = seconds / scheduled_seconds
    print(f"step {1e3 * seconds:.1f} ms without, {1e3 * scheduled_seconds:.1f} ms with: x{ratio:.1f}")


if __name__ == "__main__":
    main()
