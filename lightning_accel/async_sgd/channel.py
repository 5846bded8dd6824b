"""Messages between server and worker over a Unix socket: small, ordered, and never a reason to wait for the dead."""

import pickle
import socket
import struct
from collections import deque
from dataclasses import dataclass, field
from typing import Any

_PREFIX = struct.Struct("!QQ")  # bytes of the body, number of descriptors
_CHUNK = 1 << 18
_MOST_DESCRIPTORS = 16


class ChannelClosedError(ConnectionError):
    """The other end is gone."""


@dataclass
class Message:
    """One message: what is asked or told, its plain values, raw bytes, and file descriptors."""

    kind: str
    values: dict[str, Any] = field(default_factory=dict)
    payload: bytes = b""
    descriptors: list[int] = field(default_factory=list)


class Channel:
    """Length-prefixed messages over a stream socket.

    The server's end never blocks: a peer that is stopped or killed half-way through a message leaves a half-filled
    buffer and nothing else. Header and values are pickled; both ends are processes of one program.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._incoming = bytearray()
        self._descriptors: deque[int] = deque()
        self._outgoing: deque[tuple[memoryview, list[int]]] = deque()

    def fileno(self) -> int:
        """Descriptor, for `selectors`."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket; harmless twice."""
        self._socket.close()

    def send(self, message: Message) -> None:
        """Queue a message and send what goes without waiting; `flush` sends the rest."""
        body = pickle.dumps((message.kind, message.values, message.payload))
        prefix = _PREFIX.pack(len(body), len(message.descriptors))
        # descriptors ride on the first byte of their message
        self._outgoing.append((memoryview(prefix + body), message.descriptors))
        self.flush(wait=False)

    def flush(self, *, wait: bool) -> bool:
        """Send what is queued; returns whether nothing is left.

        Raises:
            ChannelClosedError: If the other end is gone.
        """
        self._socket.setblocking(wait)
        while self._outgoing:
            data, descriptors = self._outgoing[0]
            try:
                if descriptors:
                    sent = socket.send_fds(self._socket, [data[:_CHUNK]], descriptors)
                else:
                    sent = self._socket.send(data[:_CHUNK])
            except BlockingIOError:
                return False
            except OSError as error:
                raise ChannelClosedError("the other end of the channel is gone.") from error
            self._outgoing.popleft()
            if sent < len(data):
                self._outgoing.appendleft((data[sent:], []))
        return True

    def poll(self) -> list[Message]:
        """Return every message that is complete, without waiting.

        Raises:
            ChannelClosedError: If the other end is gone and no complete message is left.
        """
        self._socket.setblocking(False)
        closed = False
        while not closed:
            try:
                closed = not self._fill()
            except BlockingIOError:  # noqa: PERF203  # the socket is empty
                break
        messages = self._complete()
        if closed and not messages:
            raise ChannelClosedError("the other end of the channel is gone.")
        return messages

    def wait(self) -> list[Message]:
        """Wait until at least one message is complete and return all that are.

        Raises:
            ChannelClosedError: If the other end is gone.
        """
        self.flush(wait=True)
        self._socket.setblocking(True)
        while not (messages := self._complete()):
            if not self._fill():
                raise ChannelClosedError("the other end of the channel is gone.")
        return messages

    def _fill(self) -> bool:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, _CHUNK, _MOST_DESCRIPTORS)
        except BlockingIOError:
            raise
        except OSError:
            return False
        self._descriptors.extend(descriptors)
        self._incoming += data
        return bool(data)

    def _complete(self) -> list[Message]:
        messages = []
        while len(self._incoming) >= _PREFIX.size:
            length, descriptors = _PREFIX.unpack_from(self._incoming)
            end = _PREFIX.size + length
            if len(self._incoming) < end:
                break
            kind, values, payload = pickle.loads(bytes(self._incoming[_PREFIX.size : end]))
            del self._incoming[:end]
            messages.append(Message(kind, values, payload, [self._descriptors.popleft() for _ in range(descriptors)]))
        return messages
