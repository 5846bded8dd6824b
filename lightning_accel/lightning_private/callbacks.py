"""Callbacks of Lightning and what they keep to themselves."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

_NO_CALLBACKS = frozenset({bool, int, float, complex, str, bytes, type(None), dict, list, tuple, set})


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
    kind = type(value)
    return kind not in _NO_CALLBACKS and any(
        base.__name__ == "Callback" and "lightning" in base.__module__ for base in kind.__mro__
    )


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


def checkpoint_periods(trainer: Any) -> list[int]:
    """Return the ``every_n_train_steps`` of checkpoint callbacks: they fire on exact multiples of ``global_step``."""
    periods = (getattr(callback, "_every_n_train_steps", 0) for callback in trainer.callbacks)
    return [period for period in periods if period]


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
