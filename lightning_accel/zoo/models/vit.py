"""Small vision transformer."""

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional

from lightning_accel.zoo.arguments import check_integers
from lightning_accel.zoo.models.classification import accuracies, check_images, classification_step
from lightning_accel.zoo.models.optimization import OptimizerName, ScheduleName, check_optimization, configure


class Attention(nn.Module):
    """Mix tokens by multi-head self-attention with two ``nn.Linear`` projections.

    Args:
        dim: Features of a token.
        heads: Divides ``dim``.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (batch, tokens, dim) to the same shape."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))


class TransformerBlock(nn.Module):
    """Add attention, then a two-layer GELU perceptron, each to its input and each after a LayerNorm.

    Args:
        dim: Features of a token.
        heads: Attention heads.
        mlp_ratio: Hidden units of the perceptron over ``dim``.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (batch, tokens, dim) to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(LightningModule):
    """Classify images with a pre-norm transformer over square patches and the mean of its tokens.

    Args:
        num_classes: Outputs.
        channels: Of the images.
        image_size: Pixels a side, a multiple of ``patch_size``.
        patch_size: Pixels a side of a patch.
        dim: Features of a token, a multiple of ``heads``.
        depth: Transformer blocks.
        heads: Attention heads.
        mlp_ratio: Hidden units of a block's perceptron over ``dim``.
        lr: Learning rate after warm-up.
        optimizer: ``"sgd"`` has Nesterov momentum 0.9.
        weight_decay: Of every parameter.
        schedule: Of the learning rate, a step at a time, to 0 at the Trainer's last step unless ``"constant"``.
        warmup_steps: Optimizer steps of linear warm-up.

    Raises:
        ValueError: If an argument is out of range, or in ``forward`` if the batch has other images.

    References:
        Dosovitskiy et al., arXiv:2010.11929, section 3.1. *Deviations*: mean of the tokens, no class token.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        channels: int = 3,
        image_size: int = 32,
        patch_size: int = 4,
        dim: int = 384,
        depth: int = 6,
        heads: int = 6,
        mlp_ratio: int = 4,
        lr: float = 5e-4,
        optimizer: OptimizerName = "adamw",
        weight_decay: float = 0.05,
        schedule: ScheduleName = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        check_integers(1, channels=channels, image_size=image_size, patch_size=patch_size)
        check_integers(1, dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio)
        check_integers(2, num_classes=num_classes)
        if image_size % patch_size:
            raise ValueError(f"`image_size` must be a multiple of `patch_size` = {patch_size}, got {image_size}.")
        if dim % heads:
            raise ValueError(f"`dim` must be a multiple of `heads` = {heads}, got {dim}.")
        check_optimization(
            lr=lr, optimizer=optimizer, weight_decay=weight_decay, schedule=schedule, warmup_steps=warmup_steps
        )
        self.save_hyperparameters()
        self.channels = channels
        self.image_size = image_size
        self.patches = nn.Conv2d(channels, dim, patch_size, patch_size)
        self.position = nn.Parameter(torch.empty((image_size // patch_size) ** 2, dim))
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        self.accuracy = accuracies(num_classes)
        nn.init.trunc_normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, channels, image_size, image_size) to logits (batch, num_classes)."""
        check_images(x, self.channels, self.image_size)
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the cross-entropy and log ``train/loss``."""
        return classification_step(self, batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log ``val/loss`` and ``val/accuracy``."""
        classification_step(self, batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log ``test/loss`` and ``test/accuracy``."""
        classification_step(self, batch, "test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and, if one was chosen, the schedule."""
        return configure(self)
