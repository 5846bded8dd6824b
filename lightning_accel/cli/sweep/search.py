"""A search by Optuna over the jobs of a Hydra launcher: ask, launch, tell.

The study is the memory of the search. What the study holds already counts, so the same command goes on where it was; a
trial that was running when its process died is told as lost, and its values are tried again.
"""

import itertools
import logging
import math
import os
import random
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from optuna.trial import FrozenTrial, Trial, TrialState

from lightning_accel.cli.compose import instantiate
from lightning_accel.cli.errors import UsageError, explain
from lightning_accel.cli.sweep.search_space import SearchSpace, grid_of, read_search_space

_log = logging.getLogger(__name__)
_BEATS_SECONDS = 5.0
# What a running trial says of itself, in the study, where every process that works on it looks.
PROCESS, HOST, ALIVE, LOST, STOPPED, ERROR = "process", "host", "alive", "lost", "stopped_early", "error"
TRIAL_VARIABLE = "LIGHTNING_ACCEL_TRIAL"  # set in every job, whichever process a launcher runs it in
_TERMINAL = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

trials_here: dict[tuple[str, int], Trial] = {}  # those that run in this process, by study and number


class Search:
    """One call of ``sweep=optuna``.

    Args:
        settings: What stands in ``conf/hydra/sweeper/optuna.yaml``.
        config: The whole configuration, ``hydra`` included.
        hydra_context: Hydra's.
        task_function: The job.

    Raises:
        UsageError: If a setting is out of range.
    """

    def __init__(
        self, settings: Mapping[str, Any], config: DictConfig, hydra_context: HydraContext, task_function: TaskFunction
    ) -> None:
        self.settings = settings
        self.config = config
        for name in ("n_trials", "n_jobs"):
            if not isinstance(settings[name], int) or settings[name] < 1:
                raise UsageError(f"`hydra.sweeper.{name}` must be an integer >= 1, got {settings[name]}.")
        if not 0.0 <= settings["max_failure_rate"] <= 1.0:
            raise UsageError(f"`hydra.sweeper.max_failure_rate` must be in [0, 1], got {settings['max_failure_rate']}.")
        self.launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )

    def run(self, arguments: Sequence[str]) -> None:
        """Launch trials until the study holds ``n_trials`` that have ended.

        Raises:
            UsageError: If the words can not be searched, or all trials failed.
        """
        parameters = [f"{key}={value}" for key, value in (self.settings["params"] or {}).items()]
        space = read_search_space([*parameters, *arguments])
        total = self.settings["n_trials"]
        study = self._study()
        self._save_words()
        if self._is_grid:
            total = min(total, self._enqueue_grid(study, space))
        put_back_lost(study, self.settings["lost_seconds"])
        begun = len(ended(study))
        if begun:
            _log.info("study %s has %d of %d trials already.", study.study_name, begun, total)
        while (left := total - len(ended(study))) > 0:
            self._launch(study, space, min(left, self.settings["n_jobs"]))
            self._check_failures(study)
        if begun >= total:
            _log.info(
                "nothing is left to try: hydra.sweeper.n_trials=%d goes on, hydra.sweeper.study_name=NAME begins anew.",
                2 * total,
            )

    @property
    def _is_grid(self) -> bool:
        return str(self.settings["sampler"]["_target_"]).endswith(".GridSampler")

    def _enqueue_grid(self, study: optuna.Study, space: SearchSpace) -> int:
        """Queue every combination that the study does not hold yet, in an order of the seed; return how many there are.

        Optuna's own grid ends a study by an exception where trials are asked for one by one.
        """
        grid = grid_of(space)
        combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        random.Random(self.settings["sampler"].get("seed")).shuffle(combinations)
        for combination in combinations:
            study.enqueue_trial(combination, skip_if_exists=True)
        return len(combinations)

    def _study(self) -> optuna.Study:
        node = OmegaConf.create(self.settings["sampler"])
        grid = optuna.samplers.RandomSampler(seed=node.get("seed")) if self._is_grid else None
        sampler = grid or instantiate(node, name="hydra.sweeper.sampler")
        directions = self.settings["direction"]
        if directions is None:
            directions = "maximize" if self.config.get("optimized_mode", "max") == "max" else "minimize"
        directions = [directions] if isinstance(directions, str) else [str(d) for d in directions]
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # the table at the end says it
        return optuna.create_study(
            study_name=self.settings["study_name"],
            storage=open_storage(self.settings["storage"]),
            sampler=sampler,
            directions=directions,
            load_if_exists=True,
        )

    def _save_words(self) -> None:
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")

    def _launch(self, study: optuna.Study, space: SearchSpace, count: int) -> None:
        trials = [study.ask(space.varied) for _ in range(count)]
        words = [self._words(study, trial, space) for trial in trials]
        try:
            with _alive(study, trials):
                returns = self.launcher.launch(words, initial_job_idx=trials[0].number)
        except BaseException:  # Ctrl-C, or the launcher itself
            for trial in trials:
                _lose(study, trial.number)
            raise
        for trial, returned in zip(trials, returns, strict=True):
            tell(study, trial, returned)

    def _words(self, study: optuna.Study, trial: Trial, space: SearchSpace) -> list[str]:
        if self.settings["custom_search_space"] is not None:
            node = OmegaConf.create({"_target_": self.settings["custom_search_space"], "_partial_": True})
            instantiate(node, name="hydra.sweeper.custom_search_space")(self.config, trial)
        varied = [f"{key}={'null' if value is None else value}" for key, value in trial.params.items()]
        # A trial finds itself in the study, and its folder in that of the sweep, by these; see `StopBadTrial`.
        place = [f"hydra.sweep.dir='{self.config.hydra.sweep.dir}'", f"hydra.sweep.subdir={trial.number}"]
        identity = f"+hydra.job.env_set.{TRIAL_VARIABLE}='{trial.number}/{study.study_name}'"
        return [*varied, *space.fixed, *place, identity]

    def _check_failures(self, study: optuna.Study) -> None:
        trials = ended(study)
        failed = [trial for trial in trials if trial.state == TrialState.FAIL]
        if trials and len(failed) / len(trials) > self.settings["max_failure_rate"]:
            raise UsageError(
                f"{len(failed)} of {len(trials)} trials failed, more than hydra.sweeper.max_failure_rate="
                f"{self.settings['max_failure_rate']:g} allows; the last: {failed[-1].user_attrs.get(ERROR, '')}"
            )
        if len(failed) == len(trials) == self.settings["n_trials"]:
            raise UsageError(f"all {len(trials)} trials failed; the last: {failed[-1].user_attrs.get(ERROR, '')}")


def open_storage(storage: str | None) -> Any:
    """Return what Optuna keeps a study in: an address as it is, ``journal:FILE`` as a file that machines can share."""
    if storage is not None and storage.startswith("journal:"):
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        return JournalStorage(JournalFileBackend(storage.removeprefix("journal:")))
    return storage


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that count: all that have ended but those that were lost and are tried again."""
    trials = study.get_trials(deepcopy=False, states=_TERMINAL)
    return [trial for trial in trials if LOST not in trial.user_attrs]


def tell(study: optuna.Study, trial: Trial, returned: JobReturn) -> None:
    """Tell the study what became of a trial: its value, stopped early, or failed with the reason."""
    reason = ""
    if returned.status == JobStatus.COMPLETED:
        if STOPPED in study.get_trials(deepcopy=False)[trial.number].user_attrs:
            study.tell(trial, state=TrialState.PRUNED)
            return
        value = returned.return_value
        try:
            values = [float(v) for v in value] if isinstance(value, list | tuple) else [float(value)]
        except (TypeError, ValueError):
            values = []
        if values and not any(map(math.isnan, values)):
            study.tell(trial, values)
            return
        reason = f"its value is {value}; set optimized_metric to a metric that it logs."
    else:
        try:
            _ = returned.return_value  # raises what the job raised
        except Exception as error:
            reason = explain(error, [])[0]
    reason = (reason.splitlines() or ["it did not end"])[0]
    trial.set_user_attr(ERROR, reason[:500])
    study.tell(trial, state=TrialState.FAIL)
    _log.warning("trial %d failed, the search goes on: %s", trial.number, reason)


def put_back_lost(study: optuna.Study, lost_seconds: float) -> None:
    """Fail trials whose process is gone and queue their values again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        attributes = trial.user_attrs
        if attributes.get(HOST) == socket.gethostname():
            gone = not _is_running(attributes.get(PROCESS))
        else:
            gone = time.time() - float(attributes.get(ALIVE, 0.0)) > lost_seconds
        if gone:
            _log.warning("trial %d was lost with its process; its values are tried again.", trial.number)
            _lose(study, trial.number)


def _lose(study: optuna.Study, number: int) -> None:
    trial = study.get_trials(deepcopy=False)[number]
    if trial.state.is_finished():
        return
    if trial.params:  # else it died before it had any
        study.enqueue_trial(trial.params, user_attrs={"again": number})
    handle = trials_here.get((study.study_name, number)) or handle_of(study, trial)
    handle.set_user_attr(LOST, True)
    study.tell(number, state=TrialState.FAIL)


def handle_of(study: optuna.Study, trial: FrozenTrial) -> Trial:
    """Return what a running trial of another process is reported to by; Optuna has no public way to it."""
    return Trial(study, trial._trial_id)


@contextmanager
def _alive(study: optuna.Study, trials: Sequence[Trial]) -> Iterator[None]:
    """Keep saying, while trials run, which process they are in and that it is alive."""
    over = threading.Event()
    for trial in trials:
        trials_here[study.study_name, trial.number] = trial
        trial.set_user_attr(HOST, socket.gethostname())
        trial.set_user_attr(PROCESS, _process())
        trial.set_user_attr(ALIVE, time.time())

    def beat() -> None:
        while not over.wait(_BEATS_SECONDS):
            for trial in trials:
                trial.set_user_attr(ALIVE, time.time())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for trial in trials:
            trials_here.pop((study.study_name, trial.number), None)


def _process() -> str:
    """Name this process so that a later one of the same number is told apart."""
    return f"{os.getpid()}@{_started(os.getpid())}"


def _is_running(process: object) -> bool:
    number, _, started = str(process).partition("@")
    return number.isdigit() and _started(int(number)) == started != ""


def _started(number: int) -> str:
    """Return when a process started, in the kernel's ticks; empty where there is none."""
    try:
        return Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
