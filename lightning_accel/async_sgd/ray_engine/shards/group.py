"""The shards of a run, seen from its head: commands in order, copies behind the writes, replacement of the dead."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_accel.async_sgd.ray_engine.options import RayOptions
from lightning_accel.async_sgd.ray_engine.shards.shard import Shard, Step
from lightning_accel.async_sgd.ray_engine.whereabouts import Whereabouts
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.measure import available_cores

log = logging.getLogger(__name__)

_PING_SECONDS = 1.0


@dataclass
class _Member:
    """One shard."""

    number: int
    actor: Any
    saved: bytes  # for a shard that takes its place
    saved_version: int
    asked_version: int  # of the copy that was asked for last
    results: "asyncio.Queue[Any]" = field(default_factory=asyncio.Queue)
    follower: "asyncio.Task[None] | None" = None


class ShardGroup:
    """Carry commands to all shards. Used from one event loop only, as everything of the head.

    Args:
        settings: Of the run.
        options: Of the engine.
        workers: How many there are, beside whose threads shards on this machine compute.
        place: Of the caller.
        on_lost: Called when a shard has died, with the versions of its part that are lost; returns the version that
            the one in its place begins with.
        on_saved: Called when a copy has arrived.
        on_error: Called with what a command raised.
    """

    def __init__(
        self,
        settings: Settings,
        options: RayOptions,
        workers: int,
        place: Whereabouts,
        *,
        on_lost: Callable[[int, int], int],
        on_saved: Callable[[], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._settings = settings
        self._options = options
        self._place = place
        self._threads = max(1, available_cores() - workers)
        self._on_lost = on_lost
        self._on_saved = on_saved
        self._on_error = on_error
        self._members: list[_Member] = []
        self._ready: list[Any] = []  # actors that were started before there was anything to hold
        self._reads: list[Any] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self.generation = -1
        self.version = 0

    @property
    def actors(self) -> list[Any]:
        """Handles of the shards, in order."""
        return [member.actor for member in self._members]

    @property
    def is_ahead(self) -> bool:
        """Whether a step more would be one too many to lose: the last copy of a shard is too old."""
        most = 2 * self._options.shard_snapshot_steps
        return any(self.version - member.saved_version >= most for member in self._members)

    def prepare(self) -> None:
        """Start the actors that `open` is going to use, so that their seconds of imports pass beside the workers' own.

        What `open` has no use for it ends.
        """
        self._ready = [self._started() for _ in range(self._options.shards)]

    # --- commands

    def open(self, parts: Sequence[bytes], version: int) -> None:
        """See `server.Commands`."""
        self.generation += 1
        self.version = version
        for member in self._members[len(parts) :]:
            self._end(member)
        del self._members[len(parts) :]
        for number, part in enumerate(parts):
            if number == len(self._members):
                member = _Member(number, self._new_actor(), part, version, version)
                self._members.append(member)
                member.follower = self._spawn(self._follow(member))
            member = self._members[number]
            member.saved, member.saved_version, member.asked_version = part, version, version
            member.results.put_nowait((member.actor, member.actor.open.remote(part, self.generation, version)))
        self._end_ready()
        self._reads = None

    def step(self, step: Step) -> None:
        """See `server.Commands`."""
        self.version = step.version
        self._reads = None
        for member in self._members:
            member.results.put_nowait((member.actor, member.actor.step.remote(step)))
            if step.closes and step.version - member.asked_version >= self._options.shard_snapshot_steps:
                member.asked_version = step.version
                self._spawn(self._keep(member, member.actor, member.actor.save.remote(), step.version))

    def forget(self, worker: int) -> None:
        """See `server.Commands`."""
        for member in self._members:
            member.results.put_nowait((member.actor, member.actor.forget.remote(worker)))

    def read(self) -> list[Any]:
        """Return references to what each shard publishes, all of one version."""
        if self._reads is None:
            self._reads = [member.actor.read.remote() for member in self._members]
        return self._reads

    def cut(self) -> list[Any]:
        """Return references to the cut of each shard, all of one version."""
        return [member.actor.cut.remote() for member in self._members]

    async def whole(self) -> list[bytes]:
        """Return everything that the shards hold; of one that dies meanwhile, what the one in its place holds."""
        while True:
            actors = self.actors
            found = await asyncio.gather(*(actor.save.remote() for actor in actors), return_exceptions=True)
            failed = [i for i, value in enumerate(found) if isinstance(value, BaseException)]
            if not failed:
                return [value for value in found if isinstance(value, bytes)]
            for i in failed:
                error = found[i]
                if not is_death(error):
                    raise error
                self._replace(self._members[i], actors[i])

    async def confirm(self) -> list[Any]:
        """Return handles of shards that answer: those that do not are replaced first."""
        actors = self.actors
        found = await asyncio.gather(*(actor.ping.remote() for actor in actors), return_exceptions=True)
        for member, actor, answer in zip(list(self._members), actors, found, strict=False):
            if isinstance(answer, BaseException):
                if not is_death(answer):
                    raise answer
                self._replace(member, actor)
        return self.actors

    # --- life and death

    def _new_actor(self) -> Any:
        return self._ready.pop(0) if self._ready else self._started()

    def _started(self) -> Any:
        import ray

        actor = ray.remote(Shard).options(
            num_cpus=0, max_restarts=0, scheduling_strategy="SPREAD", runtime_env=self._options.runtime_env
        )
        return actor.remote(self._settings, self._threads, self._place)

    async def _follow(self, member: _Member) -> None:
        """Wait for each command of one shard in turn, and replace the shard when it is gone."""
        while True:
            try:
                actor, result = await asyncio.wait_for(member.results.get(), _PING_SECONDS)
            except asyncio.TimeoutError:
                actor = member.actor
                result = actor.ping.remote()
            try:
                await result
            except asyncio.CancelledError:
                raise
            except Exception as error:
                if is_death(error):
                    self._replace(member, actor)
                else:
                    self._on_error(error)
                    return

    def _replace(self, member: _Member, actor: Any) -> None:
        if member.actor is not actor:
            return  # has been replaced already
        lost = self.version - member.saved_version
        version = self._on_lost(member.number, lost)
        self.version = version
        self._reads = None
        member.actor = self._new_actor()
        member.saved_version = member.asked_version = version  # which is what it has now
        member.results.put_nowait((member.actor, member.actor.open.remote(member.saved, self.generation, version)))

    async def _keep(self, member: _Member, actor: Any, saved: Any, version: int) -> None:
        generation = self.generation
        try:
            data = await saved
        except Exception as error:
            if not is_death(error):
                self._on_error(error)
            return
        if member.actor is actor and generation == self.generation:
            member.saved, member.saved_version = data, version
            self._on_saved()

    def _spawn(self, work: Any) -> "asyncio.Task[Any]":
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _end(self, member: _Member) -> None:
        import ray

        if member.follower is not None:
            member.follower.cancel()
        ray.kill(member.actor)

    def _end_ready(self) -> None:
        import ray

        for actor in self._ready:
            ray.kill(actor)
        self._ready = []

    def close(self) -> None:
        """End all shards."""
        self._end_ready()
        for member in self._members:
            self._end(member)
        for task in list(self._tasks):
            task.cancel()
        self._members = []


def is_death(error: BaseException | None) -> bool:
    """Whether an error says that an actor, its process or its machine is gone (or what lay there)."""
    from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError

    return isinstance(error, (RayActorError, ObjectLostError, NodeDiedError))
