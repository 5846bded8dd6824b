"""Start the workers of an asynchronous `fit` and serve them from the process that called it.

Lightning's two launchers end the whole job as soon as one process dies. This one runs the parameter server in the
parent process, which the stock launcher would leave idle, replaces dead workers, and takes the result from whoever
coordinates in the end.
"""

import logging
import multiprocessing
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_accel.async_sgd import SharedMemoryStore, run_workers
from lightning_accel.decision_line import say_decision
from lightning_accel.lightning_private import launcher_module, make_averages_picklable
from lightning_accel.strategies.layer_exchange import prepare_to_come_back
from lightning_accel.strategies.live import live_table
from lightning_accel.strategies.results import bring_back, bring_back_optimizers, collect

log = logging.getLogger(__name__)


class AsyncSGDLauncherBody:
    """What this launcher does its own way; the rest is ``_MultiProcessingLauncher``'s."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Run ``fit`` in worker processes, anything else right here: evaluations are one process's work."""
        if trainer is None or trainer.state.fn != "fit":
            return function(*args, **kwargs)
        strategy = self._strategy  # type: ignore[attr-defined]
        parts = launcher_module(strategy.distribution)
        parts._check_missing_main_guard()
        if strategy.start_method == "forkserver":
            multiprocessing.set_forkserver_preload([type(strategy).__module__, "lightning_accel.strategies.session"])
        prepare_to_come_back(trainer)
        make_averages_picklable(trainer)
        strategy.optimizers = []  # of an earlier fit; the workers make their own
        states = parts._GlobalStateSnapshot.capture()
        # sums in another number of threads have other last bits; several workers share what this process may use
        threads = max(1, torch.get_num_threads() // strategy.num_processes)
        say_decision(trainer, "AsyncSGDStrategy", _decision(strategy))
        with live_table(strategy) as on_tick:
            output, ending = run_workers(
                _fit_in_worker,
                (trainer, function, args, kwargs, states, threads),
                workers=strategy.num_processes,
                settings=strategy.settings,
                on_tick=on_tick,
                start_method=strategy.start_method,
            )
        strategy.statistics, strategy.ending = ending.statistics, ending
        if output is None:
            raise RuntimeError(
                "the coordinator died when training was over, before it could hand over the result; the last "
                "checkpoint is resumable with `fit(ckpt_path=...)`."
            )
        weights = output.weights_path
        strategy.precision_plugin.convert_module(trainer.lightning_module)  # as the workers' was; a fit leaves it so
        self._recover_results_in_main_process(output, trainer)  # type: ignore[attr-defined]
        if not strategy.settings.local_steps:  # else each worker's optimizer has a state of its own
            bring_back_optimizers(trainer, ending.state, output.extra["async_sgd"]["groups"])
        if weights is not None:
            shutil.rmtree(Path(weights).parent, ignore_errors=True)  # made for this file alone
        return output.trainer_results

    def get_extra_results(self, trainer: Any) -> dict[str, Any]:
        """Add what a second `fit` and the caller's callbacks need to know to what Lightning brings back."""
        extra: dict[str, Any] = super().get_extra_results(trainer)  # type: ignore[misc]
        extra["async_sgd"] = collect(trainer)
        return extra

    def update_main_process_results(self, trainer: Any, extra: dict[str, Any]) -> None:
        """Bring progress and the callbacks' state into the caller's Trainer."""
        super().update_main_process_results(trainer, extra)  # type: ignore[misc]
        bring_back(trainer, extra["async_sgd"])

    def kill(self, signum: Any) -> None:
        """Nothing to do: workers end when this process does."""


def _decision(strategy: Any) -> str:
    """Return how the workers of ``strategy`` are going to train."""
    settings, workers = strategy.settings, strategy.num_processes
    who = "1 asynchronous worker pushes" if workers == 1 else f"{workers} asynchronous workers push"
    pushed = f"what {settings.local_steps} local steps changed" if settings.local_steps else "gradients"
    return (
        f"{who} {pushed} to a server in this process "
        f"(staleness={settings.staleness}, at most {settings.lease_batches} batches a lease)."
    )


def _fit_in_worker(  # noqa: PLR0917  # a process is started with a flat list of arguments
    store: SharedMemoryStore,
    trainer: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    states: Any,
    threads: int,
) -> Any:
    strategy = trainer.strategy
    parts = launcher_module(strategy.distribution)
    strategy.enter(store, trainer)
    states.restore()
    if store.worker or store.incarnation:
        # the first worker draws as a plain run does; every other one needs dropout masks of its own
        seed = int(torch.randint(2**31, ())) + 1009 * store.incarnation + store.worker
        torch.manual_seed(seed)
        random.seed(seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(seed % 2**32)
    args, kwargs = parts._disable_module_memory_sharing((args, kwargs))
    torch.set_num_threads(threads)
    os.environ["LOCAL_RANK"] = str(store.worker)
    results = function(*args, **kwargs)
    return strategy.launcher._collect_rank_zero_results(trainer, results)
