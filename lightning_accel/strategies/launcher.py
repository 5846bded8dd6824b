"""Start the workers of an asynchronous `fit` and serve them from the process that called it.

Lightning's two launchers end the whole job as soon as one process dies. This one runs the parameter server in the
parent process, which the stock launcher would leave idle, replaces dead workers, and takes the result from whoever
coordinates in the end.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from lightning_accel.async_sgd import ParameterStore
from lightning_accel.async_sgd.module_buffers import give_buffers_own_memory
from lightning_accel.async_sgd.replicas.shards import whole
from lightning_accel.async_sgd.shared_memory.memory import anonymous_file
from lightning_accel.async_sgd.shared_memory.spawn import StartMethod, resolve_start_method
from lightning_accel.async_sgd.shared_memory.supervisor import Remains
from lightning_accel.lightning_private import launcher_module, make_averages_picklable, only_tunes, without_launcher
from lightning_accel.lightning_private.decision_line import say_decision
from lightning_accel.strategies.engines import devices_here, run_on_engine
from lightning_accel.strategies.live import live_table
from lightning_accel.strategies.refusals import (
    refuse_other_launchers,
    refuse_parameters_in_one_place,
    refuse_tuning_callbacks,
)
from lightning_accel.strategies.rescue import Rescue, load_values
from lightning_accel.strategies.results import bring_back, bring_back_buffers, bring_back_optimizers, collect
from lightning_accel.strategies.worker_process.layer_exchange import prepare_to_come_back
from lightning_accel.strategies.worker_process.made_layers import put_in_place
from lightning_accel.strategies.worker_process.snapshots import remove_part

log = logging.getLogger(__name__)


class AsyncSGDLauncherBody:
    """What this launcher does its own way; the rest is ``_MultiProcessingLauncher``'s."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Run ``fit`` in worker processes, anything else right here: evaluations and tuners are one process's work."""
        strategy = self._strategy  # type: ignore[attr-defined]
        if trainer is None or trainer.state.fn != "fit" or only_tunes(trainer):
            with without_launcher(strategy):  # which Lightning takes for a reason to return no predictions
                return function(*args, **kwargs)
        refuse_other_launchers(strategy)
        strategy.check_devices()
        refuse_tuning_callbacks(strategy, trainer.callbacks)
        refuse_parameters_in_one_place(strategy, trainer.lightning_module)
        parts = launcher_module(strategy.distribution)
        prepare_to_come_back(trainer)
        give_buffers_own_memory(trainer.lightning_module)
        make_averages_picklable(trainer)
        strategy.optimizers = []  # of an earlier fit; the workers make their own
        strategy.rescue, strategy._ended_schedules = None, []
        states = parts._GlobalStateSnapshot.capture()
        # sums in another number of threads have other last bits; several workers share what this process may use
        threads = max(1, torch.get_num_threads() // (strategy.num_processes * strategy.devices_per_replica))
        start_method = self._prepare_start(strategy, threads)
        say_decision(trainer, "AsyncSGDStrategy", _decision(strategy))

        def rescue(remains: Remains) -> None:
            remove_part(trainer.default_root_dir)
            strategy.rescue = Rescue(trainer, remains)

        with live_table(strategy) as on_tick, _termination_as_exception(strategy.distribution):
            output, ending = run_on_engine(
                strategy,
                _fit_in_worker,
                (trainer, function, args, kwargs, states, threads),
                start_method=start_method,
                on_tick=on_tick,
                on_failure=rescue,
            )
        remove_part(trainer.default_root_dir)
        strategy.statistics, strategy.ending = ending.statistics, ending
        if output is None:
            if ending.state is not None:
                load_values(trainer.lightning_module, ending.state)
            raise RuntimeError(
                "the coordinator died when training was over, before it could hand over the result; the module holds "
                "the trained parameters, and the last checkpoint is resumable with `fit(ckpt_path=...)`."
            )
        strategy.precision_plugin.convert_module(trainer.lightning_module)  # as the workers' was; a fit leaves it so
        put_in_place(trainer.lightning_module, output.extra["async_sgd"]["made"])
        if ending.state is not None:  # also what a state dict of the module's own leaves out
            load_values(trainer.lightning_module, ending.state)
        bring_back_buffers(trainer.lightning_module, output.extra["async_sgd"]["buffers"])
        _load_weights(trainer.lightning_module, ending.take_file())
        self._recover_results_in_main_process(output, trainer)  # type: ignore[attr-defined]
        if not strategy.settings.local_steps:  # else each worker's optimizer has a state of its own
            bring_back_optimizers(trainer, ending.state, output.extra["async_sgd"]["groups"])
        return output.trainer_results

    def _prepare_start(self, strategy: Any, threads: int) -> StartMethod:
        """Make ready what workers of this machine start from; returns how they start."""
        parts = launcher_module(strategy.distribution)
        start_method = resolve_start_method(strategy.start_method, threads=threads, on_cpu=strategy.computes_on_cpu)
        if strategy.engine == "ray":
            return start_method  # which Ray does not ask
        if start_method != "fork":
            parts._check_missing_main_guard()
        # the first optimizer of a process imports `torch._dynamo`, which takes seconds: once for all workers
        if start_method == "forkserver":
            modules = [type(strategy).__module__, "lightning_accel.strategies.worker_process.session", "torch._dynamo"]
            multiprocessing.set_forkserver_preload(["__main__", *modules])
        elif start_method == "fork":
            import_module("torch._dynamo")
        return start_method

    def collect_results(self, store: ParameterStore, trainer: Any, results: Any) -> Any:
        """Return what the coordinator hands over; its weights go in a file without a name, which cannot be left behind.

        Other workers return None.
        """
        parts = launcher_module(self._strategy.distribution)  # type: ignore[attr-defined]
        weights = trainer.lightning_module.state_dict()  # in every process, as in any other strategy
        weights.update({key: whole(value) for key, value in weights.items() if isinstance(value, torch.Tensor)})
        if not store.is_coordinator:
            return None
        file = anonymous_file()
        with os.fdopen(os.dup(file), "wb") as writer:
            torch.save(weights, writer)
        store.deliver(file)
        os.close(file)
        best = getattr(trainer.checkpoint_callback, "best_model_path", None)
        return parts._WorkerOutput(best, None, trainer.state, results, self.get_extra_results(trainer))

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
    where = "to a server in this process" if strategy.engine == "shared_memory" else "to shards on Ray"
    return f"{who} {pushed} {where} (staleness={settings.staleness}, at most {settings.lease_batches} batches a lease)."


def _fit_in_worker(  # noqa: PLR0917  # a process is started with a flat list of arguments
    store: ParameterStore,
    trainer: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    states: Any,
    threads: int,
) -> Any:
    strategy = trainer.strategy
    strategy.parallel_devices = devices_here(strategy)
    strategy.enter(store, trainer)
    states.restore()
    _unshare(trainer.lightning_module)
    torch.set_num_threads(threads)
    os.environ["LOCAL_RANK"] = str(store.worker)
    exceptions = import_module(f"{strategy.distribution}.utilities.exceptions")
    try:
        results = function(*args, **kwargs)
    except exceptions.SIGTERMException:
        os._exit(128 + signal.SIGTERM)  # this worker alone was told to go: its batches are for others, the run goes on
    return strategy.launcher.collect_results(store, trainer, results)


@torch.no_grad()
def _unshare(module: torch.nn.Module) -> None:
    """Give a module memory of its own: pickled on the way to a process, its tensors are those of the other one."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not is_lazy(tensor):
            tensor.data = tensor.data.clone()


def _load_weights(module: Any, file: int | None) -> None:
    if file is None:
        return
    with os.fdopen(file, "rb") as reader:
        reader.seek(0)
        # of a process of ours; a state dict may hold any object in its extra state. Layers may be others there
        found = module.load_state_dict(torch.load(reader, map_location="cpu", weights_only=False), strict=False)
    if homeless := list(getattr(found, "unexpected_keys", ())):
        log.warning(
            "what was trained of %s is not in your module, which has no such layer: the workers' module made it when "
            "the fit began, and it cannot be pickled. Make it in `__init__`, or load a checkpoint of the run.",
            ", ".join(f"`{key}`" for key in homeless[:4]) + (" and others" if len(homeless) > 4 else ""),
        )


@contextlib.contextmanager
def _termination_as_exception(distribution: str) -> Iterator[None]:
    """Let SIGTERM end the run as Lightning lets it end one in this process: with callbacks told of an exception.

    A handler of the caller's stays.
    """
    default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not default or threading.current_thread() is not threading.main_thread():
        yield
        return
    exceptions = import_module(f"{distribution}.utilities.exceptions")

    def terminate(number: int, frame: Any) -> None:  # noqa: ARG001  # a signal handler's signature
        raise exceptions.SIGTERMException

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
