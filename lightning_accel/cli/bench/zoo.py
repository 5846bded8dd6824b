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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lightning_accel.cli.compare import shown_messages
from lightning_accel.cli.compare_arms import ConfiguredFit, following_seed
from lightning_accel.cli.compose import compose
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.evidence.runs import Run, measure_fit
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


def rows(*, quick: bool, device: str) -> Iterator[BenchRow]:
    """Yield a row an experiment: seconds of the whole fit, set-up included.

    Args:
        quick: Two pairs of the smallest ones.
        device: To run on; ``"cpu"`` or a CUDA device.
    """
    for name in ("sae_breast_cancer", "gan_digits") if quick else _CUT:
        yield _row(name, pairs=2 if quick else _MANY_PAIRS if name in _SHORT else _PAIRS, device=device)


def _row(experiment: str, *, pairs: int, device: str) -> BenchRow:
    fits = _fits(experiment, device)
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


def _fits(experiment: str, device: str) -> dict[str, ConfiguredFit]:
    accelerator, _, index = device.partition(":")
    devices = f"trainer.devices=[{index or 0}]" if accelerator == "cuda" else "trainer.devices=1"
    # The process is one for all rows and keeps its threads.
    settings = [f"trainer.accelerator={accelerator}", devices, "compare.cold=true", *_CUT[experiment]]
    settings.append("callbacks=[rank_quantization,sequential_freezing]")  # whatever the experiment has itself
    cfg = compose("compare", [f"experiment={experiment}", "paths.output_dir=.", *settings])
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    seeded = following_seed(cfg)
    return {arm: ConfiguredFit(config, accelerators=arm != _ARMS[0], seeded=seeded) for arm in _ARMS}


def _measured(fit: ConfiguredFit, arm: str, pair: int) -> Run:
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
