"""Run the arms of a comparison in turns, pair by pair."""

import contextlib
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from lightning_accel.evidence.measured_runs.ledger import RunLedger
from lightning_accel.evidence.measured_runs.runs import Run
from lightning_accel.evidence.measured_runs.workers import Arm, ArmWorker


class Step(NamedTuple):
    """One planned run: which arm, in which pair (-1: warm-up), at which place of it."""

    arm: str
    pair: int
    order: int


def schedule(arms: Sequence[str], *, pairs: int, first_pair: int = 0, seed: int = 0) -> list[Step]:
    """Plan the runs: one warm-up an arm, then pairs, the order within each shuffled.

    Raises:
        ValueError: If ``pairs < 1``, or there are fewer than two arms, or two of one name.
    """
    if pairs < 1:
        raise ValueError(f"`pairs` must be >= 1, got {pairs}; 6 is the least that can decide.")
    if len(arms) < 2 or len(set(arms)) < len(arms):
        raise ValueError(f"`arms` must be two or more of different names, got {list(arms)}.")
    steps = [Step(arm, -1, place) for place, arm in enumerate(arms)]
    for pair in range(first_pair, first_pair + pairs):
        order = list(arms)
        random.Random(f"{seed}/{pair}").shuffle(order)
        steps += [Step(arm, pair, place) for place, arm in enumerate(order)]
    return steps


def run_pairs(
    arms: Sequence[Arm],
    ledger: RunLedger,
    *,
    pairs: int,
    seed: int = 0,
    before_run: Callable[[Step], None] = lambda _: None,
    after_run: Callable[[Run], None] = lambda _: None,
) -> dict[str, str | int]:
    """Run what is missing for ``pairs`` complete pairs; append each run to ``ledger`` as soon as it is measured.

    One process an arm, one of them busy at a time. All arms of pair i run with the seed ``seed + i``.

    Args:
        arms: Two or more, the baseline first.
        ledger: Receives the runs.
        pairs: Complete pairs to reach, those already in ``ledger`` included.
        seed: Of the first pair and of the order.
        before_run: Called before each run.
        after_run: Called after each run, when its row is on disk.

    Returns:
        The environment block of the workers.

    Raises:
        WorkerError: If a run failed or a process died; finished rows stay in the ledger.
        ValueError: See `schedule`.
    """
    names = [arm.name for arm in arms]
    missing = pairs - len(ledger.complete_pairs(names)[names[0]])
    first_pair = ledger.next_pair()
    steps = schedule(names, pairs=max(1, missing), first_pair=first_pair, seed=seed)
    with contextlib.ExitStack() as stack:
        workers = {arm.name: stack.enter_context(ArmWorker(arm, log=log_path(ledger.folder, arm))) for arm in arms}
        environment = workers[names[0]].describe()
        for step in steps if missing > 0 else []:
            before_run(step)
            run = workers[step.arm].run(
                pair=step.pair,
                seed=seed + max(0, step.pair),
                order=step.order,
                fingerprint=ledger.fingerprint,
                count_flops=step.pair == first_pair,  # slows a few steps of one pair, the same in every arm
            )
            ledger.append(run)
            after_run(run)
    return environment


def log_path(folder: Path, arm: Arm) -> Path:
    """Return where the process of ``arm`` writes what it prints."""
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '_', arm.name)}.log"
