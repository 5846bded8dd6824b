"""Train low-rank layers with one factor of each at rest: the factors take turns, an epoch each.

Run: python examples/sequential_freezing.py
"""

import logging

from lightning.pytorch import Trainer, seed_everything

from lightning_accel.callbacks import RankQuantization, SequentialFreezing
from lightning_accel.zoo import MLP, Digits


def main() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_accel").setLevel(logging.INFO)  # which group rests, and what was decided
    seed_everything(0, verbose=False)

    trainer = Trainer(
        max_epochs=10,
        accelerator="cpu",
        callbacks=[
            RankQuantization(ratio=2.0, method="fixed", when=1, on_loss="keep", exclude=["head"]),
            SequentialFreezing(period_epochs=1, final_trainable=1),  # the last epoch trains everything
        ],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, data = MLP(width=256), Digits()
    trainer.fit(model, data)
    seconds = float(trainer.callback_metrics["sequential_freezing/step_seconds"])
    print(f"mean step of the last epoch {1e3 * seconds:.2f} ms")
    (result,) = trainer.test(model, data, verbose=False)
    print(f"test accuracy {result['test/accuracy']:.3f}")


if __name__ == "__main__":
    main()
