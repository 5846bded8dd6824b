"""What only the coordinator does, and how another worker takes it over."""

import pickle
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_accel.async_sgd import ParameterStore
from lightning_accel.lightning_private import keep_written_metrics
from lightning_accel.strategies.results import follow_loggers, pickled_loggers, state_to_send

_KEY = "coordinator"
PROGRESS_KEY = "progress"
_PROGRESS_SECONDS = 0.5


class Watchers:
    """Callbacks and schedulers that watch validation: put aside in all workers but the coordinator.

    Checkpointing, early stopping and plateau schedulers read metrics that only the coordinator has. Whoever takes
    over puts its own copies to work, with the state that the coordinator published last.
    """

    def __init__(self, strategy: Any, trainer: Any, store: ParameterStore) -> None:
        callbacks = import_module(f"{strategy.distribution}.callbacks")
        self._kinds = (callbacks.Checkpoint, callbacks.EarlyStopping)
        self._strategy = strategy
        self._trainer = trainer
        self._store = store
        self._aside: list[Any] = []
        self._plateaus: list[Any] = []
        self._limits: tuple[Any, Any] | None = None
        self._progress_due = (-1, 0.0)

    def hold_back(self) -> None:
        """Put the callbacks aside and do not validate."""
        trainer = self._trainer
        self._aside = [callback for callback in trainer.callbacks if isinstance(callback, self._kinds)]
        for callback in self._aside:
            trainer.callbacks.remove(callback)
        self._limits = trainer.limit_val_batches, trainer.num_sanity_val_steps
        trainer.limit_val_batches = trainer.num_sanity_val_steps = 0

    def hold_back_plateaus(self) -> None:
        """Put schedulers that wait for a metric aside."""
        configs = self._strategy.lr_scheduler_configs
        self._plateaus = [config for config in configs if config.reduce_on_plateau]
        for config in self._plateaus:
            configs.remove(config)

    def take_over(self) -> bool:
        """Put everything that was held back to work; returns False if this worker has coordinated all along."""
        if self._limits is None:
            return False
        trainer, module = self._trainer, self._trainer.lightning_module
        rank_zero_only.rank = self._strategy.global_rank  # type: ignore[attr-defined]
        trainer.limit_val_batches, trainer.num_sanity_val_steps = self._limits
        self._limits = None
        trainer.callbacks.extend(self._aside)  # checkpoints go last, as Lightning orders them
        for callback in self._aside:
            callback.setup(trainer, module, stage="fit")
        self._strategy.lr_scheduler_configs.extend(self._plateaus)
        self.restore()
        return True

    def publish(self) -> None:
        """Let the others know the state of the watchers."""
        plateaus = [c.scheduler for c in self._strategy.lr_scheduler_configs if c.reduce_on_plateau]
        state = {
            "callbacks": self._states(),
            "plateaus": [state_to_send(scheduler) for scheduler in plateaus],
            "loggers": pickled_loggers(self._trainer),
        }
        self._store.kv(_KEY, pickle.dumps(state), replace=True)

    def _states(self) -> dict[str, Any]:
        watching = [callback for callback in self._trainer.callbacks if isinstance(callback, self._kinds)]
        return {callback.state_key: callback.state_dict() for callback in watching}

    def publish_progress(self, steps: int, steps_of: Sequence[int]) -> None:
        """Let others know how far the loops are, twice a second and in each epoch.

        For the caller's process, if the run does not end well, and for workers that are started again.

        Args:
            steps: Of the server, as `trainer.global_step` shows them now.
            steps_of: Of the server, for each optimizer.
        """
        now = time.monotonic()
        epoch, due = self._progress_due
        if epoch == self._trainer.current_epoch and now < due:
            return
        self._progress_due = self._trainer.current_epoch, now + _PROGRESS_SECONDS
        trainer = self._trainer
        loops = trainer.fit_loop.state_dict()
        loops.get("state_dict", {}).pop("combined_loader", None)  # of a loader that only this process has
        progress = {
            "fit_loop": loops,
            "lr_schedulers": [
                (config.reduce_on_plateau, state_to_send(config.scheduler))
                for config in self._strategy.lr_scheduler_configs
            ],
            "epoch": trainer.current_epoch,
            "steps_of": list(steps_of),
            "global_step": trainer.global_step,
            "steps": steps,
            "batches": trainer.num_training_batches,
            "metrics": {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()},
            "callbacks": self._states(),
        }
        self._store.kv(PROGRESS_KEY, pickle.dumps(progress), replace=True)

    def progress(self) -> dict[str, Any] | None:
        """Return what was published last about the loops, if anything."""
        published = self._store.kv(PROGRESS_KEY, wait=False)
        return None if published is None else pickle.loads(published)

    def restore(self) -> None:
        """Take over the state that was published last, if any."""
        published = self._store.kv(_KEY, wait=False)
        if published is None:
            return
        state = pickle.loads(published)
        for callback in self._trainer.callbacks:
            if isinstance(callback, self._kinds) and callback.state_key in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][callback.state_key])
        plateaus = [c.scheduler for c in self._strategy.lr_scheduler_configs if c.reduce_on_plateau]
        if self._store.is_coordinator:
            follow_loggers(self._trainer, state["loggers"])
            for logger in self._trainer.loggers:
                keep_written_metrics(logger)
        for scheduler, found in zip(plateaus, state["plateaus"], strict=False):
            scheduler.load_state_dict(found)


def log_statistics(trainer: Any, store: ParameterStore, *, always: bool = False) -> None:
    """Send the server's statistics to the Trainer's loggers, every ``log_every_n_steps`` batches of the coordinator."""
    every = trainer.log_every_n_steps
    if not trainer.loggers or not (always or (every and trainer.fit_loop.total_batch_idx % every == 0)):
        return
    found = store.statistics()
    names = ("staleness_mean", "staleness_p95", "updates_per_second", "live_workers", "dropped", "refused")
    metrics = {f"async_sgd/{name}": float(getattr(found, name)) for name in names}
    metrics["async_sgd/push_milliseconds"] = found.apply_milliseconds
    metrics["async_sgd/pull_milliseconds"] = found.pull_milliseconds
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)


def stop_first(session: Any, callback_class: type[Any]) -> Any:
    """Return a callback that, first in the list, stops all workers before any other callback's ``on_train_end``.

    What callbacks make of the parameters there (a last projection, an average) is then made of the result itself. It
    begins validation before theirs, too: an average that they swap in to validate it is not what training goes on from.
    And it ends each batch before theirs: what they do then may take any time.
    """

    def on_train_end(self: Any, trainer: Any, pl_module: Any) -> None:  # noqa: ARG001  # Lightning's signature
        session.stop_together()

    def on_train_batch_end(self: Any, trainer: Any, pl_module: Any, *rest: Any) -> None:  # noqa: ARG001
        session.store.rest()

    def on_validation_start(self: Any, trainer: Any, pl_module: Any) -> None:  # noqa: ARG001
        session.begin_validation()

    hooks = (on_train_end, on_train_batch_end, on_validation_start)
    return type("StopFirst", (callback_class,), {hook.__name__: hook for hook in hooks})()
