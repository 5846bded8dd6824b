"""Loading a module from a checkpoint of a low-rank run, by its class's own way of loading."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_accel.callbacks.layer_exchange.structure import Module, enable_low_rank_loading, structure_hook

_one_at_a_time = threading.RLock()


def load_from_checkpoint(
    module_class: type[Module],
    checkpoint_path: str | Path,
    *,
    map_location: torch.device | str | None = None,
    hparams_file: str | Path | None = None,
    strict: bool | None = None,
    weights_only: bool | None = None,
    init_arguments: Mapping[str, object] | None = None,
) -> Module:
    """Load a LightningModule whose checkpoint has low-rank layers (``module_class.load_from_checkpoint`` can not).

    It is ``module_class.load_from_checkpoint`` that loads, once, with the arguments given here and no others: a class's
    own method, ``on_load_checkpoint``, ``configure_model`` and ``strict_loading`` count as they do without this
    function. Dense checkpoints load as well.

    Args:
        module_class: LightningModule class the checkpoint was made of.
        checkpoint_path: File of a `ModelCheckpoint`, weights-only or complete.
        map_location: As in ``load_from_checkpoint``.
        hparams_file: As in ``load_from_checkpoint``.
        strict: Whether all keys must fit after the layers were adapted; None leaves it to the module.
        weights_only: As in ``load_from_checkpoint``; not passed to a method that decides it by itself.
        init_arguments: Constructor arguments that the checkpoint does not have, or that override its own.

    Raises:
        RuntimeError: If the checkpoint does not fit the module, as ``load_state_dict`` says.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_accel import RankQuantization, load_from_checkpoint
        >>> from lightning_accel.zoo import MLP, Digits
        >>> off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
        >>> low_rank = RankQuantization(ratio=2.0)
        >>> trainer = Trainer(max_steps=1, accelerator="cpu", callbacks=[low_rank], **dict.fromkeys(off, False))
        >>> trainer.fit(MLP(width=16, depth=2), Digits())
        >>> trainer.save_checkpoint("low_rank.ckpt")  # dense or low rank, as was decided
        >>> model = load_from_checkpoint(MLP, "low_rank.ckpt")
    """
    named = {"map_location": map_location, "hparams_file": hparams_file, "strict": strict, "weights_only": weights_only}
    arguments: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    arguments |= init_arguments or {}
    with _following_layers(module_class):
        try:
            module = module_class.load_from_checkpoint(checkpoint_path, **arguments)
        except TypeError as problem:
            if "weights_only" not in arguments or "multiple values for keyword argument 'weights_only'" not in str(
                problem
            ):
                raise
            del arguments["weights_only"]
            module = module_class.load_from_checkpoint(checkpoint_path, **arguments)
    return enable_low_rank_loading(module)


@contextlib.contextmanager
def _following_layers(module_class: type["pl.LightningModule"]) -> Iterator[None]:
    """Let modules of the class that are made and loaded inside follow the incoming layers.

    The module does not exist before its class's method makes it, and is loaded before that returns.
    """

    def load_state_dict(self: "pl.LightningModule", *args: Any, **kwargs: Any) -> Any:
        structure_hook(self)
        return load(self, *args, **kwargs)

    with _one_at_a_time:
        load: Any = module_class.load_state_dict
        own = "load_state_dict" in vars(module_class)
        setattr(module_class, "load_state_dict", load_state_dict)  # noqa: B010  # a method, for a while
        try:
            yield
        finally:
            if own:
                setattr(module_class, "load_state_dict", load)  # noqa: B010
            else:
                del module_class.load_state_dict
