"""The asynchronous strategy, for either distribution of Lightning.

`for_lightning` and `for_pytorch_lightning` make a strategy of `AsyncSGDBody` and their distribution's
``ParallelStrategy``; each refuses the other's.
"""

import logging
import pickle
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_accel.async_sgd import Compression, Lease, Settings, SharedMemoryStore, Snapshot, Statistics, Worker
from lightning_accel.async_sgd.compression import CompressionName
from lightning_accel.async_sgd.rules import StalenessRule
from lightning_accel.async_sgd.settings import Buffers, Outer, Validate
from lightning_accel.async_sgd.worker import refuse_unsupported
from lightning_accel.lightning_private import (
    attach_launcher,
    checkpoint_periods,
    count_steps_of_others,
    expect_uncertain_end,
    go_to_epoch,
    looks_ahead,
    restart_fetching,
    sync_batch_norm_requested,
)
from lightning_accel.strategies.coordination import Watchers, log_statistics, rewind_loops, with_values_of
from lightning_accel.strategies.leased_data import lease_batches, refuse_unleasable
from lightning_accel.strategies.schedules import SharedPace, follow_pace, step_to_show

if TYPE_CHECKING:  # the real base comes from the distribution at hand
    from lightning.pytorch.strategies import ParallelStrategy as _Base
else:
    _Base = object

log = logging.getLogger(__name__)

_CHECKPOINT_KEY = "async_sgd"


class AsyncSGDBody(_Base):
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
        deterministic_replay: Keep the server's log, in ``ending.log`` after ``fit``, for `replay`.
        snapshot_every_n_steps: Write ``async_sgd.ckpt`` into the Trainer's ``default_root_dir`` each time that the
            server took so many steps, so that a killed parent loses no more; None for never.
        live: Show a table with one row a worker while training.
        accelerator: As of any strategy of Lightning, here and below.
        parallel_devices: The workers' devices.
        cluster_environment: As of any strategy.
        checkpoint_io: As of any strategy.
        precision_plugin: As of any strategy.

    Raises:
        ValueError: If a setting is out of range; in ``setup`` for LBFGS.

    References:
        Paine, Jin, Yang, Lin, Huang, arXiv:1312.6186. *Deviations*: optimizers run on the server (the paper's clients
        push gradients only, too, but momentum is not discussed); pushes of ``n_push`` steps carry the mean of the
        gradients; data are leased by blocks; one machine.
    """

    distribution: ClassVar[str]
    launcher_class: ClassVar[type[Any]]
    strategy_name: ClassVar[str] = "async_sgd"

    def __init__(
        self,
        *,
        n_push: int = 1,
        n_fetch: int = 1,
        local_steps: int = 0,
        outer: Outer = "mean",
        outer_momentum: float = 0.9,
        staleness: StalenessRule = "inverse",
        drop_beyond: int = 16,
        compensation: float = 0.04,
        max_staleness: int | None = None,
        warm_start_steps: int = 0,
        cooldown_steps: int = 0,
        lease_batches: int = 4,
        buffers: Buffers = "mean",
        validate: Validate = "coordinator",
        compression: CompressionName = "none",
        kept: float = 0.01,
        max_restarts: int = 3,
        heartbeat_seconds: float = 30.0,
        deterministic_replay: bool = False,
        snapshot_every_n_steps: int | None = None,
        live: bool = False,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ) -> None:
        self.settings = Settings(
            n_push=n_push,
            n_fetch=n_fetch,
            local_steps=local_steps,
            outer=outer,
            outer_momentum=outer_momentum,
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
            record_log=deterministic_replay,
        )
        if snapshot_every_n_steps is not None and snapshot_every_n_steps < 1:
            raise ValueError(f"`snapshot_every_n_steps` must be >= 1, or None for never, got {snapshot_every_n_steps}.")
        self.snapshot_every_n_steps = snapshot_every_n_steps
        self.live = live
        self.statistics = Statistics()  # in the parent, after (and during) `fit`
        self.ending: Any = None
        self._store: SharedMemoryStore | None = None
        self._worker: Worker | None = None
        self._trainer: Any = None
        self._watchers: Watchers | None = None
        self._cut: Snapshot | None = None
        self._resumed: dict[str, Any] = {}
        self._leases: list[tuple[int, int]] = []  # of batches that are loaded but not yet trained on
        self._dumped: Snapshot | None = None
        self._broadcasts: dict[str, int] = {}
        self._first_version = 0
        self._others_shown = 0
        self._next_snapshot = 0
        self._epoch = -1
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )

    # --- who is who

    def enter(self, store: SharedMemoryStore, trainer: Any) -> None:
        """Become one worker of a run; called in the worker's process before anything else."""
        self._store = store
        self._trainer = trainer
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    @property
    def num_processes(self) -> int:
        """Number of workers."""
        return len(self.parallel_devices or [None])

    @property
    def global_rank(self) -> int:
        """0 for the coordinator, another number for every other worker."""
        if self._store is None or self._store.is_coordinator:
            return 0
        return self._store.worker or self.num_processes

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
        """This worker's device."""
        devices = self.parallel_devices or [torch.device("cpu")]
        return devices[self._store.worker % len(devices)] if self._store is not None else devices[0]

    @property
    def _module(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module

    def _configure_launcher(self) -> None:
        attach_launcher(self, self.launcher_class(self))

    # --- nobody waits for anybody

    def barrier(self, name: str | None = None) -> None:
        """Do nothing: workers do not wait for each other."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:  # noqa: ARG002
        """Return what the first caller from this line of code, for the n-th time, gave; nobody waits."""
        if self._store is None:
            return obj
        # workers do not make the same calls, so the call is named by where it comes from
        frame = traceback.extract_stack(limit=2)[0]
        place = f"{frame.filename}:{frame.lineno}"
        self._broadcasts[place] = self._broadcasts.get(place, 0) + 1
        first = self._store.kv(f"{place}:{self._broadcasts[place]}", pickle.dumps(obj))
        return obj if first is None else pickle.loads(first)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:  # noqa: ARG002
        """Return this worker's own value."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:  # noqa: ARG002
        """Return this worker's own decision; those that count are the coordinator's."""
        return decision

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:  # noqa: ARG002
        """Return ``tensor`` in an evaluation, which one process makes alone.

        Raises:
            RuntimeError: In training, where the others are somewhere else.
        """
        if self._trainer is not None and self._trainer.training:
            raise RuntimeError(
                "`all_gather` in training waits for all workers, and asynchronous workers do not wait; "
                "gather in validation, or use another strategy."
            )
        return tensor

    # --- set-up

    def setup_environment(self) -> None:
        """Set the device up; workers that do not coordinate put validating and checkpointing callbacks aside."""
        super().setup_environment()
        if self._store is not None:
            self._watchers = Watchers(self, self._trainer, self._store)
            if not self._store.is_coordinator:
                self._watchers.hold_back()

    def setup(self, trainer: Any) -> None:
        """Refuse what cannot work, then set up as any strategy does."""
        self._trainer = trainer
        if self._store is not None:
            self._refuse_unsupported()
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Move the module to this worker's device."""
        assert self.model is not None
        self.model.to(self.root_device)

    def setup_optimizers(self, trainer: Any) -> None:
        """Make optimizers and schedulers; plateau schedulers act where validation runs."""
        super().setup_optimizers(trainer)
        refuse_unsupported(self.optimizers)
        if self._watchers is not None and not self.is_global_zero:
            self._watchers.hold_back_plateaus()

    def _refuse_unsupported(self) -> None:
        error = import_module(f"{self.distribution}.utilities.exceptions").MisconfigurationException
        synchronized = [n for n, m in self._module.named_modules() if isinstance(m, nn.SyncBatchNorm)]
        if synchronized or sync_batch_norm_requested(self):
            raise error(
                "synchronized batch norm waits for all workers in every forward pass, and asynchronous workers do not "
                f"wait ({', '.join(synchronized) or 'sync_batchnorm=True'}); use plain batch norm: `buffers='mean'` "
                "averages its statistics."
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise error(
                "a default process group exists: Lightning would synchronize all workers in every batch; do not call "
                "`torch.distributed.init_process_group` with this strategy."
            )

    def process_dataloader(self, dataloader: Any) -> Any:
        """Share the training data out by leases; evaluation data stay whole."""
        if self._store is None or not self._trainer.training:
            return dataloader
        alone = self.num_processes == 1
        try:
            if not isinstance(dataloader, DataLoader):
                raise ValueError(
                    f"{type(dataloader).__name__} is no torch DataLoader, so its data cannot be shared out among "
                    "workers; pass a DataLoader over a map-style dataset, or use `devices=1`."
                )
            refuse_unleasable(dataloader)
        except ValueError:
            if alone:
                return dataloader
            raise
        eager = alone and dataloader.num_workers == 0
        return lease_batches(dataloader, self._take, self._leases.append, eager=eager)

    def _take(self, order: Callable[[], Any]) -> list[Lease] | None:
        trainer, store = self._trainer, self._store
        assert store is not None
        if not isinstance(trainer.train_dataloader, DataLoader):
            return None  # several loaders, and so one worker: leases know one order an epoch
        epoch = trainer.current_epoch
        if self._worker is not None and epoch != self._epoch:
            self._epoch = epoch
            self._worker.flush()  # batches that led to no push must not keep the last epoch open

        def limited() -> Any:
            limit = trainer.num_training_batches
            units = order()
            return units if limit == float("inf") else units[: int(limit)]

        final = trainer.max_epochs not in (None, -1) and epoch + 1 >= trainer.max_epochs
        return store.lease(epoch, limited, final=final)

    # --- training

    def on_train_start(self) -> None:
        """Join the run: the coordinator opens it with what it has, the others read."""
        super().on_train_start()
        trainer, store, module = self._trainer, self._store, self._module
        assert store is not None
        assert self._watchers is not None
        parameters = dict(module.named_parameters())
        buffers = {name: b for name, b in module.named_buffers() if b is not None}
        worker = Worker(store, self.settings, parameters, buffers, self.optimizers)
        epochs = self._resumed.get("epochs", [])
        membership = worker.join(lambda: worker.opening(version=trainer.global_step, epochs=epochs))
        store.check(list(parameters.values()), list(buffers.values()))
        worker.attach()
        self._worker = worker
        self._first_version = worker.version
        self._others_shown = 0
        count_steps_of_others(trainer, worker.version - trainer.global_step)
        if membership.incarnation > 0:
            go_to_epoch(trainer, membership.epoch)
            self._watchers.restore()
        for config in self.lr_scheduler_configs:
            if not config.reduce_on_plateau and (config.interval == "step" or not module.automatic_optimization):
                follow_pace(config.scheduler, self._pace(config.scheduler.optimizer), self._is_epoch_call)
        if self.num_processes > 1 or membership.incarnation > 0:
            if not isinstance(trainer.train_dataloader, DataLoader) or not looks_ahead(trainer):
                raise ValueError(
                    "several workers share out one DataLoader, and the training loop must draw its batches itself; "
                    "combine several into one dataset and take no `dataloader_iter`, or use `devices=1`."
                )
            expect_uncertain_end(trainer, self.num_processes)
            restart_fetching(trainer)

    def _pace(self, optimizer: Optimizer) -> SharedPace:
        worker = self._worker
        assert worker is not None
        index = worker.optimizers.index(optimizer)
        limit = self._trainer.estimated_stepping_batches if self._module.automatic_optimization else -1
        limit = float("inf") if limit == -1 else limit - self._trainer.global_step
        start = worker.steps[index]
        return SharedPace(lambda: (worker.steps[index] - start, worker.own_steps[index]), limit)

    def _is_epoch_call(self) -> bool:
        # in manual optimization the call is the user's: one on the last batch is taken for one an epoch
        return not self._module.automatic_optimization and bool(self._trainer.is_last_batch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Take note of what the others did since the last batch, and of which batch this is."""
        super().on_train_batch_start(batch, batch_idx)
        worker, store, watchers = self._worker, self._store, self._watchers
        assert worker is not None
        assert store is not None
        assert watchers is not None
        if self._cut is not None:
            self._cut = None
            worker.pull()
        if store.stopped:
            self._trainer.should_stop = True
            self._trainer.fit_loop.min_epochs = 0
        elif store.is_coordinator:
            watchers.take_over()
            self._save_snapshot(worker)
            log_statistics(self._trainer, store)
        if self._leases:
            worker.pending.append(self._leases.pop(0))

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step as any strategy does (the optimizers' own ``step`` pushes), then count what the others did."""
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        worker, trainer = self._worker, self._trainer
        if worker is not None:
            per_push = max(self.settings.n_push, self.settings.local_steps)
            others = (worker.version - self._first_version - sum(worker.own_steps)) * per_push
            shown = trainer.global_step  # Lightning counts this step only when we return
            actual = shown + 1 + max(0, others - self._others_shown)
            news = step_to_show(shown, actual, checkpoint_periods(trainer)) - shown - 1
            self._others_shown += news
            count_steps_of_others(trainer, news)
        return result

    def on_validation_start(self) -> None:
        """Validate one consistent cut; the same one is what a checkpoint of this validation holds."""
        super().on_validation_start()
        if self._worker is None or self._store is None:
            return
        self._worker.flush()
        self._store.idle(True)
        self._cut = self._store.snapshot()
        self._worker.load(self._cut)

    def on_validation_end(self) -> None:
        """Tell the others what was found, should one have to take over."""
        super().on_validation_end()
        if self._worker is not None and self._store is not None and self._watchers is not None:
            self._store.idle(False)
            self._watchers.publish()

    def on_train_end(self) -> None:
        """Stop together: what the server has now is the result."""
        super().on_train_end()
        worker, store = self._worker, self._store
        if worker is None or store is None:
            return
        worker.flush()
        if store.finish():
            early = self._trainer.should_stop or 0 <= self._trainer.max_steps <= self._trainer.global_step
            store.stop(complete=not early)
            if self.num_processes > 1:
                worker.enforce()
            log_statistics(self._trainer, store, always=True)
            self._cut = store.snapshot()
            worker.load(self._cut)
        worker.detach()

    # --- checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the module's state with the server's parameters and buffers, of one cut with the optimizers."""
        state: dict[str, Any] = super().lightning_module_state_dict()
        worker, store = self._worker, self._store
        if worker is None or store is None:
            return state
        self._dumped = self._cut or store.snapshot()
        shared = self.settings.buffers == "mean" or self.num_processes > 1
        return with_values_of(self._dumped, state, worker, buffers=shared)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the server's state of an optimizer, of the same cut as the module's state."""
        if self._worker is None or self._dumped is None or self.settings.local_steps:
            state: dict[str, Any] = super().optimizer_state(optimizer)
            return state
        optimizer = getattr(optimizer, "optimizer", optimizer)
        return self._dumped.optimizer_states[self._worker.optimizers.index(optimizer)]

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write an ordinary checkpoint; unfinished epochs go under a key that a plain Trainer does not read."""
        if self._worker is not None and self._dumped is not None:
            checkpoint[_CHECKPOINT_KEY] = rewind_loops(
                checkpoint, self._dumped, pending=len(self._worker.pending), batches=self._trainer.num_training_batches
            )
            self._dumped = None
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, of this or any other strategy."""
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
        resumed: Mapping[str, Any] = checkpoint.pop(_CHECKPOINT_KEY, {})
        self._resumed = dict(resumed)
        return checkpoint

    def _save_snapshot(self, worker: Worker) -> None:
        every = self.snapshot_every_n_steps
        if every is None or worker.version < self._next_snapshot:
            return
        if self._next_snapshot:
            path = f"{self._trainer.default_root_dir}/async_sgd.ckpt"
            self._trainer.save_checkpoint(path)  # Lightning's writer replaces the file at once, when it is whole
        self._next_snapshot = (worker.version // every + 1) * every
