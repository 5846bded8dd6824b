"""A live table of an asynchronous run in the parent process: one row a worker."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.live import Live
from rich.table import Table

from lightning_accel.async_sgd import Statistics


def render(statistics: Statistics, workers: int) -> Table:
    """Return one row a worker with its pushes and share, and the whole run in the title."""
    title = (
        f"step {statistics.version}, {statistics.updates_per_second:.1f} updates/s, "
        f"staleness {statistics.staleness_mean:.2f} (p95 {statistics.staleness_p95:.0f}), "
        f"{statistics.live_workers} live, {statistics.dropped} dropped, {statistics.restarts} restarts"
    )
    table = Table(title=title)
    table.add_column("worker")
    table.add_column("pushes", justify="right")
    table.add_column("share", justify="right")
    pushes = [*statistics.worker_pushes, *[0] * workers][:workers]
    for worker, count in enumerate(pushes):
        table.add_row(str(worker), str(count), f"{count / max(1, sum(pushes)):.0%}")
    return table


@contextlib.contextmanager
def live_table(strategy: Any) -> Iterator[Callable[[Statistics], None]]:
    """Yield what the supervisor calls with its statistics; shows them if the strategy is ``live``."""
    shown = Live(render(Statistics(), strategy.num_processes), refresh_per_second=4) if strategy.live else None

    def on_tick(statistics: Statistics) -> None:
        strategy.statistics = statistics
        if shown is not None:
            shown.update(render(statistics, strategy.num_processes))

    with shown or contextlib.nullcontext():
        yield on_tick
