"""Who is who among the processes of an asynchronous run, where each worker may be a replica of several processes."""

import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_accel.async_sgd import ParameterStore, Settings, Worker
from lightning_accel.async_sgd.replicas.shards import is_spread, spread_like
from lightning_accel.async_sgd.replicas.store import ReplicaStore
from lightning_accel.lightning_private import give_device_mesh
from lightning_accel.strategies.worker_process.made_layers import Structure, structure_of

if TYPE_CHECKING:  # the real base comes from the distribution at hand
    from lightning.pytorch.strategies import ParallelStrategy as _Base
else:
    _Base = object

MESH_NAMES = ("data_parallel", "tensor_parallel")
"""As Lightning's `ModelParallelStrategy` names the dimensions of the mesh; the first has one place."""


class Places(_Base):
    """The places of workers, replicas and ranks; and what a rank of a replica needs beside."""

    distribution: ClassVar[str]
    devices_per_replica: int
    workers_per_device: int
    settings: Settings
    _store: ParameterStore | None
    _trainer: Any
    _before: Structure

    def enter(self, store: ParameterStore, trainer: Any) -> None:
        """Become one worker of a run, or a rank of one; called in the process before anything else."""
        self._store = store
        self._trainer = trainer
        self._before = structure_of(trainer.lightning_module)
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    @property
    def num_processes(self) -> int:
        """Number of workers, each a replica of ``devices_per_replica`` processes."""
        return number_of_workers(
            len(self.parallel_devices or [None]), self.workers_per_device, self.devices_per_replica
        )

    @property
    def global_rank(self) -> int:
        """0 for the coordinator (the leader of its replica), another number for every other process."""
        if self._store is None:
            return 0
        rank = self._store.ranks.rank if isinstance(self._store, ReplicaStore) else 0
        worker = 0 if self._store.is_coordinator else self._store.worker or self.num_processes
        return worker + rank * (self.num_processes + 1)

    @property
    def local_rank(self) -> int:
        """The same on one machine."""
        return self.global_rank

    @property
    def is_global_zero(self) -> bool:
        """Whether this process validates, checkpoints and logs."""
        return self.global_rank == 0

    @property
    def world_size(self) -> int:
        """Workers of the run; 1 in the parent process, where evaluations run."""
        return self.num_processes if self._store is not None else 1

    @property
    def is_distributed(self) -> bool:
        """False: Lightning must neither split the data nor shuffle it, leases do."""
        return False

    @property
    def root_device(self) -> torch.device:
        """This process's device."""
        devices = self.parallel_devices or [torch.device("cpu")]
        if self._store is None:
            return devices[0]
        rank = self._store.ranks.rank if isinstance(self._store, ReplicaStore) else 0
        return device_of(self._store.worker, rank, devices, self.devices_per_replica)

    @property
    def computes_on_cpu(self) -> bool:
        """Whether neither workers nor optimizers use an accelerator."""
        kinds = {device.type for device in self.parallel_devices or []} | {
            torch.device(self.settings.optimizer_device).type
        }
        return kinds == {"cpu"}

    def check_replicas(self, settings: Settings) -> None:
        """Refuse what replicas of several processes cannot do.

        Raises:
            ValueError: If a setting excludes replicas.
        """
        if self.devices_per_replica == 1:
            return
        if self.workers_per_device > 1:
            raise ValueError(
                f"`workers_per_device={self.workers_per_device}` and `devices_per_replica={self.devices_per_replica}` "
                "exclude each other: a device is shared by workers, or a worker has several."
            )
        wanted = {
            "local_steps": settings.local_steps == 0,
            "compression": settings.compression.name == "none",
            "staleness": settings.staleness != "delay_compensation",
            "buffers": settings.buffers != "recompute",
        }
        for name, possible in wanted.items():
            if not possible:
                value = settings.compression.name if name == "compression" else getattr(settings, name)
                raise ValueError(
                    f"`{name}={value}` needs all of the parameters in one process; leave it out, or use "
                    "`devices_per_replica=1`."
                )

    def check_devices(self) -> None:
        """Refuse devices that do not make whole replicas.

        Raises:
            MisconfigurationException: If they do not, or are no CPUs, where replicas are of several; and if there is
                no device for the optimizers.
        """
        devices = self.parallel_devices or []
        each = self.devices_per_replica
        error = import_module(f"{self.distribution}.utilities.exceptions").MisconfigurationException
        there = torch.device(self.settings.optimizer_device)
        if there.type == "cuda" and (there.index or 0) >= torch.cuda.device_count():
            raise error(
                f"`optimizer_device={self.settings.optimizer_device}` is no device of this machine, which has "
                f"{torch.cuda.device_count()} of CUDA; leave it at 'cpu'."
            )
        if each > 1 and len(devices) % each:
            raise error(
                f"`devices` must be a multiple of `devices_per_replica={each}`, got {len(devices)}; every replica "
                "takes that many."
            )
        if each > 1 and any(device.type != "cpu" for device in devices):
            raise error(
                "model-parallel replicas work on CPU, over Gloo; use accelerator='cpu', or replicas of one device."
            )

    def make_mesh(self) -> None:
        """Give the module the mesh of its replica, for its ``configure_model``."""
        if not isinstance(self._store, ReplicaStore):
            return
        from torch.distributed.device_mesh import init_device_mesh

        # every rank of a replica has seen the same batches, and Lightning takes them for ranks that have not
        warnings.filterwarnings("ignore", message=r".*sync_dist=True.*when logging on epoch level.*")
        mesh = init_device_mesh("cpu", (1, self._store.ranks.size), mesh_dim_names=MESH_NAMES)
        assert self.lightning_module is not None
        give_device_mesh(self.lightning_module, mesh)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Load whole values, of which each rank of a replica takes its part."""
        module = self.lightning_module
        assert module is not None
        spread = {name: p for name, p in module.state_dict().items() if is_spread(p)}
        state = checkpoint["state_dict"]
        values = {k: spread_like(spread[k], v) if k in spread and not is_spread(v) else v for k, v in state.items()}
        super().load_model_state_dict({**checkpoint, "state_dict": values}, strict=strict)


def number_of_workers(devices: int, workers_per_device: int, devices_per_replica: int) -> int:
    """Return how many workers there are on so many devices."""
    return max(1, devices * workers_per_device // devices_per_replica)


def device_of(worker: int, rank: int, devices: Sequence[torch.device], devices_per_replica: int) -> torch.device:
    """Return the device of a worker's rank: neighbours take devices in turn, and begin anew where all are taken.

    So the first workers have one each, and those beyond the number of devices share.
    """
    return devices[(worker * devices_per_replica + rank) % len(devices)]


def is_replica(store: Any) -> bool:
    """Whether this process is one of several that make up a worker."""
    return isinstance(store, ReplicaStore)


def refuse_in_replica(trainer: Any, store: ParameterStore, worker: Worker) -> None:
    """Refuse what a process cannot do that has a part of the parameters.

    Raises:
        ValueError: For step hooks of an optimizer, and for clipping by a norm where only some layers are spread.
    """
    if not is_replica(store):
        return
    if worker.has_step_hooks:
        raise ValueError(
            "a step hook of the optimizer changes parameters (a projection, a mask), of which each process of a "
            "replica has a part only; leave it out, or use `devices_per_replica=1`."
        )
    spread = [is_spread(p) for p in worker.parameters.values()]
    by_norm = trainer.gradient_clip_val and trainer.gradient_clip_algorithm in (None, "norm")
    if by_norm and any(spread) and not all(spread):
        raise ValueError(
            "torch does not know the norm of gradients of which some are spread over processes and some are not; "
            "spread the other layers too (`parallelize_module`, with `SequenceParallel` or the like), use "
            "`gradient_clip_algorithm='value'`, or no clipping."
        )
