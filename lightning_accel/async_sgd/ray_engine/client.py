"""A worker's end of a run on Ray: the `ParameterStore` whose calls go to the head and the shards."""

import os
import pickle
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_accel.async_sgd.policy.encoding.tensor_spec import TensorSpec
from lightning_accel.async_sgd.policy.encoding.wire import decode_values
from lightning_accel.async_sgd.policy.leases import Lease, LeaseId
from lightning_accel.async_sgd.policy.optimizer_copy import dumps
from lightning_accel.async_sgd.ray_engine.calls import HeadCalls
from lightning_accel.async_sgd.ray_engine.pushing import PushSender
from lightning_accel.async_sgd.ray_engine.shards.group import is_death
from lightning_accel.async_sgd.ray_engine.shards.layout import Layout, unpack_cuts
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.shared_memory.channel import Message
from lightning_accel.async_sgd.store import Membership, MoreUnits, Opening, Snapshot, Statistics


def _pass(stage: str) -> None:
    """Do nothing at a stage of a push."""


class RayStore(HeadCalls):
    """The `ParameterStore` of a cluster.

    Args:
        head: Handle of the head.
        worker: Number of this worker.
        incarnation: How often it was started before.
        settings: Of the run.

    Attributes:
        probe: Called with each of `PUSH_STAGES` (but for the bell, of which there is none) as a push passes it; tests
            kill the process there.
    """

    def __init__(self, head: Any, worker: int, incarnation: int, settings: Settings) -> None:
        super().__init__(head, worker, incarnation, settings)
        self.probe: Callable[[str], None] = _pass
        self._finished_as_coordinator: bool | None = None
        self._generation = 0
        self._base_version = 0
        self._specs: list[TensorSpec] = []
        self._buffer_specs: list[TensorSpec] = []
        self._layout: Layout = []
        self._order: list[list[list[int]]] = []
        self._sender: PushSender | None = None
        self._news: tuple[Message, list[Any]] | None = None  # parameters that came with the last push
        self._pulls_follow = False
        self._pull_seconds: float | None = None

    @property
    def is_coordinator(self) -> bool:
        """Whether this worker validates, checkpoints and reports."""
        if self._finished_as_coordinator is not None:
            return self._finished_as_coordinator
        return self._words[0] == self.worker

    @property
    def stopped(self) -> bool:
        """Whether the run is over for everybody."""
        return bool(self._words[1])

    @property
    def live_workers(self) -> int:
        """Workers taking part."""
        return max(1, self._words[2])

    # --- membership

    def join(self, opening: Callable[[], Opening]) -> Membership:
        """Enter the run; see `ParameterStore.join`."""
        reply, _, actors = self._ask("join")
        if reply.values["open"]:
            reply, _, actors = self._ask("join", payload=dumps(opening()))
        self._open(reply, actors)
        return Membership(self.worker, self.incarnation, reply.values["epoch"])

    def _open(self, reply: Message, actors: list[Any]) -> None:
        values = reply.values
        self._specs, self._buffer_specs = values["specs"], values["buffer_specs"]
        self._layout, self._order = values["layout"], values["order"]
        self._generation = values["generation"]
        self._news = None
        first = 0 if self._sender is None else self._sender.sequence
        self._sender = PushSender(
            self, values["shard_generation"], self._layout, actors, first=first, probe=self._pass_by
        )

    def _pass_by(self, stage: str) -> None:
        self.probe(stage)  # which is the one of now, whenever it was set

    @property
    def is_current(self) -> bool:
        """Whether the run still has the parameters that were joined; False once layers were exchanged."""
        return self._words[3] == self._generation

    @property
    def parameter_names(self) -> list[str]:
        """Names of the run's parameters, in order."""
        return [spec.name for spec in self._specs]

    def hold(self) -> Snapshot:
        """Return a cut that stays the latest until `exchange` or `let_go`: pushes of the others wait."""
        self._wait_for_all()
        return self._cut("hold")

    def let_go(self) -> None:
        """End `hold` without an exchange."""
        self._ask("let go")

    def exchange(self, opening: Opening) -> None:
        """Put other parameters and optimizers in the place of the run's; the others see `is_current` and `rejoin`."""
        reply, _, actors = self._ask("exchange", payload=dumps(opening))
        self._open(reply, actors)

    def rejoin(self) -> None:
        """Take part with the parameters that the run has now, under the same number."""
        self._wait_for_all()
        reply, _, actors = self._ask("rejoin")
        self._open(reply, actors)

    def check(self, parameters: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
        """Compare this worker's tensors with those the run was opened with.

        Raises:
            ValueError: If number, shape or dtype differ.
        """
        specs = [*self._specs, *self._buffer_specs]
        here = [(tuple(t.shape), t.dtype) for t in [*parameters, *buffers]]
        there = [(tuple(s.shape), s.dtype) for s in specs]
        if here != there:
            wrong = next((s.name for s, a, b in zip(specs, here, there, strict=False) if a != b), "their number")
            raise ValueError(
                f"worker {self.worker} built another model than the coordinator ({wrong} differs); "
                "build the same layers in every process."
            )

    def idle(self, idle: bool) -> None:
        """See `ParameterStore.idle`."""
        self._ask("idle", idle=idle)

    def finish(self) -> bool:
        """See `ParameterStore.finish`."""
        self._finished_as_coordinator = bool(self._ask("finish")[0].values["coordinates"])
        return self._finished_as_coordinator

    def stop(self, *, complete: bool = False) -> None:
        """See `ParameterStore.stop`."""
        self._ask("stop", complete=complete)

    def leave(self, *, stop: bool = False) -> None:
        """See `ParameterStore.leave`."""
        self._ask("leave", stop=stop)

    # --- parameters and gradients

    def pull(self, parameters: Sequence[Tensor | None], buffers: Sequence[Tensor | None]) -> tuple[int, list[int]]:
        """Copy the latest publication in place; see `ParameterStore.pull`. ``buffers`` may be empty: none is wanted."""
        began = time.perf_counter()
        self._pulls_follow = True
        news, self._news = self._news, None
        while True:
            reply, references = news if news is not None else self._ask("read")[:2]
            try:
                found = self._fetch(references)
                break
            except Exception as error:  # a shard died before it could answer; another takes its place
                if not is_death(error):
                    raise
                news = None
        with torch.no_grad():
            for places, message in zip(self._layout, found, strict=True):
                if all(parameters[place] is None for place in places):
                    continue
                values, _, _ = decode_values(message, [self._specs[place] for place in places], optimizers=0)
                for place, value in zip(places, values, strict=True):
                    target = parameters[place]
                    if target is not None:
                        target.detach().copy_(value)
            if any(buffer is not None for buffer in buffers):
                values, _, _ = decode_values(reply.payload, self._buffer_specs, optimizers=0)
                for buffer, value in zip(buffers, values, strict=True):
                    if buffer is not None:
                        buffer.copy_(value)
        self._base_version = reply.values["version"]
        self._pull_seconds = time.perf_counter() - began
        return self._base_version, list(reply.values["steps"])

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
        """Send gradients to the shards and their description to the head; see `ParameterStore.push`."""
        sender = self._opened()
        self.wait_for(sender.sequence - 1)  # two pushes under way are enough
        values = {
            "base_version": self._base_version,
            "optimizer": optimizer,
            "leases": list(leases),
            "groups": groups,
            "pull_seconds": self._pull_seconds,
            "read": self._pulls_follow,
        }
        self._pull_seconds, self._pulls_follow, self._news = None, False, None
        sender.send(values, gradients, buffers=buffers, base=base)
        return sender.sequence

    def wait_for(self, sequence: int) -> bool:
        """Wait for the acknowledgement of a push; see `ParameterStore.wait_for`."""
        sender = self._opened()
        outcome, answer = self._waiting(lambda: sender.wait_for(sequence))
        if answer is not None:
            self.probe("acknowledged")
            reply, references = answer
            self._learn(reply)
            if "version" in reply.values:
                self._news = reply, references
        return outcome != "refused"

    def _wait_for_all(self) -> None:
        if self._sender is not None:
            self.wait_for(self._sender.sequence)

    def wait_for_slack(self) -> None:
        """See `ParameterStore.wait_for_slack`; no message without ``max_staleness``."""
        if self.settings.max_staleness is not None:
            self._wait_for_all()  # the server's count of our pushes must be ours
            self._ask("slack")

    # --- data

    def lease(
        self,
        epoch: int,
        order: Callable[[], Sequence[Any]],
        *,
        final: bool = False,
        more: MoreUnits | None = None,
    ) -> list[Lease]:
        """See `ParameterStore.lease`. Units may be what `to_plain` takes."""
        reply = self._ask("lease", epoch=epoch, final=final, known=0, complete=True, units=None)[0]
        while (known := reply.values["known"]) is not None:
            units, complete = (list(order()), True) if more is None else more(known)
            reply = self._ask("lease", epoch=epoch, final=final, known=known, complete=complete, units=list(units))[0]
        leases: list[Lease] = reply.values["leases"]
        return leases

    def give_back(self, leases: Sequence[LeaseId]) -> None:
        """See `ParameterStore.give_back`."""
        if leases:
            self._ask("give back", leases=list(leases))

    def commit(self, leases: Sequence[LeaseId]) -> None:
        """See `ParameterStore.commit`."""
        self._ask("commit", leases=list(leases))

    # --- what a run shares beside parameters

    def kv(self, key: str, value: bytes | None = None, *, replace: bool = False, wait: bool = True) -> bytes | None:
        """See `ParameterStore.kv`."""
        reply = self._ask("kv", payload=value or b"", key=key, write=value is not None, replace=replace, wait=wait)[0]
        return reply.payload if reply.values["found"] else None

    def snapshot(self) -> Snapshot:
        """See `ParameterStore.snapshot`."""
        return self._cut("snapshot")

    def _cut(self, kind: str) -> Snapshot:
        while True:
            reply, references, _ = self._ask(kind)
            try:
                cuts = self._fetch(references)
                break
            except Exception as error:
                if not is_death(error):
                    raise
        buffers, version, _ = decode_values(reply.payload, self._buffer_specs, optimizers=0)
        head = Snapshot(version, list(reply.values["steps"]), [], buffers, [], reply.values["epochs"])
        return unpack_cuts(cuts, self._layout, self._order, head)

    def restore(self, snapshot: Snapshot) -> None:
        """See `ParameterStore.restore`."""
        self._ask("restore", payload=pickle.dumps(snapshot))

    def statistics(self) -> Statistics:
        """See `ParameterStore.statistics`."""
        statistics: Statistics = self._ask("statistics")[0].values["statistics"]
        return statistics

    def deliver(self, descriptor: int) -> None:
        """Send what is in an open file to the head, which hands it to the process that called for the run."""
        with os.fdopen(os.dup(descriptor), "rb") as file:
            file.seek(0)
            self._ask("deliver", payload=file.read())

    def report(self, result: bytes) -> None:
        """Hand the result of this worker to the head."""
        self._ask("result", payload=result)

    def report_failure(self, exception: bytes, text: str) -> None:
        """Tell the head that this worker raised an exception (packed), with its traceback as text."""
        self._ask("failed", payload=exception, traceback=text)

    def _opened(self) -> PushSender:
        assert self._sender is not None, "join first"
        return self._sender
