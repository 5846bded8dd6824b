"""Train with two workers that do not wait for each other, around a parameter server in this process.

Run: python examples/async_sgd.py
"""

import logging

from lightning.pytorch import Trainer, seed_everything

from lightning_accel import AsyncSGDStrategy
from lightning_accel.zoo import MLP, Digits


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(0, verbose=False)

    strategy = AsyncSGDStrategy(
        staleness="inverse",  # a gradient that is n steps old counts 1/n
        max_restarts=3,  # a worker that dies is started again; its batches go to others
    )
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        devices=2,  # workers
        strategy=strategy,  # or strategy="async_sgd", after `import lightning_accel`
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, data = MLP(width=64), Digits()
    trainer.fit(model, data)
    (result,) = trainer.test(model, data, verbose=False)

    found = strategy.statistics
    print(f"{found.version} steps, of the workers {found.worker_pushes}")
    print(f"staleness {found.staleness_mean:.2f} steps on average, 95th percentile {found.staleness_p95:.0f}")
    print(f"test accuracy {result['test/accuracy']:.3f}")


if __name__ == "__main__":
    main()
