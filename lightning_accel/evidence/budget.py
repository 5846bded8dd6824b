"""Where the wall-clock time of a fit goes, part by part."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_accel.evidence.measured_runs.runs import Run

SETUP, CALLBACKS, VALIDATION, LOADING, REST = (
    "before the first step",
    "callbacks: measure, switch",
    "validation",
    "waiting for data",
    "between epochs, other",
)


@dataclass(frozen=True)
class Share:
    """One part of a fit.

    Attributes:
        name: Of the part.
        note: Of a stage, how many steps of which length.
        seconds: Mean over the arm's runs, so that an arm's parts add up to its mean fit.
        is_training: Whether it is a stage of training.
    """

    name: str
    note: str
    seconds: float
    is_training: bool = False


def time_budget(runs: Sequence[Run]) -> list[Share]:
    """Split the mean fit of an arm into its parts, in the order in which they begin.

    Training is told apart by what was trained: a model that becomes smaller, or freezes a part of itself, begins
    another stage.

    Raises:
        ValueError: If there is no run.
    """
    if not runs:
        raise ValueError("`runs` must hold at least one run.")
    stages = _stages(runs)
    outside = {
        SETUP: [run.setup_seconds or 0.0 for run in runs],
        CALLBACKS: [run.callback_seconds or 0.0 for run in runs],
        VALIDATION: [run.validation_seconds for run in runs],
        LOADING: [run.loading_seconds for run in runs],
    }
    named = sum(share.seconds for share in stages) + sum(statistics.fmean(values) for values in outside.values())
    rest = statistics.fmean(run.fit_seconds for run in runs) - named
    parts = {name: statistics.fmean(values) for name, values in outside.items()} | {REST: max(0.0, rest)}
    first, *others = (Share(name, "", seconds) for name, seconds in parts.items())
    return [first, *stages, *others]


def _stages(runs: Sequence[Run]) -> list[Share]:
    """Put the stages of several runs together by their place; ranks may differ a little from run to run."""
    most = max(len(run.stages) for run in runs)
    shares = []
    for place in range(most):
        mine = [run.stages[place] for run in runs if place < len(run.stages)]
        seconds = sum(stage["seconds"] for stage in mine)
        steps = sum(stage["steps"] for stage in mine)
        size, trained = (statistics.median(stage[key] for stage in mine) for key in ("parameters", "trained"))
        name = f"training {_count(trained)}{f' of {_count(size)}' if trained < size else ''} parameters"
        note = f"{steps / len(runs):.0f} steps of {1e3 * seconds / max(1, steps):.1f} ms"
        shares.append(Share(name, note, seconds / len(runs), is_training=True))
    return shares


def _count(parameters: float) -> str:
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if parameters >= scale:
            return f"{parameters / scale:.2f}{unit}" if parameters < 100 * scale else f"{parameters / scale:.0f}{unit}"
    return f"{parameters:.0f}"


def write_budgets(runs: Mapping[str, Sequence[Run]]) -> dict[str, list[Share]]:
    """Return the budget of every arm; nothing if no arm saw a step, because the training ran in other processes."""
    if not any(run.stages for arm in runs.values() for run in arm):
        return {}
    return {arm: time_budget(arm_runs) for arm, arm_runs in runs.items()}
