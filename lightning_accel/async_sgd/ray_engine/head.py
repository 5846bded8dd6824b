"""The head of a run on Ray: an actor beside the process that called for the run, and the only one that decides.

One event loop, one thread, no locks. Whoever calls it is a worker of this run or the caller; what workers say is
checked before any of it is used.
"""

import asyncio
import logging
import os
import pickle
import time
from dataclasses import replace
from typing import Any, cast

from lightning_accel.async_sgd.policy.optimizer_copy import dumps
from lightning_accel.async_sgd.ray_engine.messages import pack_answer, unpack_request
from lightning_accel.async_sgd.ray_engine.options import RayOptions
from lightning_accel.async_sgd.ray_engine.peers import KILLED, ActorProcess, AnswerChannel, RayPeer, checked_push
from lightning_accel.async_sgd.ray_engine.service import Answer, RayService
from lightning_accel.async_sgd.ray_engine.shards.layout import merge, split
from lightning_accel.async_sgd.ray_engine.worker_actor import Errand, WorkerActor
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.shared_memory.channel import Message
from lightning_accel.async_sgd.shared_memory.peers import Peer
from lightning_accel.async_sgd.shared_memory.supervisor import Supervisor, WorkerFailedError
from lightning_accel.async_sgd.shared_memory.vital_signs import VitalSigns
from lightning_accel.async_sgd.store import Opening, Snapshot

log = logging.getLogger(__name__)

_TICK_SECONDS = 0.05
_PATIENCE_SECONDS = 30.0  # that a worker may wait for a place before somebody is told
_AT_ONCE = frozenset(("commit", "give back", "idle", "let go", "result", "failed"))  # which the service does not answer


class StrangerError(RuntimeError):
    """Who calls is no worker of this run, or one in whose place another was started."""


class _Notebook(logging.Handler):
    """Keeps what this package logs for the process that called for the run, whose loggers say it."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._records: list[tuple[str, int, str]] = []
        logger = logging.getLogger("lightning_accel")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append((record.name, record.levelno, record.getMessage()))

    def take(self) -> list[tuple[str, int, str]]:
        """Return what was logged since the last call."""
        records, self._records = self._records, []
        return records


class _Supervisor(Supervisor):
    """Start, watch and replace actors as the supervisor of one machine does processes."""

    def __init__(self, workers: int, settings: Settings, options: RayOptions, head: "Head") -> None:
        super().__init__(workers, settings, cast(Any, None))
        self.service.close()
        self.service: RayService = RayService(
            workers, settings, self.peers, options=options, node=head.node, place=head.errand.place
        )
        self._head = head

    def begin(self) -> None:
        """Start every worker, and beside them the shards."""
        for worker in range(self._workers):
            self.peers.append(self._launch(worker, 0))
        self.service.shards.prepare()

    def turn(self) -> None:
        """Look after everybody once."""
        now = time.monotonic()
        if now - self._ticked >= _TICK_SECONDS:
            self._tick(now - self._ticked)
            self._ticked = now
        self.service.drain_all()
        self.service.answer_waiting()
        self._call_back()

    @property
    def goes_on(self) -> bool:
        """Whether anybody is still at work."""
        return self._goes_on()

    def _launch(self, worker: int, incarnation: int) -> Peer:
        self.service.control.clear(worker)
        process = self._head.start(worker, incarnation)
        signs = VitalSigns(self.settings, None, heartbeat=self.service.control.heartbeat(worker))
        return RayPeer(worker, incarnation, process, cast(Any, AnswerChannel()), signs)


class Head:
    """Serve one run.

    Args:
        workers: How many.
        settings: Of the run.
        options: Of the engine.
        errand: What workers run.
        node: Where the head runs.
    """

    def __init__(self, workers: int, settings: Settings, options: RayOptions, errand: Errand, node: str) -> None:
        errand.place.follow()
        self._said = _Notebook()
        self.node = node
        self._settings = settings
        self._options = options
        self.errand = errand
        self._watches: set[asyncio.Future[Any]] = set()
        self._started: dict[int, float] = {}
        self._told: set[int] = set()
        self._progress: dict[tuple[int, int], int] = {}
        self._ended = False
        self._supervisor = _Supervisor(workers, settings, options, self)

    @property
    def _service(self) -> RayService:
        return self._supervisor.service

    # --- for the process that called for the run

    async def run(self) -> dict[str, Any]:
        """Serve until every worker has left; returns how it ended."""
        supervisor = self._supervisor
        supervisor.begin()
        try:
            while supervisor.goes_on and not self._ended:
                supervisor.turn()
                self._tell_who_waits()
                await asyncio.sleep(_TICK_SECONDS)
            return await self._ending()
        finally:
            supervisor._close()

    async def stop(self) -> None:
        """End the run at once; `run` then returns what there is."""
        self._ended = True

    async def look(self) -> tuple[Any, list[tuple[str, int, str]]]:
        """Return how the run goes (None before it is open), and what was logged since the last look."""
        server = self._service.server
        return None if server is None else self._counted(server.statistics()), self._said.take()

    def _counted(self, statistics: Any) -> Any:
        return replace(statistics, lost_versions=self._service.lost_versions)

    async def _ending(self) -> dict[str, Any]:
        service = self._service
        found: dict[str, Any] = {"kv": dict(service.kv), "log": [], "head": None, "parts": []}
        for peer in self._supervisor.peers:
            if peer.process.exitcode is None and peer.state != "left":
                peer.process.kill()
        if service.server is not None:
            found["parts"] = await service.shards.whole()
            found["head"] = dumps(service.sharded.state())
            found["layout"], found["order"] = service.sharded.layout, service.sharded.order
            found["log"] = service.server.log
            found["statistics"] = self._counted(service.server.statistics())
        if self._ended:
            return found
        try:
            ending = self._supervisor._ending()
        except WorkerFailedError as error:
            cause = service.end.failure.payload if service.end.failure is not None else b""
            return {**found, "failed": str(error), "cause": cause}
        except RuntimeError as error:
            return {**found, "error": str(error)}
        found["result"], found["statistics"] = ending.result, self._counted(ending.statistics)
        if (file := ending.take_file()) is not None:
            with os.fdopen(file, "rb") as reader:
                reader.seek(0)
                found["file"] = reader.read()
        return found

    # --- for workers

    async def ask(self, worker: int, incarnation: int, request: bytes) -> tuple[bytes, list[Any], list[Any]]:
        """Answer a worker; returns the answer, references to what shards return, and handles of the shards.

        Raises:
            MalformedMessageError: If the request is not as it must be.
            StrangerError: If the caller is nobody of this run.
        """
        peer = self._peer(worker, incarnation)
        message = unpack_request(request)
        if message.kind == "restore":
            await self._restore(message)
            return self._packed(Message("restore"))
        if message.kind in _AT_ONCE:
            self._service.handle(peer, message)
            return self._packed(Message("done"))
        future = cast(AnswerChannel, peer.channel).expect()
        self._service.handle(peer, message)
        self._service.answer_waiting()
        return self._packed(await future)

    async def push(
        self, worker: int, incarnation: int, request: bytes, *deposits: Any
    ) -> tuple[bytes, list[Any], list[Any]]:
        """Decide on a push that all shards have; returns what became of it, and the parameters after it if wanted.

        Raises:
            MalformedMessageError: If the push does not fit the run.
            StrangerError: If the caller is nobody of this run.
        """
        peer = self._peer(worker, incarnation)
        message = unpack_request(request)
        meta = checked_push(message, deposits, self._service.sharded)
        if peer.mailbox is None or meta["sequence"] < peer.sequence:
            return self._packed(Message("push", {"outcome": "refused"}))  # was dealt with: a replay
        future = peer.expect(meta["sequence"])
        cast(Any, peer.mailbox).put(meta)
        self._service.drain(peer)
        self._service.answer_waiting()
        outcome = await future
        if not meta["read"]:
            return self._packed(Message("push", {"outcome": outcome}))
        news = self._service.publication()
        news.values["outcome"] = outcome
        return self._packed(news)

    async def shards(self, worker: int, incarnation: int) -> list[Any]:
        """Return handles of the shards to a worker whose own do not answer."""
        self._peer(worker, incarnation)
        return await self._service.shards.confirm()

    async def beat(self, worker: int, incarnation: int, progress: int, limit: float) -> tuple[int, ...]:
        """Take note that a worker lives and gets on; returns the words that everybody may know."""
        self._peer(worker, incarnation)
        control = self._service.control
        control.beat(worker)
        if progress != self._progress.get((worker, incarnation)):
            self._progress[worker, incarnation] = progress
            control.get_on(worker, limit)
        return self._words()

    def _packed(self, message: Message) -> tuple[bytes, list[Any], list[Any]]:
        message.values["control"] = list(self._words())
        if isinstance(message, Answer):
            return pack_answer(message), list(message.references), list(message.actors)
        return pack_answer(message), [], []

    def _words(self) -> tuple[int, ...]:
        control = self._service.control
        return control.coordinator, int(control.stopped), control.live, control.generation

    def _peer(self, worker: int, incarnation: int) -> RayPeer:
        for peer in self._supervisor.peers:
            if (peer.worker, peer.incarnation) == (worker, incarnation) and peer.state != "dead":
                return cast(RayPeer, peer)
        raise StrangerError(f"worker {worker!r}, started for the {incarnation!r}. time, does not take part.")

    async def _restore(self, message: Message) -> None:
        """Put an earlier cut back: what the shards hold gets its values, with optimizers as they are."""
        service = self._service
        snapshot: Snapshot = pickle.loads(message.payload)
        server = service.sharded
        parts: list[Opening] = [pickle.loads(part) for part in await service.shards.whole()]
        whole = merge(parts, server.layout, server.order)
        for parameter, value in zip(whole.parameters, snapshot.parameters, strict=True):
            parameter.data.copy_(value)
        for optimizer, state in zip(whole.optimizers, snapshot.optimizer_states, strict=True):
            optimizer.load_state_dict(state)
        server.take_back(snapshot, [dumps(part) for part in split(whole, server.layout)])

    # --- lives

    def start(self, worker: int, incarnation: int) -> ActorProcess:
        """Start a worker where Ray finds a place for it."""
        import ray

        context = ray.get_runtime_context()
        options = self._options
        actor = (
            ray.remote(WorkerActor)
            .options(
                num_cpus=options.cpus_per_worker,
                num_gpus=options.gpus_per_worker,
                max_restarts=0,
                runtime_env=options.runtime_env,
            )
            .remote()
        )
        process = ActorProcess(lambda: ray.kill(actor))
        run = actor.run.remote(context.current_actor, worker, incarnation, self._settings, self.errand)
        watch = asyncio.ensure_future(self._watch(process, actor, run, worker))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)
        self._started[worker] = time.monotonic()
        return process

    async def _watch(self, process: ActorProcess, actor: Any, run: Any, worker: int) -> None:
        """Note how a worker's actor ends; the handle is held meanwhile, without which Ray would end it."""
        from ray.exceptions import RayActorError

        try:
            code = await run
        except RayActorError as error:
            log.debug("the actor of worker %d is gone: %s", worker, error)
            code = KILLED
        except Exception as error:  # what it was given could not be read there, say
            log.error("worker %d could not begin: %s", worker, error)
            code = 1
        process.ended(code)
        del actor

    def _tell_who_waits(self) -> None:
        now = time.monotonic()
        for peer in self._supervisor.peers:
            heard = (peer.worker, peer.incarnation) in self._progress or peer.state != "starting"
            late = now - self._started[peer.worker] > _PATIENCE_SECONDS
            if not heard and late and peer.worker not in self._told:
                self._told.add(peer.worker)
                log.warning(
                    "worker %d waits for a machine with %g free cores; the run goes on without it until Ray has one.",
                    peer.worker,
                    self._options.cpus_per_worker,
                )
