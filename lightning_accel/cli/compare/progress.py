"""Progress of a comparison: a bar with an estimate on a terminal, a line a run elsewhere."""

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_accel.evidence.measured_runs.ledger import RunLedger
from lightning_accel.evidence.measured_runs.pairs import Step
from lightning_accel.evidence.measured_runs.runs import Run


class RunProgress:
    """Shows which run is under way and how long the rest will take, from the times of the runs so far.

    Args:
        console: Where to.
        arms: Names of the arms.
        pairs: Complete pairs to reach.
        ledger: Rows that are there already count as done.
    """

    def __init__(self, console: Console, arms: Sequence[str], pairs: int, ledger: RunLedger) -> None:
        self._console = console
        self._arms = len(arms)
        self._pairs = pairs
        self._done_before = len(ledger.complete_pairs(arms)[arms[0]])
        self._left = dict.fromkeys(arms, pairs - self._done_before + 1)
        self._seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        self._pair = self._done_before
        self._last_pair = -1
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            refresh_per_second=2,  # redrawing must not disturb the clock of the run
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=sum(self._left.values()), left="")

    def __enter__(self) -> "RunProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def before_run(self, step: Step) -> None:
        """Say what starts now."""
        if step.pair >= 0 and step.pair != self._last_pair:
            self._pair, self._last_pair = self._pair + 1, step.pair
        what = "warm-up" if step.pair < 0 else f"pair {self._pair} of {self._pairs}"
        self._what = f"{what}, {step.arm}"
        self._bar.update(self._task, description=self._what)

    def after_run(self, run: Run) -> None:
        """Count it and estimate the rest."""
        self._left[run.arm] -= 1
        if not run.is_warmup:  # shorter than the others
            self._seconds[run.arm].append(run.fit_seconds)
        self._bar.update(self._task, advance=1, left=self.estimate())
        if not self._console.is_terminal:
            line = f"{self._what}: {run.fit_seconds:.2f} s. {self.estimate()}".rstrip()
            self._console.print(line, markup=False, soft_wrap=True)

    def estimate(self) -> str:
        """Return the time that is left in words; nothing before the first pair is complete."""
        if not all(self._seconds.values()):
            return ""
        seconds = sum(left * self._mean(arm) for arm, left in self._left.items())
        minutes, rest = divmod(round(seconds), 60)
        return f"about {minutes}:{rest:02d} left" if seconds >= 1.0 else ""

    def _mean(self, arm: str) -> float:
        return sum(self._seconds[arm]) / len(self._seconds[arm])
