"""Random small LightningModules under every accelerator: as plain training where it is neutral, trained where not.

``python tests/fuzz/modules.py --count 2000`` draws 2,000 modules and prints what it found, under every entry of
`accelerators_table.TABLE` or the one that ``--accelerator`` names; ``--workers`` divides the work. Accelerators that
need processes see one module of twenty. ``--start 500 --count 500`` draws the second quarter of the same modules. A new
accelerator is one entry more in the table.
"""

import argparse
import logging
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial

import torch
from accelerators_table import TABLE, Fit
from lightning.fabric.utilities.exceptions import MisconfigurationException
from random_modules import Moved, fit

from lightning_accel.async_sgd import WorkerFailedError

REFUSALS = (
    "no layer of",
    "can be factored",
    "found no parameter",
    "found no recurrent",
    "holds NaN",
    "which a parameter server cannot",
)


def run(seed, callbacks, **settings):
    """Fit the module of a seed and return it with what moved."""
    moved = Moved()
    module, trainer = fit(seed, callbacks, trace=[moved], **settings)
    return Fit(seed, module, trainer, moved)


def differences(plain, within, neutral):
    """Say what differs between two modules that must be equal bit for bit, or within a bound that has its reason."""
    one, other = plain.module.state_dict(), neutral.module.state_dict()
    if list(one) != list(other):
        return [f"other keys: {sorted(set(one) ^ set(other))[:3]}"]
    same = {k: torch.allclose(one[k], other[k], 0.0, within, equal_nan=True) for k in one}
    return [f"`{name}` differs" for name, equal in same.items() if not equal]


def check(accelerator, seed):
    """Return what is wrong with a seed, and what happened: the last words of a line of the summary."""
    entry = TABLE[accelerator]
    plain = _plain(seed)
    if plain is None:
        return [], "plain fails"
    wrong, _ = _try(seed, entry.neutral, partial(differences, plain, entry.within(plain)), entry.settings(real=False))
    found = [f"neutral: {text}" for text in wrong]
    wrong, ours = _try(seed, entry.real, partial(entry.problems, plain), entry.settings(real=True))
    found += [f"real: {text}" for text in wrong]
    if ours is None:
        return found, "failed" if wrong else "refused"
    return found, "acted" if entry.acted(ours.module) else "left as it was"


@lru_cache(maxsize=20)
def _plain(seed):
    """Fit without callbacks, once for all accelerators that are held against it; None if the module can not train."""
    try:
        return run(seed, [])
    except Exception:  # no question to us
        return None


def _try(seed, make, problems, settings):
    """Fit with callbacks; return what is wrong, and the fit, or None where it was refused or failed."""
    try:
        ours = run(seed, make(seed), **settings)
        return problems(ours), ours
    except Exception as problem:
        refusal = isinstance(problem, (MisconfigurationException, ValueError, WorkerFailedError))
        refused = refusal and any(words in str(problem) for words in REFUSALS)
        return [] if refused else [_where(problem)], None


def _where(problem):
    frames = [f"{os.path.basename(f.filename)}:{f.lineno}" for f in traceback.extract_tb(problem.__traceback__)]
    return f"{type(problem).__name__}: {str(problem)[:300]} ({', '.join(frames[-3:])})"


def quiet():
    """One thread, nothing printed."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_accel"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def look(accelerator, seeds, workers):
    """Check modules, print what is wrong and a summary; return how many are wrong."""
    seeds = [seed for seed in seeds if seed % TABLE[accelerator].every == 0]
    begin, happened, wrong = time.monotonic(), Counter(), 0
    with ProcessPoolExecutor(workers, initializer=quiet) as pool:
        work = pool.map if workers > 1 else map
        for seed, (found, what) in zip(seeds, work(partial(check, accelerator), seeds), strict=True):
            happened[what] += 1
            wrong += bool(found)
            for text in found:
                print(f"{accelerator}, module {seed}: {text}", flush=True)
    seconds = time.monotonic() - begin
    outcomes = ", ".join(f"{count} {what}" for what, count in happened.most_common())
    print(f"{accelerator}: {len(seeds)} modules in {seconds:.0f} s ({outcomes}): {wrong} with a difference", flush=True)
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="modules to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the first module of all")
    parser.add_argument("--start", type=int, default=0, help="modules to leave out, which an earlier run has drawn")
    parser.add_argument("--accelerator", default="all", choices=["all", *sorted(TABLE)])
    parser.add_argument("--workers", type=int, default=1, help="processes")
    given = parser.parse_args()
    quiet()
    first = given.seed + given.start
    names = TABLE if given.accelerator == "all" else [given.accelerator]
    wrong = sum(look(name, range(first, first + given.count), given.workers) for name in names)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
