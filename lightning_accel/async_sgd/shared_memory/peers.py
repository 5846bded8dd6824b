"""What the supervisor knows of one worker process, and what its mailbox holds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from lightning_accel.async_sgd.policy.encoding.tensor_spec import TensorSpec
from lightning_accel.async_sgd.policy.pushes import Push
from lightning_accel.async_sgd.policy.server import ParameterServer
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.shared_memory.channel import Channel, Message
from lightning_accel.async_sgd.shared_memory.memory import Mailbox
from lightning_accel.async_sgd.shared_memory.vital_signs import VitalSigns


class WorkerProcess(Protocol):
    """What the supervisor needs of a process; `multiprocessing.Process` has it."""

    @property
    def pid(self) -> int | None: ...  # noqa: D102
    @property
    def exitcode(self) -> int | None: ...  # noqa: D102
    def kill(self) -> None: ...  # noqa: D102
    def join(self, timeout: float | None = None) -> None: ...  # noqa: D102


@dataclass
class Peer:
    """One worker process as the supervisor sees it."""

    worker: int
    incarnation: int
    process: WorkerProcess
    channel: Channel
    signs: VitalSigns
    state: str = "starting"  # then "joined", and at the end "left" or "dead"
    mailbox: Mailbox | None = None
    sequence: int = 1  # of the push that comes next
    generation: int = 0  # of the parameters that it knows, see `Supervisor`
    request: Message | None = None  # what it waits for
    epoch: int = -1
    leased_epoch: int = -1  # the last of which it was given a batch
    idle: bool = False
    done: bool = False  # has ended its training, and can take nothing over
    is_there: bool = True  # runs by now; an actor may have to wait for a machine
    ended_for: str | None = None  # why the supervisor ended it, if it did
    slots: list[list[Tensor]] = field(default_factory=list)  # gradients in the mailbox, where nothing is compressed
    spans: list[Tensor] = field(default_factory=list)  # the same, each slot as one tensor, where all have one dtype

    @property
    def active(self) -> bool:
        """Whether it has neither left nor died."""
        return self.state in ("starting", "joined")

    def undecoded(self, meta: dict[str, Any]) -> Push:
        """Return a push of which only the leases matter."""
        return Push(
            worker=self.worker,
            incarnation=self.incarnation,
            sequence=self.sequence,
            base_version=meta["base_version"],
            optimizer=meta["optimizer"],
            gradients=[],
            leases=meta["leases"],
        )

    def decode(self, server: ParameterServer, meta: dict[str, Any], areas: list[Tensor]) -> Push:
        """Return what lies in a slot of the mailbox, as views of it where nothing is compressed."""
        parameters, buffers = server.parameters, server.buffers
        gradients: list[Tensor | None] = [None] * len(parameters)
        for i in meta["present"]:
            if self.slots:
                gradients[i] = self.slots[self.sequence % 2][i]
            else:
                shape, dtype = parameters[i].shape, parameters[i].dtype
                gradients[i] = server.settings.compression.read(areas[i], shape=shape, dtype=dtype)
        rest = areas[len(parameters) :]
        sent = [a.view(b.dtype).view(b.shape) for a, b in zip(rest, buffers, strict=False)] if meta["buffers"] else []
        rest = rest[len(buffers) :]
        base = [a.view(p.dtype).view(p.shape) for a, p in zip(rest, parameters, strict=True)] if meta["base"] else []
        return Push(
            worker=self.worker,
            incarnation=self.incarnation,
            sequence=self.sequence,
            base_version=meta["base_version"],
            optimizer=meta["optimizer"],
            gradients=gradients,
            finite=meta["finite"],
            leases=meta["leases"],
            groups=meta["groups"],
            buffers=sent,
            base=base,
            flat=self.spans[self.sequence % 2] if self.spans else None,
            pull_seconds=meta["pull_seconds"],
        )


def typed(areas: Sequence[Tensor], specs: Sequence[TensorSpec]) -> list[Tensor]:
    """Return payload areas (uncompressed) as tensors of the given shapes, in the same memory."""
    return [area.view(spec.dtype).view(spec.shape) for area, spec in zip(areas, specs, strict=False)]


def mailbox_areas(specs: list[TensorSpec], parameters: int, settings: Settings) -> tuple[list[int], int]:
    """Return the payload bytes of each tensor in a mailbox and the room for a push's description."""
    areas = [settings.compression.nbytes(spec.shape.numel(), spec.dtype) for spec in specs[:parameters]]
    areas += [spec.nbytes for spec in specs[parameters:]]
    if settings.staleness == "delay_compensation":
        areas += [spec.nbytes for spec in specs[:parameters]]
    return areas, (1 << 16) + 64 * parameters
