"""Train one package's model plainly and with every accelerator, in turns and with the same seeds; write JSON rows.

`measure` is what the tests call in their own process; as a script it is what `table.py` starts, one process a package:

    python tests/thirdparty/package_run.py of_darts --pairs 6 --out darts.json
"""

import argparse
import contextlib
import importlib
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from arms import ARMS, ASYNC, PLAIN, Arm, low_rank_names, zero_rows

from lightning_accel.lightning_private.decision_line import CHANNELS
from lightning_accel.low_rank import merge
from lightning_accel.measure import compare_paired, environment, subtract_paired

STEADY = 3  # the last third of the steps is what a decision, once made, leaves


class Clock:
    """Times training batches with every callback's work in them: its two callbacks stand around the others.

    Attributes:
        seconds: Of each batch; empty where they ran in other processes.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0

    def around(self, callbacks: list[pl.Callback]) -> list[pl.Callback]:
        """Return the callbacks with the clock's before and behind them."""
        first, last = Opens(), Closes()
        first.clock = last.clock = self
        return [first, *callbacks, last]

    @property
    def step(self) -> float | None:
        """Median seconds of the last third of the steps."""
        steady = self.seconds[-max(len(self.seconds) // STEADY, 1) :]
        return statistics.median(steady) if steady else None


class Opens(pl.Callback):
    """Begins a batch."""

    clock: Clock

    def on_train_batch_start(self, *_: Any) -> None:
        self.clock._begun = time.perf_counter()


class Closes(pl.Callback):
    """Ends a batch."""

    clock: Clock

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.seconds.append(time.perf_counter() - self.clock._begun)


@dataclass
class Fit:
    """One training by the package's own call."""

    seconds: float
    step: float | None
    score: float
    said: list[str]
    low_rank: list[str]
    zero_rows: float
    trained: Any = None


@dataclass
class Row:
    """What one accelerator did to one package's model."""

    package: str
    version: str
    field: str
    model: str
    arm: str
    verdict: str
    acted_on: str = ""
    said: list[str] = field(default_factory=list)
    step_ratio: dict[str, Any] | None = None
    fit_ratio: dict[str, Any] | None = None
    metric: str = ""
    plain_score: float | None = None
    score_difference: dict[str, Any] | None = None
    saved_and_loaded: str = ""
    error: str = ""


@contextlib.contextmanager
def listening(said: list[str]) -> Iterator[None]:
    """Collect what our accelerators say: decisions, warnings of the log, warnings of Python."""

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    ear, channels = Ear(), [*map(logging.getLogger, CHANNELS), logging.getLogger("lightning_accel")]
    levels = [channel.level for channel in channels]
    for channel in channels[:-1]:
        channel.setLevel(logging.INFO)
    channels[-1].setLevel(logging.WARNING)
    for channel in channels:
        channel.addHandler(ear)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for channel, level in zip(channels, levels, strict=True):
            channel.removeHandler(ear)
            channel.setLevel(level)
    names = ("RankQuantization", "SequentialFreezing", "Projection", "IntraStreamScheduling", "async")
    said += [text for text in dict.fromkeys(str(w.message) for w in caught) if text.startswith(names)]


def fit_once(package: ModuleType, arm: Arm, seed: int) -> Fit:
    """Train by the package's own call, and score what came out by its own prediction."""
    said: list[str] = []
    clock = Clock()
    pl.seed_everything(seed, verbose=False)
    begin = time.perf_counter()
    with listening(said):
        trained = package.train(clock.around(arm.callbacks()), strategy=arm.strategy, devices=arm.devices)
    seconds = time.perf_counter() - begin
    module = package.module_of(trained)
    score = float(package.score(trained))
    return Fit(seconds, clock.step, score, said, low_rank_names(module), zero_rows(module), trained)


def saved_and_loaded(package: ModuleType, trained: Any) -> str:
    """Save, load and predict by the package's own calls; return how it went, or raise."""
    before, layers = np.asarray(package.predict(trained)), low_rank_names(package.module_of(trained))
    if not np.isfinite(before).all():
        raise ValueError("predictions are not finite")
    how = "as ever"
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as another:
        try:
            again = np.asarray(package.predict(package.reload(trained, Path(folder))))
        except Exception:  # the package rebuilds a dense module, which can not take factors: each says so differently
            if not layers:
                raise
            merge(package.module_of(trained))
            how = "after `merge`"
            again = np.asarray(package.predict(package.reload(trained, Path(another))))
    np.testing.assert_allclose(again, before, rtol=1e-3, atol=1e-3)
    return how


def measure(package: ModuleType, *, pairs: int, arms: tuple[Arm, ...] = ARMS) -> list[Row]:
    """Train ``pairs`` times plainly and with each arm, in turns, and return a row an arm."""
    fits: dict[str, list[Fit]] = {}
    errors: dict[str, str] = {}
    loaded: dict[str, str] = {}
    able = [arm for arm in arms if arm.strategy != ASYNC or not package.NO_STRATEGY]
    fit_once(package, PLAIN, 0)  # everything loads
    for pair in range(pairs):
        for arm in (PLAIN, *(able if pair % 2 == 0 else reversed(able))):
            if arm.name in errors:
                continue
            try:
                fit = fit_once(package, arm, pair)
                if pair == pairs - 1:
                    loaded[arm.name] = saved_and_loaded(package, fit.trained)
            except Exception:  # of whatever kind: it is what the row is about
                if arm is PLAIN:
                    raise
                traceback.print_exc()
                errors[arm.name] = traceback.format_exc().rstrip()
                continue
            fit.trained = None
            fits.setdefault(arm.name, []).append(fit)
    return [row_of(package, arm, fits, errors.get(arm.name, ""), loaded.get(arm.name, "")) for arm in arms]


def row_of(package: ModuleType, arm: Arm, fits: dict[str, list[Fit]], error: str, loaded: str) -> Row:
    """Judge one arm by its pairs."""
    version = importlib.metadata.version(package.DISTRIBUTION)
    row = Row(package.DISTRIBUTION, version, package.FIELD, package.MODEL, arm.name, "")
    mine, plain = fits.get(arm.name, []), fits[PLAIN.name]
    if arm.strategy == ASYNC and package.NO_STRATEGY:
        row.verdict = f"can not be given: {package.NO_STRATEGY}"
        return row
    if error:
        row.error, row.verdict = error, "crashes"
        if is_ours(error):
            row.verdict = f"refuses: {error.splitlines()[-1].split(': ', 1)[-1]}"
        return row
    last = mine[-1]
    row.said, row.saved_and_loaded, row.metric = last.said, loaded, package.METRIC
    row.acted_on = acted_on(arm, last)
    row.fit_ratio = ratio_of([f.seconds for f in plain], [f.seconds for f in mine])
    if last.step is not None:
        row.step_ratio = ratio_of([f.step for f in plain], [f.step for f in mine])
    row.plain_score = statistics.median(f.score for f in plain)
    difference = subtract_paired([f.score for f in plain], [f.score for f in mine])
    row.score_difference = asdict(difference) | {"verdict": difference.verdict}
    row.verdict = verdict_of(row)
    return row


def is_ours(error: str) -> bool:
    """Say whether a traceback ends in one of our own messages; workers' tracebacks are part of their parent's."""
    places = [line for line in error.splitlines() if line.startswith('  File "')]
    last = error.rstrip().splitlines()[-1]
    ours = bool(places) and "/lightning_accel/" in places[-1]
    return ours and last.startswith(("ValueError: ", "TypeError: ", "lightning.", "pytorch_lightning."))


def acted_on(arm: Arm, fit: Fit) -> str:
    """Name what an arm left in the module, or nothing."""
    if arm.strategy == ASYNC:
        return "workers"
    if fit.low_rank:
        return f"{len(fit.low_rank)} low-rank layers"
    if "Projection" in arm.name and fit.zero_rows:
        return f"{fit.zero_rows:.0%} of rows are zero"
    scheduled = [line for line in fit.said if line.startswith("IntraStreamScheduling: ") and "padded" in line]
    return "recurrent layers" if scheduled else ""


def ratio_of(plain: list[float], mine: list[float]) -> dict[str, Any]:
    ratio = compare_paired(plain, mine)
    return asdict(ratio) | {"verdict": ratio.verdict}


def verdict_of(row: Row) -> str:
    """Say what came of it; six pairs are the fewest that decide anything."""
    if not row.acted_on:
        return "stands aside"
    time_words = {"no difference": "no speed-up", "undecided": "too few pairs for a verdict on time"}
    score_words = {"higher": "worse", "lower": "better", "undecided": "undecided"}
    ratio, difference = row.step_ratio or row.fit_ratio, row.score_difference
    assert ratio is not None
    assert difference is not None
    speed = time_words.get(ratio["verdict"], ratio["verdict"])
    return f"acts: {speed}, {row.metric} {score_words.get(difference['verdict'], 'not shown to differ')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", help="a module of tests/thirdparty/packages, such as of_darts")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    out = given.out.resolve()
    package = importlib.import_module(f"packages.{given.package}")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # some packages write where they are
        rows = [asdict(row) for row in measure(package, pairs=given.pairs)]
    out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
