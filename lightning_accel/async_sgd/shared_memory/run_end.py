"""The end of a run: what its workers hand in, and how long it waits for the last of them."""

import os
import time
from collections.abc import Callable
from typing import Any

from lightning_accel.async_sgd.shared_memory.channel import Message


class RunEnd:
    """Results, files and failures of workers, and the time since the run was over.

    Args:
        straggler_grace: Seconds that workers get which still train when the run is over.
        clock: Seconds.
    """

    def __init__(self, straggler_grace: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.results: dict[int, bytes] = {}  # of workers that reported one
        self.files: dict[int, int] = {}  # descriptors that workers delivered with their results
        self.failure: Message | None = None  # of the worker that raised an exception
        self.early = False  # whether the run was ended before all epochs were through
        self._grace = straggler_grace
        self._clock = clock
        self._over_at: float | None = None
        self._coordinator_gone_at: float | None = None

    def over(self) -> None:
        """Take note that training is over for everybody."""
        self._over_at = self._over_at or self._clock()

    def coordinator_gone(self) -> None:
        """Take note that the coordinator has left, or died after the end."""
        self._coordinator_gone_at = self._coordinator_gone_at or self._clock()

    def keep_file(self, worker: int, descriptor: int) -> None:
        """Take a file over."""
        former = self.files.pop(worker, None)
        if former is not None:
            os.close(former)
        self.files[worker] = descriptor

    def forget_result(self, worker: int) -> None:
        """Drop what a worker handed in that took the run for over when it was not."""
        self.results.pop(worker, None)
        file = self.files.pop(worker, None)
        if file is not None:
            os.close(file)

    def is_overdue(self, peer: Any) -> bool:
        """Whether a worker holds up the end of a run that is over.

        The coordinator never does: what its hooks at the end take is theirs to take. Once it is gone, those who train
        still get the grace of a straggler, and the others as long for their hooks as the coordinator had for its own.
        """
        if self._over_at is None or self._coordinator_gone_at is None:
            return False
        now = self._clock()
        if not peer.done:
            return now - self._over_at > self._grace
        return now - self._coordinator_gone_at > self._grace + max(0.0, self._coordinator_gone_at - self._over_at)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self.files.values():
            os.close(descriptor)
        self.files.clear()
