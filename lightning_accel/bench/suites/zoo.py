"""Whole fits of the zoo with rank quantization and sequential freezing at their default settings, against plain ones.

The question is whether switching the callbacks on ever costs time: where low rank does not pay, the note of the row
says so in the callbacks' own words. Fits are those of `conf/experiment`, cut so that all of them take some minutes;
MLP and CNN keep enough steps for ranks to be tried.
"""

import logging
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lightning_accel.evidence.measured_runs.runs import MakeFit, Run, measure_fit
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.measure import compare_paired

_ARMS = ("plain", "default settings")
_PAIRS = 6
_MANY_PAIRS = 16  # of fits of about a second, which differ by several percent of chance
_SHORT = ("sae_synthetic", "sae_breast_cancer", "char_lm", "gan_digits")
_CUT = {  # what is changed, besides the callbacks
    "mlp_digits": ("trainer.max_epochs=45", "model.width=512"),
    "cnn_digits": (),
    "vit_digits": ("trainer.max_epochs=3",),
    "resnet18_digits": ("trainer.max_epochs=1", "++trainer.limit_train_batches=8", "data.batch_size=8"),
    "sae_synthetic": (),
    "sae_breast_cancer": (),
    "char_lm": ("++trainer.limit_train_batches=8", "++trainer.limit_val_batches=2", "trainer.max_epochs=1"),
    "gan_digits": ("trainer.max_epochs=3",),
}


def rows(
    *,
    quick: bool,
    device: str,
    make_fits: Callable[[str, Sequence[str]], dict[bool, MakeFit]],
    shown_messages: Callable[[Run], list[str]],
) -> Iterator[BenchRow]:
    """Yield a row an experiment: seconds of the whole fit, set-up included.

    Args:
        quick: Two pairs of the smallest ones.
        device: To run on; ``"cpu"`` or a CUDA device.
        make_fits: Composes an experiment with overrides; returns its fits without and with the accelerators.
        shown_messages: What the accelerators said in a run.
    """
    for name in ("sae_breast_cancer", "gan_digits") if quick else _CUT:
        fits = make_fits(name, overrides(name, device))
        pairs = 2 if quick else _MANY_PAIRS if name in _SHORT else _PAIRS
        yield _row(name, {_ARMS[0]: fits[False], _ARMS[1]: fits[True]}, pairs, shown_messages)


def _row(experiment: str, fits: dict[str, MakeFit], pairs: int, shown_messages: Callable[[Run], list[str]]) -> BenchRow:
    runs: dict[str, list[Run]] = {arm: [] for arm in _ARMS}
    for pair in range(-1, pairs):  # the first warms up
        order = list(_ARMS)
        random.Random(f"{experiment}/{pair}").shuffle(order)
        for arm in order:
            run = _measured(fits[arm], arm, pair)
            if pair >= 0:
                runs[arm].append(run)
    seconds = {arm: [run.fit_seconds for run in runs[arm]] for arm in _ARMS}
    last = runs[_ARMS[1]][-1]
    return BenchRow(
        suite="zoo",
        case=f"{experiment}, {last.steps} steps",
        variant=_ARMS[1],
        baseline=_ARMS[0],
        ratio=compare_paired(seconds[_ARMS[0]], seconds[_ARMS[1]]),
        seconds={arm: statistics.median(values) for arm, values in seconds.items()},
        note=" ".join(shown_messages(last)),
    )


def overrides(experiment: str, device: str) -> list[str]:
    """Return what is set beside the experiment: device, cuts, and the callbacks in place of those it has itself."""
    accelerator, _, index = device.partition(":")
    devices = f"trainer.devices=[{index or 0}]" if accelerator == "cuda" else "trainer.devices=1"
    # The process is one for all rows and keeps its threads.
    settings = [f"trainer.accelerator={accelerator}", devices, "compare.cold=true", *_CUT[experiment]]
    return [*settings, "callbacks=[rank_quantization,sequential_freezing]"]


def _measured(fit: MakeFit, arm: str, pair: int) -> Run:
    trainer_log = logging.getLogger("lightning.pytorch")
    level = trainer_log.level
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dozens of fits say the same
        trainer_log.setLevel(logging.ERROR)
        try:
            return measure_fit(
                fit, arm=arm, pair=pair, seed=max(0, pair), order=0, folder=Path(folder), count_flops=False
            )
        finally:
            trainer_log.setLevel(level)
