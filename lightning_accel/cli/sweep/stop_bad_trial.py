"""Stops a trial of an Optuna sweep early when it is worse than the others were at the same time."""

import logging
import os
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig
from typing_extensions import override

if TYPE_CHECKING:
    import optuna

_log = logging.getLogger(__name__)


class StopBadTrial(Callback):
    """Report a metric after each validation to the study of the sweep, and stop when Optuna's pruner says so.

    Does nothing outside of an Optuna search. A trial that is stopped ends as pruned. Without a pruner of the user's own
    the median rule of Optuna decides, which starts after five finished trials.

    Args:
        metric: Name of a logged metric, the one that the sweep optimizes.

    Raises:
        ValueError: If ``metric`` is empty, or when ``fit`` starts, if the study is in the memory of another process.
    """

    def __init__(self, metric: str) -> None:
        if not metric:
            raise ValueError(f"`metric` must name a logged metric, got {metric!r}; set optimized_metric=NAME.")
        self.metric = metric
        self._trial: optuna.trial.Trial | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the trial, which belongs to a run."""
        return self.__dict__ | {"_trial": None}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trial = None
        if stage != "fit" or not trainer.is_global_zero or not HydraConfig.initialized():
            return
        hydra = HydraConfig.get()
        if str(hydra.sweeper.get("_target_", "")).endswith("OptunaSearch"):
            self._trial = _trial_of(hydra.sweeper)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = trainer.callback_metrics.get(self.metric)
        if trainer.sanity_checking or self._trial is None or value is None:
            return
        self._trial.report(float(value), step=trainer.current_epoch)
        if self._trial.should_prune():
            from lightning_accel.cli.sweep.search import STOPPED

            _log.info("trial %s is stopped: %s %.4g is below par.", self._trial.number, self.metric, float(value))
            self._trial.set_user_attr(STOPPED, trainer.current_epoch)
            trainer.should_stop = True


def _trial_of(sweeper: DictConfig) -> "optuna.trial.Trial":
    """Return the trial that this job is, from the process that searches or from where the study is kept."""
    import optuna

    from lightning_accel.cli.compose import instantiate
    from lightning_accel.cli.sweep.search import TRIAL_VARIABLE, handle_of, open_storage, trials_here

    number, _, name = os.environ[TRIAL_VARIABLE].partition("/")
    trial = trials_here.get((name, int(number)))
    pruner = None if sweeper.pruner is None else instantiate(sweeper.pruner, name="hydra.sweeper.pruner")
    if trial is not None:
        if pruner is not None:
            trial.study.pruner = pruner
        return trial
    if sweeper.storage is None:
        raise ValueError("a study in memory can not be reported to from another process: set hydra.sweeper.storage.")
    study = optuna.load_study(study_name=name, storage=open_storage(sweeper.storage), pruner=pruner)
    return handle_of(study, study.get_trials(deepcopy=False)[int(number)])
