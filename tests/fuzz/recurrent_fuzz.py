"""Modules with loops over cells, drawn at random, trained with and without IntraStreamScheduling.

Losses, all gradients, what the modules note, and the weights at the end must agree within rounding, over several
batches of changing sizes. One command: ``python tests/fuzz/recurrent_fuzz.py --modules 5000 --workers 2``. A seed alone
decides a module: ``--start N`` goes on where another run ended, ``--start SEED --modules 1`` shows a difference again.
Of every 25 modules one that ran scheduled is timed, on a longer sequence, with and without.
"""

import argparse
import logging
import math
import multiprocessing
import statistics
import sys
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor

import torch
from lightning.pytorch import Callback, Trainer
from recurrent_cells import FEATURES
from recurrent_modules import FuzzModule, draw
from torch.utils.data import DataLoader

from lightning_accel.callbacks import IntraStreamScheduling

SHAPES = ((3, 6), (3, 9), (2, 7), (4, 8), (3, 9))  # streams and steps of each batch
TIMED = ((4, 64),) * 8
PART = 25  # modules of one piece of work, of which one is timed


def fit(spec, callbacks, shapes=SHAPES):
    """Train a module; return it, or what the training raised."""
    module = FuzzModule(spec)
    generator = torch.Generator().manual_seed(spec["seed"] % 997)
    batches = [torch.randn(b, t, FEATURES, generator=generator, dtype=torch.double) for b, t in shapes]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    torch.manual_seed(spec["seed"])
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        accumulate_grad_batches=spec["accumulate"],
        **quiet,
    )
    try:
        trainer.fit(module, DataLoader(batches, batch_size=None))
    except Exception as error:
        return module, error
    return module, None


def compare(spec):
    """Return whether some loop ran scheduled, and what differs, empty if nothing does."""
    plain, failure = fit(spec, [])
    callback = IntraStreamScheduling(spec["schedule"])
    other, error = fit(spec, [callback])
    gained = any("chains of" in line for line in callback.report)
    if failure is not None:
        same = error is None or type(error) is type(failure)  # a write into what a step saved ends the plain loop only
        return gained, "" if same else f"the plain fit raises {failure!r}, the other one {error!r}"
    if error is not None:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return gained, f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
    close = 1e-7 if spec["precision"] == "64-true" and spec["around"] != "autocast" else 2e-3
    for name in ("losses", "noted"):
        a, b = getattr(plain, name), getattr(other, name)
        if len(a) != len(b):
            return gained, f"{len(b)} {name}, plain {len(a)}"
        for k, (p, q) in enumerate(zip(a, b, strict=True)):
            if not (abs(p - q) <= close * (1 + abs(p)) or p == q or (math.isnan(p) and math.isnan(q))):
                return gained, f"{name}[{k}]: {q}, plain {p}"
    for k, (a, b) in enumerate(zip(plain.gradients, other.gradients, strict=True)):
        for name, p in a.items():
            q = b[name]
            if (p is None) != (q is None):
                return gained, f"gradient of {name} in batch {k}: {'None' if q is None else 'there'}, plain not so"
            if p is not None and not torch.allclose(p, q, rtol=close, atol=close, equal_nan=True):
                return gained, f"gradient of {name} in batch {k} is off by {float((p - q).abs().max()):.1e}"
    for (name, p), q in zip(plain.state_dict().items(), other.state_dict().values(), strict=True):
        if not torch.allclose(p.double(), q.double(), rtol=close, atol=10 * close, equal_nan=True):
            return gained, f"{name} at the end is off by {float((p - q).abs().max()):.1e}"
    left = [name for name, m in other.named_modules() if "forward" in m.__dict__]
    return gained, f"`forward` is left on {left}" if left else ""


def run(seeds, verbose=False):
    """Compare the modules of many seeds; return how many gained and the differences by seed."""
    gained, wrong = 0, {}
    for seed in seeds:
        spec = draw(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            better, problem = compare(spec)
        gained += better
        if problem:
            wrong[seed] = problem
            if verbose:
                print(f"seed {seed}: {problem}\n    {spec}", flush=True)
    return gained, wrong


def timed_gain(seed):
    """Return how many times faster steps of a longer sequence are with schedules; ``None`` if none runs scheduled."""
    spec = {**draw(seed), "schedule": "intra_stream"}
    seconds = {}
    for arm in ("plain", "scheduled"):
        callback = IntraStreamScheduling(spec["schedule"])
        clock = _Clock()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(spec, [*([callback] if arm == "scheduled" else []), clock], shapes=TIMED)
        if arm == "scheduled" and not any("chains of" in line for line in callback.report):
            return None
        seconds[arm] = min(clock.seconds[-4:], default=None)
    return None if None in seconds.values() else seconds["plain"] / seconds["scheduled"]


class _Clock(Callback):
    def __init__(self):
        self.seconds, self._begun = [], 0.0

    def on_train_batch_start(self, *_):
        self._begun = time.process_time()

    def on_train_batch_end(self, *_):
        self.seconds.append(time.process_time() - self._begun)


def quiet():
    """Set up a process that runs modules."""
    for name in ("lightning.pytorch", "lightning_accel"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)


def part(seeds):
    """Run a part of the modules, and time the first that ran scheduled; return what `run` does and the gain."""
    gained, wrong, gains = 0, {}, []
    for seed in seeds:
        better, found = run([seed], verbose=True)
        gained, wrong = gained + better, {**wrong, **found}
        if better and not gains and (gain := timed_gain(seed)) is not None:
            gains.append(gain)
    return len(seeds), gained, wrong, gains


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", type=int, default=5000)
    parser.add_argument("--start", type=int, default=0, help="seed of the first module")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    begun, done, gained, wrong, gains = time.monotonic(), 0, 0, {}, []
    stop = arguments.start + arguments.modules
    parts = [range(k, min(k + PART, stop)) for k in range(arguments.start, stop, PART)]
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn"), quiet) as pool:
        for count, more, found, timed in pool.map(part, parts):
            done, gained, wrong, gains = done + count, gained + more, {**wrong, **found}, gains + timed
            seconds = time.monotonic() - begun
            print(f"{done} modules, {gained} ran scheduled, {len(wrong)} differ, {seconds:.0f} s", flush=True)
    if gains:
        print(f"{len(gains)} timed on {TIMED[0][1]} steps: median {statistics.median(gains):.2f} times the plain steps")
    for seed, problem in sorted(wrong.items()):
        print(f"seed {seed}: {problem}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
