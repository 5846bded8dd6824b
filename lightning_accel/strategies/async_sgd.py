"""The asynchronous strategy, for either distribution of Lightning.

`for_lightning` and `for_pytorch_lightning` make a strategy of `AsyncSGDBody` and their distribution's
``ParallelStrategy``; each refuses the other's.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import torch
from torch.optim import Optimizer

from lightning_accel.arguments import check_choice, check_integer, check_switch
from lightning_accel.async_sgd import Compression, ParameterStore, Settings, Statistics
from lightning_accel.async_sgd.optimizer_steps import refuse_unsupported
from lightning_accel.async_sgd.policy.encoding.compression import CompressionName
from lightning_accel.async_sgd.policy.rules import StalenessRule
from lightning_accel.async_sgd.ray_engine.options import RayOptions
from lightning_accel.async_sgd.settings import Buffers, Outer, Validate
from lightning_accel.async_sgd.shared_memory.spawn import StartMethod
from lightning_accel.lightning_private import attach_launcher, keep_written_metrics
from lightning_accel.strategies.collectives import NobodyWaits
from lightning_accel.strategies.engines import (
    Engine,
    checked_engine,
    refuse_device_elsewhere,
    refuse_replicas_elsewhere,
)
from lightning_accel.strategies.one_cut import SavesOneCut
from lightning_accel.strategies.refusals import refuse_lock_step, refuse_uninitialized
from lightning_accel.strategies.replicas import Places
from lightning_accel.strategies.rescue import Rescue
from lightning_accel.strategies.worker_process.coordination import stop_first
from lightning_accel.strategies.worker_process.leased_data import lease_training_data
from lightning_accel.strategies.worker_process.made_layers import Structure, announce_made
from lightning_accel.strategies.worker_process.random_states import draw_apart
from lightning_accel.strategies.worker_process.session import Session

if TYPE_CHECKING:  # the real base comes from the distribution at hand
    from lightning.pytorch.strategies import ParallelStrategy as _Base
else:
    _Base = object


class AsyncSGDBody(NobodyWaits, SavesOneCut, Places, _Base):
    """Train with workers that do not wait for each other, around a parameter server in the parent process.

    ``Trainer(strategy="async_sgd", devices=N)`` starts N worker processes. Each takes batches on lease, computes
    gradients on the newest parameters it has, and pushes them to the parent, where the real optimizers live. Slow or
    dead workers hold nobody up. One worker with the defaults trains bit for bit as a plain Trainer does.

    Made for stragglers, uneven machines and workers that die. On equal, healthy devices expect no gain over DDP.

    Args:
        n_push: See `lightning_accel.async_sgd.Settings`, here and below.
        n_fetch: See there.
        local_steps: See there.
        outer: See there.
        outer_momentum: See there.
        outer_rate: See there.
        min_workers: See there.
        round_grace: See there.
        overlap: See there.
        staleness: See there.
        drop_beyond: See there.
        compensation: See there.
        max_staleness: See there.
        warm_start_steps: See there.
        cooldown_steps: See there.
        lease_batches: See there.
        buffers: See there.
        validate: See there.
        compression: ``none``, ``fp16``, ``int8`` or ``topk``, with error feedback.
        kept: Fraction of the elements that ``topk`` keeps, in (0, 1].
        max_restarts: See there.
        heartbeat_seconds: See there.
        straggler_grace: See there.
        stall_seconds: See there.
        deterministic_replay: Keep the server's log, in ``ending.log`` after ``fit``, for `replay`.
        snapshot_every_n_steps: Write ``async_sgd.ckpt`` into the Trainer's ``default_root_dir`` each time that the
            server took so many steps, so that a killed parent loses no more; None for never.
        live: Show a table with one row a worker while training.
        optimizer_device: See `Settings`.
        workers_per_device: Workers that share each of ``devices``, >= 1: two on one GPU, say, where one leaves it idle.
        devices_per_replica: Processes that make up one worker, >= 1. With more than 1 the module's ``configure_model``
            finds a mesh in ``self.device_mesh`` (dimensions ``data_parallel``, of 1, and ``tensor_parallel``) and
            spreads its layers over it, as with Lightning's `ModelParallelStrategy`; ``devices`` is a multiple of it.
            CPU only.
        start_method: ``fork`` from this process, ``forkserver``, ``spawn``, or ``auto``, see `resolve_start_method`.
        engine: ``shared_memory``: processes of this machine; ``ray``: actors, on one machine or many, see `RayOptions`,
            which the next six belong to.
        address: See there.
        shards: See there.
        shard_snapshot_steps: See there.
        cpus_per_worker: See there.
        allow_without_token: See there.
        runtime_env: See there.
        accelerator: As of any strategy of Lightning, here and below.
        parallel_devices: The workers' devices.
        cluster_environment: As of any strategy.
        checkpoint_io: As of any strategy.
        precision_plugin: As of any strategy.

    Raises:
        TypeError: If a setting is of another kind, such as text for a number.
        ValueError: If a setting is out of range; in ``setup`` for LBFGS.
        ModuleNotFoundError: With ``engine="ray"``, if Ray is not installed.

    References:
        Paine, Jin, Yang, Lin, Huang, arXiv:1312.6186. *Deviations*: optimizers run on the server (the paper's clients
        push gradients only, too, but momentum is not discussed); pushes of ``n_push`` steps carry the mean of the
        gradients; data are leased by blocks.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_accel import AsyncSGDStrategy
        >>> strategy = AsyncSGDStrategy(staleness="inverse", max_restarts=3)
        >>> trainer = Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy=strategy, logger=False)
        >>> trainer.num_devices  # workers; `trainer.fit(your_module, your_data)` starts them
        2
    """

    distribution: ClassVar[str]
    launcher_class: ClassVar[type[Any]]
    strategy_name: ClassVar[str] = "async_sgd"

    def __init__(
        self,
        *,
        n_push: int = Settings.n_push,
        n_fetch: int = Settings.n_fetch,
        local_steps: int = Settings.local_steps,
        outer: Outer = Settings.outer,
        outer_momentum: float = Settings.outer_momentum,
        outer_rate: float = Settings.outer_rate,
        min_workers: int = Settings.min_workers,
        round_grace: float = Settings.round_grace,
        overlap: bool = Settings.overlap,
        staleness: StalenessRule = Settings.staleness,
        drop_beyond: int = Settings.drop_beyond,
        compensation: float = Settings.compensation,
        max_staleness: int | None = Settings.max_staleness,
        warm_start_steps: int = Settings.warm_start_steps,
        cooldown_steps: int = Settings.cooldown_steps,
        lease_batches: int = Settings.lease_batches,
        buffers: Buffers = Settings.buffers,
        validate: Validate = Settings.validate,
        compression: CompressionName = Compression.name,
        kept: float = Compression.kept,
        max_restarts: int = Settings.max_restarts,
        heartbeat_seconds: float = Settings.heartbeat_seconds,
        straggler_grace: float = Settings.straggler_grace,
        stall_seconds: float | None = Settings.stall_seconds,
        deterministic_replay: bool = False,
        snapshot_every_n_steps: int | None = None,
        live: bool = False,
        optimizer_device: str = Settings.optimizer_device,
        workers_per_device: int = 1,
        devices_per_replica: int = 1,
        start_method: StartMethod = "auto",
        engine: Engine = "shared_memory",
        address: str | None = RayOptions.address,
        shards: int = RayOptions.shards,
        shard_snapshot_steps: int = RayOptions.shard_snapshot_steps,
        cpus_per_worker: float = RayOptions.cpus_per_worker,
        allow_without_token: bool = RayOptions.allow_without_token,
        runtime_env: dict[str, Any] | None = RayOptions.runtime_env,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ) -> None:
        check_switch("deterministic_replay", deterministic_replay)
        self.settings = Settings(
            n_push=n_push,
            n_fetch=n_fetch,
            local_steps=local_steps,
            outer=outer,
            outer_momentum=outer_momentum,
            outer_rate=outer_rate,
            min_workers=min_workers,
            round_grace=round_grace,
            overlap=overlap,
            staleness=staleness,
            drop_beyond=drop_beyond,
            compensation=compensation,
            max_staleness=max_staleness,
            warm_start_steps=warm_start_steps,
            cooldown_steps=cooldown_steps,
            lease_batches=lease_batches,
            buffers=buffers,
            validate=validate,
            compression=Compression(compression, kept),
            max_restarts=max_restarts,
            heartbeat_seconds=heartbeat_seconds,
            straggler_grace=straggler_grace,
            stall_seconds=stall_seconds,
            record_log=deterministic_replay,
            optimizer_device=optimizer_device,
        )
        check_integer("snapshot_every_n_steps", snapshot_every_n_steps, at_least=1, optional=True)
        check_switch("live", live)
        check_choice("start_method", start_method, get_args(StartMethod))
        self.snapshot_every_n_steps = snapshot_every_n_steps
        self.live = live
        check_integer("devices_per_replica", devices_per_replica, at_least=1)
        check_integer("workers_per_device", workers_per_device, at_least=1)
        self.devices_per_replica, self.workers_per_device = devices_per_replica, workers_per_device
        self.check_replicas(self.settings)
        self.start_method: StartMethod = start_method
        self.engine: Engine = checked_engine(engine)
        refuse_replicas_elsewhere(engine, devices_per_replica)
        refuse_device_elsewhere(engine, optimizer_device)
        self.ray = RayOptions(
            address, shards, shard_snapshot_steps, cpus_per_worker, allow_without_token, runtime_env=runtime_env
        )
        self.statistics = Statistics()  # in the parent, after (and during) `fit`
        self.ending: Any = None
        self.rescue: Rescue | None = None  # in the parent, after a `fit` that did not end well
        self._store: ParameterStore | None = None
        self._session: Session | None = None  # in a worker process
        self._trainer: Any = None
        self._before: Structure = {}  # what the module was in a worker before its fit began
        self._made: list[str] = []
        self._ended_schedules: list[dict[str, Any]] = []  # in the parent, after `fit`: states of its schedulers
        self._resumed: dict[str, Any] = {}
        self._broadcasts: dict[str, int] = {}
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )

    @property
    def _module(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module

    def _configure_launcher(self) -> None:
        attach_launcher(self, self.launcher_class(self))

    def setup_environment(self) -> None:
        """Set the device up; workers that do not coordinate put validating and checkpointing callbacks aside."""
        super().setup_environment()
        self.make_mesh()
        if self._store is not None:
            self._session = session = Session(self, self._trainer, self._store, self.settings, self.num_processes)
            callbacks = import_module(f"{self.distribution}.callbacks")
            self._trainer.callbacks.insert(0, stop_first(session, callbacks.Callback))
            if not self._store.is_coordinator:
                session.watchers.hold_back()
            if self._store.incarnation > 0:  # before Lightning opens the loggers of this process
                for logger in self._trainer.loggers:
                    keep_written_metrics(logger)

    def setup(self, trainer: Any) -> None:
        """Refuse what cannot work, then set up as any strategy does."""
        self._trainer = trainer
        if self._store is not None:
            refuse_lock_step(self, self._module)
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Move the module to this worker's device."""
        assert self.model is not None
        self.model.to(self.root_device)

    def setup_optimizers(self, trainer: Any) -> None:
        """Make optimizers and schedulers; plateau schedulers act where validation runs."""
        super().setup_optimizers(trainer)
        refuse_unsupported(self.optimizers)
        if self._session is not None and not self.is_global_zero:
            self._session.watchers.hold_back_plateaus()

    def process_dataloader(self, dataloader: Any) -> Any:
        """Share the training data out by leases; evaluation data stay whole."""
        session = self._session
        if session is None or not self._trainer.training:
            return dataloader
        return lease_training_data(dataloader, session.data, alone=self.num_processes == 1)

    def on_train_start(self) -> None:
        """Join the run: the coordinator opens it with what it has, the others read."""
        super().on_train_start()
        if self._session is None or self._store is None:
            return  # a tuner, which trains in the caller's process
        refuse_uninitialized(self, self._module)
        draw_apart(self._store)
        self._session.join(self._resumed.get("epochs", []))
        self._made = announce_made(self._module, self._before, self._store)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Take note of what the others did since the last batch."""
        super().on_train_batch_start(batch, batch_idx)
        if self._session is not None:
            self._session.begin_batch(batch_idx, snapshot_every=self.snapshot_every_n_steps)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step as any strategy does (the optimizers' own ``step`` pushes), then count what the others did."""
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self._session is not None and self._session.joined:
            self._session.count_others()
        return result

    def on_validation_end(self) -> None:
        """Tell the others what was found, should one have to take over."""
        super().on_validation_end()
        if self._session is not None and self._session.joined:
            self._session.end_validation()

    def on_train_end(self) -> None:
        """Make what the server has now, and what callbacks made of it, the result."""
        super().on_train_end()
        if self._session is not None and self._session.joined:
            self._session.end()

    def exchanging_layers(self) -> AbstractContextManager[None]:
        """Let callbacks replace layers in the body; the server and all workers go on with the new ones."""
        if self._session is None or not self._session.joined:
            return contextlib.nullcontext()
        return self._session.exchanging_layers()
