"""Launchers, loops and loggers of Lightning, entered or left in the middle."""

import contextlib
import csv
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer


def launcher_module(distribution: str) -> Any:
    """Return the module with ``_MultiProcessingLauncher`` and what it is made of.

    Both stock launchers end the whole job when one process dies, and there is no public base class for another one.
    ``distribution`` is ``lightning.pytorch`` or ``pytorch_lightning``.
    """
    return import_module(f"{distribution}.strategies.launchers.multiprocessing")


def attach_launcher(strategy: Any, launcher: Any) -> None:
    """Give a strategy its launcher; the public property has no setter, and every strategy of Lightning does this."""
    strategy._launcher = launcher


@contextlib.contextmanager
def without_launcher(strategy: Any) -> Iterator[None]:
    """Hide a strategy's launcher while an evaluation runs in this process.

    `Trainer.predict` takes every launcher that is derived from the stock one for another process, which cannot return
    predictions, whatever it does.
    """
    launcher = strategy._launcher
    strategy._launcher = None
    try:
        yield
    finally:
        strategy._launcher = launcher


def only_tunes(trainer: Any) -> bool:
    """Whether this `fit` is a `Tuner`'s, which ends it when its callback has found what it looks for."""
    return any(getattr(callback, "_early_exit", False) for callback in trainer.callbacks)


def prepare_data_of(trainer: Any) -> None:
    """Call ``prepare_data`` of module and data module as a Trainer does, where this process is the first."""
    trainer._data_connector.prepare_data()


def sync_batch_norm_requested(strategy: Any) -> bool:
    """Whether ``Trainer(sync_batchnorm=True)`` was asked for; the connector tells strategies by this attribute only."""
    return strategy._layer_sync is not None


def count_steps_of_others(trainer: Any, steps: int) -> None:
    """Add optimizer steps that other processes made to the Trainer's ``global_step``, which is read-only."""
    loop = trainer.fit_loop.epoch_loop
    if trainer.lightning_module.automatic_optimization:
        loop.automatic_optimization.optim_progress.optimizer.step.total.increment_by(steps)
    else:
        loop.manual_optimization.optim_step_progress.total.increment_by(steps)


def expect_uncertain_end(trainer: Any, workers: int) -> None:
    """Make the fit loop learn where an epoch ends from its data instead of counting up to its length.

    With several workers nobody knows beforehand how many batches fall to whom. The loop's fetcher looks one batch
    ahead when it knows no length, and validation at the end of an epoch is tied to the last batch for loaders without
    one; but the length itself must stay known for learning-rate schedules. There is no public switch for either.

    Nor may the epoch end with as many batches as its length: a worker that gets those of a dead one from the epoch
    before has more, and would end without its last batch, and so without validation.
    """
    fit_loop = trainer.fit_loop
    progress = fit_loop.epoch_loop.batch_progress
    fit_loop.epoch_loop._num_ready_batches_reached = lambda: progress.is_last_batch
    setup_data = fit_loop.setup_data

    def setup_data_of_worker() -> None:
        setup_data()
        fetcher = fit_loop._data_fetcher
        if fetcher is None or getattr(fetcher, "_end_is_uncertain", False):
            return
        reset = fetcher.reset

        def reset_without_length() -> None:
            reset()
            fetcher.length, fetcher.done = None, False

        fetcher.reset = reset_without_length
        fetcher._end_is_uncertain = True
        every = trainer.val_check_batch
        if every is None or every == float("inf"):
            return
        whole_epoch = trainer.check_val_every_n_epoch is not None and every >= fit_loop.max_batches
        trainer.val_check_batch = float("inf") if whole_epoch else max(1, round(every / workers))

    fit_loop.setup_data = setup_data_of_worker
    setup_data_of_worker()


def restart_fetching(trainer: Any) -> None:
    """Make the first epoch's iterator anew: it was made before the run was joined."""
    iter(trainer.fit_loop._data_fetcher)


def looks_ahead(trainer: Any) -> bool:
    """Whether the fit loop itself draws the batches, so that the end of an epoch can be seen one batch ahead."""
    return hasattr(trainer.fit_loop._data_fetcher, "prefetch_batches")


def go_to_epoch(trainer: Any, epoch: int) -> None:
    """Set ``current_epoch`` of a worker that was started again while the others went on; it is read-only."""
    progress = trainer.fit_loop.epoch_progress
    for tracker in (progress.current, progress.total):
        tracker.ready = tracker.started = tracker.processed = tracker.completed = epoch


def go_into_epoch(trainer: Any, epoch: int, *, batches: float) -> None:
    """Let the loops stand at the beginning of a later epoch than they do, of so many batches; they are read-only."""
    loop = trainer.fit_loop
    passed = epoch - loop.epoch_progress.current.processed
    for tracker in (loop.epoch_progress.current, loop.epoch_progress.total):
        tracker.ready = tracker.started = epoch + 1
        tracker.processed = tracker.completed = epoch
    progress = loop.epoch_loop.batch_progress
    if batches != float("inf"):
        progress.total.increment_by(passed * int(batches) - progress.current.processed)
    progress.current.reset()


def validate_once_more(trainer: Any) -> None:
    """Run validation when training is over, as at the end of an epoch; nothing if the Trainer validates nothing.

    For a worker that took over from one which died before it had validated the result: the loop's own check for
    validation lies behind it, and `Trainer.validate` would start another run.
    """
    if not trainer.enable_validation:
        return
    first = trainer._logger_connector._first_loop_iter
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    trainer._logger_connector._first_loop_iter = first


def bring_back_progress(trainer: Any, state: dict[str, Any]) -> None:
    """Load the progress of a fit that ran in another process, as if it had run in this one.

    Loading marks every loop as resumed from a checkpoint, which changes how the next fit begins; a fit that ended
    here would not have.
    """
    loops = [trainer.fit_loop]
    loops[0].load_state_dict(state)
    while loops:
        loop = loops.pop()
        loop._restarting = loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
        loops.extend(child for child in vars(loop).values() if hasattr(child, "_loaded_from_state_dict"))


def wrapped_optimizer(optimizer: torch.optim.Optimizer, strategy: Any) -> LightningOptimizer:
    """Return an optimizer as ``self.optimizers()`` gives it, whose updates go to what stands in for a strategy.

    Lightning wraps the run's own ones for the run's own strategy only; the copy of a training step needs others.
    """
    wrapped = LightningOptimizer(optimizer)
    wrapped._strategy = strategy
    return wrapped


def keep_written_metrics(logger: Any) -> None:
    """Let a `CSVLogger` go on with the file of another process, whose columns may be more than it knows of.

    Its writer deletes the file when it is made, and takes for the header what it has written itself.
    """
    if "CSVLogger" not in {kind.__name__ for kind in type(logger).__mro__}:
        return
    kept = Path(logger.log_dir) / "metrics.csv"
    if not kept.is_file():
        return
    text = kept.read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it would delete the file
        writer = logger.experiment
    kept.write_text(text, encoding="utf-8")
    writer.metrics_keys = next(csv.reader(text.splitlines()), [])
