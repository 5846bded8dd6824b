"""When rank quantization decides."""

import logging
from typing import Literal

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_accel.low_rank import RankPlan
from lightning_accel.low_rank.spectrum import looks_untrained

_log = logging.getLogger(__name__)

When = int | Literal["auto", "setup"]


def check_when(when: object) -> None:
    """Check the argument ``when``.

    Raises:
        ValueError: If it is neither of the words nor an epoch.
    """
    words = when in ("auto", "setup")
    if not words and (isinstance(when, bool) or not isinstance(when, int) or when < 0):
        raise ValueError(f"`when` must be 'auto', 'setup' or an epoch >= 0, got {when!r}.")


def first_epoch(when: When, given: RankPlan | None, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> int:
    """Return the epoch at whose first batch to decide; warn where untrained weights are to be decomposed.

    Args:
        when: As `RankQuantization` got it.
        given: A plan that is to be applied, if the user has one.
        trainer: Of the run.
        pl_module: Whose weights are looked at.
    """
    if isinstance(when, int):
        return when
    untrained = looks_untrained(pl_module)
    if when == "setup" or given is not None:
        if untrained and (given is None or any(layer.ranks is not None for layer in given.layers)):
            rank_zero_warn(
                "RankQuantization decomposes weights that look untrained: most of what they could learn is cut "
                "off. Load trained weights first, or set `when` to the epochs of a dense warm-up."
            )
        return 0
    first = max(1, round(0.1 * (trainer.max_epochs or 1))) if untrained else 0
    if untrained and trainer.is_global_zero:
        _log.info("the weights look untrained: dense warm-up until epoch %s.", first)
    return first
