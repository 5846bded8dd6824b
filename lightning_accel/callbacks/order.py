"""Which callbacks must stand before which in a Trainer's list: one table, and its correction."""

import logging

import lightning.pytorch as pl

from lightning_accel.lightning_private import callbacks_of, held_callbacks

_log = logging.getLogger(__name__)

ORDER: tuple[tuple[str, str], ...] = (
    # freezing looks for the low-rank layers that rank quantization makes at the same hook
    ("RankQuantization", "SequentialFreezing"),
    # on resuming, the groups of finetuning are put together by the names of parameters, factors included
    ("RankQuantization", "BaseFinetuning"),
    # what a search for a rate or a batch size loads when it ends must find the layers that the optimizers hold
    ("RankQuantization", "LearningRateFinder"),
    ("RankQuantization", "BatchSizeFinder"),
    # an average is projected after it was put into the checkpoint or over the module
    ("WeightAveraging", "MultilevelProjection"),
    ("WeightAveraging", "L1InfProjection"),
    ("StochasticWeightAveraging", "MultilevelProjection"),
    ("StochasticWeightAveraging", "L1InfProjection"),
)
"""Pairs (first, later) of class names; pairs that are not listed may stand in any order."""

_NAMES = frozenset(name for pair in ORDER for name in pair)


def correct_order(trainer: "pl.Trainer") -> None:
    """Move callbacks so that every pair of `ORDER` holds; the others keep their places.

    Called in ``setup``. The Trainer's list is replaced, not edited: Lightning is iterating over the present one.
    """
    callbacks = list(callbacks_of(trainer))
    moved = True
    while moved:
        moved = False
        names = [_name(callback) for callback in callbacks]
        for first, later in ORDER:
            if first not in names or later not in names:
                continue
            begin, end = names.index(later), len(names) - 1 - names[::-1].index(first)  # of several of a class, too
            if begin < end:
                callbacks.insert(begin, callbacks.pop(end))
                names.insert(begin, names.pop(end))
                moved = True
    if callbacks != callbacks_of(trainer):
        if trainer.is_global_zero:
            _log.info("callback order corrected to %s.", ", ".join(map(_name, callbacks)))
        trainer.callbacks = callbacks  # type: ignore[attr-defined]  # see `callbacks_of`


def _name(callback: object) -> str:
    """Return the name under which `ORDER` knows a callback, or what it wraps; else that of its class."""
    kinds = (kind.__name__ for held in held_callbacks(callback) for kind in type(held).__mro__)
    return next((name for name in kinds if name in _NAMES), type(callback).__name__)
