"""What one worker process does in a `fit`: it joins the run, takes batches, pushes, validates one cut, and ends."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_accel.async_sgd import ParameterStore, Settings, Snapshot, Worker
from lightning_accel.async_sgd.module_buffers import give_buffers_own_memory
from lightning_accel.async_sgd.replicas.shards import whole
from lightning_accel.lightning_private import (
    checkpoint_periods,
    count_steps_of_others,
    expect_uncertain_end,
    go_to_epoch,
    looks_ahead,
    restart_fetching,
    validate_once_more,
)
from lightning_accel.strategies.replicas import is_replica, refuse_in_replica
from lightning_accel.strategies.worker_process.checkpoints import rewind_loops, with_values_of
from lightning_accel.strategies.worker_process.coordination import Watchers, log_statistics
from lightning_accel.strategies.worker_process.layer_exchange import follow_layers
from lightning_accel.strategies.worker_process.optimizer_groups import (
    autocast_of_steps,
    follow_groups,
    layout,
    layout_of_server,
    thaw_again,
)
from lightning_accel.strategies.worker_process.same_data import refuse_other_data
from lightning_accel.strategies.worker_process.schedules import SharedPace, catch_up, follow_pace, step_to_show
from lightning_accel.strategies.worker_process.shared_epochs import SharedEpochs
from lightning_accel.strategies.worker_process.snapshots import save_snapshot


class Session:
    """One worker's part in a run, from the set-up of its Trainer to the end of training.

    Args:
        strategy: Of the Trainer.
        trainer: In this process.
        store: This worker's end of the run.
        settings: Of the run.
        workers: How many were asked for.
    """

    def __init__(self, strategy: Any, trainer: Any, store: ParameterStore, settings: Settings, workers: int) -> None:
        self.store = store
        self.settings = settings
        self.watchers = Watchers(strategy, trainer, store)
        self.data = SharedEpochs(trainer, store, workers)
        self._strategy = strategy
        self._trainer = trainer
        self._workers = workers
        self._worker: Worker | None = None
        self._cut: Snapshot | None = None  # what the module holds while it is validated, and at the end
        self._dumped: Snapshot | None = None  # what the checkpoint that is being made holds
        self._first_steps = 0
        self._others_shown = 0
        self._next_snapshot = 0
        self._ended = False
        self._validated = False

    @property
    def worker(self) -> Worker:
        """The worker, once training has started."""
        assert self._worker is not None, "training has not started"
        return self._worker

    @property
    def joined(self) -> bool:
        """Whether training has started."""
        return self._worker is not None

    # --- training

    def join(self, epochs: list[dict[str, Any]]) -> None:
        """Join the run: the coordinator opens it with what it has, the others read.

        Args:
            epochs: Unfinished epochs of the checkpoint that is resumed.

        Raises:
            ValueError: If the data cannot be shared out, or another worker has another model.
        """
        trainer, store, module = self._trainer, self.store, self._trainer.lightning_module
        parameters, buffers = _tensors_of(module)
        optimizers = self._strategy.optimizers
        worker = Worker(
            store, self.settings, parameters, buffers, optimizers, watch=not is_replica(store), module=module
        )
        opening = functools.partial(worker.opening, version=trainer.global_step, epochs=epochs)
        membership = store.join(lambda: replace(opening(), autocast=autocast_of_steps(trainer)))
        if membership.incarnation > 0:
            thaw_again(trainer, range(trainer.current_epoch, membership.epoch))
            worker.follow(parameters, buffers)
        if store.parameter_names != list(parameters):
            follow_layers(trainer, store)  # the run has exchanged layers before this worker was started
            worker.follow(*_tensors_of(module))
        store.check(list(worker.parameters.values()), list(worker.buffers.values()))
        refuse_in_replica(trainer, store, worker)
        worker.begin()
        worker.attach()
        self._worker = worker
        self._layout = layout(optimizers)
        self.data.join(worker)
        self._first_steps = self._steps_of_all
        self._others_shown = 0
        count_steps_of_others(trainer, worker.version - trainer.global_step)
        if membership.incarnation > 0:
            go_to_epoch(trainer, membership.epoch)
            self.watchers.restore()
            self._catch_up(membership.epoch)
        for config in self._strategy.lr_scheduler_configs:
            if not config.reduce_on_plateau and (config.interval == "step" or not module.automatic_optimization):
                follow_pace(config.scheduler, self._pace(config.scheduler.optimizer), self._is_epoch_call)
        if self._workers > 1 or membership.incarnation > 0:
            if not isinstance(trainer.train_dataloader, DataLoader) or not looks_ahead(trainer):
                raise ValueError(
                    "several workers share out one DataLoader, and the training loop must draw its batches itself; "
                    "combine several into one dataset and take no `dataloader_iter`, or use `devices=1`."
                )
            if membership.incarnation == 0 or not trainer.reload_dataloaders_every_n_epochs:
                refuse_other_data(store, trainer.train_dataloader.dataset)
            expect_uncertain_end(trainer, self._workers)
            restart_fetching(trainer)
        if self.store.is_coordinator and membership.incarnation == 0:
            self.watchers.publish()  # whoever takes over goes on with these loggers

    def _catch_up(self, epoch: int) -> None:
        """Let a process that was started again go on with the rates that the run has by now."""
        progress = self.watchers.progress()
        if progress is None or self.settings.local_steps:
            return
        for optimizer, state in zip(self.worker.optimizers, self.store.snapshot().optimizer_states, strict=True):
            for group, values in zip(optimizer.param_groups, state["param_groups"], strict=False):  # one may be added
                group.update({k: v for k, v in values.items() if k != "params"})
        self.worker.know_groups()
        made = [now - then for now, then in zip(self.worker.steps, progress["steps_of"], strict=True)]
        steps_of = {id(optimizer): steps for optimizer, steps in zip(self.worker.optimizers, made, strict=True)}
        catch_up(
            [config for config in self._strategy.lr_scheduler_configs if not config.reduce_on_plateau],
            [state for is_plateau, state in progress["lr_schedulers"] if not is_plateau],
            epochs=range(progress["epoch"], epoch),
            steps_of=steps_of,
        )

    @property
    def _steps_of_all(self) -> int:
        # with `local_steps` every optimizer steps in each push; the version counts pushes
        return self.worker.version if self.settings.local_steps else sum(self.worker.steps)

    def _pace(self, optimizer: Optimizer) -> SharedPace:
        worker = self.worker
        index = worker.optimizers.index(optimizer)
        limit = self._trainer.estimated_stepping_batches if self._automatic else -1
        limit = float("inf") if limit == -1 else limit - self._trainer.global_step
        start = worker.steps[index]
        return SharedPace(lambda: (worker.steps[index] - start, worker.own_steps[index]), limit)

    @property
    def _automatic(self) -> bool:
        return bool(self._trainer.lightning_module.automatic_optimization)

    def _is_epoch_call(self) -> bool:
        # in manual optimization the call is the user's: one on the last batch is taken for one an epoch
        return not self._automatic and bool(self._trainer.is_last_batch)

    def begin_batch(self, batch_idx: int, *, snapshot_every: int | None) -> None:
        """Take note of what the others did since the last batch, and of which batch this is."""
        if self._cut is not None:
            self.worker.send_changes()
            self._cut = None
            self.worker.pull()
        self.data.stop_with_the_run()
        if not self.store.stopped and self.store.is_coordinator:
            if self.watchers.take_over():
                self._layout = layout_of_server(self.store.snapshot())
            self.watchers.publish_progress(self._steps_of_all, self.worker.steps)
            self._save_snapshot(snapshot_every)
            log_statistics(self._trainer, self.store)
        if not self.store.is_current and batch_idx % self._trainer.accumulate_grad_batches == 0:
            self._follow_exchange()
        if layout(self.worker.optimizers) != self._layout:
            self._layout = layout(self.worker.optimizers)
            follow_groups(self.worker, *_tensors_of(self._trainer.lightning_module))
        self.worker.begin_batch()
        if (lease := self.data.begin_batch()) is not None:
            self.worker.pending.append(lease)
        self.store.begin("step")

    def count_others(self) -> None:
        """After an own step, let ``global_step`` show those of the others, past no multiple that callbacks wait for."""
        if self.store.is_coordinator:
            self.watchers.take_over()  # appointed since this batch began, which may be the last one
        per_push = max(self.settings.n_push, self.settings.local_steps)
        others = (self._steps_of_all - self._first_steps - sum(self.worker.own_steps)) * per_push
        shown = self._trainer.global_step  # Lightning counts this step only when we return
        actual = shown + 1 + max(0, others - self._others_shown)
        news = step_to_show(shown, actual, checkpoint_periods(self._trainer)) - shown - 1
        self._others_shown += news
        count_steps_of_others(self._trainer, news)

    # --- validation and the end

    def begin_validation(self) -> None:
        """Put one consistent cut into the module; a checkpoint of this validation holds what callbacks make of it."""
        if not self.joined:
            return  # a sanity check
        self.worker.send_changes()
        self.worker.flush()
        self.store.idle(True)
        self._cut = self.store.snapshot()
        self.worker.load(self._cut)

    def end_validation(self) -> None:
        """Tell the others what was found, should one have to take over."""
        self._validated = True
        self.store.idle(False)
        self.watchers.publish()

    def stop_together(self) -> None:
        """End training for all; in the coordinator the module then holds the result, for callbacks to finish it."""
        if self._ended or not self.joined:
            return
        self._ended = True
        worker, store = self.worker, self.store
        worker.send_changes()
        worker.flush()
        if store.finish():
            unvalidated = self.watchers.take_over() or (store.incarnation > 0 and not self._validated)
            early = self._trainer.should_stop or 0 <= self._trainer.max_steps <= self._trainer.global_step
            store.stop(complete=not early)
            if self._workers > 1:
                if not store.is_current:
                    self._follow_exchange()
                worker.enforce()
            log_statistics(self._trainer, store, always=True)
            self._cut = store.snapshot()
            worker.load(self._cut)
            if unvalidated:  # who coordinated before died too late for this worker to do it in its loop
                validate_once_more(self._trainer)

    def end(self) -> None:
        """Take the result as callbacks have left it."""
        self.stop_together()
        self._take_result()
        self.worker.detach()

    # --- checkpoints

    def model_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a module's state dict with the server's parameters and buffers, of one cut with the optimizers."""
        if self._ended or (self._cut is not None and not is_replica(self.store)):
            self._take_result()
        elif self._cut is None:
            self.worker.send_changes()
        self._dumped = self._cut or self.store.snapshot()
        return with_values_of(self._dumped, state, self.worker)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """Return the server's state of an optimizer, of the same cut; None where this worker's own counts.

        Hyper-parameters are this worker's: a schedule may have acted since its last push.
        """
        if self._dumped is None or self.settings.local_steps:
            return None
        optimizer = getattr(optimizer, "optimizer", optimizer)
        state = self._dumped.optimizer_states[self.worker.optimizers.index(optimizer)]
        mine = self.worker.changed_groups(self.worker.optimizers.index(optimizer))
        pairs = zip(state["param_groups"], mine, strict=True)
        return {**state, "param_groups": [{**theirs, **mine} for theirs, mine in pairs]}

    def unfinished_epochs(self, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
        """Make the loops of a checkpoint count for all workers; returns what a resumed asynchronous run needs."""
        if self._dumped is None:
            return None
        batches = self._trainer.num_training_batches
        cut, self._dumped = self._dumped, None
        alone = self._workers == 1
        return rewind_loops(checkpoint, cut, pending=len(self.worker.pending), batches=batches, alone=alone)

    def _take_result(self) -> None:
        """Take what the module holds for the result: callbacks may have changed what the server had."""
        if self._cut is not None:
            parameters = [whole(p.detach()).cpu().clone() for p in self.worker.parameters.values()]
            buffers = [b.detach().cpu().clone() for b in self.worker.buffers.values()]
            self._cut = replace(self._cut, parameters=parameters, buffers=buffers)

    def _save_snapshot(self, every: int | None) -> None:
        version = self.worker.version
        if every is None or version < self._next_snapshot:
            return
        if self._next_snapshot:
            save_snapshot(self._trainer)
        self._next_snapshot = (version // every + 1) * every

    # --- other layers

    @contextlib.contextmanager
    def exchanging_layers(self) -> Iterator[None]:
        """Let the body replace layers and put their parameters into the optimizers; the run goes on with them.

        Nobody's pushes count meanwhile. The others follow at their next batch.
        """
        worker, store = self.worker, self.store
        before = list(worker.parameters.values())
        worker.send_changes()
        worker.flush()
        cut = store.hold()
        try:
            worker.load(cut)
            if not self.settings.local_steps:
                for optimizer, state in zip(worker.optimizers, cut.optimizer_states, strict=True):
                    optimizer.load_state_dict(state)
            yield
        except BaseException:
            store.let_go()
            raise
        parameters, buffers = _tensors_of(self._trainer.lightning_module)
        if [id(p) for p in before] == [id(p) for p in parameters.values()]:
            store.let_go()
            worker.begin()
            return
        worker.follow(parameters, buffers)
        store.exchange(worker.opening(version=cut.version, steps=cut.steps))
        worker.begin()

    def _follow_exchange(self) -> None:
        self.worker.flush()  # is refused, and so its batches are given out again
        self.store.rejoin()
        if self.store.parameter_names != list(self.worker.parameters):
            follow_layers(self._trainer, self.store)
            self.worker.follow(*_tensors_of(self._trainer.lightning_module))
        self.store.check(list(self.worker.parameters.values()), list(self.worker.buffers.values()))
        self.worker.begin()


def _tensors_of(module: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    give_buffers_own_memory(module)
    # a sparse buffer has no place in shared memory: it stays each worker's own
    buffers = {name: b for name, b in module.named_buffers() if b is not None and b.layout == torch.strided}
    return dict(module.named_parameters()), buffers
