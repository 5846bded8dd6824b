"""The `ParameterStore` of a replica: all its ranks make the same calls, the leader speaks with the server."""

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar, cast

from torch import Tensor

from lightning_accel.async_sgd.policy.encoding.tensor_spec import TensorSpec
from lightning_accel.async_sgd.policy.leases import Lease, LeaseId
from lightning_accel.async_sgd.replicas.pages import ShardWriter, SharedPage
from lightning_accel.async_sgd.replicas.ranks import Ranks
from lightning_accel.async_sgd.replicas.shards import is_spread, local, parts_of
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.shared_memory.channel import Message
from lightning_accel.async_sgd.shared_memory.client import SharedMemoryStore
from lightning_accel.async_sgd.store import Activity, Membership, MoreUnits, Opening, Snapshot, Statistics

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class LeadersStore(SharedMemoryStore):
    """The leader's end: hands what it was given by the server to the other ranks.

    Args:
        on_open: Called with specs, number of parameters and of counters, and the descriptors of parameters and mailbox,
            whenever there are new ones; returns what writes pushes.
    """

    on_open: Callable[[list[TensorSpec], int, int, list[int]], ShardWriter] | None = None

    def _open(self, reply: Message) -> None:
        values, descriptors = reply.values, [os.dup(fd) for fd in reply.descriptors]
        super()._open(reply)
        assert self.on_open is not None
        assert self._writer is not None
        self._writer.close()
        writer = self.on_open(values["specs"], values["parameters"], values["counters"], descriptors)
        self._writer = writer  # type: ignore[assignment]  # stands in its place
        for descriptor in descriptors:
            os.close(descriptor)

    def note_read(self, version: int) -> None:
        """Take note of what the ranks have read: the next push belongs to it."""
        self._base_version = version


class ReplicaStore:
    """A rank's end of a run. Every call is made by all ranks, in one order; what the leader learns, all learn.

    Who coordinates, whether the run is over and how many take part is what the leader saw in the last such call, so
    that ranks never differ in it.

    Args:
        ranks: Of the replica.
        worker: Number of the replica.
        incarnation: How often it was started before.
        settings: Of the run.
        leader: In the leader, its end of the run.

    Raises:
        ValueError: If the settings ask for what replicas cannot do.
    """

    def __init__(
        self, ranks: Ranks, worker: int, incarnation: int, settings: Settings, leader: LeadersStore | None
    ) -> None:
        self.ranks, self.worker, self.incarnation, self.settings = ranks, worker, incarnation, settings
        self._leader = leader
        self._page: SharedPage | None = None
        self._writer: ShardWriter | None = None
        self._specs: list[TensorSpec] = []
        self._count = 0
        self._sequence = 0
        self._flags = (False, False, 1)  # coordinates, stopped, live
        if leader is not None:
            leader.on_open = self._opened
        self._together(lambda _: None)

    # --- what all ranks learn

    def _tell(self, kind: str, value: Any) -> None:
        assert self._leader is not None
        self._flags = (self._leader.is_coordinator, self._leader.stopped, self._leader.live_workers)
        self.ranks.hear((kind, value, self._flags))

    def _together(self, ask: Callable[[LeadersStore], _T], **answers: Callable[[Any], Any]) -> _T:
        """Let the leader ask, and all know the answer; ``answers`` are what followers do when it is asked itself."""
        if self._leader is not None:
            found = ask(self._leader)
            self._tell("result", found)
            return found
        while True:
            kind, value, self._flags = self.ranks.hear()
            if kind == "result":
                return cast(_T, value)
            if kind == "opened":
                specs, count, counters = value
                self._open(specs, count, counters, self.ranks.hand_over([]))
            else:
                answers[kind](value)

    @property
    def is_coordinator(self) -> bool:
        """Whether this replica validates, checkpoints and reports."""
        return self._flags[0]

    @property
    def stopped(self) -> bool:
        """Whether the run is over for everybody."""
        return self._flags[1]

    @property
    def live_workers(self) -> int:
        """Replicas taking part."""
        return self._flags[2]

    # --- membership

    def join(self, opening: Callable[[], Opening]) -> Membership:
        """See `ParameterStore.join`; all ranks make the ``opening``, of which each has a part."""

        def asked() -> Opening:
            self._tell("opening", None)
            return opening()

        return self._together(lambda leader: leader.join(asked), opening=lambda _: opening())

    def _opened(self, specs: list[TensorSpec], count: int, counters: int, descriptors: list[int]) -> ShardWriter:
        self._tell("opened", (specs, count, counters))
        self._open(specs, count, counters, self.ranks.hand_over(descriptors))
        assert self._writer is not None
        return self._writer

    def _open(self, specs: list[TensorSpec], count: int, counters: int, descriptors: list[int]) -> None:
        page, mailbox = descriptors
        self._specs, self._count = specs, count
        self._page = SharedPage(specs, counters, page)
        self._writer = ShardWriter(self.ranks, specs, count, self.settings, mailbox)

    def check(self, parameters: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
        """See `ParameterStore.check`; takes note of how the parameters are spread, too."""
        if self._leader is not None:
            self._leader.check(parameters, buffers)
            if not any(map(is_spread, parameters)):
                log.warning(
                    "each of the %d processes of worker %d has all of the parameters: spread layers over "
                    "`self.device_mesh` in `configure_model`, or use `devices_per_replica=1`.",
                    self.ranks.size,
                    self.worker,
                )
        assert self._page is not None
        assert self._writer is not None
        parts = parts_of(parameters)
        self._page.narrow(parts)
        self._writer.spread_as(parameters, parts)

    def idle(self, idle: bool) -> None:
        """See `ParameterStore.idle`."""
        if self._leader is not None:
            self._leader.idle(idle)

    def begin(self, activity: Activity) -> None:
        """See `ParameterStore.begin`."""
        if self._leader is not None:
            self._leader.begin(activity)

    def rest(self) -> None:
        """See `ParameterStore.rest`."""
        if self._leader is not None:
            self._leader.rest()

    def finish(self) -> bool:
        """See `ParameterStore.finish`."""
        return self._together(lambda leader: leader.finish())

    def stop(self, *, complete: bool = False) -> None:
        """See `ParameterStore.stop`."""
        self._together(lambda leader: leader.stop(complete=complete))

    def leave(self, *, stop: bool = False) -> None:
        """See `ParameterStore.leave`."""
        if self._leader is not None:
            self._leader.leave(stop=stop)

    # --- parameters and gradients

    def pull(self, parameters: Sequence[Tensor | None], buffers: Sequence[Tensor | None]) -> tuple[int, list[int]]:
        """See `ParameterStore.pull`; all ranks read one publication, each its own part."""
        page = self._page
        assert page is not None, "join first"
        targets = [None if p is None else local(p.detach()) for p in parameters]
        targets += list(buffers) or [None] * (len(self._specs) - len(parameters))
        while True:
            number = self.ranks.hear(page.latest if self._leader is not None else None)
            found = page.read_at(number, targets)
            if self.ranks.all_agree(found is not None):
                assert found is not None
                break
        if self._leader is not None:
            self._leader.note_read(found[0])
        return found

    def push(
        self,
        gradients: Sequence[Tensor | None],
        *,
        optimizer: int,
        leases: Sequence[LeaseId] = (),
        groups: list[dict[str, Any]] | None = None,
        buffers: Sequence[Tensor] = (),
        base: Sequence[Tensor] = (),
    ) -> int:
        """See `ParameterStore.push`; each rank writes its own shards."""
        self._sequence += 1
        if self._leader is not None:
            return self._leader.push(
                gradients, optimizer=optimizer, leases=leases, groups=groups, buffers=buffers, base=base
            )
        assert self._writer is not None, "join first"
        self._writer.write(self._sequence, {}, gradients, buffers=buffers, base=base, probe=lambda _: None)
        return self._sequence

    def wait_for(self, sequence: int) -> bool:
        """See `ParameterStore.wait_for`."""
        return self._together(lambda leader: leader.wait_for(sequence))

    def wait_for_slack(self) -> None:
        """See `ParameterStore.wait_for_slack`."""
        if self.settings.max_staleness is not None:
            self._together(lambda leader: leader.wait_for_slack())

    # --- data

    def lease(
        self,
        epoch: int,
        order: Callable[[], Sequence[Any]],
        *,
        final: bool = False,
        more: MoreUnits | None = None,
    ) -> list[Lease]:
        """See `ParameterStore.lease`; where the leader draws an order all ranks do: random states stay alike."""

        def drawn() -> Sequence[Any]:
            self._tell("order", None)
            return order()

        def drawn_on(known: int) -> tuple[Sequence[Any], bool]:
            assert more is not None
            self._tell("more", known)
            return more(known)

        return self._together(
            lambda leader: leader.lease(epoch, drawn, final=final, more=None if more is None else drawn_on),
            order=lambda _: order(),
            more=lambda known: more(known) if more is not None else None,
        )

    def give_back(self, leases: Sequence[LeaseId]) -> None:
        """See `ParameterStore.give_back`."""
        if self._leader is not None:
            self._leader.give_back(leases)

    def commit(self, leases: Sequence[LeaseId]) -> None:
        """See `ParameterStore.commit`."""
        if self._leader is not None:
            self._leader.commit(leases)

    # --- what a run shares beside parameters

    def kv(self, key: str, value: bytes | None = None, *, replace: bool = False, wait: bool = True) -> bytes | None:
        """See `ParameterStore.kv`; what replaces another value is the leader's alone, and other ranks get None."""
        if replace:  # said every so many seconds, which ranks need not agree on
            return None if self._leader is None else self._leader.kv(key, value, replace=True)
        return self._together(lambda leader: leader.kv(key, value, wait=wait))

    def snapshot(self) -> Snapshot:
        """See `ParameterStore.snapshot`."""
        return self._together(lambda leader: leader.snapshot())

    def restore(self, snapshot: Snapshot) -> None:
        """See `ParameterStore.restore`."""
        self._together(lambda leader: leader.restore(snapshot))

    def statistics(self) -> Statistics:
        """See `ParameterStore.statistics`; empty in followers, which report nothing."""
        return Statistics() if self._leader is None else self._leader.statistics()

    def deliver(self, descriptor: int) -> None:
        """See `ParameterStore.deliver`."""
        if self._leader is not None:
            self._leader.deliver(descriptor)

    # --- an exchange of layers, which replicas do not make

    @property
    def is_current(self) -> bool:
        """True: the parameters stay what they are."""
        return True

    @property
    def parameter_names(self) -> list[str]:
        """See `ParameterStore.parameter_names`."""
        return [spec.name for spec in self._specs[: self._count]]

    def hold(self) -> Snapshot:
        """Refuse."""
        _refuse_exchange()

    def let_go(self) -> None:
        """Nothing is held."""

    def exchange(self, opening: Opening) -> None:  # noqa: ARG002  # as of any store
        """Refuse."""
        _refuse_exchange()

    def rejoin(self) -> None:
        """Refuse."""
        _refuse_exchange()


def _refuse_exchange() -> NoReturn:
    raise ValueError(
        "layers cannot be exchanged in model-parallel replicas; leave callbacks that replace layers out, or use "
        "`devices_per_replica=1`."
    )
