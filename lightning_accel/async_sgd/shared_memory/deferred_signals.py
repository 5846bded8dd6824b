"""Signals that wait for a safe moment: an interrupt must not tear an optimizer step of the server in two."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_WAITING = (signal.SIGINT, signal.SIGTERM)


class DeferredSignals:
    """Call the handlers of Ctrl-C and SIGTERM in `deliver` only, while this context is entered.

    Handlers that are not written in Python (the system's own) stay as they are; so does everything outside the main
    thread, which gets no signals.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._arrived: list[tuple[int, FrameType | None]] = []

    def __enter__(self) -> "DeferredSignals":
        if threading.current_thread() is threading.main_thread():
            for number in _WAITING:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if kind is None:
            self.deliver()

    def deliver(self) -> None:
        """Call the handlers of the signals that have arrived; they may raise."""
        while self._arrived:
            number, frame = self._arrived.pop(0)
            self._handlers[number](number, frame)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._arrived.append((number, frame))
