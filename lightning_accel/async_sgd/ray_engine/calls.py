"""A worker's calls of the head, and the thread that shows the head that it lives."""

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from lightning_accel.async_sgd.policy.pace import Pace
from lightning_accel.async_sgd.ray_engine.messages import pack_request, unpack_answer
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.shared_memory.channel import Message
from lightning_accel.async_sgd.store import Activity

_BEAT_SECONDS = 0.25
_ANY = float("inf")


class HeadGoneError(RuntimeError):
    """The head of the run, or this worker's place in the run, is gone."""


class HeadCalls:
    """Ask the head, and keep the few words that come with every answer.

    A thread beats the heart and ends the process when the head is gone, so that no worker outlives its run.

    Args:
        head: Handle of the head.
        worker: Number of this worker.
        incarnation: How often it was started before.
        settings: Of the run.
    """

    def __init__(self, head: Any, worker: int, incarnation: int, settings: Settings) -> None:
        import ray

        self.head = head
        self.worker = worker
        self.incarnation = incarnation
        self.settings = settings
        self._words: Sequence[int] = (0, 0, 1, 0)  # coordinator, stopped, live workers, generation of the layers
        self._progress, self._limit = 0, _ANY
        self._closed = threading.Event()
        self._pace: Pace | None = None
        self._ask("hello", node=ray.get_runtime_context().get_node_id(), pid=os.getpid())
        self._pace = Pace(settings.stall_seconds, self._get_on)
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()

    def begin(self, activity: Activity) -> None:
        """See `ParameterStore.begin`."""
        assert self._pace is not None
        self._pace.begin(activity)

    def rest(self) -> None:
        """See `ParameterStore.rest`."""
        assert self._pace is not None
        self._pace.end()

    def close(self) -> None:
        """Stop the heart."""
        self._closed.set()

    def _ask(self, kind: str, payload: bytes = b"", **values: Any) -> tuple[Message, list[Any], list[Any]]:
        request = pack_request(Message(kind, values, payload))
        answer, references, actors = self._waiting(lambda: self.call("ask", request))
        reply = unpack_answer(answer)
        self._learn(reply)
        return reply, references, actors

    def call(self, method: str, *args: Any) -> Any:
        """Call the head.

        Raises:
            HeadGoneError: If it is gone, or knows this worker no more.
        """
        return self.outcome_of(getattr(self.head, method).remote(self.worker, self.incarnation, *args))

    def outcome_of(self, reference: Any) -> Any:
        """Return what a call of the head returns; errors as in `call`."""
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return _get(reference)
        except RayTaskError as error:
            if error.cause is not None and type(error.cause).__name__ == "StrangerError":
                raise HeadGoneError("another has this worker's place.") from error
            raise
        except RayActorError as error:
            raise HeadGoneError("the head of the run is gone.") from error

    def _learn(self, reply: Message) -> None:
        self._words = reply.values.pop("control", self._words)

    def _fetch(self, references: Any) -> Any:
        return self._waiting(lambda: _get(references))

    def _waiting(self, wait: Callable[[], Any]) -> Any:
        """Wait for others, whose time does not count."""
        found: list[Any] = []
        if self._pace is None:
            return wait()
        self._pace.wait(lambda: found.append(wait()))
        return found[0]

    def _get_on(self, limit: float) -> None:
        self._limit = limit
        self._progress += 1

    def _beat(self) -> None:
        while not self._closed.wait(_BEAT_SECONDS):
            try:
                self._words = self.call("beat", self._progress, self._limit)
            except Exception:  # noqa: PERF203  # the head is gone, or has another in our place
                if not self._closed.is_set():
                    os._exit(1)
                return


def _get(references: Any) -> Any:
    import ray

    return ray.get(references)
