"""Train with two workers that do not wait for each other, around a parameter server in this process.

Run: python examples/async_sgd.py
"""

import logging

from lightning.pytorch import Trainer, seed_everything

from lightning_accel import AsyncSGDStrategy
from lightning_accel.zoo import CNN, Digits


def fit_and_test(strategy: AsyncSGDStrategy | str, devices: int) -> float:
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=8,
        accelerator="cpu",
        devices=devices,  # workers
        strategy=strategy,  # or strategy="async_sgd", after `import lightning_accel`
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, data = CNN(lr=2e-3), Digits(batch_size=32)
    trainer.fit(model, data)
    (result,) = trainer.test(model, data, verbose=False)
    return result["test/accuracy"]


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    strategy = AsyncSGDStrategy(
        staleness="look_ahead",  # workers compute on the parameters as they will be when their gradients arrive
        max_restarts=3,  # a worker that dies is started again; its batches go to others
    )
    alone, together = fit_and_test("auto", 1), fit_and_test(strategy, 2)
    found = strategy.statistics
    print(f"{found.version} steps, of the workers {found.worker_pushes}")
    print(f"staleness {found.staleness_mean:.2f} steps on average, 95th percentile {found.staleness_p95:.0f}")
    print(f"test accuracy {together:.3f}, in one process {alone:.3f}")


if __name__ == "__main__":
    main()
