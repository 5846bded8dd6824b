"""The one place that touches private attributes of Lightning, each with its reason."""

import contextlib
import csv
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.cloud_io import _load
from torch import nn
from torch._dynamo import OptimizedModule
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn


def callbacks_of(trainer: "pl.Trainer") -> list["pl.Callback"]:
    """Return the Trainer's list of callbacks: a public attribute, but set where no type checker sees it."""
    return trainer.callbacks  # type: ignore[attr-defined]


def logging_period(trainer: "pl.Trainer") -> int:
    """Return after how many steps the Trainer logs: a public attribute as well, set by its logger connector."""
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]  # see `callbacks_of`


def every_callback(trainer: "pl.Trainer") -> list[Any]:
    """Return the Trainer's callbacks, and those that they hold: wrappers, switches and schedules of callbacks delegate.

    Callbacks that work together find each other here, whoever calls their hooks.
    """
    found: list[Any] = []
    for callback in callbacks_of(trainer):
        found += [held for held in held_callbacks(callback) if not any(held is known for known in found)]
    return found


def held_callbacks(callback: object) -> list[Any]:
    """Return a callback, and those that it holds in attributes, in theirs, and so on."""
    found: list[Any] = []
    waiting = [callback]
    while waiting:
        held = waiting.pop(0)
        if any(held is known for known in found):
            continue
        found.append(held)
        for value in list(getattr(held, "__dict__", {}).values()):
            several = (
                value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
            )
            waiting += [other for other in several if _is_callback(other)]
    return found


def _is_callback(value: object) -> bool:
    """Say whether a value is a callback of either distribution of Lightning."""
    return any(kind.__name__ == "Callback" and "lightning" in kind.__module__ for kind in type(value).__mro__)


def averaged_modules(trainer: "pl.Trainer") -> list[nn.Module]:
    """Return the copies of the module that weight-averaging callbacks keep.

    `WeightAveraging` and `StochasticWeightAveraging` make them in ``setup`` and pair parameters by position, so they
    must follow when layers are exchanged; there is no public way to reach them.
    """
    averages = (getattr(callback, "_average_model", None) for callback in every_callback(trainer))
    return [a.module if isinstance(a, AveragedModel) else a for a in averages if isinstance(a, nn.Module)]


def pruned_layers(trainer: "pl.Trainer", module: nn.Module) -> set[str]:
    """Return the names of the layers whose parameters Lightning's `ModelPruning` has chosen to prune.

    It keeps the layers themselves from ``setup`` on, in a private list: others in their places would never be pruned.
    """
    chosen = (getattr(callback, "_parameters_to_prune", None) or () for callback in every_callback(trainer))
    pruned = {id(layer) for pairs in chosen for layer, _ in pairs}
    return {name for name, layer in module.named_modules() if id(layer) in pruned}


def rename_in_finetuning(trainer: "pl.Trainer", renamed: Mapping[str, Sequence[str]]) -> None:
    """Let `BaseFinetuning` callbacks find the parameters that took the places of others.

    They save the optimizers' groups by parameter names, in a private attribute, and put the groups together from those
    names when a run is resumed.

    Args:
        trainer: Whose callbacks are looked through.
        renamed: Full parameter name to the names of what replaced it.
    """
    for callback in every_callback(trainer):
        for groups in getattr(callback, "_internal_optimizer_metadata", {}).values():
            for group in groups:
                group["params"] = [new for name in group["params"] for new in renamed.get(name, (name,))]


@contextlib.contextmanager
def uncompiled(module: "pl.LightningModule") -> Iterator[Callable[[Any], Any] | None]:
    """Show a compiled LightningModule without its compiled methods; yield what compiles a function like them.

    The compiled methods are instance attributes bound to this very module, so a deep copy would run the original;
    Lightning's `to_uncompiled` can not be undone.
    """
    context = getattr(module, "_compiler_ctx", None)
    if context is None:
        yield None
        return
    names = [key.removeprefix("original_") for key in context if key.startswith("original_")]
    compiled = {name: module.__dict__.pop(name) for name in names if name in module.__dict__}
    module._compiler_ctx = None
    try:
        yield context["dynamo_ctx"]
    finally:
        module.__dict__.update(compiled)
        module._compiler_ctx = context


def has_compiled_parts(module: nn.Module) -> bool:
    """Say whether a module or a part of it is compiled: by Lightning's `from_compiled`, ``compile()`` or a wrapper.

    Lightning marks its own way by a private attribute alone, torch ``Module.compile`` as well.
    """
    return getattr(module, "_compiler_ctx", None) is not None or any(
        m._compiled_call_impl is not None or isinstance(m, OptimizedModule) for m in module.modules()
    )


def load_checkpoint_file(
    path: str | Path, map_location: torch.device | str | None, weights_only: bool | None
) -> dict[str, Any]:
    """Read a checkpoint file by the loader of ``load_from_checkpoint``, so that both trust alike.

    Lightning's default for ``weights_only`` depends on where the file lies; it is decided in `_load` alone.
    """
    return _load(path, map_location=map_location or "cpu", weights_only=weights_only)


def callbacks_of_new_trainer() -> list[Any]:
    """Return the callbacks that the Trainer which is being made right now got from its caller.

    Lightning calls the ``callbacks_factory`` entry points without an argument, from the connector's
    ``on_trainer_init``: what the script passed by itself can only be seen there.
    """
    frame = inspect.currentframe()
    while frame is not None:
        trainer = getattr(frame.f_locals.get("self"), "trainer", None)
        if trainer is not None and frame.f_code.co_name == "on_trainer_init":
            return list(trainer.callbacks)
        frame = frame.f_back
    return []


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


def checkpoint_periods(trainer: Any) -> list[int]:
    """Return the ``every_n_train_steps`` of checkpoint callbacks: they fire on exact multiples of ``global_step``."""
    periods = (getattr(callback, "_every_n_train_steps", 0) for callback in trainer.callbacks)
    return [period for period in periods if period]


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


class MovingAverage:
    """An averaging function of `torch.optim.swa_utils` that can be pickled: it is made anew from its decay."""

    def __init__(self, make: Callable[[float], Callable[..., Any]], decay: float) -> None:
        self._made_of = make, decay
        self._update = make(decay)

    def __call__(self, *args: Any) -> Any:
        """Average."""
        return self._update(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return MovingAverage, self._made_of


def make_averages_picklable(trainer: Any) -> None:
    """Let `EMAWeightAveraging` go to other processes: its averaging function is local to the function that made it.

    The callback keeps it among the arguments of torch's `AveragedModel`, in a private attribute.
    """
    makers = (("avg_fn", get_ema_avg_fn), ("multi_avg_fn", get_ema_multi_avg_fn))
    for callback in trainer.callbacks:
        arguments: Any = getattr(callback, "_kwargs", None)
        for name, make in makers if isinstance(arguments, dict) else ():
            found: Any = inspect.unwrap(arguments[name]) if callable(arguments.get(name)) else None
            if getattr(found, "__qualname__", "") == f"{make.__name__}.<locals>.ema_update":
                arguments[name] = MovingAverage(make, inspect.getclosurevars(found).nonlocals["decay"])


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


def hparams_name(module: "pl.LightningModule") -> str:
    """Return the constructor's argument that ``hparams`` are saved under, which only `load_from_checkpoint` reads."""
    return str(getattr(module, "_hparams_name", None) or "kwargs")
