"""Random small LightningModules under every accelerator: as plain training where it is neutral, trained where not.

``python tests/fuzz/modules.py --count 2000 --seed 0`` draws 2,000 modules and prints what it found; ``--accelerator``
names an entry of `accelerators_table.TABLE`, ``--workers`` divides the work. A new accelerator is one entry more there.
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
from functools import partial

import torch
from accelerators_table import TABLE, Fit
from lightning.fabric.utilities.exceptions import MisconfigurationException
from random_modules import Moved, fit

REFUSALS = ("no layer of", "can be factored", "found no parameter", "found no recurrent", "holds NaN")


def run(seed, callbacks):
    """Fit the module of a seed and return it with what moved."""
    moved = Moved()
    module, trainer = fit(seed, callbacks, trace=[moved])
    return Fit(seed, module, trainer, moved)


def differences(plain, neutral):
    """Say what differs between two modules that must be equal bit for bit."""
    one, other = plain.module.state_dict(), neutral.module.state_dict()
    if list(one) != list(other):
        return [f"other keys: {sorted(set(one) ^ set(other))[:3]}"]
    same = {k: torch.equal(one[k], other[k]) or bool((one[k].isnan() & other[k].isnan()).all()) for k in one}
    return [f"`{name}` differs" for name, equal in same.items() if not equal]


def check(accelerator, seed):
    """Return what is wrong with a seed, and what happened: the last words of a line of the summary."""
    entry = TABLE[accelerator]
    try:
        plain = run(seed, [])
    except Exception:  # a module that can not train is no question to us
        return [], "plain fails"
    wrong, _ = _try(seed, entry.neutral, partial(differences, plain))
    found = [f"neutral: {text}" for text in wrong]
    wrong, ours = _try(seed, entry.real, partial(entry.problems, plain))
    found += [f"real: {text}" for text in wrong]
    if ours is None:
        return found, "failed" if wrong else "refused"
    return found, "acted" if entry.acted(ours.module) else "left as it was"


def _try(seed, make, problems):
    """Fit with callbacks; return what is wrong, and the fit, or None where it was refused or failed."""
    try:
        ours = run(seed, make(seed))
        return problems(ours), ours
    except (MisconfigurationException, ValueError) as problem:
        refused = any(words in str(problem) for words in REFUSALS)
        return [] if refused else [_where(problem)], None
    except Exception as problem:
        return [_where(problem)], None


def _where(problem):
    frames = [f"{os.path.basename(f.filename)}:{f.lineno}" for f in traceback.extract_tb(problem.__traceback__)]
    return f"{type(problem).__name__}: {str(problem)[:300]} ({', '.join(frames[-3:])})"


def quiet():
    """One thread, nothing printed."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_accel"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="modules to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the first module")
    parser.add_argument("--accelerator", default="low_rank", choices=sorted(TABLE))
    parser.add_argument("--workers", type=int, default=1, help="processes")
    given = parser.parse_args()
    quiet()
    seeds, begin, happened, wrong = range(given.seed, given.seed + given.count), time.monotonic(), Counter(), 0
    with ProcessPoolExecutor(given.workers, initializer=quiet) as pool:
        work = pool.map if given.workers > 1 else map
        for seed, (found, what) in zip(seeds, work(partial(check, given.accelerator), seeds), strict=True):
            happened[what] += 1
            wrong += bool(found)
            for text in found:
                print(f"seed {seed}: {text}", flush=True)
    seconds = time.monotonic() - begin
    outcomes = ", ".join(f"{count} {what}" for what, count in happened.most_common())
    print(f"{given.accelerator}: {given.count} modules in {seconds:.0f} s ({outcomes}): {wrong} with a difference")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
