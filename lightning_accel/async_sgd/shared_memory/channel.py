"""Messages between server and worker over a Unix socket: small, ordered, and never a reason to wait for the dead."""

import array
import pickle
import socket
import struct
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

_PREFIX = struct.Struct("!QQ")  # bytes of the body, number of descriptors
_RING = _PREFIX.pack(0, 0)  # a message without a body
_CHUNK = 1 << 16
_ANCILLARY_BYTES = socket.CMSG_LEN(16 * array.array("i").itemsize)  # room for 16 descriptors


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
        sock.setblocking(True)  # each call says itself whether it waits
        self._socket = sock
        self._incoming = bytearray()
        self._descriptors: deque[int] = deque()
        self._outgoing: deque[tuple[memoryview, list[int]]] = deque()
        self._sending = threading.Lock()

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
        # descriptors ride on the first byte of their message (`socket.send_fds` forgets its flags)
        self._outgoing.append((memoryview(prefix + body), message.descriptors))
        self.flush(wait=False)

    def ring(self) -> None:
        """Send the shortest of messages, of kind ``"bell"``: look into what we share."""
        self._outgoing.append((memoryview(_RING), []))
        self.flush(wait=False)

    def flush(self, *, wait: bool) -> bool:
        """Send what is queued; returns whether nothing is left.

        Raises:
            ChannelClosedError: If the other end is gone.
        """
        with self._sending:
            return self._flush(0 if wait else socket.MSG_DONTWAIT)

    def _flush(self, flags: int) -> bool:
        while self._outgoing:
            data, descriptors = self._outgoing[0]
            try:
                if descriptors:
                    carried = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
                    sent = self._socket.sendmsg([data[:_CHUNK]], [carried], flags)
                else:
                    sent = self._socket.send(data[:_CHUNK], flags)
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
        received = _CHUNK
        while received == _CHUNK:  # less than was asked for: the socket is empty now
            try:
                received = self._fill(socket.MSG_DONTWAIT)
            except BlockingIOError:  # noqa: PERF203  # it ends the loop
                received = -1
        closed = received == 0
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
        while not (messages := self._complete()):
            if not self._fill(0):
                raise ChannelClosedError("the other end of the channel is gone.")
        return messages

    def _fill(self, flags: int) -> int:
        """Receive once; returns the number of bytes, 0 at the end."""
        try:
            data, ancillary, _, _ = self._socket.recvmsg(_CHUNK, _ANCILLARY_BYTES, flags)
        except BlockingIOError:
            raise
        except OSError:
            return 0
        for level, kind, carried in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._descriptors.extend(array.array("i", carried))
        self._incoming += data
        return len(data)

    def _complete(self) -> list[Message]:
        messages = []
        while len(self._incoming) >= _PREFIX.size:
            length, descriptors = _PREFIX.unpack_from(self._incoming)
            end = _PREFIX.size + length
            if len(self._incoming) < end:
                break
            if not length:
                del self._incoming[:end]
                messages.append(Message("bell"))
                continue
            kind, values, payload = pickle.loads(bytes(self._incoming[_PREFIX.size : end]))
            del self._incoming[:end]
            messages.append(Message(kind, values, payload, [self._descriptors.popleft() for _ in range(descriptors)]))
        return messages
