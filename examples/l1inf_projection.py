"""Select input features while training, then remove what is zero: the papers' supervised autoencoder.

Run: python examples/l1inf_projection.py
"""

import logging

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_accel.callbacks import L1InfProjection
from lightning_accel.projection.shrink import shrink
from lightning_accel.zoo import BreastCancer, SupervisedAutoencoder


def main() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(0, verbose=False)

    features = L1InfProjection(
        target_sparsity=0.5,  # half of the input features
        parameters="encoder.0.weight",
        groups="columns",  # a column is a feature, a row a hidden unit
        schedule="cubic",  # most go early, the last ones late
        end_step=100,
        freeze_zero_groups=True,  # else what grows back is taken off all features at each step
    )
    units = L1InfProjection(target_sparsity=0.5, parameters="decoder.0.weight", freeze_zero_groups=True)
    trainer = Trainer(
        max_epochs=20,
        accelerator="cpu",
        callbacks=[features, units],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, data = SupervisedAutoencoder(in_features=30), BreastCancer()
    trainer.fit(model, data)
    (result,) = trainer.test(model, data, verbose=False)

    small = shrink(model, torch.randn(4, 30))
    assert small.features is not None
    print(f"test accuracy {result['test/accuracy']:.3f}")
    print(f"features that are read: {small.features.tolist()}")
    print(f"parameters {small.parameters_before:,} -> {small.parameters_after:,}")
    print(f"outputs of the smaller model differ by {small.largest_difference:.0e}")


if __name__ == "__main__":
    main()
