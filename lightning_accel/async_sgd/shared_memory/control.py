"""The page of words through which server and workers tell each other small things without a message."""

from lightning_accel.async_sgd.shared_memory.memory import Segment, fence

# words of the page; from `_FIRST` on each worker has a line of its own
_STOP, _COORDINATOR, _LIVE, _GENERATION, _FIRST = 0, 1, 2, 3, 8
# words of a worker's line, which fills a cache line
_HEARTBEAT, _ACKNOWLEDGED, _WAITING, _PROGRESS, _LIMIT, _LINE = 0, 1, 2, 3, 4, 8
OUTCOMES = ("applied", "dropped", "refused", "committed", "assigned")


class ControlPage:
    """Who coordinates, whether the run is over, and of each worker its heartbeat, progress and last acknowledged push.

    Each word has one writer at a time and is written at once, so nobody can hold it up.

    Args:
        workers: Number of workers, >= 1.
        fd: Descriptor of an existing page.
    """

    def __init__(self, workers: int, fd: int | None = None) -> None:
        self.segment = Segment(8 * (_FIRST + _LINE * workers), fd)
        self._words = self.segment.words(0, self.segment.nbytes)

    @property
    def stopped(self) -> bool:
        """Whether the run is over for everybody."""
        return bool(self._words[_STOP])

    def stop(self) -> None:
        """End the run for everybody."""
        self._words[_STOP] = 1

    @property
    def coordinator(self) -> int:
        """Number of the worker that validates, checkpoints and reports."""
        return self._words[_COORDINATOR]

    @coordinator.setter
    def coordinator(self, worker: int) -> None:
        self._words[_COORDINATOR] = worker

    @property
    def live(self) -> int:
        """Workers taking part."""
        return self._words[_LIVE]

    @live.setter
    def live(self, workers: int) -> None:
        self._words[_LIVE] = workers

    @property
    def generation(self) -> int:
        """How often layers of the model were exchanged."""
        return self._words[_GENERATION]

    @generation.setter
    def generation(self, times: int) -> None:
        self._words[_GENERATION] = times

    def heartbeat(self, worker: int) -> int:
        """How often the worker's heart has beaten."""
        return self._words[_FIRST + _LINE * worker + _HEARTBEAT]

    def beat(self, worker: int) -> None:
        """Beat once."""
        self._words[_FIRST + _LINE * worker + _HEARTBEAT] += 1

    def acknowledged(self, worker: int) -> tuple[int, str]:
        """Return the number of the worker's last push that was dealt with, and what became of it."""
        sequence, outcome = divmod(self._words[_FIRST + _LINE * worker + _ACKNOWLEDGED], len(OUTCOMES))
        return sequence, OUTCOMES[outcome]

    def acknowledge(self, worker: int, sequence: int, outcome: str) -> bool:
        """Tell a worker what became of a push; returns whether it has to be woken up."""
        line = _FIRST + _LINE * worker
        self._words[line + _ACKNOWLEDGED] = sequence * len(OUTCOMES) + OUTCOMES.index(outcome)
        fence()
        return self.is_waiting(worker)

    def is_waiting(self, worker: int) -> bool:
        """Whether the worker sleeps until its push is acknowledged."""
        return bool(self._words[_FIRST + _LINE * worker + _WAITING])

    def wait(self, worker: int, *, waiting: bool) -> None:
        """Announce that this worker is about to sleep (look at `acknowledged` once more then), or is awake again."""
        self._words[_FIRST + _LINE * worker + _WAITING] = int(waiting)
        fence()

    def progress(self, worker: int) -> tuple[int, float]:
        """Return how often the worker has got on, and the seconds that it may take now (inf: any; 0: unknown)."""
        line = _FIRST + _LINE * worker
        limit = self._words[line + _LIMIT]
        return self._words[line + _PROGRESS], {0: float("inf"), -1: 0.0}.get(limit, limit / 1000)

    def get_on(self, worker: int, limit: float) -> None:
        """Say that the worker has got on, and how many seconds the next thing may take (inf: any; 0: unknown)."""
        line = _FIRST + _LINE * worker
        milliseconds = 0 if limit == float("inf") else max(1, round(1000 * limit))
        self._words[line + _LIMIT] = -1 if limit == 0.0 else milliseconds
        self._words[line + _PROGRESS] += 1

    def clear(self, worker: int) -> None:
        """Forget what a former incarnation of a worker left; its heart goes on from where it stopped."""
        line = _FIRST + _LINE * worker
        for word in (_ACKNOWLEDGED, _WAITING, _LIMIT):
            self._words[line + word] = 0

    def close(self) -> None:
        """Give up the descriptor."""
        self.segment.close()
