"""What the classifiers of the zoo have in common: their loss, what they log, what they accept."""

from typing import Literal, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

Stage = Literal["train", "val", "test"]


def accuracies(num_classes: int) -> nn.ModuleDict:
    """Return one accuracy metric for ``"val"`` and one for ``"test"``, which hold their own state."""
    return nn.ModuleDict(
        {stage: MulticlassAccuracy(num_classes, average="micro", validate_args=False) for stage in ("val", "test")}
    )


def log_stage(module: LightningModule, stage: Stage, loss: Tensor, batch_size: int) -> None:
    """Log ``loss`` as ``<stage>/loss``: every step of training, the mean over samples and ranks else."""
    module.log(f"{stage}/loss", loss, prog_bar=True, batch_size=batch_size, sync_dist=stage != "train")


def classification_step(module: LightningModule, batch: tuple[Tensor, Tensor], stage: Stage) -> Tensor:
    """Return the mean cross-entropy of one batch and log it, and the accuracy outside of training.

    Args:
        module: Maps ``x`` to logits (batch, classes) and has ``accuracy``, made by `accuracies`.
        batch: ``x`` as the module takes it, and class indices (batch,).
        stage: Prefix of the logged names.
    """
    x, target = batch
    logits = module(x)
    loss = functional.cross_entropy(logits, target)
    log_stage(module, stage, loss, len(target))
    if stage != "train":
        accuracy = cast(MulticlassAccuracy, cast(nn.ModuleDict, module.accuracy)[stage])
        accuracy.update(logits, target)
        module.log(f"{stage}/accuracy", accuracy, prog_bar=True, batch_size=len(target))
    return loss


def check_images(x: Tensor, channels: int, image_size: int) -> None:
    """Check that ``x`` is a batch of floating-point images (batch, channels, image_size, image_size).

    Raises:
        ValueError: With the expected shape and what to change.
    """
    if not torch.is_floating_point(x) or tuple(x.shape[1:]) != (channels, image_size, image_size):
        raise ValueError(
            f"`x` must be floating-point images of shape (batch, {channels}, {image_size}, {image_size}), got "
            f"{x.dtype} of shape {tuple(x.shape)}. Choose image data such as `data=digits` and give the model their "
            "`channels` and `image_size`."
        )


def check_features(x: Tensor, in_features: int) -> Tensor:
    """Return floating-point ``x`` (batch, ...) flattened to (batch, in_features).

    Raises:
        ValueError: With the number of features found and what to change.
    """
    if not torch.is_floating_point(x) or x[0].numel() != in_features:
        raise ValueError(
            f"`x` must hold {in_features} floating-point features a sample, got {x.dtype} of shape {tuple(x.shape)}. "
            "Choose data of images or features, such as `data=digits`, and set `in_features` to their number."
        )
    return x.flatten(1)
