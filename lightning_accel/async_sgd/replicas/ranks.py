"""The ranks of one replica, from within one of them: what the leader says, what all agree on."""

import contextlib
import os
import socket
import sys
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from lightning_accel.async_sgd.replicas.processes import RankPlace

_ENDLESS = timedelta(days=7)  # a rank that hangs is noticed by the supervisor, which ends them all
_GONE_SECONDS = 2.0  # from a lost connection until the process that it led to has ended
_START = timedelta(minutes=10)


class Ranks:
    """The default process group of this process: the ranks of its replica, by Gloo on loopback.

    Args:
        place: Of this rank.
    """

    def __init__(self, place: RankPlace) -> None:
        self.rank, self.size = place.rank, place.size
        self._links = place.links
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        descriptor = place.listener.detach() if place.listener is not None else None
        store = distributed.TCPStore(  # type: ignore[attr-defined]  # public, but missing in its `__all__`
            "127.0.0.1",
            place.port,
            place.size,
            is_master=place.rank == 0,
            timeout=_START,
            wait_for_workers=False,
            master_listen_fd=descriptor,
        )
        distributed.init_process_group("gloo", store=store, rank=place.rank, world_size=place.size, timeout=_ENDLESS)

    @property
    def leads(self) -> bool:
        """Whether this rank speaks with the server."""
        return self.rank == 0

    def hear(self, value: Any = None) -> Any:
        """Return what the leader says (``value``)."""
        said = [value]
        distributed.broadcast_object_list(said, src=0)
        return said[0]

    def all_agree(self, yes: bool) -> bool:
        """Whether all ranks say yes; nobody goes on before all have said."""
        told = torch.tensor([float(yes)])
        distributed.all_reduce(told, op=distributed.ReduceOp.MIN)
        return bool(told.item())

    def hand_over(self, descriptors: list[int]) -> list[int]:
        """Give every follower the leader's open files; returns them, each process its own."""
        if self.leads:
            for link in self._links:
                socket.send_fds(link, [b"!"], descriptors)
            return [os.dup(descriptor) for descriptor in descriptors]
        _, received, _, _ = socket.recv_fds(self._links[0], 1, 8)
        return received

    def tell_leader(self, text: str) -> None:
        """Say why this follower is about to end."""
        with contextlib.suppress(OSError):  # the leader is gone already
            self._links[0].sendall(text.encode())

    def lost_words(self) -> str | None:
        """Return what followers said that are gone, "" of those that were killed; None if all are there."""
        gone, said = False, b""
        for link in self._links:
            link.settimeout(_GONE_SECONDS)
            with contextlib.suppress(TimeoutError):  # it is there
                while data := link.recv(1 << 16):
                    said += data
                gone = True
        return said.decode(errors="replace") if gone else None
