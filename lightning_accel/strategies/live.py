"""A live table of an asynchronous run in the parent process: one row a worker, the whole run below."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.live import Live
from rich.table import Table

from lightning_accel.async_sgd import Statistics

_BAR = 20  # characters of a whole bar
_WINDOW_SECONDS = 3.0  # over which a worker's rate is taken


def render(statistics: Statistics, workers: int, rates: Sequence[float] = ()) -> Table:
    """Return a row a worker with its pushes, rate and share, and what the server counts below.

    Args:
        statistics: Of the server.
        workers: Rows.
        rates: Pushes a second of each worker, where known.
    """
    caption = (
        f"step {statistics.version}, {statistics.updates_per_second:.1f} updates/s, {statistics.live_workers} live, "
        f"{statistics.restarts} restarts\n"
        f"staleness {statistics.staleness_mean:.2f} (p95 {statistics.staleness_p95:.0f}), "
        f"{statistics.dropped} dropped, {statistics.refused} refused\n"
        f"apply {statistics.apply_milliseconds:.2f} ms, pull {statistics.pull_milliseconds:.2f} ms"
    )
    table = Table(caption=caption, caption_justify="left", min_width=64)
    table.add_column("worker", justify="right")
    table.add_column("pushes", justify="right")
    table.add_column("pushes/s", justify="right")
    table.add_column("share", min_width=_BAR + 5)
    pushes = [*statistics.worker_pushes, *[0] * workers][:workers]
    for worker, count in enumerate(pushes):
        share = count / max(1, sum(pushes))
        rate = f"{rates[worker]:.1f}" if worker < len(rates) else "-"
        table.add_row(str(worker), str(count), rate, f"{'█' * round(_BAR * share)} {share:.0%}")
    return table


class Rates:
    """Pushes a second of each worker over the last seconds.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, tuple[int, ...]]] = deque()

    def of(self, pushes: tuple[int, ...]) -> list[float]:
        """Take note of the pushes so far and return the rates; empty before there are any."""
        now = self._clock()
        self._seen.append((now, pushes))
        while now - self._seen[0][0] > _WINDOW_SECONDS and len(self._seen) > 2:
            self._seen.popleft()
        then, before = self._seen[0]
        if now <= then:
            return []
        before = (*before, *[0] * len(pushes))
        return [(count - old) / (now - then) for count, old in zip(pushes, before, strict=False)]


@contextlib.contextmanager
def live_table(strategy: Any) -> Iterator[Callable[[Statistics], None]]:
    """Yield what the supervisor calls with its statistics; shows them if the strategy is ``live``."""
    shown = Live(render(Statistics(), strategy.num_processes), refresh_per_second=4) if strategy.live else None
    rates = Rates()

    def on_tick(statistics: Statistics) -> None:
        strategy.statistics = statistics
        if shown is not None:
            shown.update(render(statistics, strategy.num_processes, rates.of(statistics.worker_pushes)))

    with shown or contextlib.nullcontext():
        yield on_tick
