"""What the classifiers of the zoo have in common: their loss, what they log, what they accept."""

from typing import Literal, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

Stage = Literal["train", "val", "test"]

IGNORED_TARGET = -100


def accuracies(num_classes: int) -> nn.ModuleDict:
    """Return one accuracy metric for ``"val"`` and one for ``"test"``; they skip targets of -100, as the loss does."""
    return nn.ModuleDict(
        {
            stage: MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORED_TARGET, validate_args=False)
            for stage in ("val", "test")
        }
    )


def log_stage(
    module: LightningModule,
    stage: Stage,
    loss: Tensor,
    batch_size: int,
    *,
    logits: Tensor | None = None,
    target: Tensor | None = None,
) -> None:
    """Log ``<stage>/loss`` and, outside of training, ``<stage>/accuracy`` if there are logits.

    Training logs every step; the other stages log the mean over samples and ranks.

    Args:
        module: Has ``accuracy``, made by `accuracies`, if there are logits.
        stage: Prefix of the logged names.
        loss: Scalar, a mean over the batch.
        batch_size: Samples in the batch.
        logits: (samples, classes).
        target: Class indices (samples,).
    """
    module.log(f"{stage}/loss", loss, prog_bar=True, batch_size=batch_size, sync_dist=stage != "train")
    if logits is not None and target is not None and stage != "train":
        accuracy = cast(MulticlassAccuracy, cast(nn.ModuleDict, module.accuracy)[stage])
        accuracy.update(logits, target)
        module.log(f"{stage}/accuracy", accuracy, prog_bar=True, batch_size=batch_size)


def classification_step(module: LightningModule, batch: tuple[Tensor, Tensor], stage: Stage) -> Tensor:
    """Return the mean cross-entropy of one batch and log it, and the accuracy outside of training.

    Args:
        module: Maps ``x`` to logits (batch, classes) or (batch, time, classes) and has ``accuracy``.
        batch: ``x`` as the module takes it, and class indices (batch,) or (batch, time); -100 marks those to skip.
        stage: Prefix of the logged names.
    """
    x, target = batch
    logits = module(x).flatten(0, -2)
    loss = functional.cross_entropy(logits, target.flatten(), ignore_index=IGNORED_TARGET)
    log_stage(module, stage, loss, len(target), logits=logits, target=target.flatten())
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
