"""What an accelerator decided, seen by everybody: one line through Lightning's own channel, numbers for the loggers."""

import logging
from collections.abc import Mapping
from typing import Any

_DISTRIBUTIONS = ("lightning.pytorch", "pytorch_lightning")
CHANNELS = tuple(f"{name}.lightning_accel" for name in _DISTRIBUTIONS)
"""Loggers of the lines. They are children of Lightning's, which print by default and are silenced in the known way."""


def say_decision(trainer: Any, accelerator: str, line: str, metrics: Mapping[str, float] | None = None) -> None:
    """Print what an accelerator decided, and hand its numbers to the Trainer's loggers; on one process only.

    Each accelerator calls it once a fit, when it knows: what it acts on, or why on nothing.

    Args:
        trainer: Of either distribution of Lightning; its distribution's logger prints.
        accelerator: Name of the callback's or strategy's class.
        line: What was decided, with the reason, in one line; it follows the name.
        metrics: Full metric name (``"rank_quantization/low_rank"``) to value.
    """
    if not trainer.is_global_zero:
        return
    logging.getLogger(f"{_distribution(trainer)}.lightning_accel").info("%s: %s", accelerator, line)
    if metrics:
        for logger in trainer.loggers:
            logger.log_metrics(dict(metrics), step=trainer.global_step)


def _distribution(trainer: object) -> str:
    """Return the name of the distribution of Lightning that a Trainer, or its own subclass, comes from."""
    homes = (kind.__module__ for kind in type(trainer).__mro__)
    return next((name for home in homes for name in _DISTRIBUTIONS if home.startswith(name)), _DISTRIBUTIONS[0])
