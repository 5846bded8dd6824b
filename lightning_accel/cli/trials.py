"""Stops a trial of an Optuna sweep early when it is worse than the others were at the same time."""

import logging

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

_log = logging.getLogger(__name__)


class StopBadTrial(Callback):
    """Report a metric after each validation to the study of the sweep, and stop when Optuna's pruner says so.

    Does nothing outside of an Optuna sweep. The trial's value is then what it has reached; the median rule of Optuna
    starts after five finished trials. The study must be kept in a storage that jobs can open.

    Args:
        metric: Name of a logged metric, the one that the sweep optimizes.

    Raises:
        ValueError: If ``metric`` is empty, or when ``fit`` starts, if the study is kept in memory only.
    """

    def __init__(self, metric: str) -> None:
        if not metric:
            raise ValueError(f"`metric` must name a logged metric, got {metric!r}; set optimized_metric=NAME.")
        self.metric = metric
        self._study: tuple[str, str] | None = None
        self._overrides: frozenset[str] = frozenset()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._study = None
        if stage != "fit" or not trainer.is_global_zero or not HydraConfig.initialized():
            return
        hydra = HydraConfig.get()
        if not str(hydra.sweeper.get("_target_", "")).endswith("OptunaSweeper"):
            return
        if hydra.sweeper.storage is None or hydra.sweeper.study_name is None:
            raise ValueError("a study in memory can not be reported to: set hydra.sweeper.storage and study_name.")
        self._study = (hydra.sweeper.study_name, hydra.sweeper.storage)
        self._overrides = frozenset(hydra.overrides.task)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = trainer.callback_metrics.get(self.metric)
        if trainer.sanity_checking or self._study is None or value is None:
            return
        import optuna

        name, storage = self._study
        study = optuna.load_study(study_name=name, storage=storage)
        running = [t for t in study.get_trials(deepcopy=False) if t.state == optuna.trial.TrialState.RUNNING]
        mine = [t for t in running if {f"{key}={chosen}" for key, chosen in t.params.items()} <= self._overrides]
        if not mine:
            return
        # The sweeper holds the trial itself, in this process or another; the storage is where both meet.
        trial = optuna.trial.Trial(study, mine[-1]._trial_id)
        trial.report(float(value), step=trainer.current_epoch)
        if trial.should_prune():
            _log.info("trial %s is stopped: %s %.4g is below par.", trial.number, self.metric, float(value))
            trainer.should_stop = True
