"""Train dense for two epochs, then in low rank: the layers that this machine runs faster that way.

Run: python examples/rank_quantization.py
"""

import logging

from lightning.pytorch import Trainer, seed_everything

from lightning_accel.callbacks import RankQuantization
from lightning_accel.zoo import MLP, Digits


def main() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_accel").setLevel(logging.INFO)  # what was decided, with the numbers
    seed_everything(0, verbose=False)

    ranks = RankQuantization(
        ratio=2.0,  # half of the weight entries
        when=2,  # after two dense epochs; "setup" for weights that are trained already
        max_overhead=0.5,  # this run is short: let measuring take its time all the same
        on_loss="keep",  # show low rank even where it does not pay; "revert" is the default
    )
    trainer = Trainer(
        max_epochs=6,
        accelerator="cpu",
        callbacks=[ranks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, data = MLP(width=256), Digits()
    trainer.fit(model, data)
    (result,) = trainer.test(model, data, verbose=False)

    assert ranks.plan is not None
    for layer in ranks.plan.layers:
        chosen = "dense" if layer.ranks is None else f"rank {layer.ranks}, {layer.energy:.0%} of the energy"
        print(f"{layer.name:10} {layer.shape!s:12} {chosen}: {layer.reason}")
    print(f"weight entries {ranks.plan.parameters_before:,} -> {ranks.plan.parameters_after:,}")
    print(f"test accuracy {result['test/accuracy']:.3f}")


if __name__ == "__main__":
    main()
