"""Which factor group would rest when."""

from collections.abc import Sized

from rich.table import Table

from lightning_accel.callbacks.sequential_freezing.callback import SequentialFreezing
from lightning_accel.cli.errors import UsageError
from lightning_accel.cli.plan import Scene
from lightning_accel.low_rank import FreezingSchedule

_SHOWN = 12  # phases; those that follow repeat them
_UNKNOWN_LENGTH = 100  # epochs or steps that are looked at where the configuration does not say how long training is


def sketch(scene: Scene) -> None:
    """Print the phases of the schedule.

    Raises:
        UsageError: If the schedule needs the length of the training and that is not known.
    """
    schedule = SequentialFreezing(**scene.settings).schedule
    unit = "step" if schedule.counts_steps else "epoch"
    total = _length(scene, schedule)
    if schedule.final_trainable and total is None:
        raise UsageError("`callbacks.sequential_freezing.final_trainable` needs trainer.max_epochs.")
    if schedule.mode == "adaptive":
        scene.console.print("Factors rest once they hardly move any more; when that is, only training shows.")
        return
    phases = frozen_phases(schedule, total)
    table = Table(f"{unit}s", "group that rests")
    for first, last, group in phases[:_SHOWN]:
        table.add_row(f"{first}-{last}", "none" if group is None else str(group))
    scene.console.print(table)
    if len(phases) > _SHOWN:
        scene.console.print(f"and {len(phases) - _SHOWN} more phases", markup=False)
    scene.console.print(
        "Groups: factor_out / factor_in, or both 1x1 factors / the core; the costlier one is group 0. Turns of two "
        "groups save at most a sixth of what low-rank layers take.",
        markup=False,
        soft_wrap=True,
    )


def frozen_phases(schedule: FreezingSchedule, total: int | None) -> list[tuple[int, int, int | None]]:
    """Return ``(first, last, group)`` of every phase, in the unit of the schedule, both ends included."""
    phases: list[tuple[int, int, int | None]] = []
    for now in range(_UNKNOWN_LENGTH if total is None else total):
        group = schedule.frozen_group(epoch=now, step=now, total=total)
        if phases and phases[-1][2] == group:
            phases[-1] = (phases[-1][0], now, group)
        else:
            phases.append((now, now, group))
    return phases


def _length(scene: Scene, schedule: FreezingSchedule) -> int | None:
    if scene.epochs is None or scene.epochs < 0:
        return None
    loader = scene.trainer.train_dataloader
    if not schedule.counts_steps:
        return scene.epochs
    return scene.epochs * len(loader) if isinstance(loader, Sized) else None
