"""How long a cold start of the command line takes: help, and ``train`` up to its first step beside a plain script.

Every start is a process of its own; commands and peers take turns. What limits a start is a time, so rows without a
peer stand against that time: a ratio of 1 is the limit.
"""

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from typing_extensions import override

from lightning_accel.evidence.rows import BenchRow
from lightning_accel.measure import compare_paired

_HELP_SECONDS, _TRAIN_SECONDS = 0.5, 1.0  # of a help; of `train` more than a plain script, to the end of the first step
_SCRIPT, _TRAIN = "a plain script", "lightning-accel train"
_ACCELERATED = f"{_TRAIN} callbacks=[rank_quantization,l1inf_projection]"
_HELP = {"lightning-accel --help": ["--help"], "lightning-accel train --help": ["train", "--help"]}
_PLAIN_SCRIPT = """
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger

from lightning_accel.bench.suites.cli import StopAfterFirstStep
from lightning_accel.zoo import MLP, Digits

seed_everything(1, workers=True)
callbacks = [RichProgressBar(), ModelCheckpoint("plain", save_last=True), StopAfterFirstStep()]
Trainer(max_epochs=5, accelerator="cpu", callbacks=callbacks, logger=CSVLogger("plain")).fit(MLP(), Digits())
"""


class StopAfterFirstStep(Callback):
    """Ends the process when the first training step is over, so that nothing behind it is timed."""

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        """Exit at once."""
        os._exit(0)


def rows(*, quick: bool) -> Iterator[BenchRow]:
    """Yield a row for each help, and for ``train`` without and with accelerators.

    Args:
        quick: One start of each in the place of ten.

    Raises:
        RuntimeError: If a start fails; the message holds what it printed.
    """
    stop = "+callbacks.stop._target_=lightning_accel.bench.suites.cli.StopAfterFirstStep"
    train = ["-m", "lightning_accel", "train", "trainer.accelerator=cpu", stop]
    commands = {name: ["-m", "lightning_accel", *words] for name, words in _HELP.items()} | {
        _SCRIPT: ["-c", _PLAIN_SCRIPT],
        _TRAIN: train,
        _ACCELERATED: [*train, "callbacks=[rank_quantization,l1inf_projection]"],
    }
    seconds = _started_in_turns(commands, rounds=1 if quick else 10, warmups=0 if quick else 1)
    for name in _HELP:
        yield _row(name, f"{_HELP_SECONDS:g} s", [_HELP_SECONDS] * len(seconds[name]), seconds[name])
    script = statistics.median(seconds[_SCRIPT])
    for name in (_TRAIN, _ACCELERATED):
        more = statistics.median(t - s for t, s in zip(seconds[name], seconds[_SCRIPT], strict=True))
        note = f"a plain script takes {script:.2f} s to the end of its first step; this takes {more:+.2f} s more"
        limit = [taken + _TRAIN_SECONDS for taken in seconds[_SCRIPT]]
        yield _row(name, f"{_SCRIPT} and {_TRAIN_SECONDS:g} s", limit, seconds[name], note)


def _row(name: str, limit: str, allowed: Sequence[float], taken: Sequence[float], note: str = "") -> BenchRow:
    return BenchRow(
        suite="cli",
        case="cold start, to the end of the first step" if note else "cold start",
        variant=name,
        baseline=limit,
        ratio=compare_paired(allowed, taken),
        seconds={limit: statistics.median(allowed), name: statistics.median(taken)},
        target=1.0,
        note=note,
    )


def _started_in_turns(commands: dict[str, list[str]], *, rounds: int, warmups: int) -> dict[str, list[float]]:
    """Return the seconds of every start, from before the process is made until it is gone."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(-warmups, rounds):
        order = list(commands)
        random.Random(f"cli/{number}").shuffle(order)
        for name in order:
            with tempfile.TemporaryDirectory() as folder:
                taken = _started(commands[name], Path(folder))
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def _started(words: Sequence[str], folder: Path) -> float:
    environment = os.environ | {"XDG_CACHE_HOME": str(folder)}  # of measured times: a first run has none
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    taken = time.perf_counter() - began
    if done.returncode != 0:
        raise RuntimeError(f"`{' '.join(words[:3])}` ended with {done.returncode}: {done.stdout}{done.stderr}")
    return taken
