"""Generative adversarial network: two optimizers, manual optimization."""

from typing import cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn import functional

from lightning_accel.zoo.arguments import check_integers, check_numbers
from lightning_accel.zoo.models.classification import Stage, check_images, log_stage


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Return the biased squared maximum mean discrepancy of two samples (n, features) and (m, features).

    The kernel is the mean of Gaussians whose squared widths are 1/4, 1 and 4 times the number of features. Zero for
    equal samples, never negative beyond rounding.
    """
    widths = x.shape[1] * torch.tensor([0.25, 1.0, 4.0], device=x.device, dtype=x.dtype)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a, b).square().unsqueeze(-1) / (2 * widths)).mean()

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


class GAN(LightningModule):
    """Learn to draw images: a generator and a discriminator of two hidden layers, each with an Adam of its own.

    Logs ``train/loss``, the sum of ``train/generator_loss`` and ``train/discriminator_loss``. ``val/loss`` and
    ``test/loss`` are the squared maximum mean discrepancy between drawn and real images, from the same noise each time.

    Args:
        channels: Of the images.
        image_size: Pixels a side.
        latent_dim: Features of the noise.
        hidden_size: Units of each hidden layer.
        lr: Learning rate of both optimizers.
        beta1: Decay of Adam's first moment, in [0, 1).

    Raises:
        ValueError: If an argument is out of range, or if the batch has other images.

    References:
        Goodfellow et al., arXiv:1406.2661; Radford, Metz, Chintala, arXiv:1511.06434 for the value of ``beta1``.
    """

    def __init__(
        self,
        *,
        channels: int = 1,
        image_size: int = 8,
        latent_dim: int = 32,
        hidden_size: int = 256,
        lr: float = 1e-3,
        beta1: float = 0.5,
    ) -> None:
        super().__init__()
        check_integers(1, channels=channels, image_size=image_size, latent_dim=latent_dim, hidden_size=hidden_size)
        check_numbers(0.0, above=True, lr=lr)
        check_numbers(0.0, 1.0, beta1=beta1)
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.channels = channels
        self.image_size = image_size
        self.latent_dim = latent_dim
        pixels = channels * image_size**2
        self.generator = nn.Sequential(
            nn.Linear(latent_dim, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, pixels),
        )
        self.discriminator = nn.Sequential(
            nn.Linear(pixels, hidden_size),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden_size, hidden_size),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden_size, 1),
        )

    def forward(self, noise: Tensor) -> Tensor:
        """Map noise (batch, latent_dim) to images (batch, channels, image_size, image_size)."""
        return self.generator(noise).unflatten(1, (self.channels, self.image_size, self.image_size))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Take one step of the discriminator, then one of the generator."""
        real = batch[0]
        check_images(real, self.channels, self.image_size)
        optimizer_g, optimizer_d = cast(list[LightningOptimizer], self.optimizers())
        noise = torch.randn(len(real), self.latent_dim, device=real.device, dtype=real.dtype)

        self.toggle_optimizer(optimizer_d)
        drawn = self(noise).detach()
        on_real = self.discriminator(real.flatten(1))
        on_drawn = self.discriminator(drawn.flatten(1))
        loss_d = 0.5 * (functional.softplus(-on_real).mean() + functional.softplus(on_drawn).mean())
        optimizer_d.zero_grad()
        self.manual_backward(loss_d)
        optimizer_d.step()
        self.untoggle_optimizer(optimizer_d)

        self.toggle_optimizer(optimizer_g)
        loss_g = functional.softplus(-self.discriminator(self(noise).flatten(1))).mean()
        optimizer_g.zero_grad()
        self.manual_backward(loss_g)
        optimizer_g.step()
        self.untoggle_optimizer(optimizer_g)

        self.log("train/generator_loss", loss_g, prog_bar=True, batch_size=len(real))
        self.log("train/discriminator_loss", loss_d, prog_bar=True, batch_size=len(real))
        log_stage(self, "train", loss_g.detach() + loss_d.detach(), len(real))

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: Stage) -> None:
        real = batch[0]
        check_images(real, self.channels, self.image_size)
        # The same noise for every batch and epoch, and none taken from the training's random numbers.
        noise = torch.randn(len(real), self.latent_dim, generator=torch.Generator().manual_seed(0)).to(real)
        log_stage(self, stage, squared_mmd(self(noise).flatten(1), real.flatten(1)), len(real))

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log ``val/loss``."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log ``test/loss``."""
        self._evaluate(batch, "test")

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the generator's optimizer, then the discriminator's."""
        lr, betas = self.hparams["lr"], (self.hparams["beta1"], 0.999)
        return [
            torch.optim.Adam(net.parameters(), lr=lr, betas=betas, fused=True)
            for net in (self.generator, self.discriminator)
        ]
