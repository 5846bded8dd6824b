"""Supervised autoencoder of the papers on projections."""

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional

from lightning_accel.zoo.arguments import check_integers, check_numbers
from lightning_accel.zoo.models.classification import Stage, accuracies, check_features, log_stage
from lightning_accel.zoo.models.optimization import OptimizerName, ScheduleName, check_optimization, configure


class SupervisedAutoencoder(LightningModule):
    """Classify by the ``k`` latent units of an autoencoder d-100-k-100-d with SiLU, where k is the number of classes.

    Minimizes ``cross_entropy(z, target) + reconstruction_weight * smooth_l1(x_hat, x)`` with latent ``z``. The columns
    of ``encoder[0].weight`` (hidden_size, in_features) are the input features: a zero column deselects one.

    Args:
        in_features: Inputs a sample, flattened; by default ``channels * image_size**2``.
        num_classes: Latent units, one a class.
        channels: Of images; read only without ``in_features``.
        image_size: Pixels a side of images; read only without ``in_features``.
        hidden_size: Units of the layers around the latent one.
        reconstruction_weight: Of the SmoothL1 loss, relative to the cross-entropy.
        lr: Learning rate after warm-up.
        optimizer: ``"sgd"`` has Nesterov momentum 0.9.
        weight_decay: Of every parameter.
        schedule: Of the learning rate, a step at a time, to 0 at the Trainer's last step unless ``"constant"``.
        warmup_steps: Optimizer steps of linear warm-up.

    Raises:
        ValueError: If an argument is out of range, or in ``forward`` if the batch has another number of features.

    References:
        Perez, Barlaud, arXiv:2405.02086 and arXiv:2407.16293, the sections on experiments.
    """

    def __init__(
        self,
        *,
        in_features: int | None = None,
        num_classes: int = 2,
        channels: int = 1,
        image_size: int = 8,
        hidden_size: int = 100,
        reconstruction_weight: float = 0.1,
        lr: float = 5e-4,
        optimizer: OptimizerName = "adam",
        weight_decay: float = 0.0,
        schedule: ScheduleName = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        check_integers(1, channels=channels, image_size=image_size, hidden_size=hidden_size)
        check_integers(2, num_classes=num_classes)
        check_numbers(0.0, reconstruction_weight=reconstruction_weight)
        check_optimization(
            lr=lr, optimizer=optimizer, weight_decay=weight_decay, schedule=schedule, warmup_steps=warmup_steps
        )
        if in_features is not None:
            check_integers(1, in_features=in_features)
        self.save_hyperparameters()
        self.in_features = channels * image_size**2 if in_features is None else in_features
        self.reconstruction_weight = reconstruction_weight
        self.encoder = nn.Sequential(
            nn.Linear(self.in_features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, num_classes)
        )
        self.decoder = nn.Sequential(
            nn.Linear(num_classes, hidden_size), nn.SiLU(), nn.Linear(hidden_size, self.in_features)
        )
        self.accuracy = accuracies(num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map samples (batch, ...) to logits (batch, num_classes) and reconstructions (batch, in_features)."""
        logits = self.encoder(check_features(x, self.in_features))
        return logits, self.decoder(logits)

    def _step(self, batch: tuple[Tensor, Tensor], stage: Stage) -> Tensor:
        x, target = batch
        logits, reconstruction = self(x)
        loss = functional.cross_entropy(logits, target)
        loss = loss + self.reconstruction_weight * functional.smooth_l1_loss(reconstruction, x.flatten(1))
        log_stage(self, stage, loss, len(target), logits=logits, target=target)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the sum of both losses and log ``train/loss``."""
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log ``val/loss`` and ``val/accuracy``."""
        self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log ``test/loss`` and ``test/accuracy``."""
        self._step(batch, "test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and, if one was chosen, the schedule."""
        return configure(self)
